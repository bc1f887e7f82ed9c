"""What recipes share: tickets, the walk over their levels, the checked call of training, and plans by level."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from rigl_jax import checks, topology, trees
from rigl_jax.base import Array, Criterion, LayerPlan, Masks, Plan, Pruned, PyTree, Surgeon, Train, Trained
from rigl_jax.distributions import whole
from rigl_jax.masking import check_masked
from rigl_jax.messages import kind, shown
from rigl_jax.pruning import is_global, prune

PlanAt = Callable[[int], Plan]
"""`level -> Plan`: how many weights are left after `level` prunings, from 1 on."""


class Ticket(NamedTuple):
    """A network that a recipe gives, with all that the levels after it depend on. A pytree, to be saved as it is.

    Attributes:
      params: the weights, exactly 0 off the masks. Trained, unless the recipe says otherwise.
      masks: parallel to params: bool[*shape], None for a dense leaf.
      level: which of the recipe's networks it is, from 0.
      sparsity: fraction of zeros over the leaves that have masks.
      carry: what the next level needs besides; the recipe says what. None: nothing.
      aux: that of the last training. No recipe reads it, and it need not be saved.
    """

    params: PyTree
    masks: Masks
    level: int
    sparsity: float
    carry: Any = None
    aux: Any = None


def walk(
    who: str, last: int, first: Callable[[], Ticket], following: Callable[[int, Ticket], Ticket], resume: Any
) -> Iterator[Ticket]:
    """The tickets of all levels up to the last, or those after `resume`. Each depends on the one before it alone.

    Raises:
      ValueError: at once: `resume` is no ticket of a level up to the last.
    """
    if resume is not None:
        if not isinstance(resume, Ticket) or not 0 <= int(resume.level) <= last:
            raise ValueError(f"{who}: resume must be a Ticket of a level from 0 to {last}, got {kind(resume)}")
        resume = resume._replace(level=int(resume.level), sparsity=float(resume.sparsity))

    def levels() -> Iterator[Ticket]:
        ticket = resume
        if ticket is None:
            ticket = first()
            yield ticket
        for level in range(ticket.level + 1, last + 1):
            ticket = following(level, ticket)
            yield ticket

    return levels()


def level_key(key: Array, level: int) -> Array:
    """The key of a level: of the recipe's key and the level alone, so that resuming needs no history."""
    return jax.random.fold_in(key, level)


def run(who: str, train: Train, params: PyTree, masks: Masks, start: int, stop: int, key: Array) -> Trained:
    """Calls the user's training and checks what it returns; `masks` of the answer are filled in.

    Raises:
      ValueError: no `Trained`, params of other leaves or shapes, or weights that are not 0 off the masks; names `train`
        or the leaf.
    """
    trained = train(params, masks, start, stop, key)
    if not isinstance(trained, Trained):
        raise ValueError(f"{who}: train must return rx.base.Trained(params, aux), got {kind(trained)}")
    if trees.named_shapes(trained.params) != trees.named_shapes(params):
        raise ValueError(f"{who}: train must return params with the leaves and shapes it was given")
    masks = masks if trained.masks is None else checks.masks(who, trained.masks, trained.params)
    check_masked(trained.params, masks)
    return trained._replace(masks=masks)


def ticket_of(trained: Trained, level: int, carry: Any = None) -> Ticket:
    """The ticket of a network that was trained."""
    return Ticket(trained.params, trained.masks, level, sparsity_of(trained.masks), carry, trained.aux)


def sparsity_of(masks: Masks) -> float:
    """The fraction of zeros in masks, as a Python float, exact in integers up to the division."""
    leaves = jax.tree.leaves(masks)
    active, size = sum(int(jnp.sum(mask)) for mask in leaves), sum(mask.size for mask in leaves)
    return 1 - active / size


def plan_of(who: str, plan_at: Any, level: int, params: PyTree) -> Plan:
    """The plan of a level, checked.

    Raises:
      ValueError: no plan, or one of other leaves or shapes than params.
    """
    plan = plan_at(level)
    checks.plan(f"{who}: plan_at", plan)
    topology.check_fit(plan, params)
    return plan


def prune_to_level(
    who: str,
    before: Ticket,
    plan_at: PlanAt,
    level: int,
    criterion: Criterion | Surgeon,
    batch: Any,
    scope: str,
    min_active: int,
) -> Pruned:
    """The network of the level before, pruned to the plan of this one; what is pruned never returns."""
    plan = plan_of(who, plan_at, level, before.params)
    return prune(plan, before.params, criterion, batch, scope=scope, masks=before.masks, min_active=min_active)


def check_scope(who: str, plan: Plan, scope: Any, min_active: Any = 1) -> None:
    """Checks a scope of pruning against the leaves of a plan.

    Raises:
      ValueError: neither "layer" nor "global"; or global with structures, or with a `min_active` without room.
    """
    topology.ranking(who, plan, jointly=is_global(who, scope), min_active=min_active)


def fraction_of(who: str, value: Any) -> float:
    """The fraction of active units that is exchanged, as a Python float.

    Raises:
      ValueError: outside of [0, 1].
    """
    return checks.number(who, "fraction", value, "must be in [0, 1]", lambda found: 0 <= found <= 1)


def whole_number(who: str, name: str, value: Any, least: int = 0) -> int:
    """A number of levels, rounds, members or steps as a Python integer.

    Raises:
      ValueError: names the argument.
    """
    if not checks.is_whole(value, least):
        raise ValueError(f"{who}: {name} must be a whole number, at least {least}, got {shown(value)}")
    return int(value)


def plan_by_rate(plan: Plan, rate: float = 0.2) -> PlanAt:
    """Each level prunes a share of what is left: `ceil(rate * remaining)` of each group of each leaf, and one stays.

    With scope "global" only the sum over leaves counts, which may so be pruned by a few weights more than `rate`.

    Args:
      plan: from `make_plan`; its leaves and structures are kept, its counts are not read.
      rate: in (0, 1).

    >>> import rigl_jax as rx
    >>> plan_at = plan_by_rate(rx.make_plan({"w": jnp.ones((10, 10))}, 0.5))
    >>> [plan_at(level)["w"].n_active for level in range(4)]
    [100, 80, 64, 51]
    """
    checks.plan("plan_by_rate", plan)
    rate = checks.number("plan_by_rate", "rate", rate, "must be above 0 and below 1", lambda found: 0 < found < 1)

    def one(layer: LayerPlan, level: int) -> LayerPlan:
        n = layer.group_size
        for _ in range(level):
            n = max(1, n - whole(rate * n, math.ceil))
        return layer._replace(n_active=n)

    return lambda level: {name: one(layer, level) for name, layer in plan.items()}


def plan_towards(plan: Plan, rounds: int) -> PlanAt:
    """Reaches the counts of a plan in rounds that each take the same share of what is left: `1 - (1 - S)^(1 / rounds)`.

    After round k about `size (n_active / size)^(k / rounds)` units of a group are left, rounded to the nearest integer.

    Args:
      plan: from `make_plan`; that of the last round.
      rounds: at least 1.

    >>> import rigl_jax as rx
    >>> plan_at = plan_towards(rx.make_plan({"w": jnp.ones((10, 10))}, 0.75), 2)
    >>> [plan_at(level)["w"].n_active for level in range(3)]
    [100, 50, 25]
    """
    checks.plan("plan_towards", plan)
    rounds = whole_number("plan_towards", "rounds", rounds, 1)

    def one(layer: LayerPlan, level: int) -> LayerPlan:
        left = layer.group_size * (layer.n_active / layer.group_size) ** (min(level, rounds) / rounds)
        return layer._replace(n_active=layer.n_active if level >= rounds else max(layer.n_active, round(left)))

    return lambda level: {name: one(layer, level) for name, layer in plan.items()}
