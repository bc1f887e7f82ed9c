"""Pruning and rewiring of all the weights of a plan."""

from __future__ import annotations

import functools
import operator
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from rigl_jax import arguments as rules
from rigl_jax import checks, native, trees
from rigl_jax.arguments import arguments
from rigl_jax.base import Array, LayerPlan, Masks, Plan, PyTree
from rigl_jax.messages import listed
from rigl_jax.scores import Draws, Magnitudes, Scores, made, of_leaves
from rigl_jax.structures import unstructured
from rigl_jax.topology.leaf import Rewiring, count, pruning, rewiring
from rigl_jax.topology.order import after
from rigl_jax.topology.together import Selections, map_selections, selected
from rigl_jax.topology.topk import all_true, native_platform


@arguments(plan=rules.plan, key=rules.key)
def random_masks(plan: Plan, key: Array, params: PyTree) -> Masks:
    """Uniformly random masks with the exact counts of the plan; the same for the same key, in every process.

    Args:
      plan: from `make_plan`.
      key: typed PRNG key.
      params: the weights; only their shapes are read, and checked against the plan.

    Raises:
      ValueError: params do not fit the plan; the message names the leaf.
    """
    check_fit(plan, params)
    drawn_in = of_leaves(Draws(key))
    return map_selections(
        lambda leaf, p: pruning(leaf.structure, made(drawn_in(leaf.name), p), leaf.n_active),
        plan,
        params,
    )


def full_masks(plan: Plan, params: PyTree) -> Masks:
    """Masks with every weight active: those of a dense network that is to become sparse.

    Raises:
      ValueError: params do not fit the plan; the message names the leaf.
    """
    check_fit(plan, params)
    return trees.map_sparse(lambda leaf, p: jnp.ones_like(p, bool), plan, params)


@arguments(plan=rules.plan)
def prune_tree(plan: Plan, scores: PyTree) -> Masks:
    """`prune` for each sparse leaf, to the counts of the plan."""
    checks.of_plan("prune_tree", plan, scores=scores)
    return map_selections(lambda leaf, s: pruning(leaf.structure, s, leaf.n_active), plan, scores)


@arguments(plan=rules.plan, fraction=rules.numbers, regrow_dropped=rules.flag)
def drop_and_grow(
    plan: Plan, masks: Masks, drop: Scores, grow: Scores, fraction: Any, *, regrow_dropped: bool = True
) -> Rewiring:
    """`rewire` for each sparse leaf, moving `fraction` of its active units, by floor.

    On a single CPU a leaf of one group of single weights is rewired by one native call, where the kernels are built
    (`rigl_jax.native`): with the same result, in less time, and in a compiled program in the memory of the old mask.

    Args:
      plan: from `make_plan`.
      masks: the current masks.
      drop: tree of scores parallel to params, or what they follow from, `scores.Magnitudes` or `scores.Draws`. The
        lowest active ones are dropped.
      grow: the same; the highest are grown. The native call needs no array for magnitudes, nor for draws here.
      fraction: scalar in [0, 1], may be traced; what is beyond counts as the nearer end.
      regrow_dropped: see `rewire`.

    Returns:
      `Rewiring` of trees. A leaf that the plan keeps full is not changed, nor one in which a score that is read is NaN
      or +inf.

    Raises:
      ValueError: leaves, shapes or masks that are not those of the plan; a fraction that is no scalar.
    """
    drop_of, grow_of = _checked("drop_and_grow", plan, masks, drop, grow)
    if jnp.size(fraction) != 1:
        raise ValueError(f"drop_and_grow: fraction must be a scalar, got an array of shape {jnp.shape(fraction)}")
    _check_bools("drop_and_grow: masks", plan, masks)
    mask_of = trees.named_leaves(masks)

    def n_drop(leaf: LayerPlan) -> Array:
        return count(fraction, leaf.active_units // leaf.layers)

    def one(leaf: LayerPlan, mask: Array, drop: Array, grow: Array) -> Selections[Rewiring]:
        if leaf.n_active == leaf.group_size:
            return Rewiring(mask, mask, jnp.zeros_like(mask))
        return (yield from rewiring(leaf.structure, mask, drop, grow, n_drop(leaf), None, regrow_dropped))

    native_leaves = {name: leaf for name, leaf in plan.items() if _is_native(leaf, drop_of(name), grow_of(name))}
    rest = {name: leaf for name, leaf in plan.items() if name not in native_leaves}
    done: dict[str, Rewiring] = {}
    last = None
    # The last leaf comes first, as their gradients do: so no gradient has to wait, and the results of a leaf are used
    # before those of the next one are made.
    for name, leaf in reversed(list(native_leaves.items())):
        done[name] = _rewire_natively(
            mask_of[name], drop_of(name), grow_of(name), n_drop(leaf), last, regrow=regrow_dropped
        )
        last = done[name].mask
    others = rewire_in_turn(rest, one, masks, drop, grow) if rest else Rewiring({}, {}, {})
    parts = [{name: new[i] for name, new in done.items()} | trees.named_leaves(part) for i, part in enumerate(others)]
    return Rewiring(*(trees.map_sparse(lambda leaf, _, part=part: part[leaf.name], plan, masks) for part in parts))


def _checked(
    who: str, plan: Plan, masks: Masks, drop: Scores, grow: Scores, **more: PyTree
) -> list[Callable[[str], Scores]]:
    """What is dropped and grown in a leaf, by its name. ValueError where trees do not fit the plan."""

    def tree_of(given: Scores) -> PyTree:
        if isinstance(given, Draws):
            checks.key(who, given.key)
            return masks if given.late is None else given.late
        return given.arrays if isinstance(given, Magnitudes) else given

    checks.of_plan(who, plan, masks=masks, drop=tree_of(drop), grow=tree_of(grow), **more)
    for given in (drop, grow):
        if isinstance(given, Draws) and given.late is not None:
            _check_bools(f"{who}: late", plan, given.late)
    return [of_leaves(drop), of_leaves(grow)]


def _check_bools(what: str, plan: Plan, tree: PyTree) -> None:
    leaves = trees.named_leaves(tree)
    for name in plan:
        if (x := leaves[name]).dtype != bool:
            raise ValueError(f"{what} must be bool, got {x.dtype}{list(x.shape)} for leaf {name!r}")


def _rewire_natively(
    mask: Array, drop: Scores, grow: Scores, n_drop: Array, last: Array | None, *, regrow: bool
) -> Rewiring:
    """The rewiring of a leaf that the native call serves, once `last` is known."""
    (n_drop,) = after(last, n_drop)
    drop, grow = (made(after(last, x)[0], mask) if _is_made(x) else x for x in (drop, grow))
    return Rewiring(*_rewired(mask, drop, grow, n_drop, regrow=regrow))


def _is_made(given: Scores) -> bool:
    """Whether an array is made for the native call. Weights and gradients are there, and would be copied."""
    if isinstance(given, Draws):
        return not native.draws(given.key)
    return not isinstance(given, Magnitudes) or given.arrays.dtype != jnp.float32


_SINGLE = unstructured()
"""The structure of all leaves that the native call serves."""


def _is_native(leaf: LayerPlan, drop: Scores, grow: Scores) -> bool:
    """Whether the native call serves a leaf: one group of single weights, ranked as they are, some of them inactive."""
    single = leaf.groups == 1 and leaf.structure.pool is _SINGLE.pool and leaf.n_active < leaf.group_size
    arrays = [x.arrays if isinstance(x, Magnitudes) else x for x in (drop, grow) if not isinstance(x, Draws)]
    return single and not isinstance(drop, Draws) and all(native_platform(scores) == "cpu" for scores in arrays)


# Jitted, so that outside of jit it is compiled once for each shape; inside of jit it is inlined. Without the structure
# of the leaf: each plan makes its own.
@functools.partial(jax.jit, static_argnames="regrow", inline=True)
def _rewired(mask: Array, drop: Scores, grow: Scores, n_drop: Array, regrow: bool) -> tuple[Array, Array, Array]:
    """The rewiring of one leaf, held, by the native call where the program is compiled for a CPU."""

    def default(mask: Array, drop: Scores, grow: Scores, n_drop: Array) -> tuple[Array, Array, Array]:
        drop, grow = made(drop, mask), made(grow, mask)
        new = selected(rewiring(_SINGLE, mask, drop, grow, n_drop, None, regrow))
        fine = _sound(drop, mask) & _sound(grow, ~new.kept)
        return jnp.where(fine, new.mask, mask), jnp.where(fine, new.kept, mask), new.fresh & fine

    by_call = functools.partial(native.rewire, regrow_dropped=regrow)
    return lax.platform_dependent(mask, drop, grow, n_drop, cpu=by_call, default=default)


@arguments(
    plan=rules.plan,
    n_drop=rules.counts,
    n_active=rules.optional(rules.counts),
    regrow_dropped=rules.flag,
    together=rules.flag,
)
def rewire_tree(
    plan: Plan,
    masks: Masks,
    drop: Scores,
    grow: Scores,
    n_drop: Mapping[str, Any],
    n_active: Mapping[str, Any] | None = None,
    *,
    regrow_dropped: bool = True,
    before: Masks | None = None,
    together: bool = False,
) -> Rewiring:
    """`rewire` for each sparse leaf, with counts by name; a name that `n_active` lacks keeps its count.

    A leaf in which a score that is read is NaN or +inf keeps its mask (or gets that of `before`, if `masks` were pruned
    from it); with `together` all leaves do.
    """
    _checked("rewire_tree", plan, masks, drop, grow, **({} if before is None else {"before": before}))
    if missing := sorted(plan.keys() - n_drop.keys()):
        raise ValueError(f"rewire_tree: n_drop must have a number for each leaf of the plan, it lacks {missing}")
    n_active = n_active or {}

    def one(leaf: LayerPlan, mask: Array, drop: Array, grow: Array) -> Selections[Rewiring]:
        return rewiring(leaf.structure, mask, drop, grow, n_drop[leaf.name], n_active.get(leaf.name), regrow_dropped)

    return rewire_in_turn(plan, one, masks, drop, grow, before=before, together=together)


def rewire_in_turn(
    plan: Plan,
    one: Callable[[LayerPlan, Array, Array, Array], Selections[Rewiring]],
    masks: Masks,
    drop: Scores,
    grow: Scores,
    *,
    before: Masks | None = None,
    together: bool = False,
) -> Rewiring:
    """`one(leaf, mask, drop, grow)` for each sparse leaf, and no mask changed where a score is not sound.

    The scores that are read are the drop scores of units that were active, and the grow scores of units not kept. On a
    CPU one leaf follows another, so that what a rewiring needs is the memory of the largest leaf (`after`).

    Args:
      plan: from `make_plan`.
      one: the rewiring of one leaf, as a ranking.
      masks: the current masks.
      drop: tree of scores parallel to params, or what they follow from; see `drop_and_grow`.
      grow: the same.
      before: what an unsound leaf gets. Default: the current masks.
      together: see `hold`.

    Returns:
      `Rewiring` of trees.
    """
    before, last, fine = masks if before is None else before, None, {}
    drop_of, grow_of = of_leaves(drop), of_leaves(grow)

    def next_one(leaf: LayerPlan, mask: Array, old: Array) -> Selections[Rewiring]:
        nonlocal last
        mask, old, *scores = after(last, mask, old, drop_of(leaf.name), grow_of(leaf.name))
        drop, grow = (made(x, mask) for x in scores)
        new = yield from one(leaf, mask, drop, grow)
        fine[leaf.name] = _sound(drop, old) & _sound(grow, ~new.kept)
        last = new.mask
        return new

    rewired = map_selections(next_one, plan, masks, before)
    new, kept, fresh = (
        jax.tree.map(operator.itemgetter(i), rewired, is_leaf=lambda x: isinstance(x, Rewiring)) for i in range(3)
    )
    nothing = jax.tree.map(jnp.zeros_like, fresh)
    return Rewiring(
        hold(plan, fine, new, before, together=together),
        hold(plan, fine, kept, before, together=together),
        hold(plan, fine, fresh, nothing, together=together),
    )


def sound(plan: Plan, scores: PyTree, read: Masks | None = None) -> dict[str, Array]:
    """Whether the scores of a leaf can be ranked, by name: bool scalars, False if one is NaN or +inf.

    -inf is sound: it ranks lowest, so such a weight is dropped first and grown last.

    Args:
      plan: from `make_plan`.
      scores: tree parallel to params.
      read: masks of the entries that are read. Default: all.
    """
    scored, read = trees.named_leaves(scores), trees.named_leaves(read)
    return {name: _sound(scored[name], read.get(name)) for name in plan}


def _sound(scores: Array, read: Array | None) -> Array:
    fine = scores < jnp.inf
    return all_true(fine if read is None else fine | ~read)


def hold(plan: Plan, sound: Mapping[str, Array], masks: Masks, before: Masks, *, together: bool = False) -> Masks:
    """The new masks of leaves that are sound, the old masks of the others; with `together` the old ones of all.

    `together` is for methods that move counts between leaves: if one leaf kept its old mask, the total would be wrong.
    """
    whole = functools.reduce(jnp.logical_and, sound.values())
    return trees.map_sparse(
        lambda leaf, new, old: jnp.where(whole if together else sound[leaf.name], new, old), plan, masks, before
    )


@arguments(plan=rules.plan)
def check_fit(plan: Plan, params: PyTree) -> None:
    """Raises a ValueError that names the first leaf in which params are not those that the plan was made for."""
    arrays = {name: p for name, p in trees.named_leaves(params).items() if hasattr(p, "shape")}
    for name, leaf in plan.items():
        if name not in arrays:
            raise ValueError(f"plan: params have no leaf {name!r}; they have {listed(arrays)}")
        if tuple(arrays[name].shape) != leaf.shape:
            raise ValueError(f"plan: leaf {name!r} was planned with shape {leaf.shape}, got {arrays[name].shape}")
        if (dtype := str(getattr(arrays[name], "dtype", "float32"))) not in checks.TRAINABLE:
            raise ValueError(f"plan: leaf {name!r} must hold weights of {', '.join(checks.TRAINABLE)}, got {dtype}")
