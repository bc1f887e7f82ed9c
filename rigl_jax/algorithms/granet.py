"""GraNet: prune gradually over all layers together, and at every step regrow some of what was pruned."""

from __future__ import annotations

from typing import Any

import jax.numpy as jnp
import optax

from rigl_jax import checks, schedules, scores, topology, trees
from rigl_jax.algorithms import reallocation
from rigl_jax.algorithms.rigl import fraction_schedule
from rigl_jax.algorithms.static import PruningState
from rigl_jax.base import Algorithm, Array, Distribution, LayerPlan, Masks, Plan, PyTree, Rewired, Score, Signals
from rigl_jax.distributions import erk, share
from rigl_jax.messages import shown


def granet(
    plan: Plan,
    *,
    period: int = 1000,
    stop: int | None = None,
    fraction: float | optax.Schedule = 0.5,
    start: int = 0,
    prune_stop: int | None = None,
    initial_sparsity: float = 0.5,
    distribution: Distribution = erk,
    drop: Score = scores.magnitude,
    grow: Score = scores.gradient,
) -> Algorithm:
    """GraNet (Liu et al. 2021): cubic pruning by global |w|, then RigL's exchange of a fraction in each layer.

    At rewiring t the number of active weights is n_f + (n_i - n_f) (1 - (t - start) / (end - start))^3, rounded, and
    exactly the plan's total at the last rewiring up to `prune_stop` and later. What is too much is pruned by |w| over
    all layers together (at least one weight of each stays); then each layer drops `fraction` of its weights by |w| and
    grows as many by |g|. Leaves compete where their units have one size (`reallocation.pools`); N:M keeps its n, and a
    constant fan-in follows the schedule by itself. As in the authors' code a weight that is pruned and grown again in
    one step starts from zero, with fresh moments, and one that is dropped and grown again goes on as it was. They drop
    ceil(fraction * n) weights of a layer, here it is floor(fraction * n).

    The initial masks are random, as in the authors' sparse-to-sparse form; `initial_sparsity=0` is their
    dense-to-sparse form. No leaf starts sparser than it ends. Where they prune by a threshold (ties all go, and a
    threshold of 0 cannot keep a dense network), counts here are exact. On CIFAR they prune until epoch 110 of 160 and
    exchange until the end, at a fraction annealed to 0.005 (here to 0): these are `prune_stop` and `stop`.

    Training FLOPs a step: (3 f_S(t) (period - 1) + 2 f_S(t) + f_D) / period, more at first than RigL's.

    Args:
      plan: from `make_plan`: the counts at the end (of each pool; layers share them by |w|).
      period: steps between rewirings.
      stop: last step that may rewire; None: never stops.
      fraction: the share of active weights exchanged, in [0, 1], annealed by a cosine; or a schedule.
      start: first step that rewires, where pruning begins.
      prune_stop: the step by which pruning is done. Default: `stop`.
      initial_sparsity: over all sparse leaves, in [0, 1).
      distribution: how it is shared among them.
      drop: the score by which weights are pruned and dropped.
      grow: the score whose highest inactive weights are grown.

    >>> import rigl_jax as rx
    >>> plan = rx.make_plan({"w": jnp.zeros((8, 8))}, 0.75)
    >>> [step for step in range(1000) if granet(plan, period=100, stop=300).due(step)]
    [0, 100, 200, 300]
    """
    checks.plan("granet", plan)
    period, start, stop = checks.steps("granet", period=period, start=start, stop=stop)
    checks.functions("granet", drop=drop, grow=grow, distribution=distribution)
    prune_stop = stop if prune_stop is None else checks.plain(prune_stop)
    if (
        prune_stop is None
        or not checks.is_whole(prune_stop)
        or prune_stop < start
        or (stop is not None and prune_stop > stop)
    ):
        raise ValueError(
            f"granet: prune_stop must be a step from start={start} to stop={stop}, got {shown(prune_stop)}; "
            "it may be left out only with a stop"
        )
    fraction_at = fraction_schedule("granet", fraction, start, stop)
    initial = _initial(plan, initial_sparsity, distribution)
    reallocation.check_totals("granet", initial)
    last = start + (prune_stop - start) // period * period  # so that a rewiring falls on the end of the cubic

    def remaining(step: Any) -> Array:
        """The share of what is to be pruned that is still there: 1 at the start, exactly 0 from `last` on."""
        done = jnp.clip((jnp.asarray(step, jnp.float32) - start) / max(last - start, 1), 0.0, 1.0)
        return jnp.where(jnp.asarray(step) >= last, 0.0, (1 - done) ** 3)

    def init(key: Array, params: PyTree) -> PruningState:
        return PruningState(topology.random_masks(initial, key, params))

    def update(state: PruningState, signals: Signals) -> Rewired:
        worth = drop(signals)
        pruned = _prune(plan, initial, state.masks, worth, remaining(signals.step))
        share = fraction_at(signals.step)
        n_drop = {name: topology.count(share, n) for name, n in reallocation.n_active(plan, pruned).items()}
        growing = scores.ranked(grow, signals)
        new = topology.rewire_tree(plan, pruned, worth, growing, n_drop, before=state.masks, together=True)
        # What was pruned and grown again is fresh too; where scores are not sound, all is kept as it was.
        return Rewired(PruningState(new.mask), new.fresh)

    due = schedules.every(period, start=start, stop=stop)
    return Algorithm(init, update, due, dense_grads=due, plan=plan, state=PruningState, active_only=True)


def _initial(plan: Plan, sparsity: float, distribution: Distribution) -> Plan:
    """The plan with the counts of the start; none is below the plan's own, and N:M stays as it is."""
    shapes, axes = ({name: getattr(leaf, key) for name, leaf in plan.items()} for key in ("shape", "axes"))
    shared = share(shapes, axes, sparsity, distribution)

    def count(leaf: LayerPlan) -> int:
        if leaf.structure.sparsity is not None:
            return leaf.n_active
        return max(leaf.n_active, round((1 - shared[leaf.name]) * leaf.group_size))

    return {name: leaf._replace(n_active=count(leaf)) for name, leaf in plan.items()}


def _prune(plan: Plan, initial: Plan, masks: Masks, worth: PyTree, remaining: Array) -> Masks:
    """The best of the active units, as many as the schedule leaves in each pool."""

    def now(first: int, last: int) -> Array:
        return last + jnp.round(remaining * (first - last)).astype(jnp.int32)

    active, scored = trees.named_leaves(masks), trees.named_leaves(worth)
    pruned: dict[str, Array] = {}
    for pool in reallocation.pools(plan):
        n = now(sum(initial[leaf.name].n_active for leaf in pool), sum(leaf.n_active for leaf in pool))
        if len(pool) == 1:
            (leaf,) = pool
            pruned[leaf.name] = topology.prune(leaf.structure, scored[leaf.name], n, among=active[leaf.name])
            continue
        pruned |= topology.prune_together(pool, scored, n, 1, active)
    return trees.map_sparse(lambda leaf, _: pruned[leaf.name], plan, masks)
