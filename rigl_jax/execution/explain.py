"""Measures on this machine, for each leaf, whether sparse products are faster than dense ones."""

from __future__ import annotations

import functools
import statistics
import time
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from rigl_jax import arguments as rules
from rigl_jax import trees
from rigl_jax.arguments import arguments
from rigl_jax.base import Array, Plan, Shape
from rigl_jax.execution import kernels
from rigl_jax.execution.packed import (
    CONV_DENSE_ABOVE,
    DENSE_ABOVE,
    Choose,
    Packed,
    Whole,
    best_choice,
    checked,
    leaf_patterns,
    masks_of,
)
from rigl_jax.tables import html_table, table

SECOND_DENSITY = 0.5  # the second point of the line that gives the break-even density


class Explained(NamedTuple):
    """The time that a masked leaf takes, forward and both gradients.

    Attributes:
      name: its path.
      shape: of the dense weight.
      kernel: that of the leaf as it is stored; "dense" if it is stored dense, and multiplied so.
      density: share of active weights.
      break_even: density at which sparse and dense would take equally long, from a line through two measured densities;
        0 if sparse is never faster.
      dense_ms, sparse_ms: median milliseconds; of stacked layers, those of one. Of a leaf that is stored dense,
        sparse_ms is the time that a kernel for its mask would take.
    """

    name: str
    shape: Shape
    kernel: str
    density: float
    break_even: float
    dense_ms: float
    sparse_ms: float


class Explanation(NamedTuple):
    """The result of `explain`: its `str` is a table, and a notebook shows it as one."""

    rows: tuple[Explained, ...]

    def __str__(self) -> str:
        """Aligned lines, the head first."""
        text = table(self._cells(), words=3)
        return f"{text}\n{note}" if (note := self._note()) else text

    def _repr_html_(self) -> str:
        return html_table(self._cells(), words=3, note=self._note())

    def _cells(self) -> list[tuple[str, ...]]:
        head = ("leaf", "shape", "stored as", "density", "break-even", "dense ms", "sparse ms", "dense / sparse")
        lines = [
            (
                row.name,
                " x ".join(map(str, row.shape)),
                row.kernel,
                f"{row.density:.3f}",
                f"{row.break_even:.2f}",
                f"{row.dense_ms:.3f}",
                f"{row.sparse_ms:.3f}",
                f"{row.dense_ms / row.sparse_ms:.2f}",
            )
            for row in self.rows
        ]
        return [head, *lines]

    def _note(self) -> str:
        dense = [row for row in self.rows if row.kernel == "dense"]
        if not dense:
            return ""
        note = (
            "stored as dense: multiplied dense; sparse ms is the time of a kernel for its mask, if it were used. pack "
            f"stores a leaf dense if its density is above {DENSE_ABOVE} (convolutions with native kernels: above "
            f"{CONV_DENSE_ABOVE}), or if it does not have 2 to 5 axes"
        )
        if any(row.sparse_ms < row.dense_ms for row in dense):
            return (
                f"{note}. Where it is faster, pack with rx.pack(..., choose=rx.execution.fastest(plan=plan, batch=...))"
            )
        return note


@arguments(batch=rules.whole(1), image=rules.whole(1), repeats=rules.whole(1))
def explain(packed: Packed, *, batch: int = 128, image: int = 16, repeats: int = 7) -> Explanation:
    """Times every masked leaf on this machine, dense and sparse alternately.

    Args:
      packed: the weights. A leaf stored dense is timed with a kernel for its mask.
      batch: rows of a matrix product, images of a convolution.
      image: height and width of a convolution's input, which has the depth of its kernel; stride 1, and one group,
        because a kernel does not say into how many groups the model divides its channels.
      repeats: timed calls of each, of which the median is taken.

    Returns:
      One row for each masked leaf; its `str` is a table.

    >>> import jax.numpy as jnp
    >>> import rigl_jax as rx
    >>> packed = rx.pack({"w": jnp.ones((64, 64))}, {"w": jnp.eye(64, dtype=bool)})
    >>> [row.name for row in explain(packed, batch=8, repeats=1).rows]
    ['w']
    """
    masks = trees.named_leaves(masks_of(checked("explain", packed)))
    rows = []
    for name, pattern in zip(trees.named_leaves(packed.values), leaf_patterns(packed), strict=True):
        if pattern is None:
            continue
        mask = np.asarray(masks[name])
        kernel = "dense" if isinstance(pattern, Whole) else name_of(pattern)
        tried = _matrix(_kernel_for(mask) if isinstance(pattern, Whole) else pattern)
        if tried is None:
            rows.append(Explained(name, mask.shape, kernel, float(mask.mean()), 0.0, float("nan"), float("nan")))
            continue
        dense, sparse, even = _measure(tried, float(mask.mean()), batch, image, repeats)
        rows.append(Explained(name, mask.shape, kernel, float(mask.mean()), even, 1e3 * dense, 1e3 * sparse))
    return Explanation(tuple(rows))


@arguments(plan=rules.optional(rules.plan), batch=rules.whole(1), image=rules.whole(1), repeats=rules.whole(1))
def fastest(*, plan: Plan | None = None, batch: int = 128, image: int = 16, repeats: int = 5) -> Choose:
    """A `choose` for `pack` that measures each leaf, and stores it dense if the sparse product is slower.

    Leaves of one shape, density and kernel are measured once. The choice depends on this machine and its load; the
    results of training do not depend on it, up to rounding.

    Args:
      plan: as in `pack`, for leaves whose axes are not those of a matrix or of a kernel HWIO.
      batch: as in `explain`; use that of your training step.
      image: as in `explain`.
      repeats: as in `explain`.

    >>> import jax.numpy as jnp
    >>> import rigl_jax as rx
    >>> params, masks = {"w": jnp.ones((64, 64))}, {"w": jnp.eye(64, dtype=bool)}
    >>> packed = rx.pack(params, masks, choose=fastest(batch=8, repeats=1))
    """
    known: dict[Any, bool] = {}
    best = best_choice(plan)

    def choose(name: str, mask: np.ndarray) -> Any:
        pattern = best(name, mask)
        if pattern is None:
            return None
        case = (mask.shape, int(mask.sum()), name_of(pattern), _matrix(pattern).shape)
        if case not in known:
            dense, sparse = _seconds(_matrix(pattern), batch, image, repeats)
            known[case] = sparse < dense
        return pattern if known[case] else None

    return choose


def name_of(pattern: Any) -> str:
    """The name of a pattern's kernel in tables."""
    if isinstance(pattern, kernels.Stacked):
        return f"{pattern.shape[0]} layers of {name_of(kernels.kernel_of(pattern))}"
    pattern = kernels.matrix_of(pattern)
    if isinstance(pattern, kernels.Slabs):
        return f"{pattern.number} slabs of {name_of(pattern.part)}"
    if isinstance(pattern, kernels.BlockPattern):
        return "blocks {} x {}".format(*pattern.tile)
    if isinstance(pattern, kernels.NMPattern):
        return f"{pattern.n}:{pattern.m}"
    native = kernels.native_in_use()
    kind = "single weights" if pattern.height == 1 else f"runs of {pattern.height}"
    return f"{kind}, {'native' if native else 'plain JAX'}"


def _matrix(pattern: Any) -> Any:
    """The pattern that is timed: of the matrix for a folded weight, of the first layer or slab where there are more."""
    if isinstance(pattern, kernels.Stacked):
        pattern = jax.tree.map(lambda a: a[0], pattern.layers)
    pattern = kernels.matrix_of(pattern)
    return jax.tree.map(lambda a: a[0], pattern.parts) if isinstance(pattern, kernels.Slabs) else pattern


def _kernel_for(mask: np.ndarray) -> Any:
    if mask.ndim == 3:
        mask = mask.reshape(kernels.as_matrix(mask.shape, kernels.squarest_split(mask.shape)))
    return kernels.make_pattern(mask) if kernels.sorting.fits(mask.shape) and mask.any() else None


def _measure(pattern: Any, density: float, batch: int, image: int, repeats: int) -> tuple[float, float, float]:
    dense, sparse = _seconds(pattern, batch, image, repeats)
    other = kernels.rebuild(pattern, _drawn(pattern, SECOND_DENSITY)) if _free(pattern) else None
    if other is None:
        return dense, sparse, min(1.0, density * dense / sparse)
    _, at_other = _seconds(other, batch, image, repeats)
    slope = (at_other - sparse) / (SECOND_DENSITY - density) if density != SECOND_DENSITY else sparse / density
    if slope <= 0:
        return dense, sparse, min(1.0, density * dense / sparse)
    return dense, sparse, float(np.clip(density + (dense - sparse) / slope, 0, 1))


def _free(pattern: Any) -> bool:
    """Whether the pattern can have another density; n:m cannot."""
    return isinstance(pattern, (kernels.Pattern, kernels.BlockPattern))


def _drawn(pattern: Any, density: float) -> np.ndarray:
    height, width = pattern.entry
    *lead, inputs, outputs = pattern.shape
    tiles = np.random.default_rng(0).random((*lead, inputs // height, outputs // width)) < density
    return np.repeat(np.repeat(tiles, height, axis=-2), width, axis=-1)


def _seconds(pattern: Any, batch: int, image: int, repeats: int) -> tuple[float, float]:
    """Median seconds of product and both gradients, dense and sparse, measured alternately."""
    rng = np.random.default_rng(0)
    *window, channels, _ = pattern.shape
    inputs = (batch, *window[:-2], *(image for _ in window[-2:]), channels)
    x = jnp.asarray(rng.standard_normal(inputs, dtype=np.float32))
    weight = jnp.asarray(rng.standard_normal(pattern.shape, dtype=np.float32))
    values = kernels.gather(weight, pattern)
    if not window:
        dense_product: Callable[..., Array] = jnp.matmul
        sparse_product = kernels.matmul
    else:
        dense_product = functools.partial(
            jax.lax.conv_general_dilated,
            window_strides=(1,) * len(window),
            padding="SAME",
            dimension_numbers=("NHWC", "HWIO", "NHWC") if len(window) == 2 else ("NDHWC", "DHWIO", "NDHWC"),
        )
        sparse_product = kernels.conv
    dense = jax.jit(lambda x, w: _both(dense_product, x, w))
    sparse = jax.jit(lambda x, v, p: _both(lambda x, v: sparse_product(x, v, p), x, v))
    seconds: tuple[list[float], list[float]] = ([], [])
    for turn in range(repeats + 1):
        for call, kept in zip((lambda: dense(x, weight), lambda: sparse(x, values, pattern)), seconds, strict=True):
            start = time.perf_counter()
            jax.block_until_ready(call())
            if turn:  # the first call compiles
                kept.append(time.perf_counter() - start)
    return statistics.median(seconds[0]), statistics.median(seconds[1])


def _both(product: Callable[..., Array], x: Array, weight: Array) -> tuple[Array, ...]:
    y, pull = jax.vjp(product, x, weight)
    return y, *pull(y)
