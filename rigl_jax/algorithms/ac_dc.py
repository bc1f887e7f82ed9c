"""AC/DC: training that alternates between sparse and dense."""

from __future__ import annotations

import jax

from rigl_jax import checks, schedules, scores, topology
from rigl_jax.algorithms.static import PruningState
from rigl_jax.base import Algorithm, Array, Plan, PyTree, Rewired, Score, Signals


def ac_dc(
    plan: Plan,
    *,
    period: int,
    stop: int,
    start: int = 0,
    jointly: bool = False,
    min_active: int = 1,
    score: Score = scores.magnitude,
) -> Algorithm:
    """AC/DC (Peste et al. 2021): compressed and decompressed phases of `period` steps each, and a sparse end.

    Dense until `start` (the warm-up), then alternately sparse and dense, and sparse from `stop` on. When a sparse phase
    begins, the largest |w| stay and all others become 0. When a dense phase begins, these become active again, from 0
    and with fresh optimizer moments. Training gives two useful networks: the sparse one and the last dense one.

    Masks change at the end of a step: the loss at steps start + 1, ... is that of the sparse network.
    The authors' schedule on ImageNet: 100 epochs, sparse for the first time at epoch 10, phases of 5 epochs, a last
    dense phase from 75 to 85 (twice as long as the others; here all have one length), then sparse to the end.

    Departures from the authors' code: they rank all layers together (`jointly=True`) and can reset all of the momentum
    when a phase begins; here kept weights keep their moments. Lengths are in steps, not epochs.

    Training FLOPs a step: 3 f_S in sparse phases and 3 f_D in dense ones (`training_cost` takes one value a step).

    Args:
      plan: from `make_plan`; gives the counts of the sparse phases.
      period: length of a phase.
      stop: the step from which on the network stays sparse.
      start: the end of the dense warm-up.
      jointly: one ranking over all leaves, which must be unstructured; the plan's total holds, not its counts.
      min_active: the least number of weights that stay in each leaf; only with `jointly`.
      score: the lowest are pruned.

    >>> import jax.numpy as jnp
    >>> import rigl_jax as rx
    >>> algorithm = ac_dc(rx.make_plan({"w": jnp.ones((8, 8))}, 0.5), start=10, period=5, stop=32)
    >>> [step for step in range(100) if algorithm.due(step)]
    [10, 15, 20, 25, 30, 32]
    """
    rank = topology.ranking("ac_dc", plan, jointly=jointly, min_active=min_active)
    checks.functions("ac_dc", score=score)
    if stop is None:
        raise ValueError("ac_dc: stop must be a step, got None")
    period, start, stop = checks.steps("ac_dc", period=period, start=start, stop=stop)
    due = schedules.every_and_last(period, start=start, stop=stop)

    def init(key: Array, params: PyTree) -> PruningState:
        del key
        return PruningState(topology.full_masks(plan, params))

    def update(state: PruningState, signals: Signals) -> Rewired:
        # Among the active, so that a weight that has come to 0 does not lose its place to one that is not there.
        ranked = score(signals)
        best = rank.best(ranked, among=state.masks)
        dense = (signals.step < stop) & ((signals.step - start) // period % 2 == 1)
        masks = jax.tree.map(lambda mask: dense | mask, best)
        return Rewired(PruningState(rank.hold(ranked, masks, state.masks, read=state.masks)))

    return Algorithm(init, update, due, dense_grads=schedules.never, plan=plan, state=PruningState, active_only=True)
