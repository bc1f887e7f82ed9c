"""Pruning to counts: each layer by itself, or all layers in one ranking."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from rigl_jax import arguments as rules
from rigl_jax import checks, trees
from rigl_jax.arguments import arguments
from rigl_jax.base import Array, LayerPlan, Masks, Plan, PyTree
from rigl_jax.messages import shown
from rigl_jax.topology.leaf import pruning
from rigl_jax.topology.together import map_selections
from rigl_jax.topology.topk import select, select_jointly
from rigl_jax.topology.tree import hold, sound


class Ranking(NamedTuple):
    """Which weights compete when a network is pruned. Made by `ranking`, which checks it.

    Attributes:
      plan: from `make_plan`.
      jointly: all leaves compete in one ranking, of which only the total holds. False: each leaf keeps its count.
      min_active: the least number of weights that stay in each leaf (in a stack, in each layer); only with
        `jointly`.
    """

    plan: Plan
    jointly: bool
    min_active: int

    def best(
        self,
        scores: PyTree,
        n_active: Callable[[LayerPlan], Any] = lambda layer: layer.n_active,
        *,
        among: Masks | None = None,
    ) -> Masks:
        """Masks of the highest scores; ties go to the earlier leaf, then to the lower index.

        Args:
          scores: tree parallel to params.
          n_active: how many units stay in each group of a leaf; may be traced. Default: the plan's count.
          among: masks of those that may stay. Default: all.
        """
        if self.jointly:
            total = sum(n_active(layer) * layer.layers for layer in self.plan.values())
            return prune_jointly(self.plan, scores, total, min_active=self.min_active, among=among)
        among = jax.tree.map(lambda _: None, scores) if among is None else among
        return map_selections(
            lambda layer, s, mask: pruning(layer.structure, s, n_active(layer), mask), self.plan, scores, among
        )

    def hold(self, scores: PyTree, masks: Masks, before: Masks, *, read: Masks | None = None) -> Masks:
        """The new masks; those before where a score that was read is NaN or +inf: in that leaf, or jointly in all."""
        return hold(self.plan, sound(self.plan, scores, read), masks, before, together=self.jointly)


def ranking(who: str, plan: Plan, *, jointly: Any = False, min_active: Any = 1) -> Ranking:
    """A `Ranking`, checked when a method is made and not at the step that first prunes.

    Raises:
      ValueError: a leaf that is not unstructured, a total of 2**31 or more, or a `min_active` that is negative or needs
        more than the plan's total, which would then not be exact. Without `jointly` leaves and totals are not checked.
    """
    checks.plan(who, plan)
    if not isinstance(jointly, (bool, np.bool_)):
        raise ValueError(f"{who}: jointly must be True or False, got {shown(jointly)}")
    total = sum(layer.active_units for layer in plan.values())
    if jointly:
        _check_unstructured(who, plan)
        checks.total(who, "weights that stay active, ranked together,", total)
    if not checks.is_whole(min_active) or (jointly and _least(plan.values(), int(min_active)) > total):
        raise ValueError(
            f"{who}: min_active is a number of weights of each leaf, 0 or more, for which the plan's total of {total} "
            f"over {len(plan)} leaves has room, got {shown(min_active)}"
        )
    return Ranking(plan, bool(jointly), int(min_active))


@arguments(plan=rules.plan, n_active=rules.optional(rules.count), min_active=rules.count)
def prune_jointly(
    plan: Plan, scores: PyTree, n_active: Any = None, *, min_active: int = 1, among: Masks | None = None
) -> Masks:
    """One ranking over all sparse leaves: the best weights stay, wherever they are, and at least a few in each leaf.

    Args:
      plan: from `make_plan`. Only its leaves and its total count matter; each leaf must be one group of single weights.
      scores: tree parallel to params, comparable between leaves; of several types, in one that holds them all.
      n_active: how many weights stay in all; may be traced. Default: the plan's total.
      min_active: the least number that stays in each leaf (in a stack, in each layer), so that no layer is cut
        off.
      among: masks of the weights that may stay. Default: all.

    Raises:
      ValueError: a structure with several groups or with units of more than one weight: such units do not compare.
    """
    given = {"scores": scores} if among is None else {"scores": scores, "among": among}
    checks.of_plan("prune_jointly", plan, **given)
    _check_unstructured("prune_jointly", plan)
    total = sum(layer.active_units for layer in plan.values()) if n_active is None else n_active
    for what, n in (("n_active", total), ("min_active times the leaves", _least(plan.values(), min_active))):
        if not isinstance(n, jax.Array):
            checks.total("prune_jointly", what, int(n))
    masks = prune_together(
        list(plan.values()), trees.named_leaves(scores), total, min_active, trees.named_leaves(among)
    )
    return trees.map_sparse(lambda layer, _: masks[layer.name], plan, scores)


def prune_together(
    layers: Sequence[LayerPlan],
    scores: Mapping[str, Array],
    n_active: Any,
    min_active: int,
    among: Mapping[str, Array],
) -> dict[str, Array]:
    """Masks of the best units of several leaves, by name; `n_active` in all, and `min_active` of each layer at least.

    The leaves must have units of one size, and one group in each layer. `among` holds masks of what may stay, or
    nothing.
    """
    if not layers:
        return {}
    wide = jnp.result_type(*(scores[layer.name] for layer in layers))
    if wide in (jnp.bfloat16, jnp.float16):
        wide = jnp.dtype(jnp.float32)
    pooled = [layer.structure.pool(scores[layer.name].astype(wide)) for layer in layers]
    free = [layer.active(among[layer.name]) if among else None for layer in layers]
    safe = [
        select(p, min_active, axes=layer.layer_axes(), among=a)
        for layer, p, a in zip(layers, pooled, free, strict=True)
    ]
    least = sum(jnp.sum(kept, dtype=jnp.int32) for kept in safe) if among else _least(layers, min_active)
    rest = [~kept if a is None else a & ~kept for kept, a in zip(safe, free, strict=True)]
    chosen = select_jointly(pooled, jnp.asarray(n_active, jnp.int32) - least, among=rest)
    return {
        layer.name: layer.structure.expand(kept | new, layer.shape)
        for layer, kept, new in zip(layers, safe, chosen, strict=True)
    }


def _least(layers: Any, min_active: int) -> int:
    return sum(
        layer.layers * max(0, min(min_active, layer.groups * layer.group_size // layer.layers)) for layer in layers
    )


def _check_unstructured(who: str, plan: Plan) -> None:
    for layer in plan.values():
        if not layer.is_unstructured:
            raise ValueError(
                f"{who}: leaf {layer.name!r} must be unstructured to be ranked jointly with others, "
                f"got structure {layer.structure.name!r}"
            )


def count_groups(who: str, plan: Plan, masks: Masks) -> dict[str, np.ndarray]:
    """How many units of each group are active, by name, in masks that were made elsewhere.

    Raises:
      ValueError: masks that are traced, of other leaves, shapes or types than the plan's, or that cut through a unit
        of the structure; names the leaf.
    """
    checks.not_in_patterns(who, masks)
    found, counts = trees.named_leaves(masks), {}
    for name in [*plan, *found]:
        if name not in found or name not in plan:
            there = "none" if name in plan else "one of a leaf that is dense"
            raise ValueError(f"{who}: masks must be of the leaves of the plan, got {there} for leaf {name!r}")
        layer, mask = plan[name], found[name]
        if isinstance(mask, jax.core.Tracer):
            raise ValueError(f"{who}: masks must have known values; that of leaf {name!r} is traced by jit")
        checks.mask(who, name, mask, jax.ShapeDtypeStruct(layer.shape, bool))
        units = layer.active(jnp.asarray(mask))
        if not np.array_equal(layer.structure.expand(units, layer.shape), mask):
            raise ValueError(f"{who}: the mask of leaf {name!r} must keep whole units of {layer.structure.name}")
        counts[name] = np.sum(np.asarray(units), axis=layer.structure.axes(units.shape), dtype=np.int64)
    return counts
