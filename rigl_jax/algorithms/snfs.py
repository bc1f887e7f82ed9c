"""SNFS, sparse momentum: grow where the momentum is large, and in the layers where it is."""

from __future__ import annotations

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from rigl_jax import checks, schedules, scores, topology, trees
from rigl_jax.algorithms import reallocation
from rigl_jax.algorithms.rigl import fraction_schedule
from rigl_jax.base import Algorithm, Array, LayerPlan, Masks, Plan, PyTree, Rewired, Score, Signals


class SnfsState(NamedTuple):
    """Masks, and the moving mean of the dense gradient (f32; None for dense leaves)."""

    masks: Masks
    momentum: PyTree


def snfs(
    plan: Plan,
    *,
    period: int = 100,
    stop: int | None = None,
    fraction: float | optax.Schedule = 0.5,
    start: int = 0,
    momentum: float = 0.9,
    redistribute: bool = True,
    drop: Score = scores.magnitude,
) -> Algorithm:
    """Sparse networks from scratch (Dettmers & Zettlemoyer 2019): drop by |w|, grow by |momentum|.

    The momentum is a moving mean of the *dense* gradient, `momentum * M + (1 - momentum) * g`, kept at every step. What
    all layers drop is grown in each in proportion to the mean |M| of its active weights, so counts move between
    layers: the total is exact, and at least one weight of each layer stays. What a full layer cannot take goes to the
    others (`topology.redistribute`). Counts move between leaves with units of one size (`reallocation.pools`); N:M and
    constant fan-in keep theirs.

    As in the authors' code, a layer that is less than 0.2 sparse and worth more than the average drops at most its
    sparsity, and a weight dropped and grown at once keeps its value. Departures: shares are rounded to the exact total
    (theirs drifts, and is damped between epochs), a layer may fill up (theirs stops at 0.99 of its free places), the
    momentum is our own for every optimizer (theirs is the optimizer's, and m / sqrt(v) for Adam), the fraction of 0.5
    goes to 0 (theirs to 0.005). The original rewires at the end of each epoch:
    `period=steps_per_epoch, start=steps_per_epoch - 1`.

    `redistribute=False` is the form in the RigL authors' code: layers keep their counts.

    Training FLOPs a step: 2 f_S + f_D, and a dense momentum in memory: the cost that RigL avoids.

    Args:
      plan: from `make_plan`; its counts are where training starts.
      period: steps between rewirings.
      stop: last step that may rewire; None: never stops.
      fraction: the share of active weights moved, in [0, 1], annealed by a cosine; or a schedule.
      start: first step that rewires.
      momentum: in [0, 1); 0.9 as the authors', 0.99 was best in the RigL paper's appendix, 0 is RigL's criterion.
      redistribute: whether counts move between layers.
      drop: the score whose lowest active weights are dropped.

    >>> import rigl_jax as rx
    >>> plan = rx.make_plan({"w": jax.ShapeDtypeStruct((8, 8), "float32")}, 0.75)
    >>> [step for step in range(1000) if snfs(plan, period=100, stop=300).due(step)]
    [0, 100, 200, 300]
    """
    checks.plan("snfs", plan)
    period, start, stop = checks.steps("snfs", period=period, start=start, stop=stop)
    if redistribute:
        reallocation.check_totals("snfs", plan)
    checks.functions("snfs", drop=drop)
    momentum = checks.number("snfs", "momentum", momentum, "must be in [0, 1)", lambda found: 0 <= found < 1)
    fraction_at = fraction_schedule("snfs", fraction, start, stop)

    def init(key: Array, params: PyTree) -> SnfsState:
        masks = topology.random_masks(plan, key, params)
        return SnfsState(masks, jax.tree.map(lambda mask: jnp.zeros(mask.shape, jnp.float32), masks))

    def observe(state: SnfsState, signals: Signals) -> SnfsState:
        def mean(_: LayerPlan, m: Array, g: Array) -> Array:
            new = momentum * m + (1 - momentum) * g.astype(jnp.float32)
            return jnp.where(jnp.isfinite(new), new, m)  # one NaN would stay for good

        return state._replace(momentum=trees.map_sparse(mean, plan, state.momentum, signals.grads))

    def update(state: SnfsState, signals: Signals) -> Rewired:
        share = fraction_at(signals.step)
        dropping, growing = scores.ranked(drop, signals), scores.Magnitudes(state.momentum)
        if redistribute:
            worth, n_drop = _worth_and_drops(plan, state, share)
            new = reallocation.drop_and_reallocate(plan, state.masks, dropping, growing, n_drop, worth)
        else:
            new = topology.drop_and_grow(plan, state.masks, dropping, growing, share)
        return Rewired(state._replace(masks=new.mask), new.fresh)

    due = schedules.every(period, start=start, stop=stop)
    return Algorithm(
        init,
        update,
        due,
        dense_grads=schedules.always,
        observe=observe,
        keeps_counts=not redistribute,
        plan=plan,
        state=SnfsState,
    )


def _worth_and_drops(plan: Plan, state: SnfsState, share: Any) -> tuple[dict[str, Array], dict[str, Array]]:
    active = reallocation.n_active(plan, state.masks)
    masks, momentum = trees.named_leaves(state.masks), trees.named_leaves(state.momentum)
    worth = {}
    for name, mask in masks.items():
        size = jnp.maximum(jnp.sum(mask, dtype=jnp.int32), 1).astype(jnp.float32)
        worth[name] = jnp.sum(jnp.where(mask, jnp.abs(momentum[name]), 0.0)) / size
    n_drop = {}
    for pool in reallocation.pools(plan):
        mean = sum(worth[leaf.name] for leaf in pool) / len(pool)
        for leaf in pool:
            sparsity = 1 - active[leaf.name] / (leaf.groups * leaf.group_size // leaf.layers)
            nearly_full = (sparsity < 0.2) & (worth[leaf.name] > mean)
            n_drop[leaf.name] = topology.count(
                jnp.where(nearly_full, jnp.minimum(share, sparsity), share), active[leaf.name]
            )
    return worth, n_drop
