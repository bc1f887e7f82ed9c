"""Sup-Tickets: cheap tickets at the end of a dynamic run, superposed into one network."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.numpy as jnp

from rigl_jax import checks, criteria
from rigl_jax.base import Array, Criterion, Masks, Plan, Pruned, PyTree, Train
from rigl_jax.masking import apply_masks
from rigl_jax.messages import shown
from rigl_jax.pruning import prune
from rigl_jax.recipes.free_tickets import check_counts, escape
from rigl_jax.recipes.tickets import Ticket, check_scope, fraction_of, level_key, run, sparsity_of, walk, whole_number


def sup_tickets(
    train: Train,
    params: PyTree,
    masks: Masks,
    plan: Plan,
    *,
    tickets: int,
    start: int,
    cycle: int,
    key: Array,
    fraction: float = 0.5,
    rule: str = "caa",
    beta: float = 0.5,
    scope: str = "global",
    grow: Criterion | None = None,
    batch: Any = None,
    reestimate: Callable[[PyTree, Masks], PyTree] | None = None,
    resume: Ticket | None = None,
) -> Iterator[Ticket]:
    """Sup-Tickets (Yin et al. 2022): the last tenth of a dynamic run in cycles, whose ends are superposed.

    Each cycle exchanges a part of the weights once, then trains with fixed masks while the learning rate goes up and
    down (`retraining.triangular`; the authors' command line: 0.001 up to 0.005, 8 epochs a cycle, 3 cycles of 250
    epochs). Its network joins the average, which is pruned to the plan's counts by magnitude after every merge.

    The run goes on from its own weights, not from the average. All that is in params is averaged; batch statistics are
    wrong then, so pass `reestimate`. The optimizer's state starts anew in each cycle, and the schedule goes on.

    Args:
      train: `(params, masks, start, stop, key) -> Trained`; masks are fixed.
      params: of the dynamic run at step `start`.
      masks: its masks, with the plan's counts.
      plan: from `make_plan`.
      tickets: how many cycles.
      start: the step at which they begin, for `train` to number its steps.
      cycle: steps of each.
      key: PRNG key; cycle i explores and trains with `fold_in(key, i)`.
      fraction: of the active units that a cycle exchanges at its start (0.5).
      rule: "caa" or "cima", see `superpose`.
      beta: of "cima".
      scope: of pruning the average: "global" (the authors) or "layer".
      grow: see `escape`.
      batch: see `escape`.
      reestimate: `(params, masks) -> params`, of the average after every merge: batch statistics over training data.
      resume: a ticket of this recipe with the same arguments.

    Yields:
      A ticket for each cycle: the average so far, with masks of its own. `carry` is the `Pruned` of the run itself.

    The authors' code keeps the masks from before the merge; these are those of the average. Its loop for CIMA drops
    intermediate averages; here it is the recursion of the paper.

    >>> import rigl_jax as rx
    >>> train = lambda params, masks, start, stop, key: rx.base.Trained(params)
    >>> params, key = {"w": jnp.arange(1.0, 17).reshape(4, 4)}, jax.random.key(0)
    >>> plan = rx.make_plan(params, 0.5)
    >>> masks = rx.topology.random_masks(plan, key, params)
    >>> averages = list(sup_tickets(train, params, masks, plan, tickets=3, start=90, cycle=10, key=key))
    >>> [int(ticket.masks["w"].sum()) for ticket in averages]
    [8, 8, 8]
    """
    who = "sup_tickets"
    checks.functions(who, train=train)
    checks.optional_functions(who, grow=grow, reestimate=reestimate)
    key, tickets = checks.key(who, key), whole_number(who, "tickets", tickets, 1)
    start, cycle = whole_number(who, "start", start), whole_number(who, "cycle", cycle, 1)
    fraction = fraction_of(who, fraction)
    _rule(who, rule, beta)
    check_counts(who, plan, masks)
    check_scope(who, plan, scope)
    begin = Pruned(apply_masks(params, masks), checks.masks(who, masks, params))

    def one(level: int, run_so_far: Pruned) -> tuple[Pruned, Any]:
        of_escape, of_training = jax.random.split(level_key(key, level))
        explored = escape(plan, *run_so_far, of_escape, fraction=fraction, grow=grow, batch=batch)
        first = start + level * cycle
        trained = run(who, train, *explored, first, first + cycle, of_training)
        return Pruned(trained.params, explored.masks), trained.aux

    def first() -> Ticket:
        now, aux = one(0, begin)
        return Ticket(*now, 0, sparsity_of(now.masks), now, aux)

    def following(level: int, before: Ticket) -> Ticket:
        now, aux = one(level, Pruned(*before.carry))
        average = superpose(before.params, now.params, level, rule=rule, beta=beta)
        merged = prune(plan, average, criteria.magnitude, scope=scope)
        params = merged.params if reestimate is None else reestimate(*merged)
        return Ticket(params, merged.masks, level, sparsity_of(merged.masks), now, aux)

    return walk(who, tickets - 1, first, following, resume)


def superpose(average: PyTree, new: PyTree, n: int, *, rule: str = "caa", beta: float = 0.5) -> PyTree:
    """The average of networks with one more (Sup-Tickets, Yin et al. 2022); to be pruned again afterwards.

    Args:
      average: of n networks.
      new: the network that joins, parallel to it.
      n: how many networks the average holds, at least 1.
      rule: "caa": `(1 - 1 / (n + 1)) average + new / (n + 1)`, the arithmetic mean of all. "cima":
        `(1 - beta) average + beta new`, in which older ones fade.
      beta: of "cima", in [0, 1].

    Returns:
      A tree of the types of `average`; what is no float is that of `new`.

    >>> superpose({"w": jnp.array([2.0])}, {"w": jnp.array([5.0])}, 2)["w"].tolist()
    [3.0]
    """
    who = "superpose"
    n = whole_number(who, "n", n, 1)
    share = beta if _rule(who, rule, beta) == "cima" else 1 / (n + 1)
    if jax.tree.structure(average) != jax.tree.structure(new):
        raise ValueError(f"{who}: new must be parallel to average")

    def one(a: Any, b: Any) -> Any:
        if not jnp.issubdtype(jnp.result_type(a), jnp.floating):
            return b
        return a + jnp.asarray(share, a.dtype) * (b - a)

    return jax.tree.map(one, average, new)


def _rule(who: str, rule: Any, beta: Any) -> str:
    if rule not in ("caa", "cima"):
        raise ValueError(f"{who}: rule must be 'caa' or 'cima', got {shown(rule)}")
    checks.number(who, "beta", beta, "must be in [0, 1]", lambda found: 0 <= found <= 1)
    return rule
