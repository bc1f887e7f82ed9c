"""A model run without some of its channels: its program at the full shapes, on arrays that lack them."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from rigl_jax import trees
from rigl_jax.base import Array, PyTree
from rigl_jax.channels import loops, splits
from rigl_jax.channels.splits import Open
from rigl_jax.tracing import geometry, primitives
from rigl_jax.tracing.channels import Reading
from rigl_jax.tracing.program import Program, evaluate, trace
from rigl_jax.tracing.walk import Rule

Kept = dict[str, dict[int, np.ndarray]]
"""`{leaf: {axis: int64[new size]}}`: the ascending positions that are left of every axis that shrank."""
Places = Callable[[Any], list[Any]]
"""`variable -> the positions left of each axis`."""


def at_smaller_shapes(
    who: str, apply: Callable[..., Any], full: PyTree, kept: Kept, read: Callable[[Program, int], Reading]
) -> Callable[..., Any]:
    """`apply` on cut weights: its program at the full shapes, in which sizes that are written down shrink as well.

    Args:
      who: what errors call it.
      apply: `(params, *inputs) -> outputs`.
      full: the params at the full shapes, of `jax.ShapeDtypeStruct`.
      kept: what is left of them.
      read: `(program, number of weights) -> the channels of the program`.
    """

    def run(params: PyTree, *inputs: Any) -> Any:
        program = trace(apply, full, *inputs)
        leaves = trees.named_leaves(full)
        reading = read(program, len(leaves))
        own = [reading.labels[v] for v in program.inputs[: len(leaves)]]
        gone = removed(reading, dict(zip(leaves, own, strict=True)), kept)
        if gone[0]:
            raise ValueError(f"{who}: these inputs take the model another way than those it was made for")
        return _smaller(reading, gone)(program, jax.tree.leaves((params, inputs)))

    return run


def removed(reading: Reading, own: Mapping[str, Any], kept: Kept) -> np.ndarray:
    """bool[positions]: those whose channels are removed; the first is True if one of them is fixed."""
    roots = reading.channels.roots()
    gone = np.zeros(len(roots), bool)
    for name, axes in kept.items():
        for axis, positions in axes.items():
            if own[name][axis] is not None:
                gone[roots[np.delete(own[name][axis], positions)]] = True
    return gone if gone[0] else gone[roots]


def _is_cut(places: Places, variable: Any) -> bool:
    return any(kept.size < n for kept, n in zip(places(variable), variable.aval.shape, strict=True))


def _smaller(reading: Reading, gone: np.ndarray) -> Callable[[Program, Sequence[Any]], Any]:
    """Evaluates programs of a reading without the channels that are gone."""

    @functools.cache
    def places(variable: Any) -> list[Any]:
        return splits.places(reading.labels[variable], variable.aval.shape, gone)

    cut = functools.partial(_is_cut, places)

    def run(program: Program, inputs: Sequence[Any]) -> Any:
        constants = {v: x[np.ix_(*places(v))] if cut(v) else x for v, x in program.constants.items()}
        around = functools.partial(_with_own_derivatives, places, functools.partial(mixes, program))
        return evaluate(program._replace(constants=constants), inputs, rules, around)

    def mixes(program: Program, call: Any) -> bool:
        """Whether a call sums over channels that are cut, which at full shapes would not be the same."""
        over = {} if reading.notes is None else reading.notes.over
        inside = [v for v, outer in program.within.items() if outer is call and v in over]
        return any(gone[axis].any() for v in inside for axis in over[v])

    def only_where_cut(rule: Rule) -> Rule:
        def one(walker: Any, eqn: Any, xs: list[Any]) -> Sequence[Any]:
            if any(map(cut, (*eqn.invars, *eqn.outvars))):
                return rule(walker, eqn, xs)
            return walker.unknown(walker, eqn, xs)

        return one

    rules = {name: only_where_cut(rule) for name, rule in _resized(places).items()}
    if reading.notes is not None:
        rules |= {**_noted(places, reading.notes, gone), **loops.resized(reading.notes.bodies, run)}
    return run


def _as_it_stands(eqn: Any, operands: Sequence[Any], **changed: Any) -> list[Any]:
    results = eqn.primitive.bind(*operands, **eqn.primitive.get_bind_params({**eqn.params, **changed}))
    return results if eqn.primitive.multiple_results else [results]


def _taken(x: Array, axis: int, at: np.ndarray) -> Array:
    """Positions of an axis, as a slice where they are one."""
    steps = np.unique(np.diff(at))
    if len(at) == x.shape[axis] and (at == np.arange(len(at))).all():
        return x
    if len(at) == 1 or (len(steps) == 1 and steps[0] > 0):
        return jax.lax.slice_in_dim(x, int(at[0]), int(at[-1]) + 1, 1 if len(at) == 1 else int(steps[0]), axis)
    return jnp.take(x, at, axis, mode="clip")


def _picked(x: Array, left: Sequence[Any]) -> Array:
    for axis, kept in enumerate(left):
        x = x if isinstance(kept, Open) else _taken(x, axis, kept)
    return x


def _resized(places: Places) -> dict[str, Rule]:
    """Operations that have a size or a position written down."""

    def size(eqn: Any) -> tuple[int, ...]:
        return tuple(kept.size for kept in places(eqn.outvars[0]))

    def part(x: Array, eqn: Any, out: Any, starts: Sequence[int], strides: Sequence[int]) -> Array:
        """A slice, by its numbers at the full shape."""
        axes = zip(places(eqn.invars[0]), places(out), starts, strides, strict=True)
        for k, (before, own, start, stride) in enumerate(axes):
            if isinstance(before, Open) or isinstance(own, Open):
                x = jax.lax.slice_in_dim(x, start, start + stride * (own.size - 1) + 1, stride, k)
            else:
                x = _taken(x, k, np.searchsorted(before, start + stride * own))
        return x

    def slices(walker: Any, eqn: Any, xs: list[Any]) -> list[Any]:
        starts = eqn.params["start_indices"]
        return [part(xs[0], eqn, eqn.outvars[0], starts, eqn.params["strides"] or (1,) * len(starts))]

    def split(walker: Any, eqn: Any, xs: list[Any]) -> list[Any]:
        begins, ones = np.cumsum([0, *eqn.params["sizes"]]), [1] * xs[0].ndim
        along = [[int(a) if k == eqn.params["axis"] else 0 for k in range(xs[0].ndim)] for a in begins]
        return [part(xs[0], eqn, v, starts, ones) for v, starts in zip(eqn.outvars, along, strict=False)]

    def pad(walker: Any, eqn: Any, xs: list[Any]) -> list[Any]:
        config = []
        shape, own = eqn.invars[0].aval.shape, places(eqn.outvars[0])
        for n, kept, (low, high, inside) in zip(shape, own, eqn.params["padding_config"], strict=True):
            if not isinstance(kept, Open) and min(low, high) >= 0 and not inside:
                low, high = int((kept < low).sum()), int((kept >= low + n).sum())
            config.append((low, high, inside))
        return [jax.lax.pad(xs[0], xs[1], config)]

    def iota(walker: Any, eqn: Any, xs: list[Any]) -> list[Any]:
        (x,) = _as_it_stands(eqn, xs)
        return [_picked(x, places(eqn.outvars[0]))]

    def conv(walker: Any, eqn: Any, xs: list[Any]) -> list[Any]:
        numbers = geometry.conv(eqn)
        groups = xs[0].shape[numbers.data[1]] // xs[1].shape[numbers.kernel[1]]
        return _as_it_stands(eqn, xs, feature_group_count=groups)

    def dynamic_slice(walker: Any, eqn: Any, xs: list[Any]) -> list[Any]:
        return _as_it_stands(eqn, xs, slice_sizes=size(eqn))

    return {
        "reshape": lambda walker, eqn, xs: [jax.lax.reshape(xs[0], size(eqn), eqn.params["dimensions"])],
        "broadcast_in_dim": lambda walker, eqn, xs: [
            jax.lax.broadcast_in_dim(xs[0], size(eqn), eqn.params["broadcast_dimensions"])
        ],
        "slice": slices,
        "split": split,
        "pad": pad,
        "iota": iota,
        "conv_general_dilated": conv,
        "dynamic_slice": dynamic_slice,
    }


def _noted(places: Places, notes: Any, gone: np.ndarray) -> dict[str, Rule]:
    """Operations whose numbers have to follow: the terms of a mean, rows that are written down."""

    def mean(walker: Any, eqn: Any, xs: list[Any]) -> list[Any]:
        if (found := notes.means.get(eqn.outvars[0])) is not None:
            total, which = found
            left = round(total.count * math.prod((~gone[axis]).mean() for axis in total.axes))
            by = xs[which]
            by = by + (left - total.count) if eqn.primitive.name == "div" else by * (total.count / left)
            xs = [by.astype(x.dtype) if k == which else x for k, x in enumerate(xs)]
        return _as_it_stands(eqn, xs)

    def gather(walker: Any, eqn: Any, xs: list[Any]) -> list[Any]:
        before, shape = places(eqn.invars[0]), eqn.invars[0].aval.shape
        sizes = [kept.size if s == n else s for s, n, kept in
                 zip(eqn.params["slice_sizes"], shape, before, strict=True)]  # fmt: skip
        given, out = eqn.params["dimension_numbers"], places(eqn.outvars[0])
        axis, batch = (*given.start_index_map, 0)[0], [k for k in range(len(out)) if k not in given.offset_dims]
        x, rows = xs[0], xs[1]
        if eqn.invars[1] in notes.numbers and len(batch) == 1 and before[axis].size < shape[axis]:
            at = notes.numbers[eqn.invars[1]].reshape(-1)[out[batch[0]]] % shape[axis]
            rows = jnp.asarray(np.searchsorted(before[axis], at), rows.dtype).reshape(-1, 1)
        return _as_it_stands(eqn, [x, rows, *xs[2:]], slice_sizes=tuple(sizes))

    return {"div": mean, "mul": mean, "gather": gather}


def _with_own_derivatives(
    places: Places,
    mixes: Callable[[Any], bool],
    call: Any,
    outs: Sequence[Any],
    run: Callable[..., list[Array]],
    operands: Sequence[Any],
) -> list[Array]:
    """A call with derivatives of its own, on arrays that shrank. See `Around`.

    The call runs at the smaller shapes, but its rule is written for the full ones. Where both work element by element
    (ReLU), the rule runs at the smaller shapes too. Any other rule is asked at the full shapes, and only where a
    derivative is taken: what is left lies packed at the beginning if the call works element by element, else in its
    places, removed channels being 0. What sums over channels that were removed (a softmax) is differentiated operation
    by operation.
    """
    packed, cut = _by_element(call), functools.partial(_is_cut, places)

    def fill(x: Array, variable: Any) -> Array:
        shape = variable.aval.shape
        if packed:
            return jnp.pad(x.reshape(-1), (0, math.prod(shape) - x.size)).reshape(shape)
        return jnp.zeros(shape, x.dtype).at[jnp.ix_(*places(variable))].set(x)

    def pick(x: Array, variable: Any) -> Array:
        left = places(variable)
        if packed:
            shape = tuple(kept.size for kept in left)
            return x.reshape(-1)[: math.prod(shape)].reshape(shape)
        return _picked(x, left)

    def whole(*operands: Any) -> list[Array]:
        filled = [fill(x, v) if cut(v) else x for v, x in zip(call.invars, operands, strict=True)]
        results = dict(zip(call.outvars, primitives.bind(call, filled), strict=True))
        return [pick(results[v], v) if cut(v) else results[v] for v in outs]

    if not any(map(cut, (*call.invars, *outs))):
        return whole(*operands)
    if mixes(call):
        return run(*operands)
    if call.primitive.name == "custom_jvp_call":
        return _with_rule(call, outs, run, whole, operands)
    backward = jax.custom_vjp(run)
    backward.defvjp(lambda *operands: jax.vjp(whole, *operands), lambda pull, ct: pull(ct))
    return backward(*operands)


def _with_rule(
    call: Any,
    outs: Sequence[Any],
    run: Callable[..., list[Array]],
    otherwise: Callable[..., list[Array]],
    operands: Sequence[Any],
) -> list[Array]:
    """A `custom_jvp` call. Where a derivative is taken, its rule runs at the shapes of the operands if it can.

    `otherwise` is differentiated where it cannot.
    """
    forward, which = jax.custom_jvp(run), [call.outvars.index(v) for v in outs]

    def around(call: Any, outs: Sequence[Any], run: Callable[..., list[Array]], operands: Sequence[Any]) -> list[Array]:
        if call.primitive.name != "custom_jvp_call":
            return run(*operands)
        return _with_rule(call, outs, run, run, operands)  # a rule may call the function again, for its value

    @forward.defjvp
    def push(primals: Any, tangents: Any) -> Any:
        rule, shape = _rule(call), jnp.broadcast_shapes(*map(jnp.shape, primals))
        if rule is None:
            return jax.jvp(otherwise, primals, tangents)
        spread = lambda walker, eqn, xs: [jnp.broadcast_to(xs[0], shape)]  # noqa: E731
        found = evaluate(rule, [*primals, *tangents], {"broadcast_in_dim": spread}, around)
        return tuple([values[i] for i in which] for values in found)

    return forward(*operands)


def _rule(call: Any) -> Program | None:
    """`(operands, tangents) -> (results, tangents)` of a `custom_jvp` call, at the full shapes.

    None unless call and rule work element by element. Operands without tangents (integers) do not.
    """
    if not _by_element(call) or not all(jnp.issubdtype(v.aval.dtype, jnp.inexact) for v in call.invars):
        return None
    full = tuple(jax.ShapeDtypeStruct(v.aval.shape, v.aval.dtype) for v in call.invars)
    program = trace(lambda *both: jax.jvp(lambda *xs: tuple(primitives.bind(call, xs)), *both), full, full)
    return program if _plain(program.equations, call.outvars[0].aval.shape) else None


def _by_element(call: Any) -> bool:
    """Whether a call computes each element of its results from the same element of its operands, and from numbers."""
    shape = call.outvars[0].aval.shape
    alike = {v.aval.shape for v in call.outvars} == {shape} and {v.aval.shape for v in call.invars} <= {shape, ()}
    return alike and _plain(primitives.held(call)[0].jaxpr.eqns, shape)


def _plain(equations: Sequence[Any], shape: tuple[int, ...]) -> bool:
    """Whether all that is done is done element by element, to arrays of one shape and to numbers."""

    def plain(eqn: Any) -> bool:
        if (inner := primitives.called(eqn)) is not None:
            return _plain(inner.jaxpr.eqns, shape)
        if eqn.primitive.name == "broadcast_in_dim":
            return not eqn.invars[0].aval.shape
        return eqn.primitive.name in geometry.ELEMENTWISE and {v.aval.shape for v in eqn.outvars} <= {shape, ()}

    return all(map(plain, equations))
