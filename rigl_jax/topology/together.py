"""Rankings of many weights, one after the other or all at once.

A selection on an accelerator starts some 60 kernels, whatever the size of the weight, and a rewiring makes two of them:
the 54 leaves of a ResNet-50 would start thousands, each with little to do. There the keys of all leaves are laid out in
rows, none of which holds keys of two leaves. A pass counts in the rows and adds up the rows of each leaf, so all
leaves are searched by the kernels of one. The native kernels for GPUs (`rigl_jax.native.cuda`) take many leaves as they
are. The masks are the same.

What ranks is written once, as a generator: it yields each `Selection` that it needs and is sent its result.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Generator, Sequence
from typing import Any, NamedTuple, TypeVar

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from rigl_jax import trees
from rigl_jax.base import Array, LayerPlan, Plan, PyTree
from rigl_jax.native import cuda
from rigl_jax.topology import apportion
from rigl_jax.topology.topk import candidates, check_scores, digit_bits, largest, native_platform, select

ROW = 4096
"""Keys in a row. A leaf is filled up to whole rows."""
MOST = 1 << 25
"""Weights searched at once, so that the keys, of 4 bytes, take 128 MiB at most. A larger leaf is searched alone."""


class Selection(NamedTuple):
    """A selection that is asked for: the arguments of `select`."""

    scores: Array
    k: Any
    axes: tuple[int, ...]
    among: Array | None = None


T = TypeVar("T")
Selections = Generator[Selection, Array, T]
"""Yields what is to be selected, is sent the bools, returns a result."""


def selected(ranking: Selections[T]) -> T:
    """The result of a ranking, whose selections are made as it asks for them."""
    return _run([ranking], lambda asked: [select(*asked[0][:2], axes=asked[0].axes, among=asked[0].among)])[0]


def map_selections(f: Callable[..., Selections[Any]], plan: Plan, tree: PyTree, *rest: PyTree) -> PyTree:
    """The results of `f(layer, x, *xs)` for each sparse leaf, None elsewhere. On one accelerator all select at once."""
    if digit_bits() == 1 or jax.device_count() > 1:
        return trees.map_sparse(lambda *leaf: selected(f(*leaf)), plan, tree, *rest)
    begun: dict[str, Selections[Any]] = {}

    def begin(layer: LayerPlan, *arrays: Array) -> str:
        begun[layer.name] = f(layer, *arrays)
        return layer.name

    names = trees.map_sparse(begin, plan, tree, *rest)
    results = dict(zip(begun, _run(list(begun.values()), select_each), strict=True))
    return jax.tree.map(results.__getitem__, names)


def _run(rankings: Sequence[Selections[T]], answer: Callable[[list[Selection]], list[Array]]) -> list[T]:
    """Runs rankings side by side: the n-th selections of all are answered together."""
    results: dict[int, T] = {}
    sent: dict[int, Any] = dict.fromkeys(range(len(rankings)))
    while sent:
        asked: dict[int, Selection] = {}
        for i, chosen in sent.items():
            try:
                asked[i] = rankings[i].send(chosen)
            except StopIteration as end:
                results[i] = end.value
        sent = dict(zip(asked, answer(list(asked.values())), strict=True)) if asked else {}
    return [results[i] for i in range(len(rankings))]


def select_each(asked: Sequence[Selection]) -> list[Array]:
    """`select` for each; those of one group each, in batches that share a dtype, by one search. For accelerators."""
    found: dict[int, Array] = {}
    on_cuda = any(native_platform(one.scores) == "cuda" for one in asked)
    # The native kernels make no keys.
    batches = _batches(asked, 1 << 31, cuda.MOST_LEAVES) if on_cuda else _batches(asked, MOST, len(asked))
    for batch in batches:
        for one in batch.values():
            check_scores("select", one.scores, one.among)
        k = jnp.stack([apportion.count(one.k).reshape(()) for one in batch.values()])
        scores, among = [one.scores for one in batch.values()], [one.among for one in batch.values()]
        found.update(zip(batch, _selected_each(scores, k, among, on_cuda=on_cuda), strict=True))
    for i, one in enumerate(asked):
        if i not in found:
            found[i] = select(one.scores, one.k, axes=one.axes, among=one.among)
    return [found[i] for i in range(len(asked))]


def _batches(asked: Sequence[Selection], most: int, most_leaves: int) -> list[dict[int, Selection]]:
    """Selections that are made by one search, by their position: at most so many weights and leaves."""
    batches: list[dict[int, Selection]] = []
    open_batch: dict[Any, tuple[dict[int, Selection], int]] = {}
    for i, one in enumerate(asked):
        dtype, size = one.scores.dtype, one.scores.size
        whole = math.prod(one.scores.shape[axis] for axis in one.axes) == size
        if not whole or not 0 < size <= most or dtype == jnp.float64 or trees.explicit_sharding(one.scores) is not None:
            continue
        batch, total = open_batch.get(dtype, ({}, most))
        if total + size > most or len(batch) == most_leaves:
            batch, total = {}, 0
            batches.append(batch)
        batch[i] = one
        open_batch[dtype] = batch, total + size
    return [batch for batch in batches if len(batch) > 1]


# Jitted for the same reason as the selection of one array.
@functools.partial(jax.jit, static_argnames="on_cuda", inline=True)
def _selected_each(scores: list[Array], k: Array, among: list[Array | None], *, on_cuda: bool) -> list[Array]:
    if not on_cuda:
        return _searched_each(scores, k, among)
    return lax.platform_dependent(scores, k, among, cuda=cuda.select_each, default=_searched_each)


def _searched_each(scores: list[Array], k: Array, among: list[Array | None]) -> list[Array]:
    """By one search in plain JAX."""
    pairs = [candidates(s, a) for s, a in zip(scores, among, strict=True)]
    rows = [-(-s.size // ROW) for s in scores]
    filled = [
        jnp.pad(keys.reshape(-1), (0, n * ROW - keys.size)).reshape(n, ROW)
        for (keys, _), n in zip(pairs, rows, strict=True)
    ]
    starts = np.cumsum([0, *rows])
    leaf = np.repeat(np.arange(len(rows)), rows)
    chosen = _search(jnp.concatenate(filled), pairs[0][1], k, leaf, np.arange(starts[-1]) - starts[leaf])
    ends = zip(scores, starts[:-1], starts[1:], strict=True)
    return [chosen[start:end].reshape(-1)[: s.size].reshape(s.shape) for s, start, end in ends]


def _search(keys: Array, bits: int, k: Array, leaf: np.ndarray, place: np.ndarray, digit: int = 4) -> Array:
    """Which keys are among the k largest of their leaf.

    Args:
      keys: unsigned[rows, ROW]; 0 is never taken.
      bits: of the keys.
      k: int32[leaves].
      leaf: int[rows], whose keys a row holds, ascending.
      place: int[rows], which of its leaf's rows it is.
      digit: bits found in a pass.
    """
    owner = jnp.asarray(leaf, jnp.int32)

    def count(which: Array) -> Array:
        """int32[leaves, ...] of bool[rows, ROW, ...]. Not marked as sorted: XLA would compile for minutes on GPUs."""
        return jax.ops.segment_sum(jnp.sum(which, axis=1, dtype=jnp.int32), owner, num_segments=len(k))

    def spread(of_leaf: Array) -> Array:
        return of_leaf[owner][:, None]

    k = jnp.clip(k, 0, count(keys > 0))
    at_least = lambda t: count(keys[..., None] >= spread(t)) >= k[:, None]  # noqa: E731
    threshold = spread(largest(bits, at_least, k, dtype=keys.dtype, digit=digit))
    above, tied = keys > threshold, (keys == threshold) & (keys > 0)
    need = k - count(above)

    # The first of those that are tied, as `select` takes them; rarely any is left over, and then no pass is made.
    surplus = jnp.any(count(tied) != need)

    def index() -> Array:
        """Places of keys in their leaf, made in each pass: an array of them would be as large as the keys."""
        return jnp.asarray(place, jnp.uint32)[:, None] * jnp.uint32(ROW) + lax.broadcasted_iota(jnp.uint32, (1, ROW), 1)

    before = lambda end: count(tied[..., None] & (index()[..., None] < spread(end))) <= need[:, None]  # noqa: E731
    length = int(place.max() + 1) * ROW
    end = largest(length.bit_length(), before, need, wanted=surplus, digit=digit)
    return above | (tied & (~surplus | (index() < spread(end))))
