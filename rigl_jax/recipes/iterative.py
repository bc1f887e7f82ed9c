"""Pruning of a trained network, at once or in rounds, with retraining after each."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

from rigl_jax import checks, criteria, topology
from rigl_jax.base import Array, Criterion, Masks, PyTree, Surgeon, Train, Trained
from rigl_jax.messages import shown
from rigl_jax.recipes.retraining import norm_drop
from rigl_jax.recipes.tickets import (
    PlanAt,
    Ticket,
    check_scope,
    level_key,
    plan_of,
    prune_to_level,
    run,
    sparsity_of,
    ticket_of,
    walk,
    whole_number,
)


class Round(NamedTuple):
    """What a retraining may depend on.

    Attributes:
      level: which pruning it follows, from 1.
      steps: how long it is.
      sparsity: fraction of zeros over the sparse leaves, after the pruning.
      fraction: share of the weights left before that this pruning took.
      norm_drop: see `retraining.norm_drop`, over all leaves of params.
    """

    level: int
    steps: int
    sparsity: float
    fraction: float
    norm_drop: float


def iterative_pruning(
    train: Train,
    params: PyTree,
    plan_at: PlanAt,
    *,
    rounds: int,
    steps: int,
    retrain_steps: int | Sequence[int],
    key: Array,
    retrain: Callable[[Round], Train] | None = None,
    criterion: Criterion | Surgeon = criteria.magnitude,
    batch: Any = None,
    scope: str = "global",
    min_active: int = 1,
    reestimate: Callable[[PyTree, Masks], PyTree] | None = None,
    resume: Ticket | None = None,
) -> Iterator[Ticket]:
    """Prunes a trained network and trains on what is left, round by round (Han et al. 2015); one round is one-shot.

    How the learning rate goes after a pruning decides most of the outcome (Zimmer et al. 2023). Give `retrain` a
    schedule of `rx.recipes.retraining`, where `make_train(schedule)` makes your training function:

        retrain = lambda r: make_train(retraining.allr(rate, T, r.steps, norm_drop=r.norm_drop, fraction=r.fraction))

    Weights are kept from round to round, and with them all that is in params, such as batch statistics. The optimizer's
    state starts anew in every call of `train`. Schedules of `retrain` count from 0 in each round.

    Args:
      train: `(params, masks, start, stop, key) -> Trained`; trains the dense network from step 0 to `steps`.
      params: weights at step 0, or trained ones with `steps=0`.
      plan_at: `round -> plan` from 1 on, such as `plan_towards(plan, rounds)`. Counts must not grow.
      rounds: how often the network is pruned.
      steps: of the dense run; 0: params are trained already, and `train` is not called for them.
      retrain_steps: after each pruning, 0 for none; or one number a round, such as `retraining.split(budget, rounds)`.
      key: PRNG key; round L trains with `fold_in(key, L)`.
      retrain: `round -> training function`, called with steps 0 to `retrain_steps`. None: `train` itself goes on, from
        step `steps` in the first round, by its own schedule.
      criterion: see `rx.prune`.
      batch: of the criterion, see `rx.prune`.
      scope: "global" or "layer"; see `rx.prune`. A surgeon takes "layer" only.
      min_active: see `rx.prune`.
      reestimate: `(params, masks) -> params`, called after each pruning, for batch statistics of the pruned network.
        The authors' code does so unawares: it evaluates the pruned network in training mode.
      resume: a ticket of this recipe with the same arguments: only the rounds after it are done, to the same bits.

    Yields:
      `rounds + 1` tickets; that of level 0 is the dense network. `carry` is the `Round`, for level 0 None.

    Raises:
      ValueError: names the argument, when called; what the functions return is checked round by round.

    >>> import jax, jax.numpy as jnp
    >>> import rigl_jax as rx
    >>> def train(params, masks, start, stop, key):
    ...     return rx.base.Trained({"w": jnp.where(masks["w"], params["w"] + 1.0, 0.0)})
    >>> params = {"w": jnp.arange(8.0).reshape(4, 2)}
    >>> plan_at = rx.recipes.plan_towards(rx.make_plan(params, 0.75), 2)
    >>> dense, half, quarter = iterative_pruning(
    ...     train, params, plan_at, rounds=2, steps=0, retrain_steps=10, key=jax.random.key(0)
    ... )
    >>> quarter.params["w"].ravel().tolist(), quarter.sparsity, half.carry.fraction
    ([0.0, 0.0, 0.0, 0.0, 0.0, 0.0, 8.0, 9.0], 0.75, 0.5)
    """
    who = "iterative_pruning"
    checks.functions(who, train=train, plan_at=plan_at, criterion=criterion)
    checks.optional_functions(who, retrain=retrain, reestimate=reestimate)
    key, rounds, steps = checks.key(who, key), whole_number(who, "rounds", rounds), whole_number(who, "steps", steps)
    lengths = _lengths(who, retrain_steps, rounds)
    plan = plan_of(who, plan_at, 1, params)
    check_scope(who, plan, scope, min_active)

    def first() -> Ticket:
        masks = topology.full_masks(plan, params)
        trained = run(who, train, params, masks, 0, steps, level_key(key, 0)) if steps else Trained(params, None, masks)
        return ticket_of(trained, 0)

    def following(level: int, before: Ticket) -> Ticket:
        pruned = prune_to_level(who, before, plan_at, level, criterion, batch, scope, min_active)
        after, length = sparsity_of(pruned.masks), lengths[level - 1]
        drop = min(1.0, norm_drop(before.params, pruned.params))
        facts = Round(level, length, after, 1 - (1 - after) / (1 - before.sparsity), drop)
        start = pruned.params if reestimate is None else reestimate(*pruned)
        if not length:
            return ticket_of(Trained(start, None, pruned.masks), level, facts)
        begin = 0 if retrain is not None else steps + sum(lengths[: level - 1])
        training = train if retrain is None else retrain(facts)
        if not callable(training):
            raise ValueError(f"{who}: retrain must return a training function, got {shown(training)}")
        trained = run(who, training, start, pruned.masks, begin, begin + length, level_key(key, level))
        return ticket_of(trained, level, facts)

    return walk(who, rounds, first, following, resume)


def _lengths(who: str, retrain_steps: Any, rounds: int) -> list[int]:
    if isinstance(retrain_steps, Sequence) and not isinstance(retrain_steps, str):
        if len(retrain_steps) != rounds or not all(checks.is_whole(n) for n in retrain_steps):
            raise ValueError(
                f"{who}: retrain_steps must be a number of steps, or {rounds} of them, got {shown(retrain_steps)}"
            )
        return [int(n) for n in retrain_steps]
    return [whole_number(who, "retrain_steps", retrain_steps)] * rounds
