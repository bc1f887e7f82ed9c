"""AP on top of any pruner: a part of what goes are the negative weights that moved least."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp

from rigl_jax import checks, topology
from rigl_jax.base import Array, Criterion, Masks, Plan, Pruned, PyTree, Surgeon
from rigl_jax.criteria.data_free import least_moved_negative
from rigl_jax.masking import apply_masks


def activating(criterion: Criterion, start: PyTree, share: float = 0.1) -> Surgeon:
    """AP (Liu et al. 2023): a criterion prunes most of what is to go, `least_moved_negative` the rest.

    Of the n units that a group of a leaf must lose, round(share n) go by the rule of AP, after the criterion took the
    others. Where fewer of the remaining ones are negative, the criterion takes what is missing. The authors split 20 %
    of the weights left into 18 % and 2 % over all layers; here it is done leaf by leaf, as the counts of a plan are
    kept. For one ranking over all leaves call `rx.prune` twice, see `least_moved_negative`.

    In `rx.recipes.lottery_ticket` that rewinds to step 0, `start` are its params, with scope "layer".

    Args:
      criterion: `(params, batch) -> scores`, such as `magnitude`.
      start: the weights at the start of the round, parallel to params.
      share: of what goes, in [0, 1]. 0 is the criterion alone.

    >>> import rigl_jax as rx
    >>> start, params = {"w": jnp.array([[1.0, -1.0, -1.0, 2.0]])}, {"w": jnp.array([[0.1, -1.1, -3.0, 2.0]])}
    >>> plan = rx.make_plan(params, 0.5)
    >>> rx.prune(plan, params, activating(rx.criteria.magnitude, start, 0.5)).params["w"].tolist()
    [[0.0, 0.0, -3.0, 2.0]]
    """
    checks.functions("activating", criterion=criterion)
    share = checks.number("activating", "share", share, "must be in [0, 1]", lambda x: 0 <= x <= 1)
    moved = least_moved_negative(start)

    def surgeon(plan: Plan, params: PyTree, masks: Masks, batch: Any) -> Pruned:
        held = topology.count_groups("activating", plan, masks)
        more = {name: round(share * max(0, int(held[name].max()) - layer.n_active)) for name, layer in plan.items()}
        first = {name: layer._replace(n_active=layer.n_active + more[name]) for name, layer in plan.items()}
        kept = _best(first, criterion(params, batch), masks)
        left = apply_masks(params, kept)
        kept = _best(plan, jax.tree.map(_in_turn, moved(left, batch), criterion(left, batch)), kept)
        return Pruned(apply_masks(params, kept), kept)

    return surgeon


def _best(plan: Plan, scores: PyTree, among: Masks) -> Masks:
    return topology.ranking("activating", plan, jointly=False, min_active=1).best(scores, among=among)


def _in_turn(first: Array, second: Array) -> Array:
    """Scores whose ranking is that of `first` where it is finite, and above these that of `second`."""
    order = jnp.argsort(jnp.argsort(jnp.where(jnp.isfinite(first), -jnp.inf, second).ravel())).reshape(first.shape)
    highest = jnp.max(jnp.where(jnp.isfinite(first), first, 0))
    return jnp.where(jnp.isfinite(first), first, highest + 1 + order.astype(jnp.float32) * (highest + 1))
