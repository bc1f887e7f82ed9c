"""Where the axes of a value come from after it is reshaped, broadcast or sliced."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

Part = tuple[int, ...]
"""The axes of a leaf that an axis of a value runs over, major ones first; empty for an axis that is not the leaf's."""


def reshape(eqn: Any, parts: tuple[Part, ...]) -> list[Part]:
    """Axes are kept, or merge and split in runs of equal size; ones come and go."""
    before, after = eqn.invars[0].aval.shape, eqn.outvars[0].aval.shape
    out: list[Part] = [()] * len(after)
    i = j = 0
    while 0 not in before and (i < len(before) or j < len(after)):
        if i < len(before) and j < len(after) and before[i] == after[j]:
            out[j] = parts[i]
            i, j = i + 1, j + 1
        elif i < len(before) and before[i] == 1:
            i += 1
        elif j < len(after) and after[j] == 1:
            j += 1
        else:
            end, stop, have, want = i + 1, j + 1, before[i], after[j]
            while have != want:
                if have < want:
                    have, end = have * before[end], end + 1
                else:
                    want, stop = want * after[stop], stop + 1
            run = tuple(axis for k in range(i, end) if before[k] > 1 for axis in parts[k])
            out[j:stop] = [run if after[k] > 1 else () for k in range(j, stop)]
            i, j = end, stop
    return out


def broadcast(eqn: Any, parts: tuple[Part, ...]) -> list[Part]:
    """An axis of 1 that is repeated is nobody's."""
    before, after = eqn.invars[0].aval.shape, eqn.outvars[0].aval.shape
    out: list[Part] = [()] * len(after)
    for axis, into in enumerate(eqn.params["broadcast_dimensions"]):
        out[into] = parts[axis] if before[axis] == after[into] else ()
    return out


def without(axes: Sequence[int], parts: tuple[Part, ...]) -> list[Part]:
    """Those of the axes that stay."""
    return [part for axis, part in enumerate(parts) if axis not in axes]


def only(axes: Sequence[int], parts: tuple[Part, ...]) -> tuple[Part, ...]:
    """The parts of these axes; the others are nobody's."""
    return tuple(part if axis in axes else () for axis, part in enumerate(parts))
