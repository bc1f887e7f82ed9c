"""Gradual magnitude pruning: from dense to sparse along a cubic."""

from __future__ import annotations

import math
from typing import Any

import jax.numpy as jnp
import numpy as np

from rigl_jax import checks, schedules, scores, topology
from rigl_jax.algorithms.static import LatentState, PruningState, all_weights
from rigl_jax.base import Algorithm, Array, LayerPlan, Plan, PyTree, Rewired, Score, Signals
from rigl_jax.messages import shown

MOST_PRUNINGS = 10**6  # their counts are a table


def gmp(
    plan: Plan,
    *,
    stop: int,
    period: int = 1000,
    start: int = 0,
    initial: float = 0.0,
    recover: bool = False,
    jointly: bool = False,
    min_active: int = 1,
    score: Score = scores.magnitude,
) -> Algorithm:
    """Gradual pruning (Narang et al. 2017; Zhu & Gupta 2017): every `period` steps keep the largest |w|, ever fewer.

    The sparsity of a leaf is s_f + (s_i - s_f)(1 - p)^3, where p = (step - start) / (stop - start) runs from 0 to 1 and
    s_f is the plan's. In units: n_f + floor((1 - p)^3 (n_i - n_f)) of a group stay active. The network is dense before
    `start`. There is always an update at `stop`, with p = 1, also if the period does not lead there, and it leaves
    exactly the plan's counts (jaxpruner, ITOP and GraNet stop short).
    Weights train on updates too; an update sees the weights after that step's training.

    Frozen (default): what is pruned is 0 and stays pruned; masks are nested. Recovering: all weights live on behind the
    masks and train with the gradient taken at the masked network, and each update takes the best of all of them. That
    is DPF (Lin et al. 2020, which has `period=16, jointly=True`). TensorFlow's pruning is between the two: there
    pruned weights keep their value but get no gradient. With `recover` take the loss at
    `straight_through(params, state.masks)` and in the end use `apply_masks(params, state.masks)`.

    The RigL paper ran it on ImageNet with steps 10k to 25k of 32k every 1k, on CIFAR-10 20k to 75k every 1k.
    Training FLOPs a step: 3 f_D (1 - s_t), averaged over training; recovering: 2 f_D (1 - s_t) + f_D
    (`training_cost` takes the sparsities as one value a step).

    Args:
      plan: from `make_plan`.
      stop: the step that reaches the plan's counts.
      period: steps between updates.
      start: the first update.
      initial: s_i, the sparsity of each leaf at `start`, in [0, 1); never more than the plan has for it.
      recover: whether pruned weights live on.
      jointly: one ranking over all leaves, which must be unstructured; the plan's total holds, not its counts.
      min_active: the least number of weights that stay in each leaf; only with `jointly`.
      score: the lowest are pruned.

    >>> import rigl_jax as rx
    >>> algorithm = gmp(rx.make_plan({"w": jnp.ones((8, 8))}, 0.5), start=100, stop=350, period=100)
    >>> [step for step in range(1000) if algorithm.due(step)]
    [100, 200, 300, 350]
    """
    initial = checks.number("gmp", "initial", initial, "is a sparsity, in [0, 1)", lambda found: 0 <= found < 1)
    period, start, _ = checks.steps("gmp", period=period, start=start)
    checks.functions("gmp", score=score)
    if not checks.is_whole(stop, start + 1):
        raise ValueError(f"gmp: stop must be after start={start}, got {shown(stop)}")
    stop, rank = int(stop), topology.ranking("gmp", plan, jointly=jointly, min_active=min_active)
    if jointly:
        first = sum((leaf.n_active + _spare(leaf, initial)) * leaf.groups for leaf in plan.values())
        checks.total("gmp", "weights that are active at `start`, ranked together,", first)
    due = schedules.every_and_last(period, start=start, stop=stop)
    if (stop - start) / period > MOST_PRUNINGS:
        raise ValueError(
            f"gmp: from start={start} to stop={stop} there may be up to {MOST_PRUNINGS} prunings, got period={period}"
        )
    # A table, so that every program has the same floats, and so the same counts, however it is compiled.
    p = np.arange(0, stop - start + 1, period) / (stop - start)
    shares = jnp.asarray((1 - p) ** 3, jnp.float32)

    def share(step: Any) -> Array:
        return jnp.where(step >= stop, 0.0, shares[jnp.maximum(step - start, 0) // period])

    State = LatentState if recover else PruningState

    def init(key: Array, params: PyTree) -> LatentState | PruningState:
        del key
        return State(topology.full_masks(plan, params))

    def update(state: LatentState | PruningState, signals: Signals) -> Rewired:
        among, ranked = None if recover else state.masks, score(signals)
        masks = rank.best(ranked, lambda leaf: _active(leaf, initial, share(signals.step)), among=among)
        return Rewired(State(rank.hold(ranked, masks, state.masks, read=among)))

    if not recover:
        return Algorithm(init, update, due, dense_grads=schedules.never, plan=plan, state=State, active_only=True)
    return Algorithm(
        init,
        update,
        due,
        dense_grads=schedules.always,
        stored=all_weights,
        trained=all_weights,
        plan=plan,
        state=State,
        latent=True,
    )


def _spare(leaf: LayerPlan, initial: float) -> int:
    """How many units of a group are to be pruned."""
    units = leaf.group_size
    return max(units - math.floor(initial * units) - leaf.n_active, 0)


def _active(leaf: LayerPlan, initial: float, share: Any) -> Array:
    """Units that stay in a group when `share` of those to be pruned are still there."""
    spare = _spare(leaf, initial)
    # A product with 1 would round above 2^24.
    return leaf.n_active + jnp.where(share >= 1, spare, topology.count(share, spare))
