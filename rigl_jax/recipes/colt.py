"""COLT: masks on which several networks agree, each trained on a part of the classes."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from rigl_jax import checks, criteria, topology, trees
from rigl_jax.base import Array, Criterion, Plan, PyTree, Train
from rigl_jax.masking import apply_masks
from rigl_jax.messages import shown
from rigl_jax.pruning import prune
from rigl_jax.recipes.tickets import Ticket, check_scope, level_key, run, sparsity_of, walk, whole_number


def colt(
    trains: Sequence[Train],
    params: PyTree,
    plan: Plan,
    *,
    rounds: int,
    steps: int,
    key: Array,
    rate: float = 0.15,
    criterion: Criterion = criteria.magnitude,
    batch: Any = None,
    scope: str = "global",
    resume: Ticket | None = None,
) -> Iterator[Ticket]:
    """COLT (Hossain et al. 2022): cyclic overlapping lottery tickets.

    Each round trains one network a part, all from the same weights and masks; prunes `ceil(rate * active)` weights of
    each; keeps the weights that all of them keep; and rewinds these to the weights at step 0. It ends with the first
    masks that hold no more weights than the plan, or after so many rounds: an intersection may take up to
    `len(trains) * rate`, so the last round may pass the target. Train the final network from the last ticket, on all
    data.

    All that is in params is rewound, batch statistics too where they are leaves of params (the authors rewind the
    parameters of normalisation layers, not their statistics). The optimizer's state starts anew in every call, and
    every training runs its schedule from step 0 to `steps`.

    Args:
      trains: a training function `(params, masks, start, stop, key) -> Trained` for each part, such as those of
        `class_parts`. Params are those of the full network; one with a head for its part alone (the authors) trains the
        body and hands back the head it was given.
      params: weights at step 0, dense.
      plan: from `make_plan`; unstructured leaves. The authors prune convolutions only. Its total is the target; with
        scope "layer" so are the counts of its leaves.
      rounds: at most so many.
      steps: of each training.
      key: PRNG key; part i of level L trains with `fold_in(fold_in(key, L), i)`.
      rate: share of the active weights that each part prunes.
      criterion: see `rx.prune`.
      batch: of the criterion.
      scope: "global" (the authors) or "layer".
      resume: a ticket of this recipe with the same arguments.

    Yields:
      Tickets whose params are the weights at step 0 on their masks, not trained. Level 0 is the dense network.

    Raises:
      ValueError: names the argument, when called.

    >>> import rigl_jax as rx
    >>> def towards(goal):
    ...     return lambda params, masks, start, stop, key: rx.base.Trained(apply_masks({"w": goal}, masks))
    >>> plan = rx.make_plan({"w": jnp.ones((2, 5))}, 0.6)
    >>> goals = [jnp.arange(10.0).reshape(2, 5), jnp.array([[9.0, 8, 7, 6, 5], [4, 3, 2, 1, 0]])]
    >>> trains, params = [towards(goal) for goal in goals], {"w": jnp.ones((2, 5))}
    >>> tickets = list(colt(trains, params, plan, rounds=9, steps=1, key=jax.random.key(0), rate=0.2))
    >>> [round(ticket.sparsity, 2) for ticket in tickets]  # the two ends fall, from both sides
    [0.0, 0.4, 0.8]
    """
    who = "colt"
    _check(who, trains, plan)
    checks.functions(who, criterion=criterion)
    rate = checks.number(who, "rate", rate, "must be above 0 and below 1", lambda found: 0 < found < 1)
    key, rounds, steps = checks.key(who, key), whole_number(who, "rounds", rounds), whole_number(who, "steps", steps)
    check_scope(who, plan, scope, 0)
    topology.check_fit(plan, params)
    target = sum(layer.active_weights for layer in plan.values())

    def first() -> Ticket:
        masks = topology.full_masks(plan, params)
        return Ticket(apply_masks(params, masks), masks, 0, 0.0)

    def following(level: int, before: Ticket) -> Ticket:
        counts = {name: int(n) for name, n in topology.count_groups(who, plan, before.masks).items()}
        left = {name: _left(counts[name], rate, layer.n_active) for name, layer in plan.items()}
        if scope == "global":
            left = _in_all(counts, rate, target)
        aim = {name: layer._replace(n_active=left[name]) for name, layer in plan.items()}
        agreed = None
        for i, train in enumerate(trains):
            key_of = jax.random.fold_in(level_key(key, level), i)
            trained = run(who, train, before.params, before.masks, 0, steps, key_of)
            masks = prune(aim, trained.params, criterion, batch, scope=scope, masks=before.masks, min_active=0).masks
            agreed = masks if agreed is None else jax.tree.map(jnp.logical_and, agreed, masks)
        for name, mask in trees.named_leaves(agreed).items():
            if not mask.any():
                raise ValueError(
                    f"{who}: the networks of level {level} agree on no weight of leaf {name!r}; "
                    "a lower rate, or scope='layer', keeps more of it"
                )
        return Ticket(apply_masks(before.params, agreed), agreed, level, sparsity_of(agreed))

    def until_target() -> Iterator[Ticket]:
        for ticket in tickets:
            yield ticket
            counts = topology.count_groups(who, plan, ticket.masks)
            if sum(int(n) for n in counts.values()) <= target:
                return

    tickets = walk(who, rounds, first, following, resume)
    return until_target()


def _check(who: str, trains: Sequence[Train], plan: Plan) -> None:
    """Checks the training functions, and that every leaf of the plan is unstructured.

    Raises:
      ValueError: names the argument.
    """
    if not isinstance(trains, Sequence) or not trains:
        raise ValueError(f"{who}: trains must be training functions, one a part, got {shown(trains)}")
    for i, train in enumerate(trains):
        checks.functions(who, **{f"trains[{i}]": train})
    checks.plan(who, plan)
    for layer in plan.values():
        if not layer.is_unstructured or layer.layers > 1:
            raise ValueError(
                f"{who}: plan: leaf {layer.name!r} must be unstructured and no stack, for masks of several networks "
                f"agree on other counts than a structure has; got structure {layer.structure.name!r}"
            )


def _left(active: int, rate: float, least: int) -> int:
    """What a part keeps of a leaf: no fewer than the target, and none that it had not."""
    return min(active, max(least, active - int(np.ceil(rate * active - 1e-6))))


def _in_all(active: dict[str, int], rate: float, target: int) -> dict[str, int]:
    """Counts whose sum is right, for a ranking of which only the sum holds."""
    total = sum(active.values())
    excess, left = total - _left(total, rate, target), {}
    for name, n in active.items():
        left[name] = n - min(n, excess)
        excess -= n - left[name]
    return left


def class_parts(labels: Any, n: int) -> list[np.ndarray]:
    """The examples of n contiguous ranges of classes, as indices; the first ranges have one class more where need be.

    Args:
      labels: int[examples], from 0.
      n: how many parts, at most the number of classes.

    >>> [part.tolist() for part in class_parts([0, 3, 1, 2, 0], 2)]
    [[0, 2, 4], [1, 3]]
    """
    labels = np.asarray(labels)
    if labels.ndim != 1 or not np.issubdtype(labels.dtype, np.integer) or not labels.size or labels.min() < 0:
        raise ValueError(f"class_parts: labels must be whole numbers from 0, one an example, got {shown(labels)}")
    if not checks.is_whole(n, 1) or n > labels.max() + 1:
        raise ValueError(f"class_parts: n must be from 1 to {labels.max() + 1}, the number of classes, got {shown(n)}")
    ranges = np.array_split(np.arange(labels.max() + 1), n)
    return [np.flatnonzero(np.isin(labels, classes)) for classes in ranges]
