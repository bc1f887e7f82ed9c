"""The same products in plain JAX: the fallback without native kernels, and the form for other platforms.

On the CPU, in f32 and for a pattern of one block, the products with W and with its transpose use jaxlib's CSR kernel.
(Its automatic derivative is ten times slower than a dense product, and is not used here.) Elsewhere W is made dense for
the call: accelerators gain nothing from unstructured sparsity below 99 %, so a dense product is the fastest correct
one. The gradient of the values is a dense product read at the entries. Weights too large to be dense are never formed:
their products gather columns and sum them, a slab of entries at a time.
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import sparse

from rigl_jax.execution.kernels import arrays
from rigl_jax.execution.kernels.bilinear import Kind, varying_alike
from rigl_jax.execution.kernels.moving import plain_gather, plain_scatter
from rigl_jax.execution.kernels.pattern import Pattern, coordinates, ends_sound

Array = jax.Array
DENSE_LIMIT = 1 << 26  # the largest weight, or gradient, that is made dense for a call: 256 MiB in f32
SLAB = 1 << 24  # products of gathered columns held at a time: 64 MiB in f32


def run(kind: Kind, a: Array, b: Array, pattern: Pattern, options: Any) -> Array:
    """The product `kind` on any platform. See `bilinear`."""
    del options
    if kind == "values_gradient":
        return _values_gradient(a, b, pattern)
    if pattern.rows * pattern.shape[-1] > DENSE_LIMIT:
        return _by_entries(kind, a, b, pattern)
    dense = plain_scatter(b, pattern).reshape(pattern.rows, -1)
    return _dot(a, dense if kind == "forward" else dense.T)


def run_cpu(kind: Kind, a: Array, b: Array, pattern: Pattern, options: Any) -> Array:
    """The product `kind` on the CPU, by jaxlib's CSR kernel where possible."""
    one_block = pattern.block >= pattern.rows and pattern.block_t >= pattern.units
    plain = a.dtype == jnp.float32 and pattern.height == 1 and pattern.nnz > 0
    if kind == "values_gradient" or not (one_block and plain):
        return run(kind, a, b, pattern, options)
    if kind == "forward":
        return _csr(b, pattern.indices, pattern.starts, (pattern.units, pattern.rows), a)
    return _csr(b[pattern.order_t], pattern.indices_t, pattern.starts_t, (pattern.rows, pattern.units), a)


def run_conv(kind: Kind, a: Array, b: Array, pattern: Pattern, options: Any) -> Array:
    """The product `kind` of a convolution, whose kernel is made dense for the call. See `conv`."""

    def dense_conv(x: Array, kernel: Array) -> Array:
        numbers = ("NHWC", "HWIO", "NHWC") if x.ndim == 4 else ("NDHWC", "DHWIO", "NDHWC")
        return jax.lax.conv_general_dilated(
            x,
            kernel,
            options.strides,
            options.padding,
            rhs_dilation=options.dilation,
            dimension_numbers=numbers,
            feature_group_count=options.groups,
        )

    if kind == "forward":
        return dense_conv(a, plain_scatter(b, pattern))
    # Each device transposes for itself, so the operand of the transposed function must vary over the mesh as the others
    # do. Otherwise JAX would sum the result over the devices, and `bilinear` already asks for that sum.
    if kind == "input_gradient":
        kernel = plain_scatter(b, pattern)
        image, *_ = varying_alike(
            jnp.zeros((a.shape[0], *options.image, pattern.shape[-2] * options.groups), a.dtype), a, kernel
        )
        return jax.linear_transpose(lambda x: dense_conv(x, kernel), image)(a)[0]
    kernel, *_ = varying_alike(jnp.zeros(pattern.shape, a.dtype), a, b)
    return plain_gather(jax.linear_transpose(lambda k: dense_conv(a, k), kernel)(b)[0], pattern)


def _csr(values: Array, indices: Array, starts: Array, shape: tuple[int, int], x: Array) -> Array:
    # jaxlib's kernel does not check indices, so they are clipped: it must not read outside of the arrays.
    n = indices.shape[0]
    values = arrays.intact(values, ends_sound(starts, indices))
    indices, starts = jnp.minimum(indices.astype(jnp.int32), shape[1] - 1), jnp.clip(starts, 0, n)
    matrix = sparse.BCSR((values, indices, starts), shape=shape)
    return (matrix @ x.T).T


def _dot(a: Array, b: Array) -> Array:
    return jax.lax.dot(a, b, preferred_element_type=jnp.promote_types(a.dtype, jnp.float32)).astype(a.dtype)


def _values_gradient(x: Array, dy: Array, pattern: Pattern) -> Array:
    if pattern.rows * pattern.shape[-1] <= DENSE_LIMIT:
        return plain_gather(_dot(x.T, dy).reshape(pattern.shape), pattern)
    rows, units = coordinates(pattern)
    columns, runs = x.T, dy.T.reshape(pattern.units, pattern.height, -1)

    def dots(entry: tuple[Array, Array]) -> Array:
        row, unit = entry
        return jnp.where(row < pattern.rows, runs[unit] @ columns[row], 0)  # 0 for padding

    return jax.lax.map(dots, (rows, units), batch_size=_slab(x, pattern)).reshape(-1)


def _by_entries(kind: Kind, a: Array, values: Array, pattern: Pattern) -> Array:
    """The product with W, or with its transpose, where W is too large to be dense."""
    total = jnp.promote_types(a.dtype, jnp.float32)
    rows, units = coordinates(pattern)
    runs = values.reshape(-1, pattern.height)
    n, size = len(runs), min(_slab(a, pattern), max(1, len(runs)))
    # What is added here has the value 0, and padding of the pattern lies outside of the sums: neither adds anything.
    slabs = [jnp.pad(x, [(0, -n % size)] + [(0, 0)] * (x.ndim - 1)) for x in (rows, units, runs)]
    slabs = [x.reshape(-1, size, *x.shape[1:]) for x in slabs]
    if kind == "forward":
        columns, shape = a.T.astype(total), (pattern.units, pattern.height, a.shape[0])
    else:
        columns, shape = a.T.astype(total).reshape(pattern.units, pattern.height, -1), (pattern.rows, a.shape[0])

    def add(sums: Array, slab: list[Array]) -> tuple[Array, None]:
        row, unit, run = slab
        if kind == "forward":
            return sums.at[unit].add(run[:, :, None] * columns[row][:, None, :]), None
        return sums.at[row].add(jnp.sum(run[:, :, None] * columns[unit], axis=1)), None

    start, *_ = varying_alike(jnp.zeros(shape, total), columns, *slabs)
    sums, _ = jax.lax.scan(add, start, slabs)
    return sums.reshape(-1, a.shape[0]).T.astype(a.dtype)


def _slab(x: Array, pattern: Pattern) -> int:
    return max(1, SLAB // max(1, x.shape[0] * pattern.height))
