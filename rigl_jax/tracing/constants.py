"""Values that do not depend on the inputs of a model: of channels that no input reaches, and of their products."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from rigl_jax.tracing import geometry
from rigl_jax.tracing.channels import Labels
from rigl_jax.tracing.program import Program
from rigl_jax.tracing.walk import Rule, Walker


class Known(NamedTuple):
    """The known entries of an array. Both fields have the rank of the array; an axis along which they are
    constant may have size 1.

    Attributes:
      value: the entries; arbitrary where they are unknown.
      sure: bool, whether each entry is known.
    """

    value: np.ndarray
    sure: np.ndarray


class Contraction(NamedTuple):
    """A matrix product or convolution of data with a weight: where channels are summed.

    Attributes:
      rows: int64[in], the position of the channel that each row of the weight reads.
      columns: int64[out], that of the channel which each column computes; 0 for the fixed channel.
      nonzero: bool[in, out], whether the weight is not 0 (at any tap, for a convolution).
      constant: bool[in], whether the row reads a known number and adds the same to all positions of an output. (False
        for a number other than 0 with padding, or with the zeros that a transposed convolution inserts, because
        positions then use different taps.)
      value: float64[in], that number; 0 in other rows.
      padded: bool[in], the row reads a known number other than 0, but some taps are left out.
      total: float[in, out], the weight, summed over taps.
      out: the variable that it computes.
      axis: that variable's axis of columns.
    """

    rows: np.ndarray
    columns: np.ndarray
    nonzero: np.ndarray
    constant: np.ndarray
    value: np.ndarray
    padded: np.ndarray
    total: np.ndarray
    out: Any
    axis: int

    def carried(self, rows: np.ndarray) -> np.ndarray:
        """float64[out]: the sum that the selected rows, bool[in], add to the outputs, if their numbers are known."""
        return self.value[rows] @ self.total[rows].astype(np.float64)


class _Context(NamedTuple):
    labels: dict[Any, Labels]
    contractions: list[Contraction]
    beyond: list[np.ndarray | None]


def read_contractions(
    program: Program, weights: Sequence[np.ndarray], labels: dict[Any, Labels]
) -> tuple[list[Contraction], list[np.ndarray | None]]:
    """All products of a program with weights of these values, and the summed axes of products that it cannot handle."""
    known: dict[Any, Known | None] = dict.fromkeys(program.inputs)
    known |= {variable: _constant(value, variable.aval) for variable, value in program.constants.items()}
    known |= {variable: _whole(value) for variable, value in zip(program.inputs, weights, strict=False)}
    context = _Context(labels, [], [])
    Walker(RULES, _unknown, _constant, context).follow(program.equations, known)
    return context.contractions, context.beyond


def _constant(value: Any, aval: Any) -> Known | None:
    if jax.dtypes.issubdtype(aval.dtype, jax.dtypes.extended):  # random keys are not numbers
        return None
    return _whole(np.asarray(value).astype(aval.dtype))


def _whole(value: np.ndarray) -> Known:
    return Known(value, np.ones((1,) * value.ndim, bool))


def _unknown(walker: Walker, eqn: Any, ins: list[Known | None]) -> list[Known | None]:
    return [None] * len(eqn.outvars)


def _rule(follow: Callable[[Any, list[Known]], Known | None]) -> Rule:
    """The rule of an operation whose result is known where all its operands are known."""

    def rule(walker: Walker, eqn: Any, ins: list[Known | None]) -> list[Known | None]:
        found = [known for known in ins if known is not None]
        return [_kept(eqn, follow(eqn, found) if len(found) == len(ins) else None)]

    return rule


def _kept(eqn: Any, known: Known | None) -> Known | None:
    if known is None or not known.sure.any():
        return None
    return known._replace(value=np.asarray(known.value).astype(eqn.outvars[0].aval.dtype))


# --- products ------------------------------------------------------------------------------------------------------


def _product(
    read: Callable[[Any, list[Known | None], list[Labels]], Contraction | None],
    summed: Callable[[Any], tuple[Sequence[int], Sequence[int]]],
) -> Rule:
    """The rule of a product: an output is known if all rows that it depends on are constant."""

    def rule(walker: Walker, eqn: Any, ins: list[Known | None]) -> list[Known | None]:
        context = walker.context
        axes = [context.labels[atom] for atom in eqn.invars]
        found = read(eqn, ins, axes)
        if found is None:
            context.beyond.extend(axes[side][k] for side, own in enumerate(summed(eqn)) for k in own)
            return [None]
        context.contractions.append(found)
        sure = np.logical_not(found.nonzero[~found.constant].any(axis=0, keepdims=True))
        shape = [-1 if k == found.axis else 1 for k in range(len(eqn.outvars[0].aval.shape))]
        return [_kept(eqn, Known(found.carried(found.constant).reshape(shape), sure.reshape(shape)))]

    return rule


def _dot(eqn: Any, ins: list[Known | None], axes: list[Labels]) -> Contraction | None:
    dot, (shapes, out) = geometry.dot(eqn), geometry.shapes(eqn)
    side = next((s for s in (1, 0) if _complete(ins[s]) and len(axes[s]) == 2), None)
    if side is None or dot.batch[0] or len(dot.summed[0]) != 1:
        return None
    (own,), (other,) = dot.summed[side], dot.summed[1 - side]
    matrix = np.moveaxis(np.broadcast_to(_value(ins[side]), shapes[side]), own, 0)
    rows, columns = _positions(axes[side][own], matrix.shape[0]), _positions(axes[side][1 - own], matrix.shape[1])
    constant, value = _along(ins[1 - side], other, len(rows))
    out_axis = len(out) - 1 if side == 1 else 0  # free axes of the left operand come first
    none = np.zeros(len(rows), bool)
    return Contraction(rows, columns, matrix != 0, constant, value, none, matrix, eqn.outvars[0], out_axis)


def _conv(eqn: Any, ins: list[Known | None], axes: list[Labels]) -> Contraction | None:
    conv, given = geometry.conv(eqn), eqn.params
    if not conv.plain or not _complete(ins[1]):
        return None
    shape = eqn.invars[1].aval.shape
    out_first, in_first, *_ = conv.kernel
    kernel = np.moveaxis(np.broadcast_to(_value(ins[1]), shape), (in_first, out_first), (-2, -1))
    taps = kernel.reshape(-1, *kernel.shape[-2:])
    rows, columns = (_positions(axes[1][k], shape[k]) for k in (in_first, out_first))
    constant, value = _along(ins[0], conv.data[1], len(rows))
    padded = np.zeros(len(rows), bool)
    if any(edge > 0 for pair in given["padding"] for edge in pair) or set(given["lhs_dilation"]) != {1}:
        padded = constant & (value != 0)
        constant = constant & ~padded
    total = taps.astype(np.float64).sum(axis=0)
    nonzero = (taps != 0).any(axis=0)
    return Contraction(rows, columns, nonzero, constant, value * constant, padded, total, eqn.outvars[0], conv.out[1])


def _complete(known: Known | None) -> bool:
    return known is not None and bool(known.sure.all())


def _value(known: Known | None) -> np.ndarray:
    assert known is not None
    return known.value


def _positions(axis: np.ndarray | None, size: int) -> np.ndarray:
    return np.zeros(size, np.int64) if axis is None else axis


def _along(x: Known | None, axis: int, size: int) -> tuple[np.ndarray, np.ndarray]:
    """Which entries of the data of a product are known, bool[size], and the entries, float64[size], 0 if not known."""
    if x is None or any(n != 1 for k, n in enumerate(x.value.shape) if k != axis):
        return np.zeros(size, bool), np.zeros(size)
    value = np.broadcast_to(x.value.reshape(-1).astype(np.float64), (size,))
    sure = np.broadcast_to(x.sure.reshape(-1), (size,)) & np.isfinite(value)
    return sure, np.where(sure, value, 0)


# --- other operations ----------------------------------------------------------------------------------------------


def _elementwise(eqn: Any, found: list[Known]) -> Known:
    shape = np.broadcast_shapes(*(known.value.shape for known in found))
    values = [jnp.asarray(k.value if k.value.ndim == 0 else np.broadcast_to(k.value, shape)) for k in found]
    sure = np.ones((1,) * len(shape), bool)
    for known in found:
        sure = sure & known.sure
    return Known(_computed(eqn, values), sure)


def _times(walker: Walker, eqn: Any, ins: list[Known | None]) -> list[Known | None]:
    """As other elementwise operations; and 0 times anything (finite) is 0."""
    zeros = [known.sure & (known.value == 0) for known in ins if known is not None]
    if not any(zero.any() for zero in zeros):
        return list(_rule(_elementwise)(walker, eqn, ins))
    zero = functools.reduce(np.logical_or, zeros)
    if any(known is None for known in ins):
        return [_kept(eqn, Known(np.zeros(zero.shape), zero))]
    both = _elementwise(eqn, ins)  # pyrefly: ignore[bad-argument-type]
    return [_kept(eqn, Known(np.where(zero, 0, both.value), both.sure | zero))]


def _moved(eqn: Any, found: list[Known]) -> Known:
    return Known(*(geometry.rearranged(part, geometry.moved(eqn)) for part in found[0]))


def _reverse(eqn: Any, found: list[Known]) -> Known:
    return Known(*(np.flip(part, eqn.params["dimensions"]) for part in found[0]))


def _reshape(eqn: Any, found: list[Known]) -> Known | None:
    if eqn.params.get("dimensions") is not None:
        return None
    (before, *_), after = geometry.shapes(eqn)
    return Known(*(_reshaped(part, before, after) for part in found[0]))


def _reshaped(part: np.ndarray, before: Sequence[int], after: Sequence[int]) -> np.ndarray:
    """An array that has 1 along runs of axes in which it does not vary."""
    full, out = list(part.shape), [1] * len(after)
    for run, into in geometry.reshaped(before, after):
        if any(part.shape[k] != 1 for k in run):
            full[run.start : run.stop] = before[run.start : run.stop]
            out[into.start : into.stop] = after[into.start : into.stop]
    return np.broadcast_to(part, full).reshape(out)


def _pooled(touched: Callable[[Any], Sequence[int]]) -> Callable[[Any, list[Known]], Known | None]:
    """The rule of a sum or an extreme along axes: the result is kept if it is the same everywhere."""

    def follow(eqn: Any, found: list[Known]) -> Known | None:
        (x, *_), axes = found, touched(eqn)
        full = [n if k in axes else x.value.shape[k] for k, n in enumerate(eqn.invars[0].aval.shape)]
        if any(x.sure.shape[k] != 1 for k in axes) or not full:
            return None
        value = _computed(eqn, [jnp.asarray(np.broadcast_to(x.value, full))])
        if value.ndim < len(full):
            return Known(value, x.sure.squeeze(tuple(axes)))
        first = value[tuple(slice(0, 1) if k in axes else slice(None) for k in range(len(full)))]
        return Known(first, x.sure & (value == first).all(axis=tuple(axes), keepdims=True))

    return follow


def _computed(eqn: Any, operands: Sequence[Any]) -> np.ndarray:
    return np.asarray(eqn.primitive.bind(*operands, **eqn.params))


RULES: dict[str, Rule] = {
    **dict.fromkeys(geometry.ELEMENTWISE, _rule(_elementwise)),
    "mul": _times,
    **dict.fromkeys(geometry.MOVES, _rule(_moved)),
    **dict.fromkeys(geometry.REDUCTIONS, _rule(_pooled(lambda eqn: eqn.params["axes"]))),
    **dict.fromkeys(geometry.WINDOWED, _rule(_pooled(geometry.window_axes))),
    "reshape": _rule(_reshape),
    "rev": _rule(_reverse),
    "dot_general": _product(_dot, lambda eqn: geometry.dot(eqn).summed),
    "conv_general_dilated": _product(
        _conv, lambda eqn: ((geometry.conv(eqn).data[1],), (geometry.conv(eqn).kernel[1],))
    ),
}
"""The known entries of the results of a primitive; those of other primitives are unknown."""
