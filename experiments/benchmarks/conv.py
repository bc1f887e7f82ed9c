"""3 x 3 convolutions, forward and both gradients, NHWC in and out: sparse kernels against XLA's dense convolution.

    python -m experiments.benchmarks.conv [--fresh] [--repeats 7]      (about 3 minutes on 2 cores)

XLA's CPU convolution is weak (oneDNN's is 1.5-2.5 times as fast), so each row also holds `gemm_ratio`: the time of
XLA's dense matrix products of the same number of operations, without any im2col, over the time of the sparse kernels.
The gain over a better dense convolution is between the two.
"""

from __future__ import annotations

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from experiments.benchmarks import paired
from experiments.benchmarks.linear import SPARSITIES, products
from rigl_jax.execution import kernels

LAYERS = ((32, 16, 128), (32, 32, 64), (64, 16, 128), (32, 16, 256))
Array = jax.Array


def dense_conv(x: Array, kernel: Array) -> Array:
    """XLA's convolution, SAME padding, stride 1."""
    return jax.lax.conv_general_dilated(x, kernel, (1, 1), "SAME", dimension_numbers=("NHWC", "HWIO", "NHWC"))


def measure(layer: tuple[int, int, int], sparsity: float, repeats: int) -> dict[str, Any]:
    """One row: both gradients in `ratio`, the forward product alone in `forward_ratio`."""
    batch, size, channels = layer
    rng = np.random.default_rng(0)
    draw = functools.partial(rng.standard_normal, dtype=np.float32)
    x, dy, kernel = (jnp.asarray(draw(s)) for s in ((batch, size, size, channels),) * 2 + ((3, 3, channels, channels),))
    active = rng.permutation(np.arange(kernel.size) < round((1 - sparsity) * kernel.size)).reshape(kernel.shape)
    pattern = kernels.make_pattern(active)
    values = kernels.gather(kernel, pattern)
    dense = jax.jit(functools.partial(products, dense_conv))
    sparse = jax.jit(lambda x, v, p, dy: products(lambda x, v: kernels.conv(x, v, p), x, v, dy))
    forward, sparse_forward = jax.jit(dense_conv), jax.jit(kernels.conv)
    pixels = batch * size * size
    columns, out, matrix = jnp.ones((pixels, 9 * channels)), dy.reshape(pixels, channels), kernel.reshape(-1, channels)
    gemm = jax.jit(functools.partial(products, jnp.matmul))

    def run() -> Any:
        return sparse(x, values, pattern, dy)

    warm, cold = (paired.paired(lambda: dense(x, kernel, dy), run, repeats, cold=cold) for cold in (False, True))
    alone = paired.paired(lambda: forward(x, kernel), lambda: sparse_forward(x, values, pattern), repeats)
    as_gemm = paired.paired(lambda: gemm(columns, matrix, out), run, repeats)
    indices = sum(leaf.nbytes for leaf in jax.tree.leaves(pattern))
    return {
        **paired.row(warm, cold, 6.0 * pixels * pattern.nnz, 4.0 * (4 * x.size + 3 * pattern.nnz) + 2 * indices),
        "dense_gflops": round(6e-9 * pixels * kernel.size / warm.dense, 1),
        "forward_ratio": round(alone.ratio, 2),
        "forward_ms": round(alone.sparse * 1e3, 4),
        "gemm_ratio": round(as_gemm.ratio, 2),
    }


def cases(repeats: int) -> paired.Cases:
    """Every layer x sparsity."""
    for layer in LAYERS:
        for sparsity in SPARSITIES:
            identity = {"batch": layer[0], "size": layer[1], "channels": layer[2], "kind": "1x1", "sparsity": sparsity}
            yield identity, functools.partial(measure, layer, sparsity, repeats)


if __name__ == "__main__":
    paired.main("conv", "Sparse 3 x 3 convolutions against XLA's dense convolution.", cases, repeats=7)
