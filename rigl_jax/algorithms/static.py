"""Static: a random mask, never changed. The baseline that every dynamic method must beat."""

from __future__ import annotations

from typing import NamedTuple

from rigl_jax import checks, schedules, topology
from rigl_jax.base import Algorithm, Array, Masks, Plan, PyTree, Rewired, Signals


class MaskState(NamedTuple):
    """The state of an algorithm that remembers nothing but its masks."""

    masks: Masks


def static(plan: Plan) -> Algorithm:
    """Random masks with the exact counts of the plan, kept for the whole of training.

    Training FLOPs: 3 f_S a step. No gradient of an inactive weight is ever read.

    Args:
      plan: from `make_plan`.
    """
    checks.plan("static", plan)

    def init(key: Array, params: PyTree) -> MaskState:
        return MaskState(topology.random_masks(plan, key, params))

    def update(state: MaskState, signals: Signals) -> Rewired:
        del signals
        return Rewired(state)

    return Algorithm(
        init, update, due=schedules.never, dense_grads=schedules.never, keeps_counts=True, plan=plan, state=MaskState
    )
