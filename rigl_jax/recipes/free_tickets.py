"""FreeTickets: ensembles of networks from dynamic sparse training."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import optax

from rigl_jax import checks, scores, topology
from rigl_jax.base import Array, Criterion, Masks, Plan, Pruned, PyTree, Train
from rigl_jax.masking import apply_masks
from rigl_jax.messages import kind
from rigl_jax.recipes.tickets import Ticket, fraction_of, level_key, run, ticket_of, walk, whole_number


def free_tickets(
    train: Train,
    init: Callable[[Array], PyTree],
    plan: Plan,
    *,
    members: int,
    steps: int,
    key: Array,
    resume: Ticket | None = None,
) -> Iterator[Ticket]:
    """The DST ensemble of FreeTickets (Liu et al. 2022): independent sparse runs, each with a start of its own.

    Members share nothing: weights, batch statistics and the optimizer's state of each are its own, and each runs its
    schedule from step 0 to `steps`.

    Args:
      train: `(params, masks, start, stop, key) -> Trained`, a dynamic method that starts with these masks
        (`rx.replace_masks`) and returns those that it ends with.
      init: `key -> params`.
      plan: from `make_plan`; the first masks are random, with its counts.
      members: how many networks.
      steps: of each.
      key: PRNG key; member i draws and trains with `fold_in(key, i)`.
      resume: a ticket of this recipe: only the members after it are trained.

    Yields:
      A ticket for each member, to be given to `ensemble`.

    >>> import rigl_jax as rx
    >>> train = lambda params, masks, start, stop, key: rx.base.Trained(params, masks=masks)
    >>> init = lambda key: {"w": jax.random.normal(key, (4, 4))}
    >>> plan = rx.make_plan({"w": jnp.ones((4, 4))}, 0.5)
    >>> [t.level for t in free_tickets(train, init, plan, members=3, steps=10, key=jax.random.key(0))]
    [0, 1, 2]
    """
    who = "free_tickets"
    checks.functions(who, train=train, init=init)
    checks.plan(who, plan)
    key, members, steps = (
        checks.key(who, key),
        whole_number(who, "members", members, 1),
        whole_number(who, "steps", steps, 1),
    )

    def member(level: int) -> Ticket:
        of_weights, of_masks, of_training = jax.random.split(level_key(key, level), 3)
        params = init(of_weights)
        masks = topology.random_masks(plan, of_masks, params)
        return ticket_of(run(who, train, apply_masks(params, masks), masks, 0, steps, of_training), level)

    return walk(who, members - 1, lambda: member(0), lambda level, before: member(level), resume)


def edst(
    train: Train,
    params: PyTree,
    masks: Masks,
    plan: Plan,
    *,
    members: int,
    explore: int,
    refine: int,
    key: Array,
    fraction: float = 0.8,
    grow: Criterion | None = None,
    batch: Any = None,
    resume: Ticket | None = None,
) -> Iterator[Ticket]:
    """EDST, the ensemble of one dynamic run (FreeTickets, Liu et al. 2022).

    The run explores for `explore` steps and refines for `refine` steps: the first member. For each further member a
    large part of the weights is exchanged at once, so that the run escapes, and it refines again. Within all phases
    `train` goes on rewiring by its own method. `edst_rates` is the schedule.

    Weights, and all else in params, such as batch statistics, go on from member to member; weights that an escape grows
    start at 0. The optimizer's state starts anew after each escape (the authors keep it for weights that stay). The
    authors save the best model of a phase by test accuracy; here it is the last. They train 3 members in 450 epochs, of
    which 150 explore, at a sparsity of 80 % (CIFAR-10).

    Args:
      train: `(params, masks, start, stop, key) -> Trained`, a dynamic method that starts with these masks and returns
        those that it ends with. Their counts must stay those of the plan.
      params: weights at step 0.
      masks: of the plan, such as `rx.topology.random_masks(plan, key, params)`.
      plan: from `make_plan`.
      members: M, how many networks.
      explore: steps before the first refinement.
      refine: steps of each member; `(T - explore) / M` in a run of T steps.
      key: PRNG key; member i escapes and trains with `fold_in(key, i)`.
      fraction: of the active units that an escape exchanges (0.8).
      grow: see `escape`.
      batch: see `escape`.
      resume: a ticket of this recipe with the same arguments.

    Yields:
      A ticket for each member, to be given to `ensemble`.

    >>> import rigl_jax as rx
    >>> train = lambda params, masks, start, stop, key: rx.base.Trained(params, (start, stop), masks)
    >>> params, key = {"w": jnp.ones((4, 4))}, jax.random.key(0)
    >>> plan = rx.make_plan(params, 0.5)
    >>> masks = rx.topology.random_masks(plan, key, params)
    >>> [t.aux for t in edst(train, params, masks, plan, members=3, explore=60, refine=20, key=key)]
    [(0, 80), (80, 100), (100, 120)]
    """
    who = "edst"
    checks.functions(who, train=train)
    checks.optional_functions(who, grow=grow)
    key, members = checks.key(who, key), whole_number(who, "members", members, 1)
    explore, refine = whole_number(who, "explore", explore), whole_number(who, "refine", refine, 1)
    fraction = fraction_of(who, fraction)
    check_counts(who, plan, masks)
    start = apply_masks(params, masks)
    masks = checks.masks(who, masks, params)

    def first() -> Ticket:
        return ticket_of(run(who, train, start, masks, 0, explore + refine, level_key(key, 0)), 0)

    def following(level: int, before: Ticket) -> Ticket:
        of_escape, of_training = jax.random.split(level_key(key, level))
        after = escape(plan, before.params, before.masks, of_escape, fraction=fraction, grow=grow, batch=batch)
        begin = explore + level * refine
        return ticket_of(run(who, train, *after, begin, begin + refine, of_training), level)

    return walk(who, members - 1, first, following, resume)


def escape(
    plan: Plan,
    params: PyTree,
    masks: Masks,
    key: Array,
    *,
    fraction: float = 0.8,
    grow: Criterion | None = None,
    batch: Any = None,
) -> Pruned:
    """Drops a fraction of the active units, those of smallest magnitude, and grows as many; new weights are 0.

    Args:
      plan: whose counts the masks have.
      params: weights.
      masks: parallel to params.
      key: PRNG key.
      fraction: in [0, 1], by floor. A unit that is dropped may be grown again, at 0.
      grow: `(params, batch) -> scores`, the highest are grown; |gradient| of the loss is RigL's. None: at random (SET).
      batch: of `grow`.

    >>> import rigl_jax as rx
    >>> params, masks = {"w": jnp.array([[4.0, 3.0], [0.0, 0.0]])}, {"w": jnp.array([[True, True], [False, False]])}
    >>> plan = rx.make_plan(params, 0.5)
    >>> last = lambda params, batch: {"w": jnp.arange(4.0).reshape(2, 2)}
    >>> escape(plan, params, masks, jax.random.key(0), fraction=0.5, grow=last).params["w"].tolist()
    [[4.0, 0.0], [0.0, 0.0]]
    """
    who = "escape"
    check_counts(who, plan, masks)
    key, fraction = checks.key(who, key), fraction_of(who, fraction)
    masks = checks.masks(who, masks, params)
    params = apply_masks(params, masks)
    if grow is not None:
        checks.functions(who, grow=grow)
    growing = scores.Draws(key) if grow is None else grow(params, batch)
    new = topology.drop_and_grow(plan, masks, scores.Magnitudes(params), growing, fraction)
    return Pruned(apply_masks(params, new.kept), new.mask)


def edst_rates(
    explore: optax.Schedule, steps: int, refine: int, *, high: float = 0.01, low: float = 0.001
) -> optax.Schedule:
    """The learning rate of EDST: that of `explore` for so many steps, then for each member `high`, from half way `low`.

    Args:
      explore: schedule of the exploration.
      steps: its length.
      refine: steps of each member.
      high: rate of the first half of a refinement.
      low: rate of the second.

    >>> rates = edst_rates(optax.constant_schedule(0.1), 60, 20)
    >>> [round(float(rates(step)), 4) for step in (0, 59, 60, 69, 70, 79, 80)]
    [0.1, 0.1, 0.01, 0.01, 0.001, 0.001, 0.01]
    """
    who = "edst_rates"
    checks.functions(who, explore=explore)
    steps, refine = whole_number(who, "steps", steps), whole_number(who, "refine", refine, 2)
    for name, value in (("high", high), ("low", low)):
        checks.number(who, name, value, "must be at least 0", lambda found: found >= 0)

    def schedule(step: Any) -> Any:
        step = jnp.asarray(step)
        return jnp.where(step < steps, explore(step), jnp.where((step - steps) % refine < refine // 2, high, low))

    return schedule


def ensemble(apply: Callable[..., Array], tickets: Sequence[Any]) -> Callable[..., Array]:
    """The mean of the members' probabilities: `(*inputs) -> float[n, classes]`.

    Its negative log-likelihood is at most the mean of the members' (Jensen's inequality).

    Args:
      apply: `(params, *inputs) -> logits`, in inference mode.
      tickets: at least one; of each `params` is read.

    >>> import rigl_jax as rx
    >>> members = [rx.base.Trained({"b": jnp.array([0.0, b])}) for b in (0.0, 100.0)]
    >>> ensemble(lambda params, x: x + params["b"][None], members)(jnp.zeros((1, 2))).tolist()
    [[0.25, 0.75]]
    """
    checks.functions("ensemble", apply=apply)
    if not isinstance(tickets, Sequence) or not tickets or not all(hasattr(t, "params") for t in tickets):
        raise ValueError(f"ensemble: tickets must be a list of what a recipe gives, got {kind(tickets)}")
    members = [ticket.params for ticket in tickets]

    def predict(*inputs: Any) -> Array:
        probs = [jax.nn.softmax(apply(params, *inputs), axis=-1) for params in members]
        return functools.reduce(jnp.add, probs) / len(probs)

    return predict


def check_counts(who: str, plan: Plan, masks: Masks) -> None:
    """Checks that masks hold the plan's counts in each group.

    Raises:
      ValueError: names the leaf.
    """
    checks.plan(who, plan)
    for name, held in topology.count_groups(who, plan, masks).items():
        if (held != plan[name].n_active).any():
            raise ValueError(
                f"{who}: masks must hold {plan[name].n_active} active units in each group of leaf {name!r}, "
                f"got {held.min()} to {held.max()}"
            )
