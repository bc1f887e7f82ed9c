"""Which channels stay."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from rigl_jax import checks
from rigl_jax.channels.grouping import Group, Groups, checked_groups
from rigl_jax.channels.resizing import Kept
from rigl_jax.messages import kind, shown


def select(
    groups: Sequence[Group],
    scores: Sequence[Any],
    *,
    remove: float | None = None,
    macs: float | None = None,
    parameters: float | None = None,
    latency: float | None = None,
    measure: Callable[[Kept], float] | None = None,
    scope: str = "global",
    normalize: str = "none",
    round_to: int = 1,
) -> Kept:
    """The channels that stay: those with the highest scores.

    Of equal scores the earlier channel stays. Groups that cannot be removed are left alone, and one channel of every
    group stays, the best: no layer is emptied. How many go is given by one of `remove`, `macs`, `parameters` and
    `latency`. By a cost, as few channels go as bring it to the share of what it was.

    Args:
      groups: as `groups` gives them.
      scores: number[size] for each of them. NaN counts as the lowest.
      remove: the share of the channels that goes, from 0 to below 1, rounded to the nearest number of channels: of all
        that can be removed ("global"), of every group ("layer") or of every class of groups ("isomorphic").
      macs: the share of the model's multiply-accumulates that may be left, above 0.
      parameters: the share of the entries of params, batch statistics included, that may be left, above 0.
      latency: the share of what `measure` gives for the whole model that may be left, above 0.
      measure: `keep -> seconds`, of a model that is shrunk to what stays (`{}`: the whole one), for `latency`; called
        about log2(number of channels) times. `rx.channels.latency` measures one.
      scope: "global" ranks all channels together; "layer" takes the same share of every group; "isomorphic" ranks the
        groups of one class together and takes the same share of every class: groups that occur in the same kinds of
        leaves (by the last parts of their names, without numbers, and by their axes) and are tied by the same
        operations, as those of equal blocks (Fang et al. 2024).
      normalize: what the scores of each group are divided by first, so that groups can be ranked together: "none",
        "sum", "mean", "max" or "norm" (L2) of them; "minmax" (0 to 1), "zscore" (mean 0, deviation 1), or "lamp" (each
        by the sum of those that are not lower, Lee et al. 2021). It changes nothing within a group.
      round_to: the number of channels that a group keeps is rounded up to a multiple of it, and to all of a group that
        has fewer.

    Returns:
      `{leaf: {axis: ascending positions that stay}}` of every axis that loses some, as `shrink` takes it.

    Raises:
      ValueError: not one of the four shares, one out of its range or one that cannot be reached, scores of another
        form.

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
    shares = {"remove": remove, "macs": macs, "parameters": parameters, "latency": latency}
    name, share = _share(groups, shares, measure)
    _check_options(scope, normalize, round_to)
    free = [g for g, group in enumerate(groups) if not group.why]
    given = {g: _normalized(normalize, _numbers(groups[g], scores[g])) for g in free}
    ranked = {g: np.argsort(-score, kind="stable")[:0:-1] for g, score in given.items()}  # the best is not among them
    queues = [_queue(members, given, ranked) for members in _classes(groups, free, scope)]

    def removed(owners: np.ndarray) -> list[np.ndarray]:
        counts = np.bincount(owners, minlength=len(groups))
        return [_lowest(group, ranked.get(g), int(counts[g]), round_to) for g, group in enumerate(groups)]

    if name == "remove":
        first = [owner[: round(share * total)] for owner, total in queues]
        return _kept(groups, removed(np.concatenate([*first, np.zeros(0, np.int64)])))
    owner = np.concatenate([owner for owner, _ in queues] or [np.zeros(0, np.int64)])
    worth = np.concatenate([np.arange(1, len(owner) + 1) / total for owner, total in queues] or [np.zeros(0)])
    owner = owner[np.lexsort((-owner, worth))]
    cost: Any = (lambda gone: measure(_kept(groups, gone))) if measure else getattr(groups, name)  # pyrefly: ignore
    return _kept(groups, _within(name, share, cost, lambda n: removed(owner[:n]), len(owner)))


def _share(groups: Any, shares: dict[str, float | None], measure: Any) -> tuple[str, float]:
    """The one share that is given, and its name."""
    given = [name for name, value in shares.items() if value is not None]
    if len(given) != 1:
        raise ValueError(f"select: expected one of remove, macs, parameters and latency, got {given or None}")
    (name,) = given
    if (name == "latency") != (measure is not None):
        raise ValueError(f"select: measure must be given with latency and only then, got {shown(measure)}")
    checks.optional_functions("select", measure=measure)
    if name == "remove":
        return name, checks.number("select", name, shares[name], "must be in [0, 1)", lambda x: 0 <= x < 1)
    if name != "latency" and not isinstance(groups, Groups):
        raise ValueError(f"select: with {name}, groups must be what rx.channels.groups gives, got {kind(groups)}")
    return name, checks.number("select", name, shares[name], "must be above 0, at most 1", lambda x: 0 < x <= 1)


def _check_options(scope: Any, normalize: Any, round_to: Any) -> None:
    for name, value, known in (("scope", scope, _SCOPES), ("normalize", normalize, tuple(_NORMALIZE))):
        if not isinstance(value, str) or value not in known:
            raise ValueError(f"select: {name} must be one of {', '.join(known)}, got {shown(value)}")
    if not checks.is_whole(round_to, 1):
        raise ValueError(f"select: round_to must be a whole number, 1 or more, got {shown(round_to)}")


_SCOPES = ("global", "layer", "isomorphic")


def _numbers(group: Group, score: Any) -> np.ndarray:
    if np.shape(score) != (group.size,):
        raise ValueError(f"select: scores of {group.name!r} must be [{group.size}], got an array of {np.shape(score)}")
    return np.asarray(score, np.float64)


def _normalized(how: str, score: np.ndarray) -> np.ndarray:
    """Scores in a common unit; what is no number is lowest."""
    finite = np.isfinite(score)
    out = np.where(np.isnan(score), -np.inf, score)
    if finite.any():
        out[finite] = _NORMALIZE[how](score[finite])
    return out


def _over(unit: Callable[[np.ndarray], Any]) -> Callable[[np.ndarray], np.ndarray]:
    return lambda x: x / (unit(x) or 1.0)


def _lamp(x: np.ndarray) -> np.ndarray:
    order = np.argsort(-x, kind="stable")
    out = np.empty_like(x)
    total = np.cumsum(x[order])
    out[order] = x[order] / np.where(total == 0, 1, total)
    return out


_NORMALIZE: dict[str, Callable[[np.ndarray], np.ndarray]] = {
    "none": lambda x: x,
    "sum": _over(np.sum),
    "mean": _over(np.mean),
    "max": _over(np.max),
    "norm": _over(np.linalg.norm),
    "minmax": lambda x: _over(np.max)(x - x.min()),
    "zscore": lambda x: _over(np.std)(x - x.mean()),
    "lamp": _lamp,
}


def _classes(groups: Sequence[Group], free: list[int], scope: str) -> list[list[int]]:
    """The groups that are ranked together."""
    if scope == "global":
        return [free] if free else []
    found: dict[Any, list[int]] = {}
    for g in free:
        found.setdefault(g if scope == "layer" else _kind(groups[g]), []).append(g)
    return list(found.values())


def _kind(group: Group) -> Any:
    """What isomorphic groups have in common."""
    places = {(re.sub(r"\d+", "", m.leaf.rpartition("/")[2]), m.axis) for m in group.members}
    return group.ties, group.exact, tuple(sorted(places))


def _queue(members: list[int], given: dict[int, np.ndarray], ranked: dict[int, np.ndarray]) -> tuple[np.ndarray, int]:
    """The owners of channels in the order in which these go, and how many channels there are in all."""
    owner = np.concatenate([np.full(len(ranked[g]), g) for g in members])
    worth = np.concatenate([given[g][ranked[g]] for g in members])
    return owner[np.lexsort((-owner, worth))], sum(len(given[g]) for g in members)  # of equal scores the later group's


def _lowest(group: Group, ranked: np.ndarray | None, count: int, round_to: int) -> np.ndarray:
    """bool[size]: which channels go, of `count` that should."""
    gone = np.zeros(group.size, bool)
    if ranked is not None:
        left = max(group.size - count, 1)
        left = min(group.size, -(-left // round_to) * round_to)
        gone[ranked[: group.size - left]] = True
    return gone


def _within(name: str, share: float, cost: Any, first: Callable[[int], list[np.ndarray]], most: int) -> Any:
    """As few channels as bring a cost to a share of what it was."""
    whole, low, high = cost(first(0)), 0, most
    least = cost(first(most))
    if least > share * whole:
        raise ValueError(f"select: {name} must be at least {least / whole:.4f} (one channel a group), got {share}")
    while low < high:
        middle = (low + high) // 2
        low, high = (low, middle) if cost(first(middle)) <= share * whole else (middle + 1, high)
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
