"""Convolutions, forward and both gradients, channels last: sparse kernels against XLA's dense convolution.

    python -m experiments.benchmarks.conv [--fresh] [--repeats 7]      (about 6 minutes on 2 cores)

Kernels are 3 x 3, or 3 x 3 x 3 where images have a depth. All is in float32, two layers also in bfloat16, where the
dense contenders are in bfloat16 too.

XLA's CPU convolution is weak (oneDNN's is 1.5-2.5 times as fast), so each row also holds `gemm_ratio`: the time of
XLA's dense matrix products of the same number of operations, without any im2col, over the time of the sparse kernels.
The gain over a better dense convolution is between the two.
"""

from __future__ import annotations

import functools
import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from experiments.benchmarks import paired
from experiments.benchmarks.linear import SPARSITIES, products
from rigl_jax.execution import kernels

Array = jax.Array


class Layer(NamedTuple):
    """A convolution with as many channels out as in.

    Attributes:
      batch: images.
      size: height and width.
      channels: in and out.
      groups: of channels.
      depth: of the images; 1: they are flat.
      sparsities: at which it is measured.
    """

    batch: int
    size: int
    channels: int
    groups: int = 1
    depth: int = 1
    sparsities: tuple[float, ...] = SPARSITIES


LAYERS = (
    Layer(32, 16, 128),
    Layer(32, 32, 64),
    Layer(64, 16, 128),
    Layer(32, 16, 256),
    Layer(8, 16, 128, groups=4, sparsities=(0.8, 0.9, 0.98)),
    Layer(32, 16, 128, groups=128, sparsities=(0.8, 0.9, 0.98)),
    Layer(4, 16, 32, depth=8, sparsities=(0.8, 0.9, 0.98)),
)


def dense_conv(groups: int, x: Array, kernel: Array) -> Array:
    """XLA's convolution, SAME padding, stride 1."""
    numbers = ("NDHWC", "DHWIO", "NDHWC") if x.ndim == 5 else ("NHWC", "HWIO", "NHWC")
    strides = (1,) * (x.ndim - 2)
    return jax.lax.conv_general_dilated(
        x, kernel, strides, "SAME", dimension_numbers=numbers, feature_group_count=groups
    )


KINDS = {"1x1": jnp.float32, "1x1 bfloat16": jnp.bfloat16}
IN_BFLOAT16 = tuple(layer._replace(sparsities=(0.8, 0.9, 0.98)) for layer in LAYERS[:2])


def measure(layer: Layer, kind: str, sparsity: float, repeats: int) -> dict[str, Any]:
    """One row: both gradients in `ratio`, the forward product alone in `forward_ratio`."""
    batch, size, channels, groups, depth, _ = layer
    rng = np.random.default_rng(0)
    draw = functools.partial(rng.standard_normal, dtype=np.float32)
    space = (size, size) if depth == 1 else (depth, size, size)
    window, inputs, pixels = (3,) * len(space), channels // groups, batch * math.prod(space)
    shapes = ((batch, *space, channels),) * 2 + ((*window, inputs, channels),)
    dtype = KINDS[kind]
    x, dy, kernel = (jnp.asarray(draw(shape), dtype) for shape in shapes)
    active = rng.permutation(np.arange(kernel.size) < round((1 - sparsity) * kernel.size)).reshape(kernel.shape)
    pattern = kernels.make_pattern(active)
    values, sparse_conv = kernels.gather(kernel, pattern), functools.partial(kernels.conv, groups=groups)
    dense = jax.jit(functools.partial(products, functools.partial(dense_conv, groups)))
    sparse = jax.jit(lambda x, v, p, dy: products(lambda x, v: sparse_conv(x, v, p), x, v, dy))
    forward, sparse_forward = jax.jit(functools.partial(dense_conv, groups)), jax.jit(sparse_conv)
    many = () if groups == 1 else (groups,)
    columns, out = jnp.ones((*many, pixels, kernel.size // channels), dtype), dy.reshape(*many, pixels, inputs)
    matrix, gemm = kernel.reshape(*many, -1, inputs), jax.jit(functools.partial(products, jnp.matmul))

    def run() -> Any:
        return sparse(x, values, pattern, dy)

    warm, cold = (paired.paired(lambda: dense(x, kernel, dy), run, repeats, cold=cold) for cold in (False, True))
    alone = paired.paired(lambda: forward(x, kernel), lambda: sparse_forward(x, values, pattern), repeats)
    as_gemm = paired.paired(lambda: gemm(columns, matrix, out), run, repeats)
    indices = sum(leaf.nbytes for leaf in jax.tree.leaves(pattern))
    moved = x.dtype.itemsize * (4.0 * x.size + 3.0 * pattern.nnz) + 2 * indices
    return {
        **paired.row(warm, cold, 6.0 * pixels * pattern.nnz, moved),
        "dense_gflops": round(6e-9 * pixels * kernel.size / warm.dense, 1),
        "forward_ratio": round(alone.ratio, 2),
        "forward_ms": round(alone.sparse * 1e3, 4),
        "gemm_ratio": round(as_gemm.ratio, 2),
    }


def cases(repeats: int) -> paired.Cases:
    """Every layer x sparsity."""
    for kind, layers in zip(KINDS, (LAYERS, IN_BFLOAT16), strict=True):
        for layer in layers:
            sizes = layer._asdict()
            del sizes["sparsities"]
            for sparsity in layer.sparsities:
                identity = {**sizes, "kind": kind, "sparsity": sparsity}
                yield identity, functools.partial(measure, layer, kind, sparsity, repeats)


if __name__ == "__main__":
    paired.main("conv", "Sparse convolutions against XLA's dense convolution.", cases, repeats=7)
