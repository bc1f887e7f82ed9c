"""ITOP: random growth that prefers weights that were never active, and the share of weights explored."""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp
import optax

from rigl_jax import arguments as rules
from rigl_jax import checks, schedules, scores, topology
from rigl_jax.algorithms.rigl import fraction_schedule
from rigl_jax.arguments import arguments
from rigl_jax.base import Algorithm, Array, Masks, Plan, PyTree, Rewired, Score, Signals
from rigl_jax.masking import share


class ItopState(NamedTuple):
    """Masks, and the union of all masks so far."""

    masks: Masks
    explored: Masks


def itop(
    plan: Plan,
    *,
    period: int = 1500,
    stop: int | None = None,
    fraction: float | optax.Schedule = 0.5,
    start: int = 0,
    drop: Score = scores.magnitude,
) -> Algorithm:
    """In-time over-parameterisation (Liu et al. 2021): SET that grows among weights that were never active first.

    The paper claims that accuracy increases with the share of weights explored during training, R_s (`explored`), and
    with a longer `period`, in which new weights train. This is the authors' `random_unfired` growth: uniformly random
    among positions that were never active; if there are none left, among all inactive positions. Their code drops all
    weights tied at the threshold, and draws so that the count drifts; here counts are exact. A weight that is dropped
    and grown in one rewiring keeps its value, as in their code. They drop ceil(fraction * n) weights of a layer, here
    it is floor(fraction * n). For R_s of another method, take the union of its masks over training.

    Training FLOPs: 3 f_S a step; no dense gradient is ever read.

    Args:
      plan: from `make_plan`.
      period: steps between rewirings; the authors' for random growth. With growth by gradient they have 4000.
      stop: last step that may rewire; None: never stops.
      fraction: as in `rigl`. The authors anneal 0.5 by a cosine too, to 0.005 at the last step of training (here to 0
        at `stop`).
      start: first step that rewires; theirs is `period - 1`, because they count a step before they test whether it is
        due.
      drop: the score whose lowest active weights are dropped.

    >>> import rigl_jax as rx
    >>> plan = rx.make_plan({"w": jax.ShapeDtypeStruct((8, 8), "float32")}, 0.75)
    >>> [step for step in range(1000) if itop(plan, period=100, stop=300).due(step)]
    [0, 100, 200, 300]
    """
    checks.plan("itop", plan)
    period, start, stop = checks.steps("itop", period=period, start=start, stop=stop)
    checks.functions("itop", drop=drop)
    fraction_at = fraction_schedule("itop", fraction, start, stop)

    def init(key: Array, params: PyTree) -> ItopState:
        masks = topology.random_masks(plan, key, params)
        return ItopState(masks, jax.tree.map(jnp.copy, masks))  # a donated state holds no buffer twice

    def update(state: ItopState, signals: Signals) -> Rewired:
        # Weights that were never active come first.
        growing, share = scores.Draws(signals.key, late=state.explored), fraction_at(signals.step)
        new = topology.drop_and_grow(plan, state.masks, scores.ranked(drop, signals), growing, share)
        return Rewired(ItopState(new.mask, jax.tree.map(jnp.logical_or, state.explored, new.mask)), new.fresh)

    due = schedules.every(period, start=start, stop=stop)
    return Algorithm(
        init,
        update,
        due,
        dense_grads=schedules.never,
        keeps_counts=True,
        plan=plan,
        state=ItopState,
        active_only=True,
    )


@arguments(state=rules.one_of(ItopState, "the state of itop"))
def explored(state: ItopState) -> Array:
    """R_s: the share of all sparse leaves' weights that have been active at some time, f32 scalar in [0, 1].

    >>> import jax.numpy as jnp
    >>> masks = {"w": jnp.array([True, False, False, False])}
    >>> float(explored(ItopState(masks, {"w": jnp.array([True, True, True, False])})))
    0.75
    """
    return share(jax.tree.leaves(state.explored))
