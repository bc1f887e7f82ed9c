"""Top-KAST: forward with the largest weights, backward with some more, never dense."""

from __future__ import annotations

import math
from typing import NamedTuple

import jax
import jax.numpy as jnp

from rigl_jax import arguments as rules
from rigl_jax import checks, schedules, topology
from rigl_jax.algorithms.static import all_weights
from rigl_jax.arguments import arguments
from rigl_jax.base import Algorithm, Array, LayerPlan, Masks, Plan, PyTree, Rewired, Signals


class TopKastState(NamedTuple):
    """Masks of the weights that the network uses (A), and of those that are trained (B, a superset)."""

    masks: Masks
    backward: Masks


def top_kast(
    plan: Plan, *, period: int = 100, start: int = 0, stop: int | None = None, extra: float = 1.0
) -> Algorithm:
    """Top-KAST (Jayakumar et al. 2020): use the largest |w| (A), train those and the next largest (B), keep the rest
    unchanged.

    In each group, A has the plan's count n and B has n + floor(extra * n), at most all. Both are taken from the
    magnitudes of all weights every `period` steps, so a weight of B that has outgrown one of A is used from then on.
    Weights outside B keep their value and are not trained; their optimizer moments are reset when they enter B.

    The params are the latent weights: take the loss at `straight_through(params, state.masks)`, to which the paper adds
    `exploration_penalty`, and use `apply_masks(params, state.masks)` once trained. No authors' code is public; the
    paper gives the sparsities of A and B instead of `extra`: 80 % and 50 % are 1.5, 90 % and 80 % are 1. Its masks are
    computed on the host every 100 steps.

    Training FLOPs a step: 2 f_A + f_B. `training_cost` counts the gradients outside A as all of f_D: an upper bound.

    Args:
      plan: from `make_plan`; gives A.
      period: steps between new masks.
      start: the first step that may change masks.
      stop: the last such step, or None.
      extra: how many more weights B has, as a share of A's count; 0 or more.

    >>> import rigl_jax as rx
    >>> params = {"w": jnp.array([[1.0, 4.0, 2.0, 3.0]])}
    >>> state = top_kast(rx.make_plan(params, 0.75)).init(jax.random.key(0), params)
    >>> state.masks["w"].tolist(), state.backward["w"].tolist()
    ([[False, True, False, False]], [[False, True, False, True]])
    """
    rank = topology.ranking("top_kast", plan)
    period, start, stop = checks.steps("top_kast", period=period, start=start, stop=stop)
    expected = "is a share of the active weights, 0 or more"
    extra = checks.number("top_kast", "extra", extra, expected, lambda share: share >= 0)

    def choose(params: PyTree) -> TopKastState:
        magnitudes = jax.tree.map(jnp.abs, params)
        return TopKastState(rank.best(magnitudes), rank.best(magnitudes, lambda leaf: _trained(leaf, extra)))

    def init(key: Array, params: PyTree) -> TopKastState:
        del key
        topology.check_fit(plan, params)
        return choose(params)

    def update(state: TopKastState, signals: Signals) -> Rewired:
        sound = topology.sound(plan, jax.tree.map(jnp.abs, signals.params))
        after = zip(choose(signals.params), state, strict=True)
        return Rewired(TopKastState(*(topology.hold(plan, sound, new, old) for new, old in after)))

    return Algorithm(
        init,
        update,
        schedules.every(period, start=start, stop=stop),
        dense_grads=schedules.always,
        stored=all_weights,
        trained=lambda state: state.backward,
        plan=plan,
        state=TopKastState,
        latent=True,
    )


def _trained(leaf: LayerPlan, extra: float) -> int:
    return min(leaf.group_size, leaf.n_active + math.floor(extra * leaf.n_active))


@arguments(state=rules.one_of(TopKastState, "the state of top_kast"), scale=rules.scalar)
def exploration_penalty(params: PyTree, state: TopKastState, scale: float = 1e-4) -> Array:
    """The regulariser that makes Top-KAST explore: scale / 2 (|w_A|^2 + |w_(B - A)|^2 / D), f32 scalar.

    D is the density of A in the leaf: weights that are trained but not used shrink faster than the others, and make
    room. Weights outside B and dense leaves do not count. Add it to the loss, at the params themselves.

    Args:
      params: the latent weights.
      state: the algorithm's state, `state.algorithm` of `sparsify`'s.
      scale: lambda, the strength.

    >>> masks = {"w": jnp.array([True, False, False, False])}, {"w": jnp.array([True, True, False, False])}
    >>> params = {"w": jnp.array([2.0, 1.0, 5.0, 5.0])}
    >>> float(exploration_penalty(params, TopKastState(*masks), 1.0))  # (4 + 1 / 0.25) / 2
    4.0
    """
    checks.masks("exploration_penalty", state.masks, params)

    def one(p: Array, used: Array | None, trained: Array | None) -> Array:
        if used is None or trained is None:
            return jnp.zeros((), jnp.float32)
        weight = jnp.where(used, 1.0, trained.astype(jnp.float32) / jnp.mean(used, dtype=jnp.float32))
        return jnp.sum(weight * jnp.square(p.astype(jnp.float32)))

    terms = jax.tree.leaves(jax.tree.map(one, params, state.masks, state.backward))
    return scale / 2 * sum(terms, start=jnp.zeros((), jnp.float32))
