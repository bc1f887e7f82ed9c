"""Finds which positions of which axes belong to one channel of a model, from its program.

At first every position of every axis of every weight is its own channel. An operation that makes two positions equal
(a bias added to an output, an output contracted with the input of the next layer) joins them. Position 0 of the
table is the fixed channel: positions joined with it cannot be removed (inputs and outputs of the model, and operands
of operations whose effect on channels is unknown).
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from rigl_jax.tracing import geometry
from rigl_jax.tracing.program import Program
from rigl_jax.tracing.walk import Rule, Walker


class Split(NamedTuple):
    """One of several axes that were one axis of channels (heads and their features, the groups of a normalisation).

    Attributes:
      grid: the channel of every combination of positions; its axes are those axes of the value that share this array.
      axis: the axis of the grid that this axis of the value is.
    """

    grid: np.ndarray
    axis: int


Labels = tuple[Any, ...]
"""For each axis the channel of each position, int64[size]; or a `Split`; None for an axis that keeps its size."""


class Channels:
    """Sets of positions that are joined while a program is read (union-find)."""

    def __init__(self) -> None:
        self._parent = np.zeros(64, np.int64)
        self._fixed = np.zeros(64, bool)  # by representatives
        self._fixed[0] = True
        self._size = 1
        self.now = ""  # the primitive that is being read
        self.ties: list[tuple[np.ndarray, str]] = []
        self.reasons: list[tuple[np.ndarray, str, bool]] = []

    def new(self, shape: Sequence[Any]) -> Labels:
        """New channels for every axis longer than 1. (An axis of 1 may be broadcast and cannot be shortened.)"""
        return tuple(self.fresh(n) if isinstance(n, int) and n > 1 else None for n in shape)

    def fresh(self, n: int) -> np.ndarray:
        """New channels, int64[n]."""
        first, self._size = self._size, self._size + n
        if self._size > len(self._parent):
            more = max(self._size, 2 * len(self._parent)) - len(self._parent)
            self._parent = np.concatenate([self._parent, np.zeros(more, np.int64)])
            self._fixed = np.concatenate([self._fixed, np.zeros(more, bool)])
        self._parent[first : self._size] = np.arange(first, self._size)
        return self._parent[first : self._size].copy()

    def __len__(self) -> int:
        """The number of positions."""
        return self._size

    def roots(self) -> np.ndarray:
        """int64[number of positions]: the representative of the channel of each position, 0 if it is fixed."""
        roots = self.find(np.arange(self._size))
        return np.where(self._fixed[roots], 0, roots)

    def find(self, positions: np.ndarray) -> np.ndarray:
        """The representatives of positions, of fixed ones as well."""
        found = self._parent[positions]
        while not np.array_equal(after := self._parent[found], found):
            found = after
        self._parent[positions] = found
        return found

    def fixed(self, positions: np.ndarray) -> np.ndarray:
        """Which of the positions are fixed, bool of their shape."""
        return self._fixed[self.find(positions)]

    def join(self, *axes: np.ndarray | None) -> np.ndarray | None:
        """Joins axes of one size, position by position; None among them fixes all."""
        if any(axis is None for axis in axes):
            self.fix(axes, f"meets an axis that keeps its size, in {self.now}")
            return None
        first, *others = axes
        for other in others:
            if other is not first:
                self._union(first, other)
        return first

    def fix(self, axes: Iterable[Any], why: str = "", known: bool = True) -> None:
        """Fixes all positions of the axes: they cannot be removed.

        Args:
          axes: labels.
          why: the reason; empty for positions that are no channels, such as those of a window.
          known: False if it is not known whether they can be removed.
        """
        for axis in axes:
            if axis is not None:
                positions = np.ravel(axis.grid if isinstance(axis, Split) else axis)
                self.reasons.append((positions, why, known))
                self._fixed[self.find(positions)] = True

    def _union(self, left: Any, right: Any) -> None:
        left, right = np.ravel(left), np.ravel(right)
        ours, theirs = self.find(left), self.find(right)
        apart = ours != theirs
        if not apart.any():
            return
        self.ties.append((left[apart], self.now))
        low, high = np.minimum(ours, theirs)[apart], np.maximum(ours, theirs)[apart]
        parent, fixed = self._parent, self._fixed
        if len(np.unique(high)) == len(high) and not np.isin(low, high).any():  # no chains: all at once
            parent[high] = low  # the smaller one represents
            np.logical_or.at(fixed, low, fixed[high])
            return
        for a, b in zip(low.tolist(), high.tolist(), strict=True):
            a, b = sorted((self._root(a), self._root(b)))
            parent[b] = a
            fixed[a] |= fixed[b]

    def _root(self, i: int) -> int:
        parent = self._parent
        while parent[i] != i:
            parent[i] = i = parent[parent[i]]
        return int(i)


class Reading(NamedTuple):
    """The context of the rules: the channels found so far.

    Attributes:
      channels: the sets of positions.
      labels: of every variable.
      notes: any data that the rules of a table share.
    """

    channels: Channels
    labels: dict[Any, Labels]
    notes: Any = None


def read_channels(program: Program, weights: int) -> tuple[dict[Any, Labels], Channels]:
    """The channels of every variable of a program; its first `weights` inputs are weights and are numbered first."""
    channels = Channels()
    fixed = {v: (None,) * len(v.aval.shape) for v in (*program.inputs, *program.constants)}
    labels = fixed | {v: channels.new(v.aval.shape) for v in program.inputs[:weights]}
    walk(program, Reading(channels, labels), RULES, _unknown)
    return labels, channels


def walk(program: Program, reading: Reading, rules: Mapping[str, Rule], unknown: Rule) -> None:
    """Reads a program whose inputs and constants have labels, and fixes its outputs."""
    channels, labels = reading.channels, reading.labels
    follow(program, reading, rules, unknown)
    for variable in program.outputs:
        channels.fix(labels[variable], "an output of the model")


def follow(program: Program, reading: Reading, rules: Mapping[str, Rule], unknown: Rule) -> None:
    """Reads a program whose inputs and constants have labels."""

    def begin(eqn: Any, ins: list[Labels]) -> None:
        del ins
        reading.channels.now = eqn.primitive.name

    walker = Walker(rules, unknown, lambda value, aval: (None,) * len(aval.shape), reading, begin)
    walker.follow(program.equations, reading.labels)


def _unknown(walker: Walker, eqn: Any, ins: list[Labels]) -> list[Labels]:
    """Fixes the operands of a primitive that has no rule or does not keep channels apart."""
    for axes in ins:
        walker.context.channels.fix(axes)
    return [(None,) * len(v.aval.shape) for v in eqn.outvars]


def _elementwise(walker: Walker, eqn: Any, ins: list[Labels]) -> list[Labels]:
    given, out = geometry.shapes(eqn)
    joined = []
    for k, n in enumerate(out):
        same = [axes[k] for axes, shape in zip(ins, given, strict=True) if len(shape) == len(out) and shape[k] == n]
        joined.append(walker.context.channels.join(*same) if same else None)
    return [tuple(joined)]


def _moved(walker: Walker, eqn: Any, ins: list[Labels]) -> list[Labels]:
    """Fixes axes that are summed over. A new axis contains equal values, so it can be joined with any channels."""
    axes, moved = ins[0], geometry.moved(eqn)
    walker.context.channels.fix(tuple(axis for k, axis in enumerate(axes) if k not in moved))
    fresh = walker.context.channels.new(
        [n if k is None else 1 for n, k in zip(eqn.outvars[0].aval.shape, moved, strict=True)]
    )
    return [tuple(new if k is None else axes[k] for new, k in zip(fresh, moved, strict=True))]


def _reverse(walker: Walker, eqn: Any, ins: list[Labels]) -> list[Labels]:
    del walker
    turned = eqn.params["dimensions"]
    return [tuple(axis if axis is None or k not in turned else axis[::-1] for k, axis in enumerate(ins[0]))]


def _reshape(walker: Walker, eqn: Any, ins: list[Labels]) -> list[Labels]:
    if eqn.params.get("dimensions") is not None:
        return _unknown(walker, eqn, ins)
    (axes,), ((before,), after) = ins, geometry.shapes(eqn)
    out: list[np.ndarray | None] = [None] * len(after)
    for run, into in geometry.reshaped(before, after):
        own = tuple(axes[k] for k in run)
        regrouped = _regroup(own, [before[k] for k in run], [after[k] for k in into])
        if regrouped is None:
            walker.context.channels.fix(own)
        else:
            out[into.start : into.stop] = regrouped
    return [tuple(out)]


def _regroup(axes: Labels, before: Sequence[Any], after: Sequence[Any]) -> Labels | None:
    """Channels of the axes after a reshape, None if the channels of an axis are not on one axis afterwards."""
    moving = [k for k, axis in enumerate(axes) if axis is not None]
    if not moving:
        return (None,) * len(after)
    if len(axes) == len(after) == 1:
        return axes
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


def _window(walker: Walker, eqn: Any, ins: list[Labels]) -> list[Labels]:
    touched = geometry.window_axes(eqn)
    walker.context.channels.fix(tuple(ins[0][k] for k in touched))
    return [tuple(None if k in touched else axis for k, axis in enumerate(ins[0]))]


def _dot(walker: Walker, eqn: Any, ins: list[Labels]) -> list[Labels]:
    dot, (left, right, *_) = geometry.dot(eqn), ins
    for a, b in zip(*dot.summed, strict=True):
        walker.context.channels.join(left[a], right[b])
    shared = [walker.context.channels.join(left[a], right[b]) for a, b in zip(*dot.batch, strict=True)]
    return [(*shared, *(left[k] for k in dot.free[0]), *(right[k] for k in dot.free[1]))]


def _conv(walker: Walker, eqn: Any, ins: list[Labels]) -> list[Labels]:
    conv, (x, kernel) = geometry.conv(eqn), ins
    if not conv.plain:
        return _unknown(walker, eqn, ins)
    walker.context.channels.join(x[conv.data[1]], kernel[conv.kernel[1]])
    walker.context.channels.fix(tuple(x[k] for k in conv.data[2:]) + tuple(kernel[k] for k in conv.kernel[2:]))
    out: list[np.ndarray | None] = [None] * len(conv.out)
    out[conv.out[0]], out[conv.out[1]] = x[conv.data[0]], kernel[conv.kernel[0]]
    return [tuple(out)]


RULES: dict[str, Rule] = {
    **dict.fromkeys(geometry.ELEMENTWISE, _elementwise),
    **dict.fromkeys(geometry.MOVES, _moved),
    **dict.fromkeys(geometry.WINDOWED, _window),
    "reshape": _reshape,
    "rev": _reverse,
    "dot_general": _dot,
    "conv_general_dilated": _conv,
}
"""The channels of the results of a primitive, after it has joined those of its operands (`Channels.join`, `fix`)."""
