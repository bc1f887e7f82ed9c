"""Axes that were one axis of channels: how labels go through a reshape, and what becomes of them afterwards.

An axis of heads times features that is reshaped to two axes holds one channel for each pair. A dense array can lose
whole heads, or the same features of all heads, but not single pairs. As long as nothing treats the two axes apart, as
where they are merged again, every pair stays a channel (`Split`). Then one of the axes is chosen, the first that is not
summed over: heads, groups of a normalisation. Its positions are the channels, and the other axis goes along. Where
nothing ever treats them apart (channels are shuffled), it is the longest one: fewer channels go at a time.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from typing import Any, NamedTuple

import numpy as np

from rigl_jax.tracing import geometry
from rigl_jax.tracing.channels import Channels, Labels, Split


def blocks(labels: Labels) -> list[tuple[int, ...]]:
    """The axes that share a split, in the order of its grid."""
    found: dict[int, list[int]] = {}
    for k, axis in enumerate(labels):
        if isinstance(axis, Split):
            found.setdefault(id(axis.grid), []).append(k)
    return [tuple(sorted(axes, key=lambda k: labels[k].axis)) for axes in found.values()]


def simple(channels: Channels, labels: Labels) -> Labels:
    """The same labels, without splits that vary along one axis only."""
    out = list(labels)
    for block in blocks(labels):
        grid = channels.find(labels[block[0]].grid)
        vary = [k for k in block if _varies(grid, labels[k].axis)]
        if len(vary) > 1:
            continue
        for k in block:
            out[k] = _along(labels[k]) if k in vary else None
    return tuple(out)


def _varies(grid: np.ndarray, axis: int) -> bool:
    return bool((grid != grid.take([0], axis)).any())


def _along(split: Split) -> np.ndarray:
    """The labels of one axis where the others have their first position."""
    return np.moveaxis(split.grid, split.axis, 0).reshape(split.grid.shape[split.axis], -1)[:, 0]


def settle(
    channels: Channels,
    labels: Labels,
    touched: Collection[int] | None = None,
    summed: Any = (),
    *,
    finest: bool = False,
) -> Labels:
    """Chooses one axis of each split: of those that have an axis among the `touched` ones (None: of all).

    It is the first one that is not `summed` over; with `finest` the first of the longest ones.
    """
    labels = simple(channels, labels)
    out = list(labels)
    for block in blocks(labels):
        if touched is not None and not set(block) & set(touched):
            continue
        chosen = next((k for k in block if k not in summed), block[0])
        if finest:
            chosen = max(block, key=lambda k: labels[k].grid.shape[labels[k].axis])
        own = _along(labels[chosen])
        pairs = np.moveaxis(labels[chosen].grid, labels[chosen].axis, 0).reshape(len(own), -1)
        channels.join(np.repeat(own, pairs.shape[1]), pairs.reshape(-1))
        for k in block:
            out[k] = own if k == chosen else None
    return tuple(out)


def drop(channels: Channels, labels: Labels, axis: int) -> Labels:
    """Makes the channels of a split the same along an axis of it."""
    split = labels[axis]
    if not isinstance(split, Split):
        return labels
    first = split.grid.take([0], split.axis)
    channels.join(np.broadcast_to(first, split.grid.shape).reshape(-1), split.grid.reshape(-1))
    rest = np.squeeze(first, split.axis)
    out = [
        Split(rest, a.axis - (a.axis > split.axis)) if isinstance(a, Split) and a.grid is split.grid else a
        for a in labels
    ]
    out[axis] = None
    return simple(channels, tuple(out))


def reshaped(channels: Channels, labels: Labels, before: Sequence[Any], after: Sequence[Any], weights: int) -> Labels:
    """Labels after a reshape. Of several axes of channels that are merged one stays.

    It is the first that is not fixed and has positions of weights, which are numbered below `weights`.
    """
    runs = geometry.reshaped(before, after)
    labels = simple(channels, labels)
    for block in blocks(labels):
        if not any(set(block) <= set(run) for run, _ in runs):
            labels = settle(channels, labels, block)
    out: list[Any] = [None] * len(after)
    for run, into in runs:
        if len(run) == len(into) == 1:
            out[into.start] = labels[run.start]
            continue
        parts = [*blocks(labels), *((k,) for k in run if isinstance(labels[k], np.ndarray))]
        parts = sorted(part for part in parts if part[0] in run)
        if not parts or not all(isinstance(n, int) for k in (run, into) for n in (before, after)[k is into]):
            channels.fix(labels[run.start : run.stop], "reshaped to sizes that are not known")
            continue
        free = (part for part in parts if _removable(channels, _grid(labels, part), weights))
        kept = next(free, None)
        if kept is None:
            kept = parts[0]
            if len(run) > 1:  # copies of what stays
                channels.fix([_grid(labels, kept)], "merged with an axis that keeps its size, in reshape")
        for part in parts:
            if part != kept:
                channels.fix([labels[part[0]]], "merged with another axis of channels, in reshape")
        sizes = [before[k] for k in run]
        spread = _spread(_grid(labels, kept), [k - run.start for k in kept], sizes)
        shape = [after[k] for k in into]
        out[into.start : into.stop] = _entries(channels, spread.reshape(shape))
    return tuple(out)


def _removable(channels: Channels, grid: np.ndarray, weights: int) -> bool:
    return not channels.fixed(grid).all() and bool((channels.find(grid) < weights).any())


def _grid(labels: Labels, part: Sequence[int]) -> np.ndarray:
    first = labels[part[0]]
    return first.grid if isinstance(first, Split) else first


def _spread(grid: np.ndarray, axes: Sequence[int], sizes: Sequence[int]) -> np.ndarray:
    """A grid over some of the axes of an array, over all of them."""
    ordered = grid.transpose(np.argsort(axes))
    return np.broadcast_to(ordered.reshape([n if k in axes else 1 for k, n in enumerate(sizes)]), sizes)


def _entries(channels: Channels, spread: np.ndarray) -> list[Any]:
    """The labels of the axes of an array of channels."""
    roots = channels.find(spread.reshape(-1)).reshape(spread.shape)
    vary = [k for k in range(spread.ndim) if _varies(roots, k)]
    if not vary:  # one channel for all: it cannot be removed, as nothing would be left
        channels.fix([spread], "one channel is a whole axis, in reshape")
    grid = spread[tuple(slice(None) if k in vary else 0 for k in range(spread.ndim))]
    if len(vary) == 1:
        return [grid if k in vary else None for k in range(spread.ndim)]
    return [Split(grid, vary.index(k)) if k in vary else None for k in range(spread.ndim)]


class Open(NamedTuple):
    """All positions of an axis whose size is a symbol, such as that of a batch."""

    size: Any


def places(labels: Labels, shape: Sequence[Any], gone: np.ndarray) -> list[Any]:
    """The ascending positions that are left of each axis, where `gone` says it of every channel: int64, or `Open`."""
    whole = [np.arange(n) if isinstance(n, int) else Open(n) for n in shape]
    return [all_ if a is None else np.flatnonzero(~gone[a]) for all_, a in zip(whole, labels, strict=True)]
