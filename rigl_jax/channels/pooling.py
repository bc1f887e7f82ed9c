"""What a channel is worth by the scores of its weights."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from rigl_jax import checks, criteria, trees
from rigl_jax.base import Criterion, PyTree
from rigl_jax.channels.grouping import Group, arrays_of, checked_groups
from rigl_jax.messages import shown


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
    the next); only where there are none those with one axis (biases, scales). A leaf whose scores are all NaN does not
    count: so a criterion chooses the leaves, as `only` does for Network Slimming.

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
      ValueError: `reduce` is none of these; the criterion gives a tree of another form, or NaN for some weights of a
        leaf and numbers for others.

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
    members = {member.leaf for group in groups for member in group.members}
    if broken := [n for n in arrays if n in members and 0 < np.isnan(arrays[n]).sum() < arrays[n].size]:
        raise ValueError(f"scores: criterion must give a number for each weight, got NaN in leaf {broken[0]!r}")
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
