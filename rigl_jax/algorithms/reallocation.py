"""What methods share that move weights from one leaf to another."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import jax.numpy as jnp

from rigl_jax import checks, topology, trees
from rigl_jax.base import Array, LayerPlan, Masks, Plan
from rigl_jax.scores import Scores


def pools(plan: Plan) -> list[list[LayerPlan]]:
    """The leaves among which units can move while the number of weights stays exact.

    A unit is worth another where both have as many weights and no group has a count to keep: leaves of one group pool
    with those of equal unit size. A leaf of several groups (N:M, constant fan-in, a stack) is alone, and keeps its
    counts.

    >>> import jax, rigl_jax as rx
    >>> shapes = {name: jax.ShapeDtypeStruct((8, 8), "float32") for name in "abc"}
    >>> rules = [("c", rx.structures.fan_in()), (".*", rx.unstructured())]
    >>> [[leaf.name for leaf in pool] for pool in pools(rx.make_plan(shapes, 0.5, rules=rules))]
    [['a', 'b'], ['c']]
    """
    found: dict[Any, list[LayerPlan]] = {}
    for leaf in plan.values():
        found.setdefault(leaf.name if leaf.groups > 1 else leaf.unit_size, []).append(leaf)
    return list(found.values())


def check_totals(who: str, plan: Plan) -> None:
    """Refuses a plan in which the active units of a pool are more than int32 holds.

    Raises:
      ValueError: says how many.
    """
    for pool in pools(plan):
        if len(pool) > 1:
            active = sum(leaf.active_units for leaf in pool)
            checks.total(who, "active units among which counts move", active)


def n_active(plan: Plan, masks: Masks) -> dict[str, Array]:
    """How many units of each leaf are active, int32, all groups together; in a stack an array over its layers."""
    found = trees.named_leaves(masks)
    pooled = {name: leaf.active(found[name]) for name, leaf in plan.items()}
    return {name: leaf.count_units(pooled[name]) for name, leaf in plan.items()}


def drop_and_reallocate(
    plan: Plan,
    masks: Masks,
    drop: Scores,
    grow: Scores,
    n_drop: Mapping[str, Array],
    worth: Mapping[str, Any],
    *,
    regrow_dropped: bool = True,
) -> topology.Rewiring:
    """Drops in each leaf, then grows as many in all, more in the leaves of more worth.

    Args:
      plan: from `make_plan`; its counts are not read.
      masks: the current masks.
      drop: what is ranked, as in `topology.drop_and_grow`; the lowest active ones are dropped.
      grow: the same; the highest are grown.
      n_drop: units to drop, by name (in a stack, of each layer); one active unit of each stays in any case, so that no
        layer is cut off.
      worth: at least 0, by name; leaves of a pool get what was dropped in it in proportion (`topology.redistribute`).
      regrow_dropped: see `topology.rewire`.

    Returns:
      The new masks, and of these the parts that were not dropped. Each pool has as many active weights as before. Where
      a score that is read is NaN or +inf in any leaf, all masks are as before.
    """
    before = n_active(plan, masks)
    n_drop = {name: jnp.clip(n, 0, jnp.maximum(before[name] - 1, 0)) for name, n in n_drop.items()}
    after: dict[str, Array] = {}
    for pool in pools(plan):
        if len(pool) == 1:
            continue
        active, dropped = (jnp.stack([counts[leaf.name] for leaf in pool]) for counts in (before, n_drop))
        weights = jnp.stack([jnp.asarray(worth[leaf.name], jnp.float32) for leaf in pool])
        free = jnp.array([leaf.group_size for leaf in pool], jnp.int32) - active
        total = jnp.sum(dropped)
        if regrow_dropped:
            grown = topology.redistribute(total, weights, free + dropped)
        else:  # what was just dropped comes back only where no leaf has another place
            grown = topology.redistribute(total, weights, free)
            grown = grown + topology.redistribute(total - jnp.sum(grown), weights, dropped)
        counts = active - dropped + grown
        after |= {leaf.name: counts[i] for i, leaf in enumerate(pool)}
    return topology.rewire_tree(plan, masks, drop, grow, n_drop, after, regrow_dropped=regrow_dropped, together=True)
