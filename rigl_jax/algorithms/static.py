"""Static: a random mask, never changed. The baseline that every dynamic method must beat."""

from __future__ import annotations

from typing import NamedTuple

from rigl_jax import checks, schedules, topology
from rigl_jax.base import Algorithm, Array, Masks, Plan, PyTree, Rewired, Signals


class MaskState(NamedTuple):
    """The state of an algorithm that remembers nothing but its masks, which hold the plan's counts.

    States of different types are not exchanged by mistake: `sparsify` refuses another type than the algorithm's.
    """

    masks: Masks


class PruningState(NamedTuple):
    """The masks of a method that prunes as it trains: until it is done they hold more weights than the plan."""

    masks: Masks


class LatentState(NamedTuple):
    """The masks of a method whose pruned weights live on, so that params are not 0 where the masks are False."""

    masks: Masks


def static(plan: Plan) -> Algorithm:
    """Random masks with the exact counts of the plan, kept for the whole of training.

    Training FLOPs: 3 f_S a step. No gradient of an inactive weight is ever read.

    Args:
      plan: from `make_plan`.

    >>> import jax
    >>> import jax.numpy as jnp
    >>> import rigl_jax as rx
    >>> params = {"w": jnp.ones((8, 8))}
    >>> state = static(rx.make_plan(params, 0.75)).init(jax.random.key(0), params)
    >>> int(state.masks["w"].sum())
    16
    """
    checks.plan("static", plan)

    def init(key: Array, params: PyTree) -> MaskState:
        return MaskState(topology.random_masks(plan, key, params))

    def update(state: MaskState, signals: Signals) -> Rewired:
        del signals
        return Rewired(state)

    return Algorithm(
        init,
        update,
        due=schedules.never,
        dense_grads=schedules.never,
        keeps_counts=True,
        plan=plan,
        state=MaskState,
        active_only=True,
    )
