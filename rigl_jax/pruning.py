"""`prune`: the weights that a criterion ranks highest stay, at once or in rounds."""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from rigl_jax import checks, criteria, topology, trees
from rigl_jax.base import Array, Criterion, Masks, Plan, Pruned, PyTree, Surgeon
from rigl_jax.masking import apply_masks
from rigl_jax.messages import kind, shown
from rigl_jax.topology.apportion import geometric

MOST_ROUNDS = 10**6  # their counts are a table


def prune(
    plan: Plan,
    params: PyTree,
    criterion: Criterion | Surgeon = criteria.magnitude,
    batch: Any = None,
    *,
    scope: str = "layer",
    masks: Masks | None = None,
    rounds: int = 1,
    min_active: int = 1,
) -> Pruned:
    """Prunes a network to the counts of a plan: those weights stay that the criterion ranks highest.

    Counts are exact; ties go to the earlier leaf, then to the lower index. A score that is NaN, as after a loss that is
    not finite, is an error, and so is a weight that a surgeon makes NaN. Under `jax.jit`, where values are not known,
    NaN ranks lowest instead, so scores that are all NaN prune by index: check the loss first. To fine-tune what is
    left, train it with `rx.static(plan, pruned.masks)`.

    Args:
      plan: from `make_plan`; its structures are kept. Structures of several weights rank by the mean score of a unit.
      params: the weights.
      criterion: `(params, batch) -> scores`, such as those of `rx.criteria`; or a surgeon, `(plan, params, masks,
        batch) -> Pruned`, which moves the weights that stay as well. They are distinguished by the number of arguments.
      batch: handed to the criterion as it is: what its `loss` takes, often `(inputs, labels)`; for one made of an
        `apply` (`synflow`, `wanda`, `mean_activation`, `nnrelief`, `sparsegpt`) the inputs alone. None for one that
        needs no data.
      scope: "layer": each leaf (each group of its structure) keeps the plan's count. "global": one ranking over all
        leaves, which must be unstructured; only the plan's total holds. A surgeon prunes by layer.
      masks: of a network that is pruned already, parallel to params: what they lack never returns. Default: all
        weights are there.
      rounds: how often to rank what is left, at least 1. After round k of n, about size (n_active / size)^(k / n) units
        of a group are left, rounded to the nearest integer: a geometric series, as in SynFlow. With more than one round
        a criterion is traced by JAX, so it must be written in JAX operations.
      min_active: with scope "global" the least number of weights that stay in each leaf; 0 may empty a leaf.

    Returns:
      `Pruned(params, masks)`: the weights, 0 where they are pruned, and bool masks (None for dense leaves).

    Raises:
      ValueError: a criterion of another number of arguments, or one that cannot be traced where it must be; no batch
        for one of `rx.criteria` that reads it, or one without examples; scores that are NaN or do not fit params; an
        unknown scope; a surgeon under jit; masks that hold fewer weights than are to stay; names the argument and the
        leaf.

    >>> import rigl_jax as rx
    >>> params = {"w": jnp.array([[1.0, -3.0], [2.0, 0.5]])}
    >>> pruned = rx.prune(rx.make_plan(params, 0.5), params)
    >>> pruned.params["w"].tolist()
    [[0.0, -3.0], [2.0, 0.0]]
    """
    ranking = topology.ranking("prune", plan, jointly=is_global("prune", scope), min_active=min_active)
    schedule = schedule_rounds("prune", ranking, rounds, masks)
    topology.check_fit(plan, params)
    masks = None if masks is None else checks.masks("prune", masks, params)
    if _takes(criterion, 2):
        masks = rank_in_rounds(schedule, criterion, params, batch, masks)  # pyrefly: ignore[bad-argument-type]
        return Pruned(apply_masks(params, masks), masks)
    if not _takes(criterion, 4):
        raise ValueError(
            "prune: criterion must be a function (params, batch) -> scores, or (plan, params, masks, batch) -> Pruned, "
            f"got {shown(criterion)}"
        )
    if ranking.jointly:
        raise ValueError("prune: scope must be 'layer' for a surgeon, which prunes to the counts of its plan")
    return _operate(schedule, criterion, params, batch, masks)


def is_global(who: str, scope: Any) -> bool:
    """Whether a scope of pruning is one ranking over all leaves.

    Raises:
      ValueError: neither "layer" nor "global".
    """
    if scope not in ("layer", "global"):
        raise ValueError(f"{who}: scope must be 'layer' or 'global', got {shown(scope)}")
    return scope == "global"


class Schedule(NamedTuple):
    """Who competes, and how many units of a group of each leaf are left after each round, int32[rounds] by name.

    `who` is the function that errors name.
    """

    who: str
    ranking: topology.Ranking
    counts: Mapping[str, np.ndarray]


def schedule_rounds(who: str, ranking: topology.Ranking, rounds: Any, masks: Masks | None = None) -> Schedule:
    """The counts of each round, from those of the masks to the plan's.

    Raises:
      ValueError: rounds that are no number from 1 to a million; masks that hold fewer units than are to stay; totals of
        one ranking that int32 does not hold.
    """
    if not checks.is_whole(rounds, 1) or rounds > MOST_ROUNDS:
        raise ValueError(f"{who}: rounds must be a whole number from 1 to {MOST_ROUNDS}, got {shown(rounds)}")
    plan = ranking.plan
    first = {name: layer.group_size for name, layer in plan.items()}
    if masks is not None:
        held = topology.count_groups(who, plan, masks)
        first = {name: max(layer.n_active, int(held[name].max())) for name, layer in plan.items()}
        _check_enough(who, ranking, held)
    counts = {name: geometric(first[name], layer.n_active, int(rounds)) for name, layer in plan.items()}
    if ranking.jointly:
        total = sum(int(counts[name][0]) * layer.groups for name, layer in plan.items())
        checks.total(who, "weights that stay after the first round, ranked together,", total)
    return Schedule(who, ranking, counts)


def _check_enough(who: str, ranking: topology.Ranking, held: Mapping[str, np.ndarray]) -> None:
    plan = ranking.plan
    if ranking.jointly:
        total, wanted = sum(int(n.sum()) for n in held.values()), sum(layer.active_units for layer in plan.values())
        if total < wanted:
            raise ValueError(f"{who}: masks must hold at least the plan's {wanted} weights in all, got {total}")
        return
    for name, layer in plan.items():
        if held[name].min() < layer.n_active:
            raise ValueError(
                f"{who}: masks must hold at least {layer.n_active} units in each group of leaf {name!r}, "
                f"got {held[name].min()}"
            )


def rank_in_rounds(
    schedule: Schedule, criterion: Criterion, params: PyTree, batch: Any, masks: Masks | None = None
) -> Masks:
    """The masks after all rounds. For jit; what is pruned never returns."""
    ranking, rounds = schedule.ranking, len(next(iter(schedule.counts.values())))

    def ranked(masks: Masks | None, *n_active: Any) -> tuple[Masks, dict[str, Array]]:
        scores = _scores(schedule.who, criterion, params if masks is None else apply_masks(params, masks), batch)
        checks.of_plan(schedule.who, ranking.plan, scores=scores)
        return ranking.best(scores, *n_active, among=masks), _nan_leaves(ranking.plan, scores, masks)

    if rounds == 1:
        masks, nan = ranked(masks)
    else:
        table = {name: jnp.asarray(counts) for name, counts in schedule.counts.items()}

        def one_round(k: Any, carry: tuple[Masks, dict[str, Array]]) -> tuple[Masks, dict[str, Array]]:
            masks, nan = ranked(carry[0], lambda layer: table[layer.name][k])
            return masks, jax.tree.map(jnp.logical_or, carry[1], nan)

        start = topology.full_masks(ranking.plan, params) if masks is None else jax.tree.map(jnp.asarray, masks)
        masks, nan = lax.fori_loop(0, rounds, one_round, (start, dict.fromkeys(ranking.plan, jnp.zeros((), bool))))
    traced = any(isinstance(flag, jax.core.Tracer) for flag in nan.values())
    if not traced and (found := [name for name, flag in jax.device_get(nan).items() if flag]):
        raise ValueError(f"{schedule.who}: criterion must give scores that are numbers, got NaN in leaf {found[0]!r}")
    return masks


def _scores(who: str, criterion: Criterion, params: PyTree, batch: Any) -> PyTree:
    try:
        return criterion(params, batch)
    except jax.errors.JAXTypeError as error:
        raise ValueError(
            f"{who}: criterion must be written in JAX operations where it is traced, which is under jax.jit and with "
            f"rounds > 1, got {type(error).__name__} in {shown(criterion)}"
        ) from error


def _nan_leaves(plan: Plan, scores: PyTree, masks: Masks | None) -> dict[str, Array]:
    """Whether the score (or value) of a weight that competes is NaN, a bool for each leaf."""
    given, among = trees.named_leaves(scores), trees.named_leaves(masks)
    return {name: jnp.any(jnp.isnan(given[name]) & among.get(name, True)) for name in plan}


def _operate(schedule: Schedule, surgeon: Any, params: PyTree, batch: Any, masks: Masks | None) -> Pruned:
    """A surgeon in rounds, each held to its counts and to the masks before it."""
    if any(isinstance(x, jax.core.Tracer) for x in jax.tree.leaves((params, masks, batch))):
        raise ValueError("prune: criterion, a surgeon, needs params with known values; call prune outside of jit")
    plan = schedule.ranking.plan
    now = Pruned(params, topology.full_masks(plan, params) if masks is None else masks)
    now = now._replace(params=apply_masks(*now))
    for k in range(len(next(iter(schedule.counts.values())))):
        aim = {name: layer._replace(n_active=int(schedule.counts[name][k])) for name, layer in plan.items()}
        after = surgeon(aim, *now, batch)
        if not isinstance(after, Pruned):
            raise ValueError(f"prune: criterion, a surgeon, must return Pruned(params, masks), got {kind(after)}")
        masks = checks.masks("prune", after.masks, after.params)
        _check_operated(aim, now.masks, masks)
        now = Pruned(apply_masks(after.params, masks), masks)
        nan = jax.device_get(_nan_leaves(plan, now.params, None))
        if found := [name for name, flag in nan.items() if flag]:
            raise ValueError(f"prune: criterion, a surgeon, must give numbers, got NaN in leaf {found[0]!r}")
    return now


def _check_operated(aim: Plan, before: Masks, after: Masks) -> None:
    held, left = topology.count_groups("prune", aim, before), topology.count_groups("prune", aim, after)
    back = jax.tree.map(lambda new, old: bool(jnp.any(new & ~old)), after, before)
    for (name, layer), returned in zip(aim.items(), jax.tree.leaves(back), strict=True):
        if returned or (left[name] != np.minimum(layer.n_active, held[name])).any():
            raise ValueError(
                f"prune: criterion, a surgeon, must keep {layer.n_active} units in each group of leaf {name!r}, all of "
                f"those it was given, got {left[name].min()} to {left[name].max()}"
            )


def _takes(function: Any, n: int) -> bool:
    """Whether a function can be called with n arguments."""
    try:
        inspect.signature(function).bind(*range(n))
    except (TypeError, ValueError):
        return False
    return True
