"""What several pruning methods share: full masks, and the best of each leaf or of all leaves together."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from rigl_jax import checks, topology, trees
from rigl_jax.base import Array, LayerPlan, Masks, Plan, PyTree
from rigl_jax.messages import shown


def full(plan: Plan, params: PyTree) -> Masks:
    """Masks with every weight active: those of a dense network that is to become sparse.

    Raises:
      ValueError: params do not fit the plan; the message names the leaf.
    """
    topology.check_fit(plan, params)
    return trees.map_sparse(lambda leaf, p: jnp.ones_like(p, bool), plan, params)


def everything(masks: Masks) -> Masks:
    """The tree of Nones: all weights, for `Algorithm.stored` and `Algorithm.trained`."""
    return jax.tree.map(lambda _: None, masks)


def check_jointly(who: str, plan: Plan, jointly: bool, min_active: int) -> int:
    """Checks on construction, not at the step that first prunes, that `best(..., jointly=True)` can serve.

    Returns:
      `min_active`, as a Python number.

    Raises:
      ValueError: a leaf that is not unstructured, or a `min_active` that is negative or needs more than the plan's
        total, which would then not be exact; a total of 2**31 or more. Nothing is asked of these without `jointly`.
    """
    checks.plan(who, plan)
    min_active = checks.plain(min_active)
    if not jointly:
        return min_active
    for leaf in plan.values():
        if not leaf.is_unstructured:
            raise ValueError(
                f"{who}: jointly=True ranks single weights of all leaves; leaf {leaf.name!r} must be unstructured, "
                f"got structure {leaf.structure.name!r}"
            )
    total = sum(leaf.active_units for leaf in plan.values())
    checks.total(who, "weights that stay active, ranked together,", total)
    if not checks.is_whole(min_active) or sum(_least(leaf, min_active) for leaf in plan.values()) > total:
        raise ValueError(
            f"{who}: min_active is a number of weights of each leaf, 0 or more, for which the plan's total of {total} "
            f"over {len(plan)} leaves has room, got {shown(min_active)}"
        )
    return min_active


def _least(leaf: LayerPlan, min_active: int) -> int:
    return leaf.groups * min(min_active, leaf.group_size)


def check_loss(who: str, loss: Callable[[PyTree], Array], params: PyTree) -> None:
    """Checks that the loss is a function to one real number; traces it.

    Raises:
      ValueError: something else.
    """
    check_callable(who, loss)
    out = jax.eval_shape(loss, params)
    if not (hasattr(out, "shape") and out.shape == () and jnp.issubdtype(out.dtype, jnp.floating)):
        raise ValueError(f"{who}: loss must return one real number, got {shown(out)}")


def check_callable(who: str, loss: Any) -> None:
    """Checks that the loss is a function; `check_loss` traces it, once there are params."""
    if not callable(loss):
        raise ValueError(f"{who}: loss must be a function of the params, got {shown(loss)}")


def best(
    plan: Plan,
    ranked: PyTree,
    n_active: Callable[[LayerPlan], Any] = lambda leaf: leaf.n_active,
    *,
    among: Masks | None = None,
    jointly: bool = False,
    min_active: int = 1,
) -> Masks:
    """The weights with the highest scores.

    Args:
      plan: from `make_plan`.
      ranked: tree of scores parallel to params.
      n_active: how many units stay in each group of a leaf; may be traced. Default: the plan's count.
      among: masks of those that may stay. Default: all.
      jointly: one ranking over all leaves, which must be unstructured; only the sum of the counts holds then.
      min_active: so many of each leaf stay whatever their score, so that no layer is cut off; only with `jointly`.
    """
    if jointly:
        if among is not None:
            ranked = trees.map_masked(lambda mask, s: jnp.where(mask, s, jnp.asarray(-jnp.inf, s.dtype)), among, ranked)
        total = sum(n_active(leaf) * leaf.layers for leaf in plan.values())
        return topology.prune_jointly(plan, ranked, total, min_active=min_active)
    if among is None:
        among = everything(ranked)
    return trees.map_sparse(
        lambda leaf, s, mask: topology.prune(leaf.structure, s, n_active(leaf), among=mask), plan, ranked, among
    )
