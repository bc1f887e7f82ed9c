"""RigL's rewiring without a dense gradient, mask or weight in memory.

The gradient of a weight is a product of two thin matrices, its inputs and the cotangents of its outputs. Growth needs
only the largest entries, so the gradient is computed one block of rows at a time, and only entries above a threshold
are kept. The threshold comes from a sample of rows. It affects how many entries are kept, but not the result.
Memory: O(k + block) to grow k weights.
"""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from rigl_jax import arguments as rules
from rigl_jax import checks, topology, trees
from rigl_jax.arguments import arguments
from rigl_jax.base import Array
from rigl_jax.execution import kernels
from rigl_jax.execution.packed import Packed, checked, leaf_patterns
from rigl_jax.execution.run import Context, run_with
from rigl_jax.execution.training import Box, check_state, map_inner
from rigl_jax.execution.weight import Weight
from rigl_jax.messages import kind, listed, shown
from rigl_jax.transform import SparseState

BLOCK = 1 << 24  # entries of a gradient that are computed at a time: 64 MiB in f32
MARGIN = 1.25  # wanted candidates for each weight that is grown


class Factors(NamedTuple):
    """The dense gradient of a weight as two factors: it is left.T @ right, a sum over examples (and pixels).

    Attributes:
      left: float[examples, rows], rows as `Pattern` counts them.
      right: float[examples, out].
    """

    left: Array
    right: Array


@arguments(shape=rules.shape)
def random_pattern(key: Array, shape: tuple[int, ...], n_active: int) -> kernels.Pattern:
    """The pattern of a uniformly random mask, without the mask, for weights whose mask would not fit into memory.

    Args:
      key: `jax.random.key`. Its draws are NumPy's, so not those of `topology.random_masks`.
      shape: (in, out) or ([kd,] kh, kw, in, out) of the dense weight.
      n_active: how many single weights are active.

    >>> random_pattern(jax.random.key(0), (100, 100), 7).nnz
    7
    """
    if len(shape) not in kernels.pattern.RANKS or not all(checks.is_whole(size, 1) for size in shape):
        raise ValueError(f"random_pattern: shape must be {kernels.pattern.EXPECTED}, got {shown(shape)}")
    n = math.prod(shape)
    if not checks.is_whole(n_active, 1) or n_active > n:
        raise ValueError(f"random_pattern: n_active must be from 1 to {n}, got {shown(n_active)}")
    rng = np.random.default_rng(np.asarray(jax.random.key_data(checks.key("random_pattern", key))))
    return kernels.make_pattern_at(np.sort(rng.choice(n, checks.plain(n_active), replace=False, shuffle=False)), shape)


@arguments(loss=rules.function)
def gradient_factors(loss: Callable[..., Array]) -> Callable[..., dict[str, Factors]]:
    """Like `jax.grad(loss)` in its first argument, for packed weights, with every gradient as two factors.

    Args:
      loss: `(params, *args) -> scalar`, written for dense params.

    Returns:
      `factors(packed, *args) -> {leaf name: Factors}` for the packed leaves. For jit.

    Raises:
      ValueError: a packed leaf is used in no product, or inside a loop, where its products cannot be observed.

    >>> import jax.numpy as jnp
    >>> import rigl_jax as rx
    >>> packed = rx.pack({"w": jnp.ones((4, 4))}, {"w": jnp.eye(4, dtype=bool)})
    >>> loss = lambda params, x: (x @ params["w"]).sum()
    >>> factors = gradient_factors(loss)(packed, jnp.ones((2, 4)))["w"]
    >>> (factors.left.T @ factors.right).tolist() == jax.grad(loss)({"w": jnp.eye(4)}, jnp.ones((2, 4)))["w"].tolist()
    True
    """

    def factors(packed: Packed, *args: Any) -> dict[str, Factors]:
        seen: dict[str, list[tuple[bool, jax.ShapeDtypeStruct]]] = {}  # outlives the trace: no tracers

        def probed(probes: Any) -> tuple[Array, Any]:
            seen.clear()
            inputs: dict[str, list[Array]] = {}

            def observe(weight: Weight, rows: Array, y: Array) -> Array:
                uses = seen.setdefault(weight.name, [])
                uses.append((weight.flipped, jax.ShapeDtypeStruct(y.shape, y.dtype)))
                inputs.setdefault(weight.name, []).append(rows)
                return y if probes is None else y + probes[weight.name][len(uses) - 1]

            return run_with(Context(observe), loss, packed, *args), inputs

        jax.eval_shape(probed, None)
        zeros = {name: [jnp.zeros(y.shape, y.dtype) for _, y in uses] for name, uses in seen.items()}
        flipped = {name: [flip for flip, _ in uses] for name, uses in seen.items()}
        cotangents, inputs = jax.grad(probed, has_aux=True)(zeros)
        return {name: _joined(inputs[name], cotangents[name], flipped[name]) for name in zeros}

    return factors


def _joined(inputs: list[Array], cotangents: list[Array], flipped: list[bool]) -> Factors:
    """Concatenates the factors of all uses of one weight, whose gradients add up."""
    pairs = [(dy, x) if flip else (x, dy) for x, dy, flip in zip(inputs, cotangents, flipped, strict=True)]
    left, right = ([m.reshape(-1, m.shape[-1]) for m in side] for side in zip(*pairs, strict=True))
    return Factors(jnp.concatenate(left), jnp.concatenate(right))


@arguments(block=rules.whole(1))
def rewire_streamed(
    inner: optax.GradientTransformation,
    gradients: dict[str, Factors],
    state: SparseState,
    packed: Packed,
    share: float,
    *,
    block: int = BLOCK,
) -> tuple[Packed, SparseState]:
    """`PackedTraining.rewire` for RigL with its defaults; memory is proportional to the number of active weights.

    In every packed leaf the `share` of smallest |w| is dropped, rounded down, and as many are grown where |gradient| is
    largest, at zero. The step trains nothing. Ties go to the lower index of the dense weight (of a `Moved` one, as HWIO
    or DHWIO). The masks are those of the masked path, up to the rounding of the gradient itself. A leaf in which a
    weight, or the gradient of a weight that is not kept, is infinite or NaN stays as it is.

    Args:
      inner: the inner optimizer.
      gradients: from `gradient_factors`, of all packed leaves.
      state: of `packed_training`.
      packed: the weights; leaves with a mask must be packed with single weights (`make_pattern` of height 1).
      share: of the active weights that are dropped, in [0, 1].
      block: number of gradient entries computed at a time.

    Raises:
      ValueError: a leaf stored dense or in blocks; factors that are missing or do not fit a leaf; a state of a masked
        run, of another optimizer, or that does not fit the packed weights.

    >>> import jax.numpy as jnp
    >>> import optax
    >>> import rigl_jax as rx
    >>> params, inner = {"w": jnp.arange(1.0, 65.0).reshape(8, 8)}, optax.sgd(0.1)
    >>> training = rx.packed_training(inner, rx.rigl(rx.make_plan(params, 0.75)), key=jax.random.key(0))
    >>> packed, state = training.init(params)
    >>> factors = gradient_factors(lambda params, x: (x @ params["w"]).sum())(packed, jnp.ones((2, 8)))
    >>> packed, state = rewire_streamed(inner, factors, state, packed, 0.25)
    >>> packed.values["w"].shape  # as many as before: 4 were dropped and 4 grown
    (16,)
    """
    checks.optimizer("rewire_streamed", inner)
    share = checks.number("rewire_streamed", "share", share, "must be in [0, 1]", lambda found: 0 <= found <= 1)
    if not isinstance(gradients, Mapping):
        raise ValueError(f"rewire_streamed: gradients must be what gradient_factors gives, got {kind(gradients)}")
    names = list(trees.named_leaves(checked("rewire_streamed", packed).values))
    check_state("rewire_streamed", inner, packed, state)
    moves: list[_Move | None] = []
    for name, values, pattern in zip(names, jax.tree.leaves(packed.values), leaf_patterns(packed), strict=True):
        if pattern is None:
            moves.append(None)
            continue
        matrix = kernels.matrix_of(pattern)
        if not isinstance(matrix, kernels.Pattern) or matrix.height != 1:
            raise ValueError(f"rewire_streamed: leaf {name!r} must be packed as single weights; see pack(choose=...)")
        if name not in gradients:
            raise ValueError(f"rewire_streamed: leaf {name!r} has no gradient factors; got {listed(gradients)}")
        _check_factors(name, gradients[name], matrix)
        move = _move(values, matrix, gradients[name], share, block)
        if matrix is not pattern:
            move = _Move(dataclasses.replace(pattern, matrix=move.pattern), move.origin)
        moves.append(move)
    structure = jax.tree.structure(packed.values)
    patterns = [None if move is None else move.pattern for move in moves]
    by_leaf = jax.tree.unflatten(structure, [Box(move) for move in moves])
    after = Packed(
        jax.tree.map(lambda v, box: _carried(v, box.content), packed.values, by_leaf),
        jax.tree.unflatten(structure, patterns),
    )
    optimizer = map_inner(inner, lambda part, box: _carried(part, box.content), state.inner, by_leaf)
    return after, state._replace(step=state.step + 1, inner=optimizer)


def _check_factors(name: str, factors: Any, matrix: kernels.Pattern) -> None:
    whole = isinstance(factors, Factors)
    given = [getattr(part, "shape", None) for part in factors] if whole else type(factors).__name__
    examples = given[0][:1] if whole and given[0] else ("examples",)
    expected = [(*examples, matrix.rows), (*examples, matrix.units)]
    if given != expected:
        raise ValueError(
            f"rewire_streamed: gradients of leaf {name!r} must be Factors of shapes {expected}, got {given}"
        )


@dataclasses.dataclass(frozen=True)
class _Move:
    """The new pattern of a leaf, and for each of its entries the index of the same weight before, or -1."""

    pattern: kernels.Pattern | kernels.Folded | kernels.Moved
    origin: Array


@jax.jit
def _taken(part: Array, origin: Array) -> Array:
    return jnp.where(origin >= 0, part[jnp.maximum(origin, 0)], jnp.zeros((), part.dtype))


def _carried(part: Array, move: _Move | None) -> Array:
    return part if move is None else _taken(part, move.origin)


def _move(values: Array, pattern: kernels.Pattern, gradient: Factors, share: float, block: int) -> _Move:
    place = kernels.pattern.places(pattern)
    n_drop = int(topology.count(share, len(place)))
    order = np.argsort(kernels.pattern.dense_index(pattern, place))
    kept = np.asarray(topology.select(jnp.abs(values)[order], len(place) - n_drop))
    stay = np.sort(place[order[kept]])
    grown, sound = _top(gradient, n_drop, exclude=stay, pattern=pattern, block=block)
    if not (sound and bool(jnp.all(jnp.isfinite(values)))):
        return _Move(pattern, jnp.arange(pattern.nnz, dtype=jnp.int32))
    sizes = {"block": pattern.block, "block_t": pattern.block_t, "capacity": pattern.nnz}
    after = kernels.make_pattern_at(np.sort(np.concatenate([stay, grown])), pattern.shape, **sizes)
    ascending = np.argsort(place)
    new = kernels.pattern.places(after)
    old = place[ascending]
    found = np.minimum(np.searchsorted(old, new), len(old) - 1)
    lived = old[found] == new
    origin = np.full(pattern.nnz, -1, np.int32)  # padding comes from nowhere
    origin[: len(new)] = np.where(lived, ascending[found], -1)
    return _Move(after, jnp.asarray(origin))


@functools.partial(jax.jit, static_argnames="rows")
def _block_of(gradient: Factors, start: Any, rows: int) -> Array:
    left = jax.lax.dynamic_slice_in_dim(gradient.left, start, rows, axis=1)
    return jnp.abs(jnp.matmul(left.T, gradient.right, preferred_element_type=jnp.float32))


@arguments(k=rules.whole(0), exclude=rules.host_array(1), block=rules.whole(1))
def top_products(
    gradient: Factors, k: int, *, exclude: np.ndarray, pattern: kernels.Pattern, block: int = BLOCK
) -> np.ndarray:
    """The `k` places of the largest |left.T @ right| outside of `exclude`, ascending.

    Args:
      gradient: the factors.
      k: how many, at most as many as there are places left.
      exclude: int64, ascending places that may not be taken.
      pattern: of the weight; only its sizes are used.
      block: entries computed at a time.

    Returns:
      int64[k]. Ties go to the lower index of the dense weight, NaN comes last.
    """
    return _top(gradient, k, exclude=exclude, pattern=pattern, block=block)[0]


def _top(
    gradient: Factors, k: int, *, exclude: np.ndarray, pattern: kernels.Pattern, block: int
) -> tuple[np.ndarray, bool]:
    """The result of `top_products`, and whether all candidates are finite."""
    rows, out = pattern.rows, pattern.units
    if not 0 <= k <= rows * out - len(exclude):
        raise ValueError(f"top_products: k must be from 0 to {rows * out - len(exclude)}, got {k}")
    if k == 0:
        return np.zeros(0, np.int64), True
    step = max(1, min(rows, block // max(1, out)))
    wanted = MARGIN * (k + len(exclude))
    while True:
        threshold = _threshold(gradient, wanted / (rows * out), rows, step)
        places, scores = _above(gradient, threshold, exclude, rows, out, step)
        if len(places) >= k:
            best = np.lexsort((kernels.pattern.dense_index(pattern, places), -scores))[:k]
            return np.sort(places[best]), bool(np.isfinite(scores).all())
        wanted *= 4


def _threshold(gradient: Factors, fraction: float, rows: int, step: int) -> float:
    """A value that about `fraction` of the entries exceed, from a sample of rows; -1, below all, for all of them."""
    if fraction >= 0.5:
        return -1.0
    sample = np.linspace(0, rows - 1, min(step, 256)).astype(np.int32)
    entries = np.asarray(_block_of(gradient._replace(left=gradient.left[:, sample]), 0, len(sample))).ravel()
    entries = entries[~np.isnan(entries)]
    above = int(fraction * len(entries))
    return float(np.partition(entries, -above)[-above]) if 0 < above < len(entries) else -1.0


def _above(
    gradient: Factors, threshold: float, exclude: np.ndarray, rows: int, out: int, step: int
) -> tuple[np.ndarray, np.ndarray]:
    """Places and values of all entries above the threshold (or NaN) that are not excluded, ascending by place."""
    places, scores = [], []
    for start in range(0, rows, step):
        first = min(start, rows - step)  # the last block overlaps the one before, so that all have one shape
        entries = np.asarray(_block_of(gradient, first, step)).ravel()[(start - first) * out :]
        local = np.flatnonzero(~(entries <= threshold))
        place = local + start * out
        among = exclude[np.searchsorted(exclude, start * out) : np.searchsorted(exclude, start * out + len(entries))]
        free = ~np.isin(place, among, assume_unique=True)
        places.append(place[free])
        scores.append(entries[local[free]])
    return np.concatenate(places), np.concatenate(scores)
