"""Pruning and rewiring of one weight."""

from __future__ import annotations

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from rigl_jax import arguments as rules
from rigl_jax import checks
from rigl_jax.arguments import arguments
from rigl_jax.base import Array, LayerPlan, Structure
from rigl_jax.topology.order import after
from rigl_jax.topology.together import Selection, Selections, selected
from rigl_jax.topology.topk import check_count, count_true


@arguments(structure=rules.structure, scores=rules.array(), n_active=rules.count)
def prune(structure: Structure, scores: Array, n_active: Any, *, among: Array | None = None) -> Array:
    """A mask of the `n_active` best units of each group.

    Args:
      structure: how the weight is cut into units and groups.
      scores: float[*shape], one score for each weight; the structure pools them.
      n_active: int, or integer array over groups, how many units stay in each group. May be traced.
      among: bool[*shape], the units that may stay. Default: all.

    Returns:
      bool[*shape] in the structure.

    Raises:
      ValueError: scores or `among` of another shape or type, an `n_active` that is no integer.

    >>> from rigl_jax.structures import unstructured
    >>> prune(unstructured(), jnp.array([[0.1, -2.0], [3.0, 0.5]]), 2).tolist()
    [[False, False], [True, True]]
    """
    return selected(pruning(structure, scores, n_active, among))


def pruning(structure: Structure, scores: Array, n_active: Any, among: Array | None = None) -> Selections[Array]:
    """`prune`, as a ranking."""
    checks.same_shape("prune", jnp.shape(scores), scores=scores, among=among)
    pooled = structure.pool(scores)
    units = None if among is None else structure.active(among)
    kept = yield Selection(pooled, n_active, structure.axes(pooled.shape), units)
    return structure.expand(kept, scores.shape)


class Rewiring(NamedTuple):
    """One weight after drop and growth, or a tree of each for all weights.

    Attributes:
      mask: the new mask.
      kept: the part of it that was not dropped.
      fresh: the part of it that was not active before.
    """

    mask: Any
    kept: Any
    fresh: Any

    @property
    def restarted(self) -> Any:
        """The part of the new mask that was not kept: what is fresh, and what was dropped and grown again."""
        return jax.tree.map(lambda mask, kept: mask & ~kept, self.mask, self.kept)


@arguments(
    structure=rules.structure,
    mask=rules.array(),
    drop=rules.array(),
    grow=rules.array(),
    n_drop=rules.count,
    n_active=rules.optional(rules.count),
    regrow_dropped=rules.flag,
)
def rewire(
    structure: Structure,
    mask: Array,
    drop: Array,
    grow: Array,
    n_drop: Any,
    n_active: Any = None,
    *,
    regrow_dropped: bool = True,
) -> Rewiring:
    """Drops the `n_drop` active units that score lowest and grows the inactive ones that score highest.

    The lowest units of the leaf (in a stack: of each layer) are dropped, whatever their group; each group then grows
    back to its count. For one group, unstructured sparsity, this is Algorithm 1 of Evci et al. (2020). In small groups
    a share of each group would be rounded down to 0: with 2:4 nothing would be rewired.

    Args:
      structure: how the weight is cut into units and groups.
      mask: bool[*shape], the current mask, in the structure.
      drop: float[*shape], the lowest are dropped. Inactive entries are never read.
      grow: float[*shape], the highest are grown. Entries of kept units are never read.
      n_drop: int, how many units of the leaf are dropped, in a stack of each layer; or an array over the layers, that
        broadcasts against the units. May be traced.
      n_active: int or integer array over groups, how many units are active afterwards. Default: as many as before.
      regrow_dropped: whether a unit that was just dropped may be grown again (as in the authors' code). If not, such
        units are grown only if there are no others, so that the count stays exact.

    Returns:
      `Rewiring(mask, kept, fresh)`, all bool[*shape] and in the structure: the new mask, with exactly `n_active` active
      units in each group, the part of it that was not dropped, and the part of it that was not active before.

    Ties go to the lower index, NaN scores are dropped first and grown last.
    """
    return selected(rewiring(structure, mask, drop, grow, n_drop, n_active, regrow_dropped))


def rewiring(
    structure: Structure, mask: Array, drop: Array, grow: Array, n_drop: Any, n_active: Any, regrow_dropped: bool
) -> Selections[Rewiring]:
    """`rewire`, as a ranking."""
    checks.same_shape("rewire", jnp.shape(mask), mask=mask, drop=drop, grow=grow)
    check_count("rewire: n_drop", n_drop)
    active = structure.active(mask)
    axes, layer = structure.axes(active.shape), structure.layer_axes(active.shape)
    # Counting takes half a copy of the weight, and a score a whole one: one after the other.
    n_kept = count_true(active, layer) - n_drop
    n_active = count_true(active, axes) if n_active is None else n_active
    kept = yield Selection(structure.pool(*after(n_kept, drop)), n_kept, layer, active)
    n_grow = n_active - count_true(kept, axes)
    grow = structure.pool(*after(n_grow, grow))
    if not regrow_dropped:
        grow = jnp.where(active & ~kept, -jnp.inf, grow)
    grown = yield Selection(grow, n_grow, axes, ~kept)
    new = kept | grown
    return Rewiring(*(structure.expand(part, mask.shape) for part in (new, kept, new & ~active)))


def rewire_ablating(
    layer: LayerPlan, mask: Array, drop: Array, grow: Array, fraction: Any, min_salient: int | None
) -> Selections[Rewiring]:
    """SRigL's rewiring, as a ranking: groups with few salient units are removed, and the others share their weights.

    Salient units are those that RigL would keep or grow. A group with fewer than `min_salient` of them loses all its
    units, but enough groups stay to hold the units of the layer: those with the most salient ones. Each group that is
    left gets (units of the layer) // (groups left) units: first those that were not dropped, by drop score, then those
    with the highest grow score.

    Args:
      layer: of the plan.
      mask: bool[*shape], the current mask.
      drop: float[*shape], the lowest are dropped.
      grow: float[*shape], the highest are grown.
      fraction: scalar in [0, 1], the share of the active units that is dropped, by floor.
      min_salient: a number of units; None: no group is removed.
    """
    structure = layer.structure
    drop, grow, active = structure.pool(drop), structure.pool(grow), layer.active(mask)
    axes, together = structure.axes(active.shape), layer.layer_axes()
    total = layer.active_units // layer.layers

    n = layer.count_units(active)
    n_drop = count(fraction, n)
    kept = yield Selection(drop, n - n_drop, together, active)
    salient = kept | (yield Selection(grow, n_drop, together, ~kept))

    counts = jnp.sum(salient, axis=axes, keepdims=True, dtype=jnp.int32)
    fewest = -(-total // layer.group_size)  # groups that it takes to hold all units
    alive = counts >= (-1 if min_salient is None else min_salient)
    alive = alive | (yield Selection(counts.astype(jnp.float32), fewest, together))
    each = jnp.where(alive, total // layer.count_units(alive), 0)

    kept = yield Selection(drop, each, axes, kept)
    missing = each - jnp.sum(kept, axis=axes, keepdims=True, dtype=jnp.int32)
    grown = yield Selection(grow, missing, axes, ~kept)
    new = kept | grown
    return Rewiring(*(structure.expand(part, layer.shape) for part in (new, kept, new & ~active)))


@arguments(fraction=rules.numbers, n=rules.count)
def count(fraction: Any, n: Any) -> Array:
    """How many of `n` units a fraction moves: floor(fraction * n) in float32, from 0 to n.

    This is the rule of the authors' code. Above 2^24 units the product has a relative error of 2^-24; the number of
    active units does not depend on it, because as many are grown as were dropped.
    """
    return jnp.clip(jnp.floor(jnp.asarray(fraction, jnp.float32) * jnp.asarray(n, jnp.float32)).astype(jnp.int32), 0, n)
