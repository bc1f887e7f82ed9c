"""Structures: which weights live and die together, and which of them compete.

Unstructured sparsity is the special case of units of one weight in one group. Every algorithm speaks to a weight
through its structure alone, so a new structure is a function here and nothing else.

Which axes of a weight are inputs and outputs is an argument, `axes`. Left out, kernels are (..., in, out), as Flax has
them, and `make_plan` puts in what it knows of each leaf. In a stack of layers (`Axes.stack`) each layer is on its own.

A unit of several weights scores the mean of their scores. All units of a leaf are of one size, so within a leaf a sum
would rank them the same; but the mean also compares with a threshold, or with another leaf, whatever the size of the
units, and does not overflow in float16.

The functions of a structure are functions of this module, or partial applications of them, so that a plan can be
pickled.
"""

from __future__ import annotations

import math
from functools import partial
from typing import Any

import jax.numpy as jnp

from rigl_jax import arguments as rules
from rigl_jax import checks
from rigl_jax.arguments import arguments
from rigl_jax.base import Array, Axes, Shape, Structure
from rigl_jax.messages import shown


@arguments(axes=rules.optional(rules.axes))
def unstructured(axes: Axes | None = None) -> Structure:
    """Every weight is a unit; all weights of a leaf compete with each other (in a stack, all of a layer).

    >>> unstructured().units((3, 4))
    (3, 4)
    """
    stack, bind = partial(_stack, axes), unstructured if axes is None else None
    return Structure("unstructured", _same, _same, _same, partial(_in_layer, stack), stack=stack, bind=bind)


@arguments(axes=rules.optional(rules.axes), fan_in=rules.flag)
def block(height: int, width: int, axes: Axes | None = None, *, fan_in: bool = False) -> Structure:
    """Tiles of `height` inputs x `width` outputs; all tiles of a leaf compete, or those of each column of tiles.

    Each spatial position of a convolution kernel has its own tiles. `block(1, 16)`: 16 outputs share an input. Of
    several input or output axes, as those of attention, the last one is tiled.

    Args:
      height: inputs to a tile, at least 1; must divide the input axis.
      width: outputs to a tile, at least 1; must divide the output axis.
      axes: of the weight. Default: (..., in, out); `make_plan` puts in what it knows.
      fan_in: each column of tiles keeps the same number, and tiles compete within it: where columns are multiplied
        side by side, the fullest one is what the others wait for.

    Raises:
      ValueError: sizes below 1; when planned, a leaf with fewer than 2 axes, or that does not divide.

    >>> block(4, 2).units((3, 3, 8, 6))
    (3, 3, 2, 3)
    >>> block(4, 2, Axes((1,), (0,))).units((6, 8))
    (3, 2)
    """
    height, width = checks.plain(height), checks.plain(width)
    name = f"block({shown(height)}, {shown(width)}{', fan_in' if fan_in else ''})"
    _check_sizes(name, height, width)
    stack = partial(_stack, axes)
    return Structure(
        name,
        pool=partial(_pool_block, height, width, axes),
        expand=partial(_expand_block, height, width, axes),
        units=partial(_units_of_block, height, width, axes),
        axes=partial(_summed, axes) if fan_in else partial(_in_layer, stack),
        stack=stack,
        bind=partial(block, height, width, fan_in=fan_in) if axes is None else None,
        needs_axes=axes is None,
    )


def _tiled(height: int, width: int, axes: Axes | None, shape: Shape) -> dict[int, int]:
    """Sizes of the tiles, `{axis: size}`."""
    name = f"block({shown(height)}, {shown(width)})"
    _check_rank(name, shape, 2)
    known = resolve(name, axes, shape)
    tiles = {known.inputs[-1]: height, known.outputs[-1]: width}
    for axis, size in tiles.items():
        _check_divides(name, shape, axis, size)
    return tiles


def _units_of_block(height: int, width: int, axes: Axes | None, shape: Shape) -> Shape:
    tiles = _tiled(height, width, axes, shape)
    return tuple(size // tiles.get(axis, 1) for axis, size in enumerate(shape))


def _split(tiles: dict[int, int], units: Shape) -> tuple[list[int], list[int]]:
    """The shape in which each tiled axis is two, and the positions of the second ones."""
    split, inner = [], []
    for axis, n in enumerate(units):
        split.append(n)
        if axis in tiles:
            inner.append(len(split))
            split.append(tiles[axis])
    return split, inner


def _pool_block(height: int, width: int, axes: Axes | None, scores: Array) -> Array:
    units = _units_of_block(height, width, axes, scores.shape)
    split, inner = _split(_tiled(height, width, axes, scores.shape), units)
    return jnp.mean(scores.reshape(split), axis=tuple(inner))


def _expand_block(height: int, width: int, axes: Axes | None, chosen: Array, shape: Shape) -> Array:
    split, inner = _split(_tiled(height, width, axes, shape), chosen.shape)
    return jnp.broadcast_to(jnp.expand_dims(chosen, inner), split).reshape(shape)


@arguments(axes=rules.optional(rules.axes))
def n_of_m(n: int, m: int, axis: int | None = None, axes: Axes | None = None) -> Structure:
    """Exactly n of every m neighbouring weights along an axis stay: 2:4 and its kind.

    The structure fixes the sparsity of its leaves, 1 - n/m; the plan's total must leave room for it. Rewiring drops
    the leaf's lowest weights wherever they are and grows each group of m back to n.

    Args:
      n: weights that stay in each group, from 1 to m.
      m: size of a group; must divide the axis.
      axis: along which groups lie. Default: the (last) input axis, as sparse tensor cores have it.
      axes: of the weight. Default: (..., in, out); `make_plan` puts in what it knows.

    Raises:
      ValueError: n not in [1, m]; when planned, a leaf without that axis, or that does not divide.

    >>> n_of_m(2, 4).units((3, 3, 8, 6))
    (3, 3, 2, 4, 6)
    """
    n, m, axis = checks.plain(n), checks.plain(m), checks.plain(axis)
    name = f"n_of_m({shown(n)}, {shown(m)})" if axis is None else f"n_of_m({shown(n)}, {shown(m)}, axis={shown(axis)})"
    _check_sizes(name, n, m)
    _check_whole(name, axis)
    if n > m:
        raise ValueError(f"{name}: n must be at most m, got {n} of {m}")
    return Structure(
        name,
        pool=partial(_pool_n_of_m, name, m, axis, axes),
        expand=_reshape,
        units=partial(_units_of_n_of_m, name, m, axis, axes),
        axes=partial(_axes_of_n_of_m, name, axis, axes),
        sparsity=1 - n / m,
        stack=partial(_stack_of_n_of_m, name, axis, axes),
        bind=partial(n_of_m, n, m, axis) if axes is None else None,
        needs_axes=axes is None and axis is None,
    )


def _along(name: str, axis: int | None, axes: Axes | None, shape: Shape) -> int:
    """The axis along which groups lie."""
    if axis is not None:
        return _check_axis(name, shape, axis)
    if axes is None:
        return _check_axis(name, shape, -2)
    return resolve(name, axes, shape).inputs[-1]


def _units_of_n_of_m(name: str, m: int, axis: int | None, axes: Axes | None, shape: Shape) -> Shape:
    at = _along(name, axis, axes, shape)
    _check_divides(name, shape, at, m)
    return (*shape[:at], shape[at] // m, m, *shape[at + 1 :])


def _pool_n_of_m(name: str, m: int, axis: int | None, axes: Axes | None, scores: Array) -> Array:
    return scores.reshape(_units_of_n_of_m(name, m, axis, axes, scores.shape))


def _axes_of_n_of_m(name: str, axis: int | None, axes: Axes | None, units: Shape) -> tuple[int, ...]:
    return (_along(name, axis, axes, units[1:]) + 1,)


def _stack_of_n_of_m(name: str, axis: int | None, axes: Axes | None, units: Shape) -> tuple[int, ...]:
    at = _along(name, axis, axes, units[1:])
    return tuple(i + (i > at) for i in _stack(axes, units[1:]))


@arguments(axes=rules.optional(rules.axes))
def fan_in(axes: Axes | None = None) -> Structure:
    """Constant fan-in: each output keeps the same number of inputs, and weights compete within it.

    The inputs of a convolution's output are all positions and channels of its window.

    Args:
      axes: of the weight. Default: (..., in, out); `make_plan` puts in what it knows.

    Raises:
      ValueError: when planned, a leaf with fewer than 2 axes.

    >>> fan_in().axes((3, 3, 8, 6))
    (0, 1, 2)
    >>> fan_in(Axes((1,), (0,))).axes((6, 8))
    (1,)
    """
    return Structure(
        "fan_in",
        pool=_same,
        expand=_same,
        units=_units_of_fan_in,
        axes=partial(_summed, axes),
        stack=partial(_stack, axes),
        bind=fan_in if axes is None else None,
        needs_axes=axes is None,
    )


def _units_of_fan_in(shape: Shape) -> Shape:
    _check_rank("fan_in", shape, 2)
    return shape


def _summed(axes: Axes | None, units: Shape) -> tuple[int, ...]:
    known = resolve("fan_in", axes, units)
    return tuple(sorted((*known.window, *known.inputs)))


@arguments(axes=rules.optional(rules.axes))
def channel(axis: int | None = None, axes: Axes | None = None) -> Structure:
    """Whole channels: all the weights of one index along an axis live together, and channels compete.

    Args:
      axis: of the channels. Default: the outputs (neurons); -2 are the input channels of a weight (..., in, out).
      axes: of the weight. Default: (..., in, out); `make_plan` puts in what it knows.

    Raises:
      ValueError: when planned, a leaf without that axis.

    >>> channel().units((3, 3, 8, 6))
    (1, 1, 1, 6)
    """
    axis = checks.plain(axis)
    name = "channel" if axis is None else f"channel(axis={shown(axis)})"
    _check_whole(name, axis)
    stack = partial(_stack, axes)
    return Structure(
        name,
        pool=partial(_pool_channel, name, axis, axes),
        expand=jnp.broadcast_to,
        units=partial(_units_of_channel, name, axis, axes),
        axes=partial(_in_layer, stack),
        stack=stack,
        bind=partial(channel, axis) if axes is None else None,
        needs_axes=axes is None and axis is None,
    )


def _units_of_channel(name: str, axis: int | None, axes: Axes | None, shape: Shape) -> Shape:
    if axis is None and axes is not None:
        kept = set(resolve(name, axes, shape).outputs)
    else:
        kept = {_check_axis(name, shape, -1 if axis is None else axis)}
    kept.update(_stack(axes, shape))
    return tuple(size if i in kept else 1 for i, size in enumerate(shape))


def _pool_channel(name: str, axis: int | None, axes: Axes | None, scores: Array) -> Array:
    units = _units_of_channel(name, axis, axes, scores.shape)
    gone = tuple(i for i, (n, size) in enumerate(zip(units, scores.shape, strict=True)) if n != size)
    return jnp.mean(scores, axis=gone, keepdims=True)


def resolve(who: str, axes: Axes | None, shape: Shape) -> Axes:
    """The axes of a weight of this shape, none negative; (..., in, out) where they are not given.

    Raises:
      ValueError: they do not name every axis once, or no input or output axis.
    """
    n = len(shape)
    if axes is None:
        _check_rank(who, shape, 2)
        return Axes((n - 2,), (n - 1,), tuple(range(n - 2)))
    if isinstance(axes, Axes) and all(isinstance(part, tuple) for part in axes):
        named = [axis for part in axes for axis in part]
        within = all(checks.is_whole(axis, -n) and axis < n for axis in named)
        if within and sorted(axis % n for axis in named) == list(range(n)):
            if axes.inputs and axes.outputs:
                return Axes(*(tuple(axis % n for axis in part) for part in axes))
            raise ValueError(f"{who} needs a weight with input and output axes, got {axes} for shape {shape}")
    raise ValueError(f"{who}: axes must be rx.Axes that name every axis of shape {shape} once, got {shown(axes)}")


def n_stacked(shape: Shape, axes: Axes | None) -> int:
    """How many layers are stacked in a weight with these axes; 1 where they are not known."""
    return math.prod(shape[axis] for axis in axes.stack) if axes else 1


def _stack(axes: Axes | None, units: Shape) -> tuple[int, ...]:
    return () if axes is None else tuple(sorted(axis % len(units) for axis in axes.stack))


def _in_layer(stack: Any, units: Shape) -> tuple[int, ...]:
    """All axes but those along which layers are stacked."""
    layers = stack(units)
    return tuple(axis for axis in range(len(units)) if axis not in layers)


def _same(given: Any, shape: Shape | None = None) -> Any:
    del shape
    return given


def _reshape(chosen: Array, shape: Shape) -> Array:
    return chosen.reshape(shape)


def _check_sizes(name: str, *sizes: int) -> None:
    if not all(checks.is_whole(size, 1) for size in sizes):
        raise ValueError(f"{name}: sizes must be integers of at least 1, got {', '.join(map(shown, sizes))}")


def _check_whole(name: str, axis: int | None) -> None:
    if axis is not None and not checks.is_whole(axis, -checks.LARGEST):
        raise ValueError(f"{name}: axis must be an integer such as -2, got {shown(axis)}")


def _check_rank(name: str, shape: Shape, least: int) -> None:
    if len(shape) < least:
        raise ValueError(f"{name} needs a weight of {least} axes or more, got shape {shape}")


def _check_axis(name: str, shape: Shape, axis: int) -> int:
    if not -len(shape) <= axis < len(shape):
        raise ValueError(f"{name} needs a weight that has axis {axis}, got shape {shape}")
    return axis % len(shape)


def _check_divides(name: str, shape: Shape, axis: int, size: int) -> None:
    if shape[axis] % size:
        raise ValueError(f"{name} needs axis {axis} to be a multiple of {size}, got shape {shape}")
