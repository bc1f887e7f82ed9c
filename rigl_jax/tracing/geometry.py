"""The axes of primitives: where the axes of a result come from, and which axes products sum over.

All analyses that follow weights through a program use it: roles, channels, known values, costs, captured products.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import numpy as np

Moved = tuple[int | None, ...]
"""For each axis of a result the axis of the first operand that it comes from; None: a new axis."""

_ELEMENTWISE = """
abs acos acosh add add_any and asin asinh atan atan2 atanh cbrt ceil clamp convert_element_type copy cos cosh div eq
erf erf_inv erfc exp exp2 expm1 floor ge gt integer_pow is_finite le lgamma log log1p logistic lt max min mul ne neg
nextafter not or pow reduce_precision rem round rsqrt select_n sign sin sinh sqrt square stop_gradient sub tan tanh
xor
"""
ELEMENTWISE = frozenset(_ELEMENTWISE.split())
"""Elementwise operations."""

REDUCTIONS = frozenset(("reduce_sum", "reduce_max", "reduce_min", "reduce_prod", "argmax", "argmin"))
"""Operations that leave out `axes`."""

WINDOWED = frozenset(("reduce_window_sum", "reduce_window_max", "reduce_window_min"))
"""Poolings, see `window_axes`."""


def _transpose(eqn: Any) -> Moved:
    return tuple(eqn.params["permutation"])


def _squeeze(eqn: Any) -> Moved:
    return _without(eqn, eqn.params["dimensions"])


def _broadcast(eqn: Any) -> Moved:
    """The source of the axes of a broadcast; an axis of 1 that is repeated is new."""
    (before, *_), after = shapes(eqn)
    out: list[int | None] = [None] * len(after)
    for axis, into in enumerate(eqn.params["broadcast_dimensions"]):
        out[into] = axis if before[axis] == after[into] else None
    return tuple(out)


def _reduce(eqn: Any) -> Moved:
    return _without(eqn, eqn.params["axes"])


def _without(eqn: Any, gone: Sequence[int]) -> Moved:
    return tuple(axis for axis in range(len(eqn.invars[0].aval.shape)) if axis not in gone)


MOVES: dict[str, Callable[[Any], Moved]] = {
    "transpose": _transpose,
    "squeeze": _squeeze,
    "broadcast_in_dim": _broadcast,
    **dict.fromkeys(REDUCTIONS, _reduce),
}
"""Operations that keep, drop and order axes of one array."""


def moved(eqn: Any) -> Moved:
    """Where the axes of the result of one of `MOVES` come from."""
    return MOVES[eqn.primitive.name](eqn)


def shapes(eqn: Any) -> tuple[list[Sequence[Any]], Sequence[Any]]:
    """Of the operands, and of the first result."""
    return [atom.aval.shape for atom in eqn.invars], eqn.outvars[0].aval.shape


def reshaped(before: Sequence[Any], after: Sequence[Any]) -> list[tuple[range, range]]:
    """The runs of axes that a reshape turns into one another, as short as possible: axes before, axes after.

    A kept axis is a run of one axis to one axis. Axes of size 1 appear and disappear in separate runs.
    """
    runs = []
    i = j = 0
    while i < len(before) or j < len(after):
        end, stop = i, j
        if i < len(before) and j < len(after) and before[i] == after[j]:
            end, stop = i + 1, j + 1
        elif i < len(before) and before[i] == 1:
            end = i + 1
        elif j < len(after) and after[j] == 1:
            stop = j + 1
        elif 0 in before or not all(isinstance(n, int) for n in (*before[i:], *after[j:])):  # symbolic sizes
            least = min(len(before) - i, len(after) - j)
            same = next((k for k in range(least) if before[-1 - k] != after[-1 - k]), least)
            end, stop = len(before) - same, len(after) - same
        else:
            end, stop, have, want = i + 1, j + 1, before[i], after[j]
            while have != want:
                if have < want:
                    have, end = have * before[end], end + 1
                else:
                    want, stop = want * after[stop], stop + 1
        runs.append((range(i, end), range(j, stop)))
        i, j = end, stop
    return runs


def window_axes(eqn: Any) -> list[int]:
    """The axes of a pooling."""
    given = eqn.params
    alone = zip(
        given["window_dimensions"],
        given["window_strides"],
        given["padding"],
        given["base_dilation"],
        given["window_dilation"],
        strict=True,
    )
    return [k for k, (size, stride, pad, *_) in enumerate(alone) if (size, stride, tuple(pad)) != (1, 1, (0, 0))]


class Dot(NamedTuple):
    """The axes of a `dot_general`, of its left and its right operand.

    Attributes:
      summed: those summed over, in pairs.
      batch: those with a separate product for each index, in pairs.
      free: the others.
      written: for each axis of the result where it comes from: `{axis of the result: axis of the operand}`.
    """

    summed: tuple[tuple[int, ...], tuple[int, ...]]
    batch: tuple[tuple[int, ...], tuple[int, ...]]
    free: tuple[tuple[int, ...], tuple[int, ...]]
    written: tuple[dict[int, int], dict[int, int]]


def dot(eqn: Any) -> Dot:
    """The axes of a `dot_general`."""
    summed, batch = (tuple(map(tuple, pair)) for pair in eqn.params["dimension_numbers"])
    ranks = [len(atom.aval.shape) for atom in eqn.invars[:2]]
    free = tuple(tuple(k for k in range(ranks[s]) if k not in (*summed[s], *batch[s])) for s in (0, 1))
    starts = len(batch[0]), len(batch[0]) + len(free[0])
    written = tuple(
        {**dict(enumerate(batch[s])), **{starts[s] + k: axis for k, axis in enumerate(free[s])}} for s in (0, 1)
    )
    return Dot(summed, batch, free, written)  # pyrefly: ignore[bad-argument-type]


class Conv(NamedTuple):
    """The axes of a `conv_general_dilated`.

    Attributes:
      data: batch, channels, then the window's.
      kernel: outputs, channels (of one group), then the window's.
      out: batch, outputs, then the window's.
      groups: of channels; more than 1 in grouped and depthwise convolutions.
      plain: whether there is one group of channels and one of examples.
    """

    data: tuple[int, ...]
    kernel: tuple[int, ...]
    out: tuple[int, ...]
    groups: int
    plain: bool


def conv(eqn: Any) -> Conv:
    """The axes of a `conv_general_dilated`."""
    given = eqn.params
    numbers, groups = given["dimension_numbers"], given["feature_group_count"]
    plain = groups == given["batch_group_count"] == 1
    return Conv(tuple(numbers.lhs_spec), tuple(numbers.rhs_spec), tuple(numbers.out_spec), groups, plain)


def rearranged(array: np.ndarray, axes: Moved) -> np.ndarray:
    """An array after a move; axes that are dropped or new have size 1."""
    kept = [axis for axis in axes if axis is not None]
    order = [*kept, *(axis for axis in range(array.ndim) if axis not in kept)]
    return array.transpose(order).reshape([1 if axis is None else array.shape[axis] for axis in axes])
