"""The k best of n, exactly, on any number of devices.

Selection takes exactly k of n, with ties to the lower index, and k may be traced. It does not sort: the k-th largest
score is found by a search over the bits of its float representation: with a counting pass for each bit on CPUs, for
each four bits on accelerators, which count 15 numbers in the time that it takes to read the scores. Counts can be
summed over devices, so a sharded weight is not gathered. On a single CPU, and on a single GPU of NVIDIA, a native
kernel selects where it was built (`rigl_jax.native`): with the same result, and with less memory.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from rigl_jax import arguments as rules
from rigl_jax import checks, native, trees
from rigl_jax.arguments import arguments
from rigl_jax.base import Array
from rigl_jax.messages import kind, shown
from rigl_jax.native import cuda
from rigl_jax.topology import apportion

SMALL_GROUP = 16  # size up to which entries of a group are ranked by comparing all pairs, not by a search over bits
_NARROW = ("bfloat16", "float16", "float32")  # types of scores that native kernels rank


def digit_bits() -> int:
    """Bits found in one pass over the scores: a CPU computes for longer than it reads, an accelerator does not."""
    return 1 if jax.default_backend() == "cpu" else 4


@arguments(scores=rules.array(), k=rules.count)
def select(scores: Array, k: Any, *, axes: tuple[int, ...] | None = None, among: Array | None = None) -> Array:
    """The k highest scores of each group.

    Order: +inf, ..., +0.0 = -0.0, ..., -inf, NaN. Equal scores go to the lower index, in row-major order along
    `axes`. `lax.top_k` gives the same set, but sorts, needs a static k, and ranks -0.0 below +0.0 and NaN first. On
    a single CPU or NVIDIA GPU one group is selected natively, where the kernels are built (`rigl_jax.native`).

    Args:
      scores: float[*units]: f32, bf16 or f16; f64 under `jax_enable_x64`.
      k: how many to take in each group: an int, or an integer array that broadcasts against `scores` reduced over
        `axes` with the axes kept. May be traced. Clipped to 0 and the number of candidates.
      axes: the axes along which scores of a group compete (default: all, one group).
      among: bool[*units], the candidates; others are never taken. Default: all.

    Returns:
      bool[*units] with exactly min(k, candidates) True in each group.

    Raises:
      ValueError: for scores of another type, an `among` that is not bool of their shape, a k that does
        not broadcast. (`jax.export` of a CPU program refuses the native call: set RIGL_JAX_NATIVE=0 for that.)

    >>> select(jnp.array([1.0, 3.0, 3.0, 2.0]), 2).tolist()
    [False, True, True, False]
    >>> select(jnp.array([3.0, 3.0, 3.0, 2.0]), 2).tolist()
    [True, True, False, False]
    """
    check_scores("select", scores, among)
    axes = tuple(range(scores.ndim)) if axes is None else axes
    given: tuple[Any, ...] = axes if isinstance(axes, tuple) else (None,)
    if len(set(given)) < len(given) or not all(checks.is_whole(axis) and axis < scores.ndim for axis in given):
        raise ValueError(f"select: axes must be a tuple of axes of scores of shape {scores.shape}, got {shown(axes)}")
    check_count("select", k)
    counts = tuple(1 if axis in axes else size for axis, size in enumerate(scores.shape))
    if jnp.broadcast_shapes(jnp.shape(k), counts) != counts:
        raise ValueError(f"select: k must be one number for each group, of shape {counts}, got {jnp.shape(k)}")
    on = native_platform(scores) if len(set(axes)) == scores.ndim else None
    return _selected(scores, apportion.count(k), among, axes=axes, on=on, digit=digit_bits())


_NATIVE: dict[str, Callable[[Array, Array, Array | None], Array]] = {
    "cpu": native.select,
    "cuda": lambda scores, k, among: cuda.select_each([scores], k.reshape(1), [among])[0],
}


# Jitted, so that outside of jit it is compiled once for each shape; inside of jit it is inlined.
@functools.partial(jax.jit, static_argnames=("axes", "on", "digit"), inline=True)
def _selected(
    scores: Array, k: Array, among: Array | None, *, axes: tuple[int, ...], on: str | None, digit: int
) -> Array:
    if on is None:
        return _select(scores, k, among, axes, digit)
    return lax.platform_dependent(
        scores,
        k.reshape(()),
        *(() if among is None else (among,)),
        default=lambda scores, k, among=None: _select(scores, k, among, axes, digit),
        **{on: lambda scores, k, among=None: _NATIVE[on](scores, k, among)},
    )


def _select(scores: Array, k: Any, among: Array | None, axes: tuple[int, ...], digit: int) -> Array:
    """The search over bits, `digit` of them in a pass, on any number and kind of devices."""
    keys, bits = candidates(scores, among)
    long = [axis for axis in axes if scores.shape[axis] > 1]
    if len(long) == 1 and scores.shape[long[0]] <= SMALL_GROUP:
        return (_rank(keys, long[0]) < jnp.asarray(k, jnp.int32)) & (keys > 0)
    k = jnp.clip(jnp.asarray(k, jnp.int32), 0, count_true(keys > 0, axes))
    threshold = _kth(keys, bits, k, axes, digit)
    above, tied = keys > threshold, (keys == threshold) & (keys > 0)
    return above | _first(tied, k - count_true(above, axes), axes, digit)


def one_cpu() -> bool:
    """Whether this process has a single device, a CPU. On several XLA would gather the arrays for a custom call."""
    return jax.default_backend() == "cpu" and jax.device_count() == 1


def native_platform(scores: Array) -> str | None:
    """The platform whose native kernels select from all of an array: "cpu", "cuda", or None."""
    plain = scores.size == 0 or scores.dtype not in _NARROW or trees.explicit_sharding(scores) is not None
    if plain or jax.sharding.get_abstract_mesh().manual_axes:  # `shard_map` asks over which axes results vary
        return None
    if one_cpu():
        return "cpu" if native.library() is not None else None
    return "cuda" if jax.default_backend() == "gpu" and jax.device_count() == 1 and cuda.serves() else None


@arguments(scores=rules.sequence, k=rules.count, among=rules.optional(rules.sequence))
def select_jointly(scores: Sequence[Array], k: Any, *, among: Sequence[Array | None] | None = None) -> list[Array]:
    """The k highest scores of several arrays together, as `select` on their concatenation, which is never made.

    Args:
      scores: float[*units] each, all of one dtype. Ties go to the earlier array, then to the lower index.
      k: how many in all; may be traced.
      among: bool[*units] or None for each array, the candidates. Default: all.

    Returns:
      bool[*units] for each array, with exactly min(k, candidates) True in all.

    Raises:
      ValueError: as `select`; arrays of several dtypes, or none.

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
    check_count("select_jointly", k)
    for s, a in zip(scores, among, strict=True):
        check_scores("select_jointly", s, a)
    if not isinstance(k, jax.Array) and sum(s.size for s in scores) >= checks.LARGEST:
        checks.total("select_jointly", "k", int(k))
    return _selected_jointly(list(scores), apportion.count(k), list(among), digit=digit_bits())


@functools.partial(jax.jit, static_argnames="digit", inline=True)
def _selected_jointly(scores: list[Array], k: Array, among: list[Array | None], *, digit: int) -> list[Array]:
    pairs = [candidates(s, a) for s, a in zip(scores, among, strict=True)]
    bits, keys = max(bits for _, bits in pairs), [keys for keys, _ in pairs]

    def total(which: Callable[[Array], Array]) -> Array:
        # Where there are more than int32 holds, the sum stops there, and k is no larger.
        return apportion.total(jnp.stack([count_true(which(key), tuple(range(key.ndim))).reshape(()) for key in keys]))

    def at_least(t: Array) -> Array:
        if digit == 1:
            return total(lambda key: key >= t) >= k
        trials = [t.reshape((1,) * key.ndim + t.shape) for key in keys]
        pairs = zip(keys, trials, strict=True)
        counts = [count_true(key[..., None] >= trial, tuple(range(key.ndim))).reshape(-1) for key, trial in pairs]
        return jax.vmap(apportion.total, in_axes=1)(jnp.stack(counts)) >= k

    k = jnp.clip(k, 0, total(lambda key: key > 0))
    threshold = largest(bits, at_least, k, dtype=keys[0].dtype, digit=digit)
    need = k - total(lambda key: key > threshold)
    chosen = []
    for key in keys:
        axes, tied = tuple(range(key.ndim)), (key == threshold) & (key > 0)
        found = count_true(tied, axes)
        take = jnp.minimum(need, found)
        chosen.append((key > threshold) | _first(tied, take, axes, digit))
        need = need - take.reshape(())
    return chosen


def _rank(keys: Array, axis: int) -> Array:
    """How many of its group come before each entry, comparing all pairs: one pass, for groups as small as 2 of 4."""
    place = lax.broadcasted_iota(jnp.int32, keys.shape, axis, out_sharding=trees.explicit_sharding(keys))
    rank = jnp.zeros_like(keys, jnp.int32)
    for i in range(keys.shape[axis]):
        other = lax.index_in_dim(keys, i, axis)
        rank += ((other > keys) | ((other == keys) & (i < place))).astype(jnp.int32)
    return rank


def check_scores(who: str, scores: Array, among: Array | None) -> None:
    """Checks that scores can be ranked, and that `among` is a mask of them.

    Raises:
      ValueError: says what was given.
    """
    if not hasattr(scores, "dtype"):
        raise ValueError(f"{who}: scores must be an array of floats, got {kind(scores)}")
    if scores.dtype not in _types():
        raise ValueError(f"{who}: scores must be {', '.join(_types())}, got {scores.dtype}")
    checks.total(who, "scores of one array", scores.size)
    checks.same_shape(who, scores.shape, among=among)
    if among is not None and among.dtype != jnp.bool_:
        raise ValueError(f"{who}: among must be bool{list(scores.shape)}, got {shown(among)}")


def _types() -> tuple[str, ...]:
    """The types of scores that this mode of JAX can rank."""
    return (*_NARROW, *(("float64",) if jnp.result_type(float) == jnp.float64 else ()))


def candidates(scores: Array, among: Array | None) -> tuple[Array, int]:
    """Unsigned keys in the order of the scores, 0 for those that are not among the candidates; and their bits."""
    keys, bits = _sortable(scores)
    return (keys if among is None else jnp.where(among, keys, jnp.zeros((), keys.dtype))), bits


def check_count(who: str, k: Any) -> None:
    """Checks that k is a number of units.

    Raises:
      ValueError: says what was given.
    """
    if not isinstance(k, int) and not jnp.issubdtype(getattr(k, "dtype", object), jnp.integer):
        raise ValueError(f"{who}: k must be an integer, or an array of integers, got {shown(k)}")


def count_true(which: Array, axes: tuple[int, ...]) -> Array:
    """How many are True, int32, axes kept. Selection spends almost all its time here."""
    most = 1
    if one_cpu() and which.ndim - 1 in axes and which.shape[-1] % 4 == 0:
        # Four at a time, as the bits of a word: 1.2 to 3 times as fast. On several devices this could move data.
        bytes_ = which.reshape(*which.shape[:-1], which.shape[-1] // 4, 4).astype(jnp.uint8)
        which = lax.population_count(lax.bitcast_convert_type(bytes_, jnp.uint32))
        most = 4
    long = [axis for axis in axes if axis < which.ndim - 1 and 1 < which.shape[axis] * most <= jnp.iinfo(jnp.int16).max]
    if long and jax.default_backend() == "cpu":
        # First along the longest axis but the last, in 16 bits: vectors hold twice as many, and it is 2 to 3 times as
        # fast. Not on other devices, where a sharded axis would then be summed over devices as vectors, not as scalars.
        down = max(long, key=lambda axis: which.shape[axis])
        which = jnp.sum(which, axis=down, keepdims=True, dtype=jnp.int16)
    return jnp.sum(which, axis=axes, keepdims=True, dtype=jnp.int32)


def all_true(which: Array) -> Array:
    """`jnp.all` to a scalar; on one CPU by counting, which is several times as fast there."""
    return count_true(~which, tuple(range(which.ndim))).reshape(()) == 0 if one_cpu() else jnp.all(which)


def _kth(keys: Array, bits: int, k: Array, axes: tuple[int, ...], digit: int) -> Array:
    """The k-th largest key of each group, k from 0 to as many as are above 0. On CPUs one search for every 16 bits."""
    if digit > 1:
        return largest(
            bits, lambda t: count_true(keys[..., None] >= t, axes) >= k[..., None], k, dtype=keys.dtype, digit=digit
        )

    def search(part: Array, need: Array) -> Array:
        return largest(16, lambda t: count_true(part >= t.astype(jnp.uint16), axes) >= need, need)

    part = (keys >> (bits - 16)).astype(jnp.uint16)
    found = search(part, k).astype(keys.dtype)
    for shift in range(bits - 32, -1, -16):
        k = k - count_true(part > found.astype(jnp.uint16), axes)
        same, part = keys >> (shift + 16) == found, (keys >> shift).astype(jnp.uint16)
        part = jnp.where(same, part, jnp.uint16(0))  # 0 for the others: trials are above it, so they never count
        found = found << 16 | search(part, k).astype(keys.dtype)
    return found


def largest(
    bits: int,
    holds: Callable[[Array], Array],
    like: Array,
    *,
    wanted: Any = True,
    dtype: Any = jnp.uint32,
    digit: int = 1,
) -> Array:
    """The largest number of that many bits for which `holds` is True; it must be monotonic, and True for 0.

    Args:
      bits: of the number; more are searched where `digit` does not divide them.
      holds: with a `digit` of 1 gets a number in the shape of `like`. Otherwise all values of the next digit but 0,
        along a last axis of 2**digit - 1, and its result has that axis too.
      like: has the shape and, on a mesh, the sharding of the result.
      wanted: bool scalar, may be traced. Where it is False, no pass is made and the result is 0.
      dtype: of the number.
      digit: bits that a pass finds.
    """
    passes = -(-bits // digit)

    def narrow(i: Array, number: Array) -> Array:
        shift = jnp.asarray(digit * (passes - 1 - i), dtype)
        if digit == 1:
            trial = number | (jnp.ones((), dtype) << shift)
            return jnp.where(holds(trial), trial, number)
        steps = jnp.arange(1, 1 << digit, dtype=dtype).reshape((1,) * like.ndim + (-1,))
        return number | jnp.sum(holds(number[..., None] | (steps << shift)), axis=-1, dtype=dtype) << shift

    end = passes if wanted is True else jnp.where(wanted, passes, 0)
    return lax.fori_loop(0, end, narrow, (like * 0).astype(dtype))


def _sortable(scores: Array) -> tuple[Array, int]:
    """Unsigned keys in the order of the scores, and how many bits they use: NaN 1, -inf above it, 0 left free."""
    bits = jnp.finfo(scores.dtype).bits
    dtype = jnp.uint64 if bits == 64 else jnp.uint32
    signed = lax.bitcast_convert_type(scores, {16: jnp.int16, 32: jnp.int32, 64: jnp.int64}[bits])
    sign = jnp.asarray(1 << (bits - 1), dtype)
    magnitude = signed.astype(dtype) & (sign - 1)  # the bits without the sign grow with |score|
    keys = jnp.where(signed < 0, sign - 1 - magnitude, sign + magnitude)
    keys = jnp.where(magnitude == 0, sign, keys)  # -0.0 is 0.0
    return jnp.where(jnp.isnan(scores), jnp.ones((), dtype), keys), bits


def _first(tied: Array, need: Array, axes: tuple[int, ...], digit: int) -> Array:
    """The first `need` True entries of each group, in row-major order along the axes."""
    bits = max(math.prod(tied.shape[axis] for axis in axes), 1).bit_length()

    def holds(end: Array) -> Array:
        # The index is made in the pass that reads it: made before, it would be an array as large as the weight.
        if digit == 1:
            return count_true(tied & (_index(tied, axes) < end), axes) <= need
        return count_true(tied[..., None] & (_index(tied, axes)[..., None] < end), axes) <= need[..., None]

    # Scores are rarely tied: without a surplus the loop makes no pass at all.
    surplus = jnp.any(count_true(tied, axes) != need)
    end = largest(bits, holds, need, wanted=surplus, digit=digit)
    return tied & (~surplus | (_index(tied, axes) < end))


def _index(like: Array, axes: tuple[int, ...]) -> Array:
    """uint32, broadcasts against `like`: the place of an entry in its group, row-major along the axes."""
    index, stride, out = jnp.zeros((1,) * like.ndim, jnp.uint32), 1, trees.explicit_sharding(like)
    for axis in sorted(axes, reverse=True):
        # Arrays of one axis each, so that none has the whole shape; on a mesh with explicit axes each device makes its
        # part.
        shape = tuple(size if i == axis or out else 1 for i, size in enumerate(like.shape))
        index = index + lax.broadcasted_iota(jnp.uint32, shape, axis, out_sharding=out) * jnp.uint32(stride)
        stride *= like.shape[axis]
    return index
