"""Pruning before training: masks by a criterion, found in `init` and then kept."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from rigl_jax import checks, topology
from rigl_jax.algorithms.static import MaskState, static
from rigl_jax.base import Algorithm, Array, Criterion, Plan, PyTree
from rigl_jax.pruning import is_global, rank_in_rounds, schedule_rounds


def one_shot(
    plan: Plan, criterion: Criterion, batch: Any = None, *, rounds: int = 1, scope: str = "layer", min_active: int = 1
) -> Algorithm:
    """Prunes the initial weights by a criterion, in `init`, and trains what is left: SNIP, GraSP and SynFlow are this.

    `rx.prune` does the same outside of training; all options are explained there. The batch is a constant of the
    compiled `init`. Training FLOPs a step: 3 f_S, after what the criterion costs in each round.

    Args:
      plan: from `make_plan`.
      criterion: `(params, batch) -> scores`, such as those of `rx.criteria`.
      batch: passed to the criterion.
      rounds: how often to rank what is left.
      scope: "layer" or "global".
      min_active: the least number of weights that stay in each leaf; only with scope "global".

    >>> import jax, jax.numpy as jnp
    >>> import rigl_jax as rx
    >>> params = {"w": jnp.array([[1.0, -3.0], [2.0, 0.5]])}
    >>> algorithm = one_shot(rx.make_plan(params, 0.5), rx.criteria.magnitude)
    >>> algorithm.init(jax.random.key(0), params).masks["w"].tolist()
    [[False, True], [True, False]]
    """
    jointly = is_global("one_shot", scope)
    checks.functions("one_shot", criterion=criterion)
    return prune_at_init("one_shot", plan, lambda key: criterion, batch, rounds, jointly, min_active)


def prune_at_init(
    who: str,
    plan: Plan,
    criterion: Callable[[Array], Criterion],
    batch: Any = None,
    rounds: int = 1,
    jointly: bool = False,
    min_active: int = 1,
) -> Algorithm:
    """`one_shot` for a criterion that is made of the key of `init`, with errors in the name of `who`."""
    schedule = schedule_rounds(who, topology.ranking(who, plan, jointly=jointly, min_active=min_active), rounds)

    def init(key: Array, params: PyTree) -> MaskState:
        topology.check_fit(plan, params)
        return MaskState(rank_in_rounds(schedule, criterion(key), params, batch))

    return static(plan)._replace(init=init, keeps_counts=not jointly)


def of_params(who: str, loss: Any) -> Callable[[PyTree, Any], Any]:
    """A loss `params -> scalar` as one of params and a batch that is not read."""
    checks.functions(who, loss=loss)
    return lambda params, batch: loss(params)
