"""Selection, pruning and rewiring: the only code that makes a mask.

Everything is exact and in integers: `select` takes k of n, no more and no fewer, with ties to the lower index, and
k may be a tracer. It never sorts. The k-th largest score is found by binary search over the bits of its float
representation, one counting pass a bit; counts add up over devices, so a sharded weight is not gathered. The masks are
the same for every number and shape of devices. For that each device should hold whole units, and for N:M whole groups:
otherwise XLA exchanges tiles that straddle two devices, or gathers them. Where a single CPU is all there is, a native
kernel selects (`rigl_jax.native`): the same, faster, and without the memory that a search over bits needs.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from rigl_jax import checks, native, trees
from rigl_jax.base import Array, Leaf, Masks, Plan, PyTree, Structure
from rigl_jax.quotas import redistribute as redistribute

SMALL_GROUP = 16
"""Size of a group up to which entries are ranked by comparing all pairs instead of by a search over bits."""


def select(scores: Array, k: Any, *, axes: tuple[int, ...] | None = None, among: Array | None = None) -> Array:
    """The k highest scores of each group.

    Order: +inf, ..., +0.0 = -0.0, ..., -inf, NaN. Equal scores go to the lower index, in row-major order along
    `axes`. `lax.top_k` gives the same set, but sorts, needs a static k, and ranks -0.0 below +0.0 and NaN first. On
    a single CPU one group is selected natively, where the kernels are built (`rigl_jax.native`).

    Args:
      scores: float[*units]: f32, bf16 or f16.
      k: how many to take in each group: an int, or an integer array that broadcasts against `scores` reduced over
        `axes` with the axes kept. May be traced. Below 0 counts as 0, above the number of candidates as that number.
      axes: the axes along which scores of a group compete (default: all, one group).
      among: bool[*units], the candidates; others are never taken. Default: all.

    Returns:
      bool[*units] with exactly min(k, candidates) True in each group.

    Raises:
      ValueError: for scores that are not f32, bf16 or f16, an `among` that is not bool of their shape, a k that does
        not broadcast. (`jax.export` of a CPU program refuses the native call: set RIGL_JAX_NATIVE=0 for that.)

    >>> select(jnp.array([1.0, 3.0, 3.0, 2.0]), 2).tolist()
    [False, True, True, False]
    >>> select(jnp.array([3.0, 3.0, 3.0, 2.0]), 2).tolist()
    [True, True, False, False]
    """
    _check_scores(scores, among)
    axes = tuple(range(scores.ndim)) if axes is None else axes
    if not isinstance(axes, tuple) or not all(axis in range(scores.ndim) for axis in axes):
        raise ValueError(f"select: axes must be a tuple of axes of scores of shape {scores.shape}, got {axes!r}")
    _check_count("select", k)
    counts = tuple(1 if axis in axes else size for axis, size in enumerate(scores.shape))
    if jnp.broadcast_shapes(jnp.shape(k), counts) != counts:
        raise ValueError(f"select: k must be one number for each group, of shape {counts}, got {jnp.shape(k)}")
    if len(set(axes)) == scores.ndim and _on_one_cpu(scores):
        lone = jnp.asarray(k, jnp.int32).reshape(())
        return lax.platform_dependent(
            scores,
            lone,
            *(() if among is None else (among,)),
            cpu=lambda scores, k, among=None: native.select(scores, k, among),
            default=lambda scores, k, among=None: _select(scores, k, among, axes),
        )
    return _select(scores, k, among, axes)


def _select(scores: Array, k: Any, among: Array | None, axes: tuple[int, ...]) -> Array:
    """The search over bits, on any number and kind of devices."""
    keys, bits = _candidates(scores, among)
    long = [axis for axis in axes if scores.shape[axis] > 1]
    if len(long) == 1 and scores.shape[long[0]] <= SMALL_GROUP:
        return (_rank(keys, long[0]) < jnp.asarray(k, jnp.int32)) & (keys > 0)
    candidates = _count(keys > 0, axes)
    k = jnp.clip(jnp.asarray(k, jnp.int32), 0, candidates)
    threshold = _kth(keys, bits, k, axes)
    above, tied = keys > threshold, (keys == threshold) & (keys > 0)
    return above | _first(tied, k - _count(above, axes), axes)


def _on_one_cpu(scores: Array) -> bool:
    """Whether the native selection serves. XLA would gather for it what lies on several devices."""
    if jax.default_backend() != "cpu" or jax.device_count() > 1 or trees.explicit_sharding(scores) is not None:
        return False
    return scores.size > 0 and native.library() is not None


def select_jointly(scores: Sequence[Array], k: Any, *, among: Sequence[Array | None] | None = None) -> list[Array]:
    """The k highest scores of several arrays together, as `select` on their concatenation, which is never made.

    Args:
      scores: float[*units] each, all of one dtype. Ties go to the earlier array, then to the lower index.
      k: how many in all; may be traced.
      among: bool[*units] or None for each array, the candidates. Default: all.

    Returns:
      bool[*units] for each array, with exactly min(k, candidates) True in all.

    >>> [chosen.tolist() for chosen in select_jointly([jnp.array([1.0, 3.0]), jnp.array([3.0, 2.0])], 2)]
    [[False, True], [True, False]]
    """
    among = [None] * len(scores) if among is None else among
    dtypes = sorted({str(getattr(s, "dtype", type(s).__name__)) for s in scores})
    if len(dtypes) != 1 or len(among) != len(scores):
        raise ValueError(
            "select_jointly: scores must be arrays of one dtype, to be compared, each with its own `among`, "
            f"got {', '.join(dtypes) or 'none'} and {len(among)} for {len(scores)} arrays"
        )
    _check_count("select_jointly", k)
    for s, a in zip(scores, among, strict=True):
        _check_scores(s, a)
    pairs = [_candidates(s, a) for s, a in zip(scores, among, strict=True)]
    bits, keys = max(bits for _, bits in pairs), [keys for keys, _ in pairs]

    def total(which: Callable[[Array], Array]) -> Array:
        counts = (_count(which(key), tuple(range(key.ndim))).reshape(()) for key in keys)
        return sum(counts, start=jnp.zeros((), jnp.int32))

    k = jnp.clip(jnp.asarray(k, jnp.int32), 0, total(lambda key: key > 0))
    threshold = _largest(bits, lambda t: total(lambda key: key >= t) >= k, k)
    need = k - total(lambda key: key > threshold)
    chosen = []
    for key in keys:
        axes, tied = tuple(range(key.ndim)), (key == threshold) & (key > 0)
        found = _count(tied, axes)
        take = jnp.minimum(need, found)
        chosen.append((key > threshold) | _first(tied, take, axes))
        need = need - take.reshape(())
    return chosen


def _rank(keys: Array, axis: int) -> Array:
    """How many of its group come before each entry, comparing all pairs: one pass, for groups as small as 2 of 4."""
    place = lax.broadcasted_iota(jnp.int32, keys.shape, axis, out_sharding=trees.explicit_sharding(keys))
    rank = jnp.zeros_like(keys, jnp.int32)
    for i in range(keys.shape[axis]):
        other = lax.index_in_dim(keys, i, axis)
        rank += (other > keys) | ((other == keys) & (i < place))
    return rank


def _check_scores(scores: Array, among: Array | None) -> None:
    if not hasattr(scores, "dtype"):
        raise ValueError(f"select: scores must be an array of floats, got {type(scores).__name__}")
    if scores.dtype not in (jnp.float32, jnp.bfloat16, jnp.float16):
        raise ValueError(f"select: scores must be float32, bfloat16 or float16, got {scores.dtype}")
    checks.same_shape("select", scores.shape, among=among)
    if among is not None and among.dtype != jnp.bool_:
        raise ValueError(f"select: among must be bool{list(scores.shape)}, got {among.dtype}{list(among.shape)}")


def _candidates(scores: Array, among: Array | None) -> tuple[Array, int]:
    keys, bits = _sortable(scores)
    return (keys if among is None else jnp.where(among, keys, 0)), bits


def _check_count(who: str, k: Any) -> None:
    if not isinstance(k, int) and not jnp.issubdtype(getattr(k, "dtype", object), jnp.integer):
        raise ValueError(f"{who}: k must be an integer, or an array of integers, got {k!r}")


def _count(which: Array, axes: tuple[int, ...]) -> Array:
    """How many are True, int32, axes kept. This is nearly all the time of a selection."""
    long = [axis for axis in axes if axis < which.ndim - 1 and 1 < which.shape[axis] <= jnp.iinfo(jnp.int16).max]
    if long and jax.default_backend() == "cpu":
        # First down the longest axis but the last, in 16 bits: twice as many to a vector, 2 to 3 times as fast. Not on
        # other devices, where a sharded axis would then be summed over devices as vectors instead of as scalars.
        down = max(long, key=lambda axis: which.shape[axis])
        which = jnp.sum(which, axis=down, keepdims=True, dtype=jnp.int16)
    return jnp.sum(which, axis=axes, keepdims=True, dtype=jnp.int32)


def _kth(keys: Array, bits: int, k: Array, axes: tuple[int, ...]) -> Array:
    """The k-th largest key of each group, k from 0 to as many as are above 0. Two searches over halves of 16 bits."""

    def search(half: Array, need: Array) -> Array:
        return _largest(16, lambda t: _count(half >= t.astype(jnp.uint16), axes) >= need, need)

    if bits == 16:
        return search(keys.astype(jnp.uint16), k)
    high, low = (keys >> 16).astype(jnp.uint16), keys.astype(jnp.uint16)
    top = search(high, k)
    need = k - _count(high > top, axes)
    rest = jnp.where(high == top, low, jnp.uint16(0))  # 0 for the others: trials are above it, so they never count
    return top << 16 | search(rest, need)


def _largest(bits: int, holds: Callable[[Array], Array], like: Array, passes: Any = None) -> Array:
    """The largest number of so many bits for which `holds`, which must hold for 0 and never again after it fails.

    `like` has the shape and, on a mesh, the sharding of what `holds` takes and gives.
    """

    def narrow(i: Array, number: Array) -> Array:
        trial = number | (jnp.uint32(1) << (jnp.uint32(bits - 1) - i.astype(jnp.uint32)))
        return jnp.where(holds(trial), trial, number)

    return lax.fori_loop(0, bits if passes is None else passes, narrow, (like * 0).astype(jnp.uint32))


def _sortable(scores: Array) -> tuple[Array, int]:
    """Unsigned keys in the order of the scores, and how many bits they use: NaN 1, -inf above it, 0 left free."""
    if scores.dtype == jnp.float32:
        signed, bits = lax.bitcast_convert_type(scores, jnp.int32), 32
    else:
        signed, bits = lax.bitcast_convert_type(scores, jnp.int16).astype(jnp.int32), 16
    sign = jnp.uint32(1 << (bits - 1))
    magnitude = signed.astype(jnp.uint32) & (sign - 1)  # the bits without the sign grow with |score|
    keys = jnp.where(signed < 0, sign - 1 - magnitude, sign + magnitude)
    keys = jnp.where(magnitude == 0, sign, keys)  # -0.0 is 0.0
    return jnp.where(jnp.isnan(scores), jnp.uint32(1), keys), bits


def _first(tied: Array, need: Array, axes: tuple[int, ...]) -> Array:
    """The first `need` True entries of each group, in row-major order along the axes."""
    bits = max(math.prod(tied.shape[axis] for axis in axes), 1).bit_length()
    index, stride, out = jnp.zeros((1,) * tied.ndim, jnp.uint32), 1, trees.explicit_sharding(tied)
    for axis in sorted(axes, reverse=True):
        # One axis long each, so that no array of the whole shape is made; where it must be, each device makes its part.
        shape = tuple(size if i == axis or out else 1 for i, size in enumerate(tied.shape))
        index = index + lax.broadcasted_iota(jnp.uint32, shape, axis, out_sharding=out) * jnp.uint32(stride)
        stride *= tied.shape[axis]
    # Scores are rarely tied: without a surplus the loop makes no pass at all.
    surplus = jnp.any(_count(tied, axes) != need)
    passes = jnp.where(surplus, bits, 0)
    end = _largest(bits, lambda e: _count(tied & (index < e), axes) <= need, need, passes)
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
    checks.structure("prune", structure)
    checks.same_shape("prune", jnp.shape(scores), scores=scores, among=among)
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
    checks.structure("rewire", structure)
    checks.same_shape("rewire", jnp.shape(mask), mask=mask, drop=drop, grow=grow)
    _check_count("rewire: n_drop", n_drop)
    active = _units(structure, mask)
    axes = structure.axes(active.shape)
    everywhere = tuple(range(active.ndim))
    kept = select(structure.pool(drop), _count(active, everywhere).reshape(()) - n_drop, among=active)
    if n_active is None:
        n_active = _count(active, axes)
    n_grow = n_active - _count(kept, axes)
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


def count(fraction: Any, n: Any) -> Array:
    """How many of `n` units a fraction moves: floor(fraction * n) in float32, from 0 to n.

    This is the authors' rule. Above 2^24 units the product is right to one part in 2^24; the number of active
    units does not depend on it, because as many are grown as were dropped.
    """
    return jnp.clip(jnp.floor(jnp.asarray(fraction, jnp.float32) * n).astype(jnp.int32), 0, n)


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
        lambda leaf, p: prune(
            leaf.structure,
            jax.random.uniform(trees.leaf_key(key, leaf.name), leaf.shape, out_sharding=trees.explicit_sharding(p)),
            leaf.n_active,
        ),
        plan,
        params,
    )


def prune_tree(plan: Plan, scores: PyTree) -> Masks:
    """`prune` for each sparse leaf, to the counts of the plan."""
    return trees.map_sparse(lambda leaf, s: prune(leaf.structure, s, leaf.n_active), plan, scores)


def prune_jointly(plan: Plan, scores: PyTree, n_active: Any = None, *, min_active: int = 1) -> Masks:
    """One ranking over all sparse leaves: the best weights stay, wherever they are, and at least a few in each leaf.

    Args:
      plan: from `make_plan`. Only its leaves and its total count matter; each leaf must be one group of single weights.
      scores: tree parallel to params, comparable between leaves.
      n_active: how many weights stay in all; may be traced. Default: the plan's total.
      min_active: so many of each leaf stay whatever their score, so that no layer is cut off.

    Raises:
      ValueError: a structure with several groups or with units of more than one weight: such units do not compare.
    """
    for leaf in plan.values():
        if n_units(leaf) != (1, math.prod(leaf.shape)):
            raise ValueError(
                f"prune_jointly: leaf {leaf.name!r} must be unstructured to compete with others, "
                f"got structure {leaf.structure.name!r}"
            )
    given = {name: s for name, s in trees.named_leaves(scores).items() if name in plan}
    total = sum(leaf.n_active for leaf in plan.values()) if n_active is None else n_active
    safe = {name: select(s, min_active) for name, s in given.items()}
    rest = jnp.asarray(total, jnp.int32) - sum(min(min_active, s.size) for s in given.values())
    chosen = select_jointly(list(given.values()), rest, among=[~kept for kept in safe.values()])
    masks = {name: safe[name] | new for name, new in zip(given, chosen, strict=True)}
    return trees.map_sparse(lambda leaf, _: masks[leaf.name], plan, scores)


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

    return _masks_and_kept(trees.map_sparse(one, plan, masks, drop, grow))


def rewire_tree(
    plan: Plan,
    masks: Masks,
    drop: PyTree,
    grow: PyTree,
    n_drop: Mapping[str, Any],
    n_active: Mapping[str, Any] | None = None,
    *,
    regrow_dropped: bool = True,
) -> tuple[Masks, Masks]:
    """`rewire` for each sparse leaf, with counts by name; a name that `n_active` lacks keeps its count."""
    n_active = n_active or {}

    def one(leaf: Leaf, mask: Array, drop: Array, grow: Array) -> Rewiring:
        n, after = n_drop[leaf.name], n_active.get(leaf.name)
        return rewire(leaf.structure, mask, drop, grow, n, after, regrow_dropped=regrow_dropped)

    return _masks_and_kept(trees.map_sparse(one, plan, masks, drop, grow))


def _masks_and_kept(rewirings: PyTree) -> tuple[Masks, Masks]:
    is_one = lambda x: isinstance(x, Rewiring)  # noqa: E731
    masks = jax.tree.map(lambda r: r.mask, rewirings, is_leaf=is_one)
    return masks, jax.tree.map(lambda r: r.kept, rewirings, is_leaf=is_one)


def check_fit(plan: Plan, params: PyTree) -> None:
    """Raises a ValueError that names the first leaf in which params are not those that the plan was made for."""
    checks.plan("plan", plan)
    shapes = {name: tuple(jnp.shape(p)) for name, p in trees.named_leaves(params).items()}
    for name, leaf in plan.items():
        if name not in shapes:
            raise ValueError(f"plan: params have no leaf {name!r}; they have {', '.join(shapes)}")
        if shapes[name] != leaf.shape:
            raise ValueError(f"plan: leaf {name!r} was planned with shape {leaf.shape}, got {shapes[name]}")
