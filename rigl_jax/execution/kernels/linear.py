"""y = x @ W for a sparse W: native kernels on CPUs and NVIDIA's GPUs, plain JAX elsewhere, one differentiable function.

The native kernels read activations in tiles of 64 batch rows, feature-major, so that one weight is multiplied by 64
contiguous numbers. `rigl_tile` makes the tiles; the products write row-major results. In one compiled program x and dy
are tiled once for all products that need them, because XLA merges equal calls.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np

from rigl_jax import native
from rigl_jax.execution.kernels import arrays, cuda, reference
from rigl_jax.execution.kernels.bilinear import Kind, bilinear
from rigl_jax.execution.kernels.pattern import Pattern, check_sizes

Array = jax.Array
TILE = 64  # TILE in native/kernels.h


def matmul(x: Array, values: Array, pattern: Pattern, *, transpose: bool = False, level: str = "auto") -> Array:
    """x[..., in] @ W -> [..., out], with W[in, out] given by its values in storage order.

    Differentiable in x and values, any number of times and in both modes; `vmap` becomes one product. Sums are in f32
    for every dtype; the result has the promoted dtype of x and values.

    Args:
      x: floating, last axis `pattern.rows`.
      values: floating [pattern.nnz].
      pattern: from `make_pattern`.
      transpose: x[..., out] @ W.T -> [..., in] instead.
      level: "auto"; "jax" for the fallback; "cuda" for the kernels on GPUs also where they are not expected to be
        faster than a dense product; or the name of an instruction-set level, for tests.

    Raises:
      ValueError: sizes that do not fit the pattern, or an unknown level.

    Example:
      pattern = make_pattern(mask)
      y = matmul(x, gather(kernel, pattern), pattern)
    """
    check_sizes("matmul", pattern)
    inputs, outputs = (pattern.shape[-1], pattern.rows) if transpose else (pattern.rows, pattern.shape[-1])
    arrays.check_operands("matmul", x, values, inputs=inputs, nnz=pattern.nnz)
    if level not in ("jax", "cuda"):
        native.level_number(level)
    dtype = jnp.result_type(x, values)
    product = _product.transposed if transpose else _product
    y = product(x.astype(dtype).reshape(-1, inputs), values.astype(dtype), pattern, level)
    return y.reshape(*x.shape[:-1], outputs)


def _shape(kind: Kind, a: tuple[int, ...], b: tuple[int, ...], pattern: Pattern, level: str) -> tuple[int, ...]:
    del b, level
    return {
        "forward": (a[0], pattern.shape[-1]),
        "input_gradient": (a[0], pattern.rows),
        "values_gradient": (pattern.nnz,),
    }[kind]


def _run_cpu(kind: Kind, a: Array, b: Array, pattern: Pattern, level: str) -> Array:
    served = native.library() is not None and level != "jax" and a.dtype.itemsize <= 4
    if not served or 0 in (pattern.nnz, *a.shape):
        return reference.run_cpu(kind, a, b, pattern, level)
    level = "auto" if level == "cuda" else level
    number = native.level_number(level)
    if _multiplies_halves(a, b, level):
        return _HALVES[kind](a, b, pattern, number).astype(a.dtype)
    if kind == "values_gradient":
        b = _readable(b)
    elif not (kind == "forward" and a.shape[0] == 1 and b.dtype == jnp.bfloat16):  # which is read as it is
        b = b.astype(jnp.float32)
    return _FLOATS[kind](_readable(a), b, pattern, number).astype(a.dtype)


def _readable(x: Array) -> Array:
    """Activations in a dtype that the kernels read: float32, or bfloat16 where there are several rows."""
    return x if x.dtype == jnp.bfloat16 and x.shape[0] > 1 else x.astype(jnp.float32)


def _multiplies_halves(a: Array, b: Array, level: str) -> bool:
    """Whether products are taken in bfloat16, with sums in float32.

    They are if the level has instructions for it, and tiles, which are whole then, hold at most 1.3 times the batch.
    At 4/3 times the batch y is still faster than in float32, but the gradient of the values is not.
    """
    batch = a.shape[0]
    whole = -(-batch // TILE) * TILE <= 1.3 * batch
    return native.multiplies_halves(level) and whole and a.dtype == b.dtype == jnp.bfloat16


_product = bilinear("rigl_sparse_matmul", _shape, reference.run, _run_cpu)
_product.lowered_by(cuda.run_cuda, "cuda")


def _tiled(x: Array, level: np.int64) -> Array:
    """x[batch, features] in tiles; a batch of one row is one tile."""
    batch, features = x.shape
    if batch == 1:
        return x.reshape(-1)
    # The last tile is padded to whole vectors of the level, of at most 16 floats.
    room = batch // TILE * TILE + -(-(batch % TILE) // 16) * 16
    return native.call("rigl_tile", (room * features,), x, level=level)


def _forward(x: Array, values: Array, p: Pattern, level: np.int64) -> Array:
    attributes = {"rows": p.rows, "height": p.height, "block": p.block, "level": level}
    shape = (x.shape[0], p.shape[-1])
    return native.call("rigl_gather", shape, _tiled(x, level), values, p.indices, p.starts, dtype=x.dtype, **attributes)


def _input_gradient(dy: Array, values: Array, p: Pattern, level: np.int64) -> Array:
    shape, tiles = (dy.shape[0], p.rows), _tiled(dy, level)
    if p.height > 1:
        attributes = {"outputs": p.shape[-1], "height": p.height, "block": p.block, "level": level}
        return native.call("rigl_scatter", shape, tiles, values, p.indices, p.starts, dtype=dy.dtype, **attributes)
    attributes = {"rows": p.shape[-1], "block": p.block_t, "level": level}
    index = p.order_t, p.indices_t, p.starts_t
    return native.call("rigl_gather_ordered", shape, tiles, values, *index, dtype=dy.dtype, **attributes)


def _values_gradient(x: Array, dy: Array, p: Pattern, level: np.int64) -> Array:
    sizes = {"batch": x.shape[0], "rows": p.rows, "outputs": p.shape[-1]}
    attributes = {**sizes, "height": p.height, "block": p.block, "level": level}
    return native.call("rigl_dots", (p.nnz,), _tiled(x, level), _tiled(dy, level), p.indices, p.starts, **attributes)


_FLOATS = {"forward": _forward, "input_gradient": _input_gradient, "values_gradient": _values_gradient}
"""The products by kind, in float32."""


def _half_tiled(x: Array, level: np.int64) -> Array:
    room = -(-x.shape[0] // TILE) * TILE
    return native.call("rigl_half_tile", (room * x.shape[1],), x, dtype=np.uint16, level=level)


def _half_forward(x: Array, values: Array, p: Pattern, level: np.int64) -> Array:
    shape, tiles = (x.shape[0], p.shape[-1]), _half_tiled(x, level)
    attributes = {"rows": p.rows, "height": p.height, "block": p.block, "level": level}
    return native.call("rigl_half_gather", shape, tiles, values, p.indices, p.starts, dtype=x.dtype, **attributes)


def _half_input_gradient(dy: Array, values: Array, p: Pattern, level: np.int64) -> Array:
    shape, tiles = (dy.shape[0], p.rows), _half_tiled(dy, level)
    if p.height > 1:
        attributes = {"outputs": p.shape[-1], "height": p.height, "block": p.block, "level": level}
        return native.call("rigl_half_scatter", shape, tiles, values, p.indices, p.starts, dtype=dy.dtype, **attributes)
    attributes = {"rows": p.shape[-1], "block": p.block_t, "level": level}
    index = p.order_t, p.indices_t, p.starts_t
    return native.call("rigl_half_gather_ordered", shape, tiles, values, *index, dtype=dy.dtype, **attributes)


def _half_values_gradient(x: Array, dy: Array, p: Pattern, level: np.int64) -> Array:
    operands = _half_tiled(x, level), _half_tiled(dy, level), p.indices, p.starts
    sizes = {"batch": x.shape[0], "rows": p.rows, "outputs": p.shape[-1]}
    return native.call("rigl_half_dots", (p.nnz,), *operands, **sizes, height=p.height, block=p.block, level=level)


_HALVES = {"forward": _half_forward, "input_gradient": _half_input_gradient, "values_gradient": _half_values_gradient}
"""The products by kind, in bfloat16 with sums in float32."""
