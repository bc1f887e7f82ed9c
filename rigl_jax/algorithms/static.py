"""Static: masks that never change, drawn at random or given."""

from __future__ import annotations

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from rigl_jax import checks, schedules, topology, trees
from rigl_jax.base import Algorithm, Array, LayerPlan, Masks, Plan, PyTree, Rewired, Signals


class MaskState(NamedTuple):
    """The state of an algorithm that stores only its masks, with the counts of the plan.

    States of different types are not exchanged by mistake: `sparsify` refuses another type than the algorithm's.
    """

    masks: Masks


class PruningState(NamedTuple):
    """The masks of a method that prunes as it trains: until it is done they hold more weights than the plan."""

    masks: Masks


class LatentState(NamedTuple):
    """The masks of a method that keeps pruned weights, so that params are not 0 where the masks are False."""

    masks: Masks


def all_weights(state: Any) -> Masks:
    """The tree of Nones: all weights, for `Algorithm.stored` and `Algorithm.trained`."""
    return jax.tree.map(lambda _: None, state.masks)


def static(plan: Plan, masks: Masks | None = None) -> Algorithm:
    """Masks that do not change during training: random masks, or given masks.

    Random masks have the exact counts of the plan, and are the baseline that every dynamic method must beat. Given
    masks fine-tune a pruned network, or train a sparse one from scratch:

        pruned = rx.prune(plan, params, rx.criteria.magnitude)
        tx = rx.sparsify(optax.adam(1e-4), rx.static(plan, pruned.masks), key=key)
        params, state = pruned.params, tx.init(pruned.params)

    Training FLOPs: 3 f_S a step. No gradient of an inactive weight is ever read.

    Args:
      plan: from `make_plan`.
      masks: by name, bool[*shape] for each leaf of the plan, and None for others; with known values, not traced. The
        total of active weights must be the plan's. Leaves may share it otherwise than the plan does, as after pruning
        over all layers; but of a leaf whose layers have several groups (N:M, constant fan-in) each group must hold the
        plan's count. Default: random masks.

    Raises:
      ValueError: masks that are not so; names the leaf.

    >>> import jax
    >>> import jax.numpy as jnp
    >>> import rigl_jax as rx
    >>> params = {"w": jnp.array([[1.0, -3.0], [2.0, 0.5]])}
    >>> plan = rx.make_plan(params, 0.5)
    >>> algorithm = rx.static(plan, rx.prune(plan, params).masks)
    >>> algorithm.init(jax.random.key(0), params).masks["w"].tolist()
    [[False, True], [True, False]]
    """
    checks.plan("static", plan)
    keeps_counts = masks is None or _check_masks(plan, masks)
    given = trees.named_leaves(masks)

    def init(key: Array, params: PyTree) -> MaskState:
        if masks is None:
            return MaskState(topology.random_masks(plan, key, params))
        topology.check_fit(plan, params)
        return MaskState(trees.map_sparse(lambda layer, p: _beside(p, given[layer.name]), plan, params))

    def update(state: MaskState, signals: Signals) -> Rewired:
        del signals
        return Rewired(state)

    return Algorithm(
        init,
        update,
        due=schedules.never,
        dense_grads=schedules.never,
        keeps_counts=keeps_counts,
        plan=plan,
        state=MaskState,
        active_only=True,
    )


def _check_masks(plan: Plan, masks: Masks) -> bool:
    """Refuses masks that are not of the plan; returns whether every leaf has the plan's count."""
    counts = topology.count_groups("static", plan, masks)

    def exact(layer: LayerPlan) -> bool:
        return bool(np.all(counts[layer.name] == layer.n_active))

    for layer in plan.values():
        if layer.groups > layer.layers and not exact(layer):
            raise ValueError(
                f"static: each group of leaf {layer.name!r}, {layer.structure.name}, must hold {layer.n_active} active "
                f"units, got {counts[layer.name].min()} to {counts[layer.name].max()}"
            )
    active = sum(int(counts[name].sum()) * layer.unit_size for name, layer in plan.items())
    wanted = sum(layer.active_weights for layer in plan.values())
    if active != wanted:
        raise ValueError(f"static: masks must hold the plan's {wanted} active weights in all, got {active}")
    return all(map(exact, plan.values()))


def _beside(p: Any, mask: Any) -> Array:
    """A copy of the mask, which a donated state does not take from the caller; on an explicit mesh laid as `p`."""
    sharding, mask = trees.explicit_sharding(p), jnp.array(mask)
    return mask if sharding is None else jax.sharding.reshard(mask, sharding)
