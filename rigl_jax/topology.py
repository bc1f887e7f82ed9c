"""Selection, pruning and rewiring: the only code that makes a mask.

Everything is exact and in integers: `select` takes k of n, no more and no fewer, with ties to the lower index, and
k may be a tracer. It never sorts. The k-th largest score is found by binary search over the bits of its float
representation, one counting pass a bit; counts add up over devices, so a sharded weight is not gathered.
"""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from rigl_jax import trees
from rigl_jax.base import Array, Leaf, Masks, Plan, PyTree, Structure


def select(scores: Array, k: Any, *, axes: tuple[int, ...] | None = None, among: Array | None = None) -> Array:
    """The k highest scores of each group.

    Order: +inf, ..., +0.0 = -0.0, ..., -inf, NaN. Equal scores go to the lower index, in row-major order along
    `axes`. `lax.top_k` gives the same set, but sorts, needs a static k, and ranks -0.0 below +0.0 and NaN first.

    Args:
      scores: float[*units]: f32, bf16 or f16.
      k: how many to take in each group: an int, or an integer array that broadcasts against `scores` reduced over
        `axes` with the axes kept. May be traced. Below 0 counts as 0, above the number of candidates as that number.
      axes: the axes along which scores of a group compete (default: all, one group).
      among: bool[*units], the candidates; others are never taken. Default: all.

    Returns:
      bool[*units] with exactly min(k, candidates) True in each group.

    Raises:
      ValueError: for scores that are not f32, bf16 or f16.

    >>> select(jnp.array([1.0, 3.0, 3.0, 2.0]), 2).tolist()
    [False, True, True, False]
    >>> select(jnp.array([3.0, 3.0, 3.0, 2.0]), 2).tolist()
    [True, True, False, False]
    """
    axes = tuple(range(scores.ndim)) if axes is None else axes
    keys, bits = _sortable(scores)
    if among is not None:
        keys = jnp.where(among, keys, 0)

    def count(which: Array) -> Array:
        return jnp.sum(which, axis=axes, keepdims=True, dtype=jnp.int32)

    candidates = count(keys > 0)
    k = jnp.clip(jnp.asarray(k, jnp.int32), 0, candidates)

    def narrow(i: Array, threshold: Array) -> Array:
        trial = threshold | (jnp.uint32(1) << (jnp.uint32(bits - 1) - i.astype(jnp.uint32)))
        return jnp.where(count(keys >= trial) >= k, trial, threshold)

    threshold = lax.fori_loop(0, bits, narrow, jnp.zeros(candidates.shape, jnp.uint32))
    above, tied = keys > threshold, (keys == threshold) & (keys > 0)
    return above | _first(tied, k - count(above), axes, count)


def _sortable(scores: Array) -> tuple[Array, int]:
    """Unsigned keys in the order of the scores, and how many bits they use: NaN 1, -inf above it, 0 left free."""
    if scores.dtype == jnp.float32:
        signed, bits = lax.bitcast_convert_type(scores, jnp.int32), 32
    elif scores.dtype in (jnp.bfloat16, jnp.float16):
        signed, bits = lax.bitcast_convert_type(scores, jnp.int16).astype(jnp.int32), 16
    else:
        raise ValueError(f"select: scores must be float32, bfloat16 or float16, got {scores.dtype}")
    sign = jnp.uint32(1 << (bits - 1))
    magnitude = signed.astype(jnp.uint32) & (sign - 1)  # the bits without the sign grow with |score|
    keys = jnp.where(signed < 0, sign - 1 - magnitude, sign + magnitude)
    keys = jnp.where(magnitude == 0, sign, keys)  # -0.0 is 0.0
    return jnp.where(jnp.isnan(scores), jnp.uint32(1), keys), bits


def _first(tied: Array, need: Array, axes: tuple[int, ...], count: Any) -> Array:
    """The first `need` True entries of each group, in row-major order along the axes."""
    sizes = [tied.shape[axis] for axis in axes]
    bits = max(math.prod(sizes), 1).bit_length()
    index, stride = jnp.zeros((1,) * tied.ndim, jnp.uint32), 1
    for axis, size in zip(reversed(axes), reversed(sizes), strict=True):
        shape = tuple(size if i == axis else 1 for i in range(tied.ndim))
        index = index + lax.broadcasted_iota(jnp.uint32, shape, axis) * jnp.uint32(stride)
        stride *= size

    def widen(i: Array, end: Array) -> Array:
        trial = end | (jnp.uint32(1) << (jnp.uint32(bits - 1) - i.astype(jnp.uint32)))
        return jnp.where(count(tied & (index < trial)) <= need, trial, end)

    # Scores are rarely tied: without a surplus the loop makes no pass at all.
    surplus = jnp.any(count(tied) != need)
    end = lax.fori_loop(0, jnp.where(surplus, bits, 0), widen, jnp.zeros(need.shape, jnp.uint32))
    return tied & (~surplus | (index < end))


def prune(structure: Structure, scores: Array, n_active: Any, *, among: Array | None = None) -> Array:
    """A mask of the `n_active` best units of each group.

    Args:
      structure: how the weight is cut into units and groups.
      scores: float[*shape], one score for each weight; the structure pools them.
      n_active: int, or integer array over groups, how many units stay in each group. May be traced.
      among: bool[*shape], the units that may stay. Default: all.

    Returns:
      bool[*shape] in the structure.

    >>> from rigl_jax.structures import unstructured
    >>> prune(unstructured(), jnp.array([[0.1, -2.0], [3.0, 0.5]]), 2).tolist()
    [[False, False], [True, True]]
    """
    pooled = structure.pool(scores)
    units = None if among is None else _units(structure, among)
    kept = select(pooled, n_active, axes=structure.axes(pooled.shape), among=units)
    return structure.expand(kept, scores.shape)


class Rewiring(NamedTuple):
    """One weight after drop and growth: its new mask, and the part of it that was not dropped."""

    mask: Array
    kept: Array


def rewire(
    structure: Structure,
    mask: Array,
    drop: Array,
    grow: Array,
    n_drop: Any,
    n_active: Any = None,
    *,
    regrow_dropped: bool = True,
) -> Rewiring:
    """Drops the `n_drop` active units that score lowest and grows the inactive ones that score highest.

    The leaf's lowest units are dropped wherever they are; each group then grows back to its count. For one group,
    unstructured sparsity, this is Algorithm 1 of Evci et al. (2020). For small groups it is what keeps rewiring alive:
    a fixed share of each group of 2:4 would round down to nothing.

    Args:
      structure: how the weight is cut into units and groups.
      mask: bool[*shape], the current mask, in the structure.
      drop: float[*shape], the lowest are dropped. Inactive entries are never read.
      grow: float[*shape], the highest are grown. Entries of kept units are never read.
      n_drop: int, how many units of the leaf are dropped. May be traced.
      n_active: int or integer array over groups, how many units are active afterwards. Default: as many as before.
      regrow_dropped: whether a unit just dropped may be grown again at once (as in the authors' code). If not, such
        units come back only where nothing else is left, so that the count stays exact.

    Returns:
      `Rewiring(mask, kept)`, both bool[*shape] and in the structure: the new mask, with exactly `n_active` active units
      in each group, and the part of it that was not dropped.

    Ties go to the lower index, NaN scores are dropped first and grown last.
    """
    active = _units(structure, mask)
    axes = structure.axes(active.shape)
    kept = select(structure.pool(drop), jnp.sum(active, dtype=jnp.int32) - n_drop, among=active)
    if n_active is None:
        n_active = jnp.sum(active, axis=axes, keepdims=True, dtype=jnp.int32)
    n_grow = n_active - jnp.sum(kept, axis=axes, keepdims=True, dtype=jnp.int32)
    grow = structure.pool(grow)
    if not regrow_dropped:
        grow = jnp.where(active & ~kept, -jnp.inf, grow)
    grown = select(grow, n_grow, axes=axes, among=~kept)
    return Rewiring(structure.expand(kept | grown, mask.shape), structure.expand(kept, mask.shape))


def _units(structure: Structure, mask: Array) -> Array:
    return structure.pool(mask.astype(jnp.float32)) > 0


def n_units(leaf: Leaf) -> tuple[int, int]:
    """`(groups, units in each group)` of a leaf."""
    units = leaf.structure.units(leaf.shape)
    in_group = math.prod(units[axis] for axis in leaf.structure.axes(units))
    return math.prod(units) // in_group, in_group


def count(fraction: Any, n: int) -> Array:
    """How many of `n` units a fraction moves: floor(fraction * n) in float32, at most n.

    This is the authors' rule. Above 2^24 units the product is right to one part in 2^24; the number of active
    units does not depend on it, because as many are grown as were dropped.
    """
    return jnp.minimum(jnp.floor(jnp.asarray(fraction, jnp.float32) * n).astype(jnp.int32), n)


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
    return trees.map_sparse(
        lambda leaf, _: prune(
            leaf.structure, jax.random.uniform(trees.leaf_key(key, leaf.name), leaf.shape), leaf.n_active
        ),
        plan,
        params,
    )


def drop_and_grow(
    plan: Plan, masks: Masks, drop: PyTree, grow: PyTree, fraction: Any, *, regrow_dropped: bool = True
) -> tuple[Masks, Masks]:
    """`rewire` for each sparse leaf, moving `fraction` of its active units, by floor.

    Args:
      plan: from `make_plan`.
      masks: the current masks.
      drop: tree of scores parallel to params; the lowest active ones are dropped.
      grow: tree of scores parallel to params; the highest are grown.
      fraction: scalar in [0, 1], may be traced.
      regrow_dropped: see `rewire`.

    Returns:
      The new masks, and of these the parts that were not dropped. A leaf that the plan keeps full is returned as it is:
      it has nowhere to grow.
    """

    def one(leaf: Leaf, mask: Array, drop: Array, grow: Array) -> Rewiring:
        groups, units = n_units(leaf)
        if leaf.n_active == units:
            return Rewiring(mask, mask)
        n_drop = count(fraction, groups * leaf.n_active)
        return rewire(leaf.structure, mask, drop, grow, n_drop, regrow_dropped=regrow_dropped)

    rewirings = trees.map_sparse(one, plan, masks, drop, grow)
    is_one = lambda x: isinstance(x, Rewiring)  # noqa: E731
    return (
        jax.tree.map(lambda r: r.mask, rewirings, is_leaf=is_one),
        jax.tree.map(lambda r: r.kept, rewirings, is_leaf=is_one),
    )


def check_fit(plan: Plan, params: PyTree) -> None:
    """Raises a ValueError that names the first leaf in which params are not those that the plan was made for."""
    shapes = {name: tuple(p.shape) for name, p in trees.named_leaves(params).items()}
    for name, leaf in plan.items():
        if name not in shapes:
            raise ValueError(f"plan: params have no leaf {name!r}; they have {', '.join(shapes)}")
        if shapes[name] != leaf.shape:
            raise ValueError(f"plan: leaf {name!r} was planned with shape {leaf.shape}, got {shapes[name]}")
