"""What a channel is worth, and which of them stay."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from rigl_jax import checks, criteria, trees
from rigl_jax.base import Criterion, PyTree
from rigl_jax.channels.grouping import Group, Groups, arrays_of, checked_groups
from rigl_jax.channels.resizing import Kept
from rigl_jax.messages import kind, shown


def scores(
    groups: Sequence[Group],
    params: PyTree,
    criterion: Criterion = criteria.magnitude,
    batch: Any = None,
    *,
    reduce: str = "mean",
) -> tuple[np.ndarray, ...]:
    """What every channel of every group is worth: the scores of its weights, reduced to one number.

    The weights of a channel are those of all its members with two axes or more (the rows of one kernel, the columns of
    the next); only where there are none those with one axis (biases, scales). Scores that are NaN do not count: so a
    criterion chooses the leaves, as `only` does for Network Slimming.

    Args:
      groups: as `groups` gives them.
      params: the weights.
      criterion: `(params, batch) -> a tree parallel to params`, higher is more worth keeping, such as those of
        `rx.criteria`. Default: |w|.
      batch: what the criterion takes.
      reduce: "mean" over the weights of a channel, "sum", "norm" (root of the sum of squares) or "max".

    Returns:
      float64[size] for each group. A channel without any number has 0.

    Raises:
      ValueError: `reduce` is none of these; the criterion gives a tree of another form.

    Example:
      >>> import jax.numpy as jnp
      >>> import rigl_jax as rx
      >>> params = {"a": jnp.array([[3.0, -1.0]]), "b": jnp.array([[1.0], [2.0]])}
      >>> found = rx.channels.groups(lambda p, x: x @ p["a"] @ p["b"], params, jnp.ones((5, 1)))
      >>> [s.tolist() for s in rx.channels.scores(found, params)]
      [[2.0, 1.5]]
    """
    checked_groups("scores", groups)
    leaves = arrays_of("scores", params)
    if missing := {m.leaf for group in groups for m in group.members} - leaves.keys():
        raise ValueError(f"scores: params must hold the leaves of the groups, got none of the name {min(missing)!r}")
    if not isinstance(reduce, str) or reduce not in _REDUCE:
        raise ValueError(f"scores: reduce must be one of {sorted(_REDUCE)}, got {shown(reduce)}")
    checks.functions("scores", criterion=criterion)
    given = criterion(params, batch)
    if jax.tree.structure(given) != jax.tree.structure(params):
        raise ValueError("scores: criterion must give a tree parallel to params, got another one")
    arrays = {name: np.asarray(leaf, np.float64) for name, leaf in trees.named_leaves(given).items() if _counts(leaf)}
    return tuple(_pooled(group, arrays, reduce) for group in groups)


def _counts(leaf: Any) -> bool:
    return jnp.issubdtype(jnp.result_type(leaf), jnp.floating)


def _pooled(group: Group, arrays: dict[str, np.ndarray], reduce: str) -> np.ndarray:
    before, merge, after = _REDUCE[reduce]
    total, count = np.zeros(group.size), np.zeros(group.size)
    present = [m for m in group.members if m.leaf in arrays]
    filled = [m for m in present if arrays[m.leaf].ndim > 1 and not np.isnan(arrays[m.leaf]).all()]
    filled = filled or [m for m in present if not np.isnan(arrays[m.leaf]).all()]
    for member in filled:
        rows = np.moveaxis(arrays[member.leaf], member.axis, 0)[member.positions].reshape(group.size, -1)
        there = ~np.isnan(rows)
        total = merge(total, before(np.where(there, rows, 0)))
        count += there.sum(axis=1)
    return after(total, np.maximum(count, 1))


_REDUCE: dict[str, tuple[Callable[..., Any], Callable[..., Any], Callable[..., Any]]] = {
    "mean": (lambda rows: rows.sum(axis=1), np.add, lambda total, count: total / count),
    "sum": (lambda rows: rows.sum(axis=1), np.add, lambda total, count: total),
    "norm": (lambda rows: np.square(rows).sum(axis=1), np.add, lambda total, count: np.sqrt(total)),
    "max": (lambda rows: rows.max(axis=1), np.maximum, lambda total, count: total),
}


def select(
    groups: Sequence[Group],
    scores: Sequence[np.ndarray],
    *,
    remove: float | None = None,
    macs: float | None = None,
    scope: str = "global",
    round_to: int = 1,
) -> Kept:
    """The channels that stay: those with the highest scores.

    Of equal scores the earlier channel stays. Groups that cannot be removed are left alone, and one channel of every
    group stays, the best.

    Args:
      groups: as `groups` gives them.
      scores: number[size] for each of them. NaN counts as the lowest.
      remove: the share of the channels that goes, from 0 to below 1, rounded to the nearest number of channels: of all
        that can be removed ("global"), or of every group ("layer").
      macs: instead, the share of the model's multiply-accumulates that may be left, above 0: as few channels as will
        do go.
      scope: "global" ranks all channels together; "layer" takes the same share of every group.
      round_to: the number of channels that a group keeps is rounded up to a multiple of it, and to all of a group that
        has fewer.

    Returns:
      `{leaf: {axis: ascending positions that stay}}` of every axis that loses some, as `shrink` takes it.

    Raises:
      ValueError: not one of `remove` and `macs`, one out of its range, scores of another form, `macs` that cannot be
        reached.

    Example:
      >>> import jax.numpy as jnp
      >>> import rigl_jax as rx
      >>> params = {"a": jnp.array([[3.0, -1.0, 0.5, 2.0]]), "b": jnp.ones((4, 1))}
      >>> found = rx.channels.groups(lambda p, x: x @ p["a"] @ p["b"], params, jnp.ones((5, 1)))
      >>> keep = select(found, rx.channels.scores(found, params), remove=0.5)
      >>> {leaf: {axis: at.tolist() for axis, at in axes.items()} for leaf, axes in keep.items()}
      {'a': {1: [0, 3]}, 'b': {0: [0, 3]}}
    """
    checked_groups("select", groups, scores=scores)
    _check_share(groups, remove, macs, scope, round_to)
    free = [g for g, group in enumerate(groups) if not group.why]
    ranked = {g: _ranked(groups[g], scores[g]) for g in free}  # the first to go first; the best is not among them
    owner = np.concatenate([np.full(groups[g].size - 1, g) for g in free] or [np.zeros(0, np.int64)])
    if scope == "layer":
        worth = np.concatenate([np.arange(1, groups[g].size) / groups[g].size for g in free] or [np.zeros(0)])
    else:
        worth = np.concatenate([_numbers(scores[g])[ranked[g]] for g in free] or [np.zeros(0)])
    owner = owner[np.lexsort((-owner, worth))]  # of equal scores the later group's goes first

    def removed(counts: np.ndarray) -> list[np.ndarray]:
        return [_lowest(group, ranked.get(g), int(counts[g]), round_to) for g, group in enumerate(groups)]

    def first(n: int) -> list[np.ndarray]:
        return removed(np.bincount(owner[:n], minlength=len(groups)))

    if remove is None:
        return _kept(groups, _within(groups, macs, first, len(owner)))
    if scope == "layer":
        return _kept(groups, removed(np.array([round(remove * group.size) for group in groups])))
    return _kept(groups, first(round(remove * sum(groups[g].size for g in free))))


def _check_share(groups: Any, remove: Any, macs: Any, scope: str, round_to: int) -> None:
    if (remove is None) == (macs is None):
        raise ValueError(f"select: expected either remove or macs, got remove={shown(remove)}, macs={shown(macs)}")
    if remove is not None:
        checks.number("select", "remove", remove, "must be in [0, 1)", lambda x: 0 <= x < 1)
    else:
        checks.number("select", "macs", macs, "must be above 0, at most 1", lambda x: 0 < x <= 1)
        if not isinstance(groups, Groups):
            raise ValueError(f"select: with macs, groups must be what rx.channels.groups gives, got {kind(groups)}")
    if not isinstance(scope, str) or scope not in ("global", "layer"):
        raise ValueError(f"select: scope must be 'global' or 'layer', got {shown(scope)}")
    if not checks.is_whole(round_to, 1):
        raise ValueError(f"select: round_to must be a whole number, 1 or more, got {shown(round_to)}")


def _numbers(score: Any) -> np.ndarray:
    score = np.asarray(score, np.float64)
    return np.where(np.isnan(score), -np.inf, score)


def _ranked(group: Group, score: Any) -> np.ndarray:
    """The channels of a group but the best, in the order in which they go: of equal scores the later one first."""
    if np.shape(score) != (group.size,):
        raise ValueError(f"select: scores of {group.name!r} must be [{group.size}], got an array of {np.shape(score)}")
    return np.argsort(-_numbers(score), kind="stable")[:0:-1]


def _lowest(group: Group, ranked: np.ndarray | None, count: int, round_to: int) -> np.ndarray:
    """bool[size]: which channels go, of `count` that should."""
    gone = np.zeros(group.size, bool)
    if ranked is not None:
        left = max(group.size - count, 1)
        left = min(group.size, -(-left // round_to) * round_to)
        gone[ranked[: group.size - left]] = True
    return gone


def _within(groups: Any, macs: Any, first: Callable[[int], list[np.ndarray]], most: int) -> list[np.ndarray]:
    """As few channels as bring the MACs to a share of what they were."""
    whole, low, high = groups.macs(), 0, most
    least = groups.macs(first(most))
    if least > macs * whole:
        raise ValueError(f"select: macs must be at least {least / whole:.4f} (one channel a group), got {macs}")
    while low < high:
        middle = (low + high) // 2
        low, high = (low, middle) if groups.macs(first(middle)) <= macs * whole else (middle + 1, high)
    return first(low)


def _kept(groups: Sequence[Group], removed: Sequence[np.ndarray]) -> Kept:
    sizes: dict[tuple[str, int], int] = {}
    gone: dict[tuple[str, int], list[np.ndarray]] = {}
    for group, which in zip(groups, removed, strict=True):
        for member in group.members:
            place = member.leaf, member.axis
            sizes[place] = sizes.get(place, 0) + member.positions.size
            if which.any():
                gone.setdefault(place, []).append(member.positions[which].reshape(-1))
    keep: Kept = {}
    for (leaf, axis), positions in gone.items():
        keep.setdefault(leaf, {})[axis] = np.delete(np.arange(sizes[leaf, axis]), np.concatenate(positions))
    return keep
