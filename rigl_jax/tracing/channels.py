"""Which entries of which arrays belong to one unit of a model, read off its program.

Every position of every axis of every weight starts as a unit of its own. An operation that needs two positions to be
the same (a bias added to an output, an output contracted with the next layer's input) joins them. Position 0 of the
table is the fixed unit: what joins it keeps its size (the model's inputs and outputs, and everything that meets an
operation whose effect on units is not known here).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from rigl_jax.tracing.program import Program, Step

Labels = tuple[np.ndarray | None, ...]
"""For each axis the unit of each of its positions, int64[size]; None for an axis whose size is fixed."""


class Units:
    """Sets of positions, joined as a program is read (union-find)."""

    def __init__(self) -> None:
        self._parent: list[int] = [0]

    def new(self, shape: Sequence[Any]) -> Labels:
        """Fresh units for every axis longer than 1. (An axis of 1 may be broadcast, and has nothing to remove.)"""
        return tuple(self._fresh(n) if isinstance(n, int) and n > 1 else None for n in shape)

    def _fresh(self, n: int) -> np.ndarray:
        first = len(self._parent)
        self._parent.extend(range(first, first + n))
        return np.arange(first, first + n)

    def roots(self) -> np.ndarray:
        """int64[number of positions]: the representative of each one's unit, 0 for the fixed unit."""
        return np.array([self._find(i) for i in range(len(self._parent))])

    def _find(self, i: int) -> int:
        parent = self._parent
        while parent[i] != i:
            parent[i] = i = parent[parent[i]]
        return i

    def join(self, *axes: np.ndarray | None) -> np.ndarray | None:
        """Makes axes of one size the same, position by position; None among them fixes all."""
        if any(axis is None for axis in axes):
            self.fix(axes)
            return None
        first, *others = axes
        for other in others:
            if other is not first:
                for a, b in zip(first.tolist(), other.tolist(), strict=True):  # pyrefly: ignore[missing-attribute]
                    self._union(a, b)
        return first

    def fix(self, axes: Labels) -> None:
        """Joins all positions of the axes to the fixed unit."""
        for axis in axes:
            for a in () if axis is None else axis.tolist():
                self._union(0, a)

    def _union(self, a: int, b: int) -> None:
        a, b = sorted((self._find(a), self._find(b)))
        self._parent[b] = a  # the smaller one represents, so 0 stays the fixed unit's


def read_units(program: Program, weights: int) -> tuple[dict[int, Labels], Units]:
    """The units of every value of a program; its first `weights` inputs are weights, numbered before all else."""
    units = Units()
    labels = {i: units.new(program.avals[i].shape) for i in program.inputs[:weights]}

    def read(i: int) -> Labels:
        return labels.setdefault(i, (None,) * len(program.avals[i].shape))

    for step in program.steps:
        ins = [read(i) for i in step.ins]
        shapes = [program.avals[i].shape for i in (*step.ins, *step.outs[:1])]
        rule = _elementwise if step.name in ELEMENTWISE else _RULES.get(step.name)
        outs = rule(units, step, ins, shapes) if rule else None
        if outs is None:
            for axes in ins:
                units.fix(axes)
        else:
            labels[step.outs[0]] = outs
    for i in program.outputs:
        units.fix(read(i))
    return labels, units


_ELEMENTWISE = """
abs acos acosh add add_any and asin asinh atan atan2 atanh cbrt ceil clamp convert_element_type copy cos cosh div eq
erf erf_inv erfc exp exp2 expm1 floor ge gt integer_pow is_finite le lgamma log log1p logistic lt max min mul ne neg
nextafter not or pow reduce_precision rem round rsqrt select_n sign sin sinh sqrt square stop_gradient sub tan tanh
xor
"""
ELEMENTWISE = frozenset(_ELEMENTWISE.split())
"""Operations that treat every position alike and apart."""

_Out = Labels | None  # None: the operation cannot keep units apart
_Shapes = list[Sequence[Any]]  # of the operands, and last of the result


def _elementwise(units: Units, step: Step, ins: list[Labels], shapes: _Shapes) -> _Out:
    del step
    *given, out = shapes
    joined = []
    for k, n in enumerate(out):
        same = [axes[k] for axes, shape in zip(ins, given, strict=True) if len(shape) == len(out) and shape[k] == n]
        joined.append(units.join(*same) if same else None)
    return tuple(joined)


def _reshape(units: Units, step: Step, ins: list[Labels], shapes: _Shapes) -> _Out:
    if step.params.get("dimensions") is not None:
        return None
    (axes,), (before, after) = ins, shapes
    start, stop = common_ends(before, after)
    end, out_end = len(before) - stop, len(after) - stop
    middle = _regroup(axes[start:end], before[start:end], after[start:out_end])
    if middle is None:
        units.fix(axes[start:end])
        middle = (None,) * (out_end - start)
    return (*axes[:start], *middle, *axes[end:])


def common_ends(before: Sequence[Any], after: Sequence[Any]) -> tuple[int, int]:
    """How many leading and how many trailing axes a reshape leaves alone."""
    least = min(len(before), len(after))
    start = next((k for k in range(least) if before[k] != after[k]), least)
    rest = least - start
    return start, next((k for k in range(rest) if before[-1 - k] != after[-1 - k]), rest)


def _regroup(axes: Labels, before: Sequence[Any], after: Sequence[Any]) -> _Out:
    """Units of the axes after a reshape, None if the units of an axis do not land on one axis again."""
    moving = [k for k, axis in enumerate(axes) if axis is not None]
    if not moving:
        return (None,) * len(after)
    if len(moving) > 1 or not all(isinstance(n, int) for n in (*before, *after)):
        return None
    k = moving[0]
    spread = np.broadcast_to(axes[k].reshape(-1, *[1] * (len(before) - k - 1)), before)  # pyrefly: ignore
    spread = spread.reshape(after)
    for k in range(len(after)):
        along = np.moveaxis(spread, k, 0).reshape(after[k], -1)
        if after[k] > 1 and (along == along[:, :1]).all():
            return tuple(along[:, 0] if j == k else None for j in range(len(after)))
    return None


def _transpose(units: Units, step: Step, ins: list[Labels], shapes: _Shapes) -> _Out:
    del units, shapes
    return tuple(ins[0][k] for k in step.params["permutation"])


def _reverse(units: Units, step: Step, ins: list[Labels], shapes: _Shapes) -> _Out:
    del units, shapes
    turned = step.params["dimensions"]
    return tuple(axis if axis is None or k not in turned else axis[::-1] for k, axis in enumerate(ins[0]))


def _squeeze(units: Units, step: Step, ins: list[Labels], shapes: _Shapes) -> _Out:
    del units, shapes
    return tuple(axis for k, axis in enumerate(ins[0]) if k not in step.params["dimensions"])


def _broadcast(units: Units, step: Step, ins: list[Labels], shapes: _Shapes) -> _Out:
    """A new axis holds equal values, so it has whatever units it meets."""
    before, after = shapes[0], shapes[-1]
    out = list(units.new(after))
    for k, into in enumerate(step.params["broadcast_dimensions"]):
        if before[k] == after[into]:
            out[into] = ins[0][k]
    return tuple(out)


def _reduce(units: Units, step: Step, ins: list[Labels], shapes: _Shapes) -> _Out:
    del shapes
    gone = step.params["axes"]
    units.fix(tuple(ins[0][k] for k in gone))
    return tuple(axis for k, axis in enumerate(ins[0]) if k not in gone)


def window_axes(step: Step) -> list[int]:
    """The axes that a pooling touches."""
    given = step.params
    alone = zip(
        given["window_dimensions"],
        given["window_strides"],
        given["padding"],
        given["base_dilation"],
        given["window_dilation"],
        strict=True,
    )
    return [k for k, (size, stride, pad, *_) in enumerate(alone) if (size, stride, tuple(pad)) != (1, 1, (0, 0))]


def _window(units: Units, step: Step, ins: list[Labels], shapes: _Shapes) -> _Out:
    del shapes
    touched = window_axes(step)
    units.fix(tuple(ins[0][k] for k in touched))
    return tuple(None if k in touched else axis for k, axis in enumerate(ins[0]))


def _dot(units: Units, step: Step, ins: list[Labels], shapes: _Shapes) -> _Out:
    del shapes
    contract, batch = step.params["dimension_numbers"]
    left, right = ins[:2]
    for a, b in zip(*contract, strict=True):
        units.join(left[a], right[b])
    shared = [units.join(left[a], right[b]) for a, b in zip(*batch, strict=True)]
    free = [
        axis
        for axes, summed, own in zip((left, right), contract, batch, strict=True)
        for k, axis in enumerate(axes)
        if k not in (*summed, *own)
    ]
    return (*shared, *free)


def _conv(units: Units, step: Step, ins: list[Labels], shapes: _Shapes) -> _Out:
    given = step.params
    if given["feature_group_count"] != 1 or given["batch_group_count"] != 1:
        return None
    numbers = given["dimension_numbers"]
    x, kernel = ins
    units.join(x[numbers.lhs_spec[1]], kernel[numbers.rhs_spec[1]])
    units.fix(tuple(x[k] for k in numbers.lhs_spec[2:]) + tuple(kernel[k] for k in numbers.rhs_spec[2:]))
    out: list[np.ndarray | None] = [None] * len(shapes[-1])
    out[numbers.out_spec[0]], out[numbers.out_spec[1]] = x[numbers.lhs_spec[0]], kernel[numbers.rhs_spec[0]]
    return tuple(out)


_RULES: dict[str, Callable[[Units, Step, list[Labels], _Shapes], _Out]] = {
    "reshape": _reshape,
    "transpose": _transpose,
    "rev": _reverse,
    "squeeze": _squeeze,
    "broadcast_in_dim": _broadcast,
    "reduce_sum": _reduce,
    "reduce_max": _reduce,
    "reduce_min": _reduce,
    "reduce_window_sum": _window,
    "reduce_window_max": _window,
    "reduce_window_min": _window,
    "dot_general": _dot,
    "conv_general_dilated": _conv,
}
