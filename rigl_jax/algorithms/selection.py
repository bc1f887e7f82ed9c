"""What several pruning methods share: full masks, and the best of each leaf or of all leaves together."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from rigl_jax import topology, trees
from rigl_jax.base import Leaf, Masks, Plan, PyTree


def full(plan: Plan, params: PyTree) -> Masks:
    """Masks with every weight active: those of a dense network that is to become sparse.

    Raises:
      ValueError: params do not fit the plan; the message names the leaf.
    """
    topology.check_fit(plan, params)
    return trees.map_sparse(lambda leaf, _: jnp.ones(leaf.shape, bool), plan, params)


def everything(masks: Masks) -> Masks:
    """The tree of Nones: all weights, for `Algorithm.stored` and `Algorithm.trained`."""
    return jax.tree.map(lambda _: None, masks)


def best(
    plan: Plan,
    ranked: PyTree,
    n_active: Callable[[Leaf], Any] = lambda leaf: leaf.n_active,
    *,
    among: Masks | None = None,
    jointly: bool = False,
    min_active: int = 1,
) -> Masks:
    """The weights with the highest scores.

    Args:
      plan: from `make_plan`.
      ranked: tree of scores parallel to params, of one dtype if `jointly`.
      n_active: how many units stay in each group of a leaf; may be traced. Default: the plan's count.
      among: masks of those that may stay. Default: all.
      jointly: one ranking over all leaves, which must be unstructured; only the sum of the counts holds then.
      min_active: so many of each leaf stay whatever their score, so that no layer is cut off; only with `jointly`.
    """
    if jointly:
        if among is not None:
            ranked = trees.map_masked(lambda mask, s: jnp.where(mask, s, -jnp.inf), among, ranked)
        total = sum(n_active(leaf) for leaf in plan.values())
        return topology.prune_jointly(plan, ranked, total, min_active=min_active)
    if among is None:
        among = everything(ranked)
    return trees.map_sparse(
        lambda leaf, s, mask: topology.prune(leaf.structure, s, n_active(leaf), among=mask), plan, ranked, among
    )
