"""Structures: which weights live and die together, and which of them compete.

Unstructured sparsity is the special case of units of one weight in one group. Every algorithm speaks to a weight
through its structure alone, so a new structure is a function here and nothing else. Kernels are stored (..., in, out),
as Flax has them.

A unit of several weights scores the mean of their scores. All units of a leaf are of one size, so within a leaf a sum
would rank them the same; but the mean also compares with a threshold, or with another leaf, whatever the size of the
units, and does not overflow in float16.

The functions of a structure are functions of this module, or partial applications of them, so that a plan can be
pickled.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import jax.numpy as jnp

from rigl_jax import checks
from rigl_jax.base import Array, Shape, Structure


def unstructured() -> Structure:
    """Every weight is a unit; all weights of a leaf compete with each other.

    >>> unstructured().units((3, 4))
    (3, 4)
    """
    return Structure(name="unstructured", pool=_same, expand=_same, units=_same, axes=_all)


def block(height: int, width: int) -> Structure:
    """Tiles of `height` x `width` weights over the last two axes (in, out); all tiles of a leaf compete.

    Each spatial position of a convolution kernel has its own tiles. `block(1, 16)`: 16 outputs share an input.

    Args:
      height: inputs to a tile, at least 1; must divide the last axis but one.
      width: outputs to a tile, at least 1; must divide the last axis.

    Raises:
      ValueError: sizes below 1; when planned, a leaf with fewer than 2 axes, or that does not divide.

    >>> block(4, 2).units((3, 3, 8, 6))
    (3, 3, 2, 3)
    """
    name = f"block({height}, {width})"
    _check_sizes(name, height, width)

    return Structure(
        name,
        pool=partial(_pool_block, height, width),
        expand=partial(_expand_block, height, width),
        units=partial(_units_of_block, height, width),
        axes=_all,
    )


def _units_of_block(height: int, width: int, shape: Shape) -> Shape:
    name = f"block({height}, {width})"
    _check_rank(name, shape, 2)
    _check_divides(name, shape, -2, height)
    _check_divides(name, shape, -1, width)
    return (*shape[:-2], shape[-2] // height, shape[-1] // width)


def _pool_block(height: int, width: int, scores: Array) -> Array:
    *lead, rows, columns = _units_of_block(height, width, scores.shape)
    return jnp.mean(scores.reshape(*lead, rows, height, columns, width), axis=(-3, -1))


def _expand_block(height: int, width: int, chosen: Array, shape: Shape) -> Array:
    tiles = chosen[..., :, None, :, None]
    *lead, rows, columns = chosen.shape
    return jnp.broadcast_to(tiles, (*lead, rows, height, columns, width)).reshape(shape)


def n_of_m(n: int, m: int, axis: int = -2) -> Structure:
    """Exactly n of every m neighbouring weights along an axis stay: 2:4 and its kind.

    The structure fixes the sparsity of its leaves, 1 - n/m; the plan's total must leave room for it. Rewiring drops
    the leaf's lowest weights wherever they are and grows each group of m back to n.

    Args:
      n: weights that stay in each group, from 1 to m.
      m: size of a group; must divide the axis.
      axis: along which groups lie. Default: the inputs, as sparse tensor cores have it.

    Raises:
      ValueError: n not in [1, m]; when planned, a leaf without that axis, or that does not divide.

    >>> n_of_m(2, 4).units((3, 3, 8, 6))
    (3, 3, 2, 4, 6)
    """
    name = f"n_of_m({n}, {m})" if axis == -2 else f"n_of_m({n}, {m}, axis={axis})"
    _check_sizes(name, n, m)
    _check_whole(name, axis)
    if n > m:
        raise ValueError(f"{name}: n must be at most m, got {n} of {m}")

    return Structure(
        name,
        pool=partial(_pool_n_of_m, name, m, axis),
        expand=_reshape,
        units=partial(_units_of_n_of_m, name, m, axis),
        axes=partial(_axes_of_n_of_m, axis),
        sparsity=1 - n / m,
    )


def _units_of_n_of_m(name: str, m: int, axis: int, shape: Shape) -> Shape:
    at = _check_axis(name, shape, axis)
    _check_divides(name, shape, at, m)
    return (*shape[:at], shape[at] // m, m, *shape[at + 1 :])


def _pool_n_of_m(name: str, m: int, axis: int, scores: Array) -> Array:
    return scores.reshape(_units_of_n_of_m(name, m, axis, scores.shape))


def _axes_of_n_of_m(axis: int, units: Shape) -> tuple[int, ...]:
    return ((axis + 1) if axis >= 0 else len(units) + axis,)


def fan_in() -> Structure:
    """Constant fan-in: each output (the last axis) keeps the same number of inputs, and weights compete within it.

    The inputs of a convolution's output are all positions and channels of its window.

    Raises:
      ValueError: when planned, a leaf with fewer than 2 axes.

    >>> fan_in().axes((3, 3, 8, 6))
    (0, 1, 2)
    """
    return Structure("fan_in", pool=_same, expand=_same, units=_units_of_fan_in, axes=_all_but_last)


def _units_of_fan_in(shape: Shape) -> Shape:
    _check_rank("fan_in", shape, 2)
    return shape


def _all_but_last(units: Shape) -> tuple[int, ...]:
    return tuple(range(len(units) - 1))


def channel(axis: int = -1) -> Structure:
    """Whole channels: all the weights of one index along an axis live together, and channels compete.

    Args:
      axis: -1 for output channels (neurons), -2 for input channels.

    Raises:
      ValueError: when planned, a leaf without that axis.

    >>> channel().units((3, 3, 8, 6))
    (1, 1, 1, 6)
    """
    name = "channel" if axis == -1 else f"channel(axis={axis})"
    _check_whole(name, axis)

    return Structure(
        name,
        pool=partial(_pool_channel, name, axis),
        expand=jnp.broadcast_to,
        units=partial(_units_of_channel, name, axis),
        axes=_all,
    )


def _units_of_channel(name: str, axis: int, shape: Shape) -> Shape:
    at = _check_axis(name, shape, axis)
    return tuple(size if i == at else 1 for i, size in enumerate(shape))


def _pool_channel(name: str, axis: int, scores: Array) -> Array:
    at = _check_axis(name, scores.shape, axis)
    return jnp.mean(scores, axis=tuple(i for i in range(scores.ndim) if i != at), keepdims=True)


def _same(given: Any, shape: Shape | None = None) -> Any:
    del shape
    return given


def _reshape(chosen: Array, shape: Shape) -> Array:
    return chosen.reshape(shape)


def _all(units: Shape) -> tuple[int, ...]:
    return tuple(range(len(units)))


def _check_sizes(name: str, *sizes: int) -> None:
    if not all(checks.is_whole(size, 1) for size in sizes):
        raise ValueError(f"{name}: sizes must be integers of at least 1, got {', '.join(map(repr, sizes))}")


def _check_whole(name: str, axis: int) -> None:
    if not checks.is_whole(axis, -checks.LARGEST):
        raise ValueError(f"{name}: axis must be an integer such as -2, got {axis!r}")


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
