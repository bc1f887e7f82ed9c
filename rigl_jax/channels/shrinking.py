"""A smaller dense model without the channels that are not kept."""

from __future__ import annotations

import math
import statistics
import time
from collections.abc import Callable, Iterable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from rigl_jax import arguments as given
from rigl_jax import contents, trees
from rigl_jax.arguments import arguments
from rigl_jax.base import Masks, PyTree, Shape
from rigl_jax.channels import folding, rules
from rigl_jax.channels.grouping import arrays_of
from rigl_jax.channels.resizing import Kept, at_smaller_shapes, removed
from rigl_jax.channels.splits import places
from rigl_jax.messages import shown
from rigl_jax.tracing.program import Program, trace_model


class Compact(NamedTuple):
    """A model without some of its channels.

    Attributes:
      params: a tree like the params, with smaller arrays.
      masks: the masks, cut to the same shapes, for `compact`; None for `shrink`.
      apply: `(params, *inputs) -> outputs`, the given `apply` at the smaller shapes. Takes any batch size that the
        given one takes. Traced on every call, so jit it. Its gradients are those of the given one: functions with
        derivatives of their own (`jax.custom_jvp`, `jax.custom_vjp`) keep them.
      kept: which positions are left of every axis that shrank; empty if none did.
      shapes: `{leaf: (shape before, shape now)}` of the same leaves. To build the model itself anew, read its widths
        here, as in `MLP(features=(compact.shapes["Dense_0/kernel"][1][1], ...))`: its own `apply` then takes params.
      weights: how many entries the params had and have.
      macs: multiply-accumulates of one call on the inputs, all examples of the batch together, before and now; None
        for `compact`.
      latency: seconds of one call, before and now; None if they were not measured.
      notes: what could not be folded into biases, and why; leaves that the model does not read.
    """

    params: PyTree
    masks: Masks
    apply: Callable[..., Any]
    kept: Kept
    shapes: dict[str, tuple[Shape, Shape]]
    weights: tuple[int, int] = (0, 0)
    macs: tuple[float, float] | None = None
    latency: tuple[float, float] | None = None
    notes: tuple[str, ...] = ()


@arguments(apply=given.function, fold=given.flag, repeats=given.whole(0))
def shrink(
    apply: Callable[..., Any],
    params: PyTree,
    keep: Mapping[str, Mapping[int, Any]],
    *inputs: Any,
    fold: bool = True,
    repeats: int = 0,
) -> Compact:
    """Removes the channels that are not kept. Runs on the host, outside of jit.

    The model computes the same function, up to rounding, if the removed channels were 0 at every input and their groups
    are `exact`; with `fold` also if they were other constants, as beta of a batch normalisation with gamma = 0 is after
    a ReLU. Such a constant goes into the bias (or running mean) of the next layer, where that is exact: not through a
    convolution with padding, whose borders it does not reach; `notes` say so. Otherwise it is another function, to be
    fine-tuned. Means over channels are taken over those that are left.

    Args:
      apply: `(params, *inputs) -> outputs`, as it was given to `groups`.
      params: the weights. Of `jax.ShapeDtypeStruct`, for the shapes of a model that is to be read from a file.
      keep: `{leaf: {axis: positions}}`, as `select` gives it: what is left of an axis. In place of positions also a
        bool for each, True for what stays. It is enough to name one axis of a group; the other members follow.
      *inputs: arrays or `jax.ShapeDtypeStruct`, for their shapes.
      fold: whether constants of removed channels are added to biases.
      repeats: how often both models are timed, see `latency`; 0: not at all.

    Returns:
      The smaller model.

    Raises:
      ValueError: `keep` names no such leaf or axis, keeps nothing of an axis or a position twice, keeps part of a
        channel, or removes channels that have to stay; names the leaf.

    Example:
      >>> import jax, jax.numpy as jnp
      >>> params = {"a": jnp.ones((4, 8)), "b": jnp.ones((8, 3))}
      >>> apply = lambda p, x: jax.nn.relu(x @ p["a"]) @ p["b"]
      >>> small = shrink(apply, params, {"a": {1: [0, 1, 5]}}, jnp.ones((1, 4)))
      >>> small.shapes, small.weights, small.macs
      ({'a': ((4, 8), (4, 3)), 'b': ((8, 3), (3, 3))}, (56, 21), (56.0, 21.0))
    """
    leaves = arrays_of("shrink", params)
    shapes = {name: jnp.shape(leaf) for name, leaf in leaves.items()}
    wanted = _checked(keep, shapes)
    program = trace_model("shrink", apply, params, *inputs)
    reading = rules.read(program, len(leaves))
    own = {name: reading.labels[v] for name, v in zip(leaves, program.inputs, strict=False)}
    gone = removed(reading, own, wanted)
    if gone[0]:
        raise ValueError(f"shrink: keep must leave what cannot be removed, got fewer {_stuck(reading, own, wanted)}")
    kept: Kept = {}
    for name, axes in own.items():
        left = places(axes, shapes[name], gone)
        kept[name] = {k: at for k, at in enumerate(left) if len(at) < shapes[name][k]}
        for k in range(len(shapes[name])):
            asked = wanted.get(name, {}).get(k, left[k])
            if not np.array_equal(left[k], asked):
                raise ValueError(
                    f"shrink: keep must hold whole channels, but removes only part of one of {name!r}, axis {k}"
                )
    kept = {name: axes for name, axes in kept.items() if axes}
    notes: tuple[str, ...] = ()
    if fold and kept and not any(isinstance(leaf, jax.ShapeDtypeStruct) for leaf in leaves.values()):
        weights = [np.asarray(leaf) for leaf in leaves.values()]
        changed, notes = folding.fold(program, list(leaves), weights, reading.labels, gone)
        same = zip(leaves.values(), weights, changed, strict=True)
        whole = jax.tree.unflatten(jax.tree.structure(params), [a if b is c else c for a, b, c in same])
    else:
        whole = params
    made = _made("shrink", apply, whole, kept, reading, gone)._replace(notes=(*notes, *_unread(leaves, program)))
    if not repeats:
        return made
    both = [latency(*model, *inputs, repeats=repeats) for model in ((apply, params), (made.apply, made.params))]
    return made._replace(latency=(both[0], both[1]))


def _unread(leaves: Mapping[str, Any], program: Program) -> list[str]:
    """A note for each array of numbers that the model was given and does not read."""
    used = program.uses
    unread = {name: x for (name, x), v in zip(leaves.items(), program.inputs, strict=False) if not used[v]}
    names = [name for name, x in unread.items() if x.shape and jnp.issubdtype(x.dtype, jnp.floating)]
    return [f"{n} is not read and keeps its size; batch statistics are not read in training mode" for n in names]


@arguments(apply=given.function, repeats=given.whole(1))
def latency(apply: Callable[..., Any], params: PyTree, *inputs: Any, repeats: int = 10) -> float:
    """Seconds of one call of a model, compiled: the median of several, after one that is not counted.

    Args:
      apply: `(params, *inputs) -> outputs`.
      params: the weights.
      *inputs: arrays; zeros in place of `jax.ShapeDtypeStruct`.
      repeats: how many calls are timed.

    Returns:
      The time on the default device. Other work on the machine makes it longer.

    Example:
      >>> seconds = latency(lambda p, x: x @ p["a"], {"a": jnp.ones((4, 4))}, jnp.ones((2, 4)), repeats=3)
      >>> 0 < seconds < 10
      True
    """
    arrays_of("latency", params)
    arrays = jax.tree.map(
        lambda x: jnp.zeros(x.shape, x.dtype) if isinstance(x, jax.ShapeDtypeStruct) else jnp.asarray(x),
        (params, *inputs),
    )
    run = jax.jit(apply).lower(*arrays).compile()
    jax.block_until_ready(run(*arrays))
    times = []
    for _ in range(repeats):
        start = time.perf_counter()
        jax.block_until_ready(run(*arrays))
        times.append(time.perf_counter() - start)
    return statistics.median(times)


def _made(who: str, apply: Callable[..., Any], params: PyTree, kept: Kept, reading: Any, gone: np.ndarray) -> Compact:
    leaves = trees.named_leaves(params)
    small = [_cut(leaf, kept.get(name, {})) for name, leaf in leaves.items()]
    before = jax.tree.map(lambda p: jax.ShapeDtypeStruct(jnp.shape(p), jnp.result_type(p)), params)
    shapes = {n: (jnp.shape(w), jnp.shape(s)) for (n, w), s in zip(leaves.items(), small, strict=True) if n in kept}
    products = reading.notes.products
    return Compact(
        params=jax.tree.unflatten(jax.tree.structure(params), small),
        masks=None,
        apply=at_smaller_shapes(who, apply, before, kept, rules.read),
        kept=kept,
        shapes=shapes,
        weights=(_entries(leaves.values()), _entries(small)),
        macs=(
            math.fsum(cost for cost, _ in products),
            math.fsum(cost * math.prod((~gone[axis]).mean() for axis in axes) for cost, axes in products),
        ),
    )


def _entries(arrays: Iterable[Any]) -> int:
    return sum(math.prod(jnp.shape(array)) for array in arrays)


def _cut(array: Any, kept: Mapping[int, np.ndarray]) -> Any:
    if not kept:
        return array
    if isinstance(array, jax.ShapeDtypeStruct):
        shape = [len(kept[k]) if k in kept else n for k, n in enumerate(array.shape)]
        return jax.ShapeDtypeStruct(shape, array.dtype)
    array = np.asarray(array)
    for axis, positions in kept.items():
        array = np.take(array, positions, axis)
    return jax.device_put(array)  # jnp.asarray would compile a program for each shape


def _checked(keep: Any, shapes: Mapping[str, Shape]) -> Kept:
    if not isinstance(keep, Mapping):
        raise ValueError(f"shrink: keep must be {{leaf: {{axis: positions}}}}, got {shown(keep)}")
    out: Kept = {}
    for name, axes in keep.items():
        if name not in shapes or not isinstance(axes, Mapping):
            raise ValueError(
                f"shrink: keep must be {{leaf: {{axis: positions}}}} of leaves of params, got {shown(name)}"
            )
        for axis, positions in axes.items():
            n = shapes[name][axis] if axis in range(len(shapes[name])) else 0
            at = np.asarray(positions).reshape(-1)
            at = np.flatnonzero(at) if at.dtype == bool and at.shape == (n,) else at
            if not (len(at) and np.issubdtype(at.dtype, np.integer)):
                raise ValueError(
                    f"shrink: keep[{name!r}][{axis}] must be positions of an axis of {shapes[name]}, at least one, or "
                    f"bool[{n}] with a True, got {shown(positions)}"
                )
            where = f"keep[{name!r}][{axis}]"
            contents.whole("shrink", where, at, n)
            out.setdefault(name, {})[axis] = np.sort(contents.distinct("shrink", where, at)).astype(np.int64)
    return out


def _stuck(reading: Any, own: Mapping[str, Any], wanted: Kept) -> str:
    """The first axis from which positions are taken that have to stay."""
    for name, axes in wanted.items():
        for axis, positions in axes.items():
            label = own[name][axis]
            if label is not None and reading.channels.fixed(np.delete(label, positions)).any():
                return f"of {name!r}, axis {axis}"
    return "of an axis"
