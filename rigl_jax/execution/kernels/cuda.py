"""y = x @ W for single weights or runs of 16 on NVIDIA's GPUs, by the kernels of native/src/cuda.

Activations are handed over feature-major, so that a gathered input is contiguous over the batch; XLA transposes them,
once for all products of a program that read them. Sums are in f32, in the same order in every call. The kernels use
no tensor cores, so where weights are not sparse enough a dense product is faster. `pays` says where they are used. Its
bounds are predicted from the bandwidths of an H100; nothing was measured.
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp

from rigl_jax.execution.kernels import reference
from rigl_jax.execution.kernels.bilinear import Kind
from rigl_jax.execution.kernels.pattern import Pattern
from rigl_jax.native import cuda

Array = jax.Array
DTYPES = ("float32", "bfloat16")
HEIGHTS = (1, 16)
MOST_EXAMPLES = 65535 * 128
# Up to which density a product is predicted to be faster than a dense one, by (height, how the dense one is computed).
BREAK_EVEN = {
    (1, "bf16"): 0.01,
    (1, "tf32"): 0.025,
    (1, "f32"): 0.15,
    (16, "bf16"): 0.04,
    (16, "tf32"): 0.08,
    (16, "f32"): 0.5,
}


def takes(pattern: Pattern, dtype: Any, a: tuple[int, ...]) -> bool:
    """Whether the kernels take such a pattern, dtype and first operand."""
    plain = pattern.taps == 1 and pattern.height in HEIGHTS and str(dtype) in DTYPES
    return plain and 0 not in (pattern.nnz, *a) and a[0] <= MOST_EXAMPLES


def pays(kind: Kind, pattern: Pattern, dtype: Any, batch: int) -> bool:
    """Whether a product is predicted to be faster by these kernels than by a dense product.

    One example is limited by the bytes of the weight, for which sparsity pays early; where W is not to be made dense at
    all, plain JAX adds entry by entry.
    """
    if pattern.rows * pattern.shape[-1] > reference.DENSE_LIMIT or (batch == 1 and kind == "forward"):
        return True
    density = pattern.nnz / (pattern.rows * pattern.shape[-1])
    config: Any = jax.config
    precision = str(config.jax_default_matmul_precision)
    how = "bf16" if dtype == jnp.bfloat16 else "f32" if precision in ("highest", "float32") else "tf32"
    return density <= BREAK_EVEN[pattern.height, how]


def run_cuda(kind: Kind, a: Array, b: Array, pattern: Pattern, level: str) -> Array:
    """The product `kind` where a program is lowered for CUDA. See `bilinear`."""
    served = level != "jax" and cuda.serves() and takes(pattern, a.dtype, a.shape)
    if served and (level == "cuda" or pays(kind, pattern, a.dtype, a.shape[0])):
        return run(kind, a, b, pattern)
    return reference.run(kind, a, b, pattern, level)


def run(kind: Kind, a: Array, b: Array, p: Pattern) -> Array:
    """The product `kind` by a kernel."""
    sizes = {"height": p.height, "block": p.block}
    if kind == "values_gradient":
        return cuda.product("rigl_cuda_dots", (p.nnz,), jnp.float32, a.T, b.T, p.indices, p.starts, **sizes).astype(
            a.dtype
        )
    shape = (a.shape[0], p.shape[-1] if kind == "forward" else p.rows)
    if kind == "forward":
        order = jnp.zeros(0, jnp.int32)
        return cuda.product("rigl_cuda_gather", shape, a.dtype, a.T, b, order, p.indices, p.starts, **sizes)
    if p.height > 1:
        return cuda.product("rigl_cuda_scatter", shape, a.dtype, a.T, b, p.indices, p.starts, **sizes)
    sizes["block"] = p.block_t
    return cuda.product("rigl_cuda_gather", shape, a.dtype, a.T, b, p.order_t, p.indices_t, p.starts_t, **sizes)
