"""Linear layers, forward and both gradients, row-major in and out: sparse kernels against XLA's dense product.

    python -m experiments.benchmarks.linear [--fresh] [--repeats 15]      (about 8 minutes on 2 cores)

Kinds: 1x1 unstructured, 4x1 and 16x1 runs of outputs (native kernels), 32x32 tiles (plain XLA); in float32, and the
first three also in bfloat16, where the dense contender is XLA's product in bfloat16.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from experiments.benchmarks import paired
from rigl_jax.execution import kernels

SHAPES = ((256, 768, 3072), (128, 1024, 1024), (1024, 1024, 1024), (256, 2048, 2048))
SPARSITIES = (0.5, 0.8, 0.9, 0.95, 0.98)
Array = jax.Array


class Kind(NamedTuple):
    """Which weights share their place, and in which dtype all is."""

    tile: tuple[int, int]
    dtype: Any = jnp.float32


KINDS = {
    "1x1": Kind((1, 1)),
    "4x1": Kind((1, 4)),
    "16x1": Kind((1, 16)),
    "32x32": Kind((32, 32)),
    "1x1 bfloat16": Kind((1, 1), jnp.bfloat16),
    "4x1 bfloat16": Kind((1, 4), jnp.bfloat16),
    "16x1 bfloat16": Kind((1, 16), jnp.bfloat16),
}


def products(product: Callable[[Array, Array], Array], x: Array, weight: Array, dy: Array) -> tuple[Array, ...]:
    """y, dx and the gradient of the weight (or of its values)."""
    y, pull = jax.vjp(product, x, weight)
    return y, *pull(dy)


def pattern_of(kind: str, inputs: int, outputs: int, sparsity: float, rng: np.random.Generator) -> Any:
    """A random pattern with exactly the asked-for number of tiles."""
    height, width = KINDS[kind].tile
    grid = (inputs // height, outputs // width)
    count = math.prod(grid)
    tiles = rng.permutation(np.arange(count) < round((1 - sparsity) * count)).reshape(grid)
    mask = np.repeat(np.repeat(tiles, height, axis=0), width, axis=1)
    if height > 1:
        return kernels.make_block_pattern(mask, (height, width))
    return kernels.make_pattern(mask, height=width)


def bytes_moved(batch: int, inputs: int, outputs: int, pattern: Any, size: int) -> float:
    """x, y, dy and dx once; values three times (read, read, written); the index arrays once a product."""
    indices = sum(leaf.nbytes for leaf in jax.tree.leaves(pattern))
    return float(size) * (2 * batch * (inputs + outputs) + 3 * pattern.nnz) + 2 * indices


def measure(shape: tuple[int, int, int], kind: str, sparsity: float, repeats: int) -> dict[str, Any]:
    """One row: both gradients in `ratio`, the forward product alone in `forward_ratio`."""
    batch, inputs, outputs = shape
    rng = np.random.default_rng(0)
    draw = functools.partial(rng.standard_normal, dtype=np.float32)
    sizes, dtype = ((batch, inputs), (inputs, outputs), (batch, outputs)), KINDS[kind].dtype
    x, weight, dy = (jnp.asarray(draw(size), dtype) for size in sizes)
    pattern = pattern_of(kind, inputs, outputs, sparsity, rng)
    values = kernels.gather(weight, pattern)
    dense = jax.jit(functools.partial(products, jnp.matmul))
    sparse = jax.jit(lambda x, v, p, dy: products(lambda x, v: kernels.matmul(x, v, p), x, v, dy))
    forward, sparse_forward = jax.jit(jnp.matmul), jax.jit(kernels.matmul)
    calls = (lambda: dense(x, weight, dy)), (lambda: sparse(x, values, pattern, dy))
    warm, cold = (paired.paired(*calls, repeats, cold=cold) for cold in (False, True))
    alone = paired.paired(lambda: forward(x, weight), lambda: sparse_forward(x, values, pattern), repeats)
    moved = bytes_moved(batch, inputs, outputs, pattern, x.dtype.itemsize)
    return {
        **paired.row(warm, cold, 6.0 * batch * pattern.nnz, moved),
        "dense_gflops": round(6e-9 * batch * inputs * outputs / warm.dense, 1),
        "forward_ratio": round(alone.ratio, 2),
        "forward_ms": round(alone.sparse * 1e3, 4),
    }


def cases(repeats: int) -> paired.Cases:
    """Every shape x kind x sparsity."""
    for shape in SHAPES:
        for kind in KINDS:
            for sparsity in SPARSITIES:
                identity = {"batch": shape[0], "in": shape[1], "out": shape[2], "kind": kind, "sparsity": sparsity}
                yield identity, functools.partial(measure, shape, kind, sparsity, repeats)


if __name__ == "__main__":
    paired.main("linear", "Sparse linear layers against XLA's dense product.", cases, repeats=15)
