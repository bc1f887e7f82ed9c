"""y = x @ W for a W of whole tiles as a Pallas kernel for TPUs, without intermediate arrays in main memory.

The plain XLA form (`block.matmul`) writes the gathered blocks of x and the products of all tiles to memory and reads
them back. Here the row and column of a tile are prefetched scalars, which select what the next grid step loads, and a
column of tiles is summed in VMEM. It was not measured on a device. It is tested against `block.matmul` in Pallas'
interpret mode, in which it also runs where there is no TPU.
"""

from __future__ import annotations

import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from rigl_jax import checks
from rigl_jax.execution.kernels import arrays, block
from rigl_jax.execution.kernels.block import BlockPattern
from rigl_jax.messages import shown

Array = jax.Array
ROWS = 128  # batch rows to a grid step
SIDE = 128  # sides of tiles, also transposed, are axes of blocks, which must fill the TPU's lanes


def matmul(x: Array, values: Array, pattern: BlockPattern, *, rows: int = ROWS, interpret: bool | None = None) -> Array:
    """x[..., in] @ W -> [..., out], as `block.matmul`, with gradients in x and values.

    Args:
      x: floating [..., in].
      values: floating [pattern.nnz].
      pattern: from `make_block_pattern`; on a TPU both sides of its tiles must be multiples of 128.
      rows: batch rows worked on at a time, on a TPU a multiple of 8; the batch is padded to a multiple of it.
      interpret: run the steps of the kernel as ordinary JAX. Default: where the backend is not a TPU.

    Raises:
      ValueError: sizes that do not fit the pattern, or that the compiler for TPUs does not accept.

    Inside `jax.shard_map` it needs `check_vma=False`, as Pallas kernels do.

    Example:
      pattern = make_block_pattern(mask, (128, 128))
      y = pallas.matmul(x, gather(kernel, pattern), pattern)
    """
    arrays.check_operands("pallas matmul", x, values, inputs=pattern.shape[0], nnz=pattern.nnz)
    interpret = jax.default_backend() != "tpu" if interpret is None else interpret
    if not checks.is_whole(rows, 1) or not (interpret or rows % 8 == 0):
        raise ValueError(f"pallas matmul: rows must be at least 1, on a TPU a multiple of 8, got {shown(rows)}")
    if not interpret and any(side % SIDE for side in pattern.tile):
        raise ValueError(f"pallas matmul: on a TPU tiles must have sides of multiples of {SIDE}, got {pattern.tile}")
    dtype = jnp.result_type(x, values)
    flat = x.reshape(-1, x.shape[-1]).astype(dtype)
    rows = min(checks.plain(rows), max(8, flat.shape[0]))
    padded = jnp.pad(flat, ((0, -flat.shape[0] % rows), (0, 0)))
    tiles = block.tiles_of(values.astype(dtype), pattern)
    y = _product(padded, tiles, block.inside(pattern), rows, interpret)[: flat.shape[0]]
    return y.reshape(*x.shape[:-1], pattern.shape[1])


@functools.partial(jax.custom_vjp, nondiff_argnums=(3, 4))
def _product(x: Array, tiles: Array, pattern: BlockPattern, rows: int, interpret: bool) -> Array:
    return _gathered(x, tiles, pattern.rows, pattern.columns, pattern.shape[1], rows, interpret)


def _forward(x: Array, tiles: Array, pattern: BlockPattern, rows: int, interpret: bool) -> tuple[Array, Any]:
    return _product(x, tiles, pattern, rows, interpret), (x, tiles, pattern)


def _backward(rows: int, interpret: bool, kept: Any, dy: Array) -> tuple[Array, Array, None]:
    x, tiles, pattern = kept
    order = jnp.argsort(pattern.rows, stable=True)  # sorts the tiles of the transposed weight by its columns of tiles
    flipped = tiles.swapaxes(1, 2)[order]
    dx = _gathered(dy, flipped, pattern.columns[order], pattern.rows[order], pattern.shape[0], rows, interpret)
    return dx, _outer(x, dy, pattern, tiles.dtype, rows, interpret), None


_product.defvjp(_forward, _backward)


def _gathered(
    x: Array, tiles: Array, sources: Array, targets: Array, outputs: int, rows: int, interpret: bool
) -> Array:
    """Sum over tiles t of x[:, block sources[t]] @ tiles[t] into column block targets[t], ascending in targets."""
    count, height, width = tiles.shape
    if count == 0:
        return jnp.zeros((x.shape[0], outputs), x.dtype)

    def kernel(sources: Any, targets: Any, x_ref: Any, tile_ref: Any, zeros_ref: Any, y_ref: Any, sum_ref: Any) -> None:
        del sources, zeros_ref
        t = pl.program_id(1)
        first = (t == 0) | (targets[t] != targets[jnp.maximum(t - 1, 0)])
        last = (t == count - 1) | (targets[t] != targets[jnp.minimum(t + 1, count - 1)])

        @pl.when(first)
        def _() -> None:
            sum_ref[...] = jnp.zeros_like(sum_ref)

        sum_ref[...] += jnp.dot(x_ref[...], tile_ref[0], preferred_element_type=jnp.float32)

        @pl.when(last)
        def _() -> None:
            y_ref[...] = sum_ref[...].astype(y_ref.dtype)

    at_target = pl.BlockSpec((rows, width), lambda b, t, sources, targets: (b, targets[t]))
    grid = pltpu.PrefetchScalarGridSpec(
        num_scalar_prefetch=2,
        grid=(x.shape[0] // rows, count),
        in_specs=[
            pl.BlockSpec((rows, height), lambda b, t, sources, targets: (b, sources[t])),
            pl.BlockSpec((1, height, width), lambda b, t, sources, targets: (t, 0, 0)),
            pl.BlockSpec(memory_space=pl.ANY),
        ],
        out_specs=at_target,
        scratch_shapes=[pltpu.VMEM((rows, width), jnp.float32)],
    )
    zeros = jnp.zeros((x.shape[0], outputs), x.dtype)  # aliased to the result: columns without a tile stay 0
    call = pl.pallas_call(
        kernel,
        grid_spec=grid,
        out_shape=jax.ShapeDtypeStruct(zeros.shape, zeros.dtype),
        input_output_aliases={4: 0},
        interpret=interpret,
    )
    return call(sources, targets, x, tiles, zeros)


def _outer(x: Array, dy: Array, pattern: BlockPattern, dtype: Any, rows: int, interpret: bool) -> Array:
    """The gradient of every tile: x[:, its rows].T @ dy[:, its columns], summed over the batch."""
    height, width = pattern.tile
    count, steps = pattern.rows.shape[0], x.shape[0] // rows
    if count == 0:
        return jnp.zeros((0, height, width), dtype)

    def kernel(sources: Any, targets: Any, x_ref: Any, dy_ref: Any, tile_ref: Any, sum_ref: Any) -> None:
        del sources, targets
        step = pl.program_id(1)

        @pl.when(step == 0)
        def _() -> None:
            sum_ref[...] = jnp.zeros_like(sum_ref)

        sum_ref[...] += jnp.dot(x_ref[...].T, dy_ref[...], preferred_element_type=jnp.float32)

        @pl.when(step == steps - 1)
        def _() -> None:
            tile_ref[0] = sum_ref[...].astype(tile_ref.dtype)

    grid = pltpu.PrefetchScalarGridSpec(
        num_scalar_prefetch=2,
        grid=(count, steps),
        in_specs=[
            pl.BlockSpec((rows, height), lambda t, b, sources, targets: (b, sources[t])),
            pl.BlockSpec((rows, width), lambda t, b, sources, targets: (b, targets[t])),
        ],
        out_specs=pl.BlockSpec((1, height, width), lambda t, b, sources, targets: (t, 0, 0)),
        scratch_shapes=[pltpu.VMEM((height, width), jnp.float32)],
    )
    out_shape = jax.ShapeDtypeStruct((count, height, width), dtype)
    return pl.pallas_call(kernel, grid_spec=grid, out_shape=out_shape, interpret=interpret)(
        pattern.rows, pattern.columns, x, dy
    )
