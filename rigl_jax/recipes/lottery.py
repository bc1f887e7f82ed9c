"""The lottery ticket hypothesis: train, prune, rewind, again; and the controls that say whether the ticket won."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.numpy as jnp

from rigl_jax import checks, criteria, topology, trees
from rigl_jax.base import Array, Criterion, LayerPlan, Masks, Plan, PyTree, Surgeon, Train
from rigl_jax.masking import apply_masks
from rigl_jax.messages import shown
from rigl_jax.recipes.tickets import (
    PlanAt,
    Ticket,
    check_scope,
    level_key,
    plan_of,
    prune_to_level,
    run,
    ticket_of,
    walk,
    whole_number,
)


def lottery_ticket(
    train: Train,
    params: PyTree,
    plan_at: PlanAt,
    *,
    levels: int,
    steps: int,
    key: Array,
    rewind_to: int = 0,
    rewind: str = "weights",
    criterion: Criterion | Surgeon = criteria.magnitude,
    batch: Any = None,
    scope: str = "global",
    min_active: int = 1,
    resume: Ticket | None = None,
) -> Iterator[Ticket]:
    """Lottery tickets by iterative pruning (Frankle & Carbin 2019; rewinding to step k: Frankle et al. 2020).

    Level 0 trains the dense network from step 0 to `steps`. Each level prunes the trained network of the one before,
    rewinds what is left to the dense run's weights at step `rewind_to`, and trains it from there to `steps`. With
    `rewind="learning_rate"` (Renda et al. 2020) the trained weights stay, and only the schedule goes back to that step.

    What is in params is rewound with them: batch statistics too, if they are dense leaves of params, as in the authors'
    code. The optimizer's state starts anew in every call of `train`; level 0 with `rewind_to > 0` is two calls, up to
    that step and on. Schedules go by the steps that `train` is given, so from `rewind_to` on.

    Args:
      train: `(params, masks, start, stop, key) -> Trained`.
      params: the weights at step 0, dense.
      plan_at: `level -> plan` from level 1 on, such as `plan_by_rate(plan, 0.2)`. Counts must not grow.
      levels: how often the network is pruned; 0 trains the dense one only.
      steps: of the dense run.
      key: PRNG key; level L trains with `fold_in(key, L)`.
      rewind_to: k, from 0 to below `steps`.
      rewind: "weights" or "learning_rate".
      criterion: see `rx.prune`. Weights that a surgeon moves are rewound all the same.
      batch: of the criterion, see `rx.prune`.
      scope: "global" (the authors) or "layer"; see `rx.prune`.
      min_active: see `rx.prune`. The authors have no such floor.
      resume: a ticket of this recipe with the same arguments: only the levels after it are trained, to the same bits.

    Yields:
      `levels + 1` tickets with trained params. `carry` holds the weights from which the level was trained from step
      `rewind_to` on, the "winning ticket"; None with `rewind="learning_rate"`.

    Raises:
      ValueError: names the argument, when called; what `train` returns is checked level by level.

    The authors prune all weights with a magnitude at or below a threshold, which takes more where weights tie; here
    counts are exact. Their 20 % are of all weights with masks, also those of layers that are not pruned; here of those
    of the plan's leaves.

    >>> import rigl_jax as rx
    >>> def train(params, masks, start, stop, key):
    ...     for _ in range(start, stop):  # towards 1, 2, 3, ...
    ...         params = apply_masks({"w": params["w"] + 0.5 * (jnp.arange(1.0, 11) - params["w"])}, masks)
    ...     return rx.base.Trained(params)
    >>> params = {"w": jnp.linspace(-1.0, 1.0, 10)}
    >>> plan_at = rx.recipes.plan_by_rate(rx.make_plan(params, 0.5, rules=[("w", rx.unstructured())]), 0.5)
    >>> tickets = list(lottery_ticket(train, params, plan_at, levels=2, steps=8, key=jax.random.key(0)))
    >>> [ticket.sparsity for ticket in tickets], tickets[2].masks["w"].tolist()[7:]
    ([0.0, 0.5, 0.8], [False, True, True])
    """
    who = "lottery_ticket"
    checks.functions(who, train=train, plan_at=plan_at, criterion=criterion)
    key, levels = checks.key(who, key), whole_number(who, "levels", levels)
    steps, rewind_to = whole_number(who, "steps", steps, 1), whole_number(who, "rewind_to", rewind_to)
    if rewind_to >= steps:
        raise ValueError(f"{who}: rewind_to must be below steps={steps}, got {rewind_to}")
    if rewind not in ("weights", "learning_rate"):
        raise ValueError(f"{who}: rewind must be 'weights' or 'learning_rate', got {shown(rewind)}")
    plan = plan_of(who, plan_at, 1, params)
    check_scope(who, plan, scope, min_active)

    def first() -> Ticket:
        masks, start = topology.full_masks(plan, params), params
        if rewind_to:
            start = run(who, train, start, masks, 0, rewind_to, level_key(key, 0)).params
        trained = run(who, train, start, masks, rewind_to, steps, level_key(key, 0))
        return ticket_of(trained, 0, start if rewind == "weights" else None)

    def following(level: int, before: Ticket) -> Ticket:
        pruned = prune_to_level(who, before, plan_at, level, criterion, batch, scope, min_active)
        start = apply_masks(before.carry, pruned.masks) if rewind == "weights" else pruned.params
        trained = run(who, train, start, pruned.masks, rewind_to, steps, level_key(key, level))
        return ticket_of(trained, level, start if rewind == "weights" else None)

    return walk(who, levels, first, following, resume)


def reinitialise(init: Callable[[Array], PyTree], masks: Masks, key: Array) -> PyTree:
    """The control "random reinit": the ticket's masks on weights drawn anew. Train them as a level is trained.

    Args:
      init: `key -> params`.
      masks: of a ticket.
      key: PRNG key, another than that of the run.

    >>> masks = {"w": jnp.array([True, False])}
    >>> reinitialise(lambda key: {"w": jnp.ones(2)}, masks, jax.random.key(0))["w"].tolist()
    [1.0, 0.0]
    """
    checks.functions("reinitialise", init=init)
    return apply_masks(init(checks.key("reinitialise", key)), masks)


def shuffle_masks(plan: Plan, masks: Masks, key: Array, *, scope: str = "layer") -> Masks:
    """The control "random mask": as many active weights as the ticket has, elsewhere. Put them on the ticket's start.

    Args:
      plan: whose leaves and structures the masks have; counts are those of the masks.
      masks: of a ticket.
      key: PRNG key.
      scope: "layer": units are shuffled within each group of the structure, so that each keeps its count. For
        unstructured leaves this is a uniformly random mask of equal count. "global": single weights are shuffled over
        all leaves, which keeps the total only; leaves must be unstructured.

    >>> import rigl_jax as rx
    >>> plan = rx.make_plan({"w": jnp.ones((4, 4))}, 0.75)
    >>> masks = rx.topology.random_masks(plan, jax.random.key(0), {"w": jnp.ones((4, 4))})
    >>> shuffled = shuffle_masks(plan, masks, jax.random.key(1))
    >>> int(shuffled["w"].sum()), bool((shuffled["w"] == masks["w"]).all())
    (4, False)
    """
    who = "shuffle_masks"
    checks.plan(who, plan)
    check_scope(who, plan, scope)
    key, counts = checks.key(who, key), topology.count_groups(who, plan, masks)
    draws = trees.map_sparse(
        lambda layer, _: jax.random.uniform(trees.leaf_key(key, layer.name), layer.shape), plan, masks
    )
    if scope == "global":
        return topology.prune_jointly(plan, draws, sum(int(n.sum()) for n in counts.values()), min_active=0)

    def one(layer: LayerPlan, draw: Array) -> Array:
        n = jnp.expand_dims(jnp.asarray(counts[layer.name], jnp.int32), layer.structure.axes(layer.units))
        return topology.prune(layer.structure, draw, n)

    return trees.map_sparse(one, plan, draws)
