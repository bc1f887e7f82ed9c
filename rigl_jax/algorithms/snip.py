"""SNIP: prune before training, by how much each weight matters to the loss."""

from __future__ import annotations

from collections.abc import Callable

import jax.numpy as jnp

from rigl_jax import checks, schedules, scores, topology
from rigl_jax.algorithms.one_shot import of_params, prune_at_init
from rigl_jax.algorithms.static import PruningState
from rigl_jax.base import Algorithm, Array, Criterion, Plan, PyTree, Rewired, Score, Signals
from rigl_jax.criteria import losses
from rigl_jax.messages import shown


def snip(
    plan: Plan,
    *,
    loss: Callable[[PyTree], Array] | None = None,
    start: int = 0,
    jointly: bool = False,
    min_active: int = 1,
    score: Score = scores.snip,
) -> Algorithm:
    """SNIP (Lee et al. 2019): keep the largest |g w| of the dense network, once; then train what is left.

    There are two ways to get the gradient:

    * `loss=None`, as in the RigL authors' code: the network is dense until step `start`, whose gradient decides; that
      step trains nothing (`skip_step`). Average over several batches with `accumulate_growth(snip(plan, start=n - 1),
      n)`, but note that a later start trains the dense network until then. A leaf with a NaN or infinite score on that
      step stays dense (with `jointly` all leaves).
    * `loss`: the masks are made in `init`, before any step, from the gradient of a loss that the caller closes over
      the data of (one batch in the paper; a mean over several works as well).

    Per layer, the plan's counts hold (the RigL authors' form). The original ranks all layers together:
    `jointly=True`, of which only the total is the plan's. The paper divides by the sum of all scores; this does
    not change the ranking, and is left out. An earlier version of the RigL authors' code had |g| instead of |g w|.

    Training FLOPs a step: 3 f_S, after one gradient of the dense network (3 f_D).

    Args:
      plan: from `make_plan`.
      loss: `params -> scalar`, or None.
      start: the step that prunes; only without a loss.
      jointly: one ranking over all layers; needs unstructured leaves.
      min_active: the least number of weights that stay in each leaf; only with `jointly`.
      score: what is ranked. `scores.taylor` pools squares over the units of a structure.

    >>> import jax, rigl_jax as rx
    >>> params = {"w": jnp.array([[1.0, 2.0], [3.0, 4.0]])}
    >>> algorithm = snip(rx.make_plan(params, 0.5), loss=lambda p: p["w"][0].sum())
    >>> algorithm.init(jax.random.key(0), params).masks["w"].tolist()
    [[True, True], [False, False]]
    """
    if not checks.is_whole(start) or (start and loss is not None):
        raise ValueError(
            f"snip: start must be a step from 0 on, and 0 with a loss (init prunes then), got {shown(start)}"
        )
    checks.functions("snip", score=score)
    if loss is not None:
        value = losses.at("snip", of_params("snip", loss))

        def criterion(key: Array) -> Criterion:
            return lambda params, batch: score(
                Signals(params, scores.gradient_of(lambda p: value(p, batch), params), jnp.int32(0), key)
            )

        return prune_at_init("snip", plan, criterion, jointly=jointly, min_active=min_active)
    rank = topology.ranking("snip", plan, jointly=jointly, min_active=min_active)

    def init(key: Array, params: PyTree) -> PruningState:
        del key
        return PruningState(topology.full_masks(plan, params))

    def update(state: PruningState, signals: Signals) -> Rewired:
        ranked = score(signals)
        return Rewired(PruningState(rank.hold(ranked, rank.best(ranked), state.masks)))

    due = schedules.every(1, start=start, stop=start)
    return Algorithm(
        init, update, due, dense_grads=due, skip_step=True, plan=plan, state=PruningState, active_only=True
    )
