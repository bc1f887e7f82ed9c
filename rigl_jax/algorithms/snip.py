"""SNIP: prune before training, by how much each weight matters to the loss."""

from __future__ import annotations

from collections.abc import Callable

import jax.numpy as jnp

from rigl_jax import checks, schedules, scores, topology
from rigl_jax.algorithms import selection
from rigl_jax.algorithms.static import MaskState, PruningState
from rigl_jax.base import Algorithm, Array, Masks, Plan, PyTree, Rewired, Score, Signals
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

    Two ways to get at the gradient:

    * `loss=None`, as in the RigL authors' code: the network is dense until step `start`, whose gradient decides; that
      step trains nothing (`skip_step`). Average over several batches with `accumulate_growth(snip(plan, start=n - 1),
      n)`, but note that a later start trains the dense network until then. A leaf with a NaN or infinite score on that
      step stays dense (with `jointly` all leaves).
    * `loss`: the masks are made in `init`, before any step, from the gradient of a loss that the caller closes over
      the data of (one batch in the paper; a mean over several works as well).

    Per layer, the plan's counts hold (the RigL authors' form). The original ranks all layers together:
    `jointly=True`, of which only the total is the plan's. Where the paper divides by the sum of all scores nothing
    changes, so nothing is divided. The RigL authors found that an earlier version of theirs had |g| for |g w|.

    Training FLOPs a step: 3 f_S, after one gradient of the dense network (3 f_D).

    Args:
      plan: from `make_plan`.
      loss: `params -> scalar`, or None.
      start: the step that prunes; only without a loss.
      jointly: one ranking over all layers; needs unstructured leaves.
      min_active: so many weights of each leaf stay whatever their score; only with `jointly`.
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
    start = int(start)
    min_active = selection.check_jointly("snip", plan, jointly, min_active)
    checks.functions("snip", score=score)
    selection.check_callable("snip", score if loss is None else loss)

    def decide(ranked: PyTree) -> Masks:
        return selection.best(plan, ranked, jointly=jointly, min_active=min_active)

    def init(key: Array, params: PyTree) -> MaskState | PruningState:
        topology.check_fit(plan, params)
        if loss is None:
            return PruningState(selection.full(plan, params))
        selection.check_loss("snip", loss, params)
        return MaskState(decide(score(Signals(params, scores.gradient_of(loss, params), jnp.int32(0), key))))

    def update(state: MaskState | PruningState, signals: Signals) -> Rewired:
        if loss is not None:
            return Rewired(state)
        ranked = score(signals)
        sound = topology.sound(plan, ranked)
        return Rewired(PruningState(topology.hold(plan, sound, decide(ranked), state.masks, together=jointly)))

    due = schedules.never if loss is not None else schedules.every(1, start=start, stop=start)
    return Algorithm(
        init,
        update,
        due,
        dense_grads=due,
        skip_step=loss is None,
        plan=plan,
        state=PruningState if loss is None else MaskState,
        active_only=True,
    )
