"""Rules of operations that put arrays together or take parts of them."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import Any

import numpy as np

from rigl_jax.channels import splits
from rigl_jax.tracing.channels import Channels, Labels, Split
from rigl_jax.tracing.walk import Walker


def concatenate(walker: Walker, eqn: Any, ins: list[Labels]) -> list[Labels]:
    """Channels side by side."""
    channels, along = walker.context.channels, eqn.params["dimension"]
    parts = [
        _fixed(channels, atom.aval.shape[along]) if axes[along] is None else axes[along]
        for axes, atom in zip(ins, eqn.invars, strict=True)
    ]
    out = [
        np.concatenate(parts) if k == along else None if n == 1 else channels.join(*(axes[k] for axes in ins))
        for k, n in enumerate(eqn.outvars[0].aval.shape)
    ]
    return [tuple(out)]


def _fixed(channels: Channels, n: int) -> np.ndarray:
    new = channels.fresh(n)
    channels.fix([new], "meets an axis that keeps its size, in concatenate")
    return new


def slice(walker: Walker, eqn: Any, ins: list[Labels]) -> list[Labels]:
    """The channels of some positions."""
    given = eqn.params
    strides = given["strides"] or (1,) * len(given["start_indices"])
    ranges = zip(given["start_indices"], given["limit_indices"], strides, strict=True)
    return [_part(walker, eqn, ins[0], [range(*r) for r in ranges])]


def split(walker: Walker, eqn: Any, ins: list[Labels]) -> list[Labels]:
    """As several slices."""
    shape, along = eqn.invars[0].aval.shape, eqn.params["axis"]
    ends = np.cumsum([0, *eqn.params["sizes"]]).tolist()
    whole = [range(n) for n in shape]
    cuts = [[*whole[:along], range(a, b), *whole[along + 1 :]] for a, b in itertools.pairwise(ends)]
    return [_part(walker, eqn, ins[0], cut) for cut in cuts]


def _part(walker: Walker, eqn: Any, axes: Labels, cut: Sequence[Sequence[int]]) -> Labels:
    """The labels of some positions of each axis."""
    channels, shape = walker.context.channels, eqn.invars[0].aval.shape
    for k, taken in enumerate(cut):
        if len(taken) == shape[k]:
            continue
        if isinstance(axes[k], Split):
            axes = splits.drop(channels, axes, k)
        elif axes[k] is not None:
            own = np.asarray(axes[k])[list(taken)]
            if len(own) == 1:
                channels.fix([own], f"taken by its position, in {eqn.primitive.name}")
            axes = (*axes[:k], own if len(own) > 1 else None, *axes[k + 1 :])
    return axes


def pad(walker: Walker, eqn: Any, ins: list[Labels]) -> list[Labels]:
    """New channels, of the padding, beside the others."""
    channels, out = walker.context.channels, list(ins[0])
    for k, (low, high, inside) in enumerate(eqn.params["padding_config"]):
        if (low, high, inside) == (0, 0, 0) or out[k] is None:
            continue
        if min(low, high) < 0 or inside:
            channels.fix([out[k]], "padded between its positions")
            out[k] = None
        else:
            out[k] = np.concatenate([channels.fresh(int(low)), out[k], channels.fresh(int(high))])
    return [tuple(out)]


def dynamic_slice(walker: Walker, eqn: Any, ins: list[Labels]) -> list[Labels]:
    """An axis that is cut at a computed position stays; others keep their channels."""
    shape, sizes = eqn.invars[0].aval.shape, eqn.params["slice_sizes"]
    other = [k for k in range(len(shape)) if sizes[k] != shape[k]]
    walker.context.channels.fix([ins[0][k] for k in other], "sliced at a position that is computed")
    return [tuple(None if k in other else axis for k, axis in enumerate(ins[0]))]


def dynamic_update(walker: Walker, eqn: Any, ins: list[Labels]) -> list[Labels]:
    """As the two arrays are one afterwards, so are their channels."""
    channels, (whole, part, *_) = walker.context.channels, ins
    out = []
    for k, (n, m) in enumerate(zip(eqn.invars[0].aval.shape, eqn.invars[1].aval.shape, strict=True)):
        if n != m:
            channels.fix([whole[k], part[k]], "updated at a position that is computed")
        out.append(channels.join(whole[k], part[k]) if n == m > 1 else None)
    return [tuple(out)]


def gather(walker: Walker, eqn: Any, ins: list[Labels]) -> list[Labels]:
    """Rows that data choose stay; rows that are written down are a selection."""
    channels, given = walker.context.channels, eqn.params["dimension_numbers"]
    (axes, rows, *_), shape, sizes = ins, eqn.invars[0].aval.shape, eqn.params["slice_sizes"]
    number, out = walker.context.notes.numbers.get(eqn.invars[1]), [None] * len(eqn.outvars[0].aval.shape)
    apart = {*given.collapsed_slice_dims, *given.operand_batching_dims}
    kept = [k for k in range(len(shape)) if k not in apart]
    batch = [k for k in range(len(out)) if k not in given.offset_dims]
    chosen = [k for k in range(len(shape)) if k in given.start_index_map and sizes[k] < shape[k]]
    for place, k in zip(given.offset_dims, kept, strict=True):
        if sizes[k] == shape[k]:
            out[place] = axes[k]
    for place, axis in zip(batch, rows, strict=False):
        out[place] = axis
    for k, j in zip(given.operand_batching_dims, given.start_indices_batching_dims, strict=True):
        out[batch[j]] = _both(channels, axes[k], rows[j])
    whole = number is not None and len(chosen) == len(batch) == 1 and chosen[0] in given.collapsed_slice_dims
    if whole and axes[chosen[0]] is not None:
        out[batch[0]] = axes[chosen[0]][number.reshape(-1) % shape[chosen[0]]]
        return [tuple(out)]
    chosen = [axes[k] for k in range(len(shape)) if sizes[k] < shape[k] and k not in given.operand_batching_dims]
    channels.fix(chosen, "rows that data choose")
    return [tuple(out)]


def scatter(walker: Walker, eqn: Any, ins: list[Labels]) -> list[Labels]:
    """What is written has the channels of what it is written into, but for rows that data choose."""
    channels, given = walker.context.channels, eqn.params["dimension_numbers"]
    (axes, rows, new), out = ins, list(ins[0])
    apart = {*given.inserted_window_dims, *given.operand_batching_dims}
    window = [k for k in range(len(axes)) if k not in apart]
    for place, k in zip(given.update_window_dims, window, strict=True):
        if eqn.invars[0].aval.shape[k] == eqn.invars[2].aval.shape[place]:
            out[k] = _both(channels, axes[k], new[place])
        else:
            channels.fix([axes[k], new[place]], "updated at a position that data choose")
            out[k] = None
    batch = [k for k in range(len(new)) if k not in given.update_window_dims]
    for place, axis in zip(batch, rows, strict=False):
        _both(channels, new[place], axis)
    for k, j in zip(given.operand_batching_dims, given.scatter_indices_batching_dims, strict=True):
        out[k] = _both(channels, axes[k], rows[j])
    channels.fix([axes[k] for k in given.inserted_window_dims], "rows that data choose")
    return [tuple(out)]


def _both(channels: Channels, one: Any, other: Any) -> Any:
    """One axis of channels of two; none where neither has any."""
    return None if one is None and other is None else channels.join(one, other)
