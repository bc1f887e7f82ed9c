"""y = x @ W for a W of whole tiles on NVIDIA's tensor cores (Hopper), as Mosaic GPU kernels; plain XLA elsewhere.

Three kernels, one for each product of `bilinear`: y, the gradient of x, the gradient of the values. Each block of a
result is one sum of products of tiles, whose number is read from the pattern: the next tiles are loaded while the
tensor cores multiply, sums are in registers, and no intermediate array exists. A column (or row) without tiles is
written as zeros. Tiles are stored once; the gradient of x reads them transposed.

In bfloat16 and float16, tiles of 64 or 128. In float32 the tensor cores round operands to tf32 (10 bits of mantissa)
and cannot transpose them, so XLA first makes transposed copies: of the tiles for y, of x and dy for the gradient of the
values. A `TilePattern` holds what the kernels read beside a `BlockPattern`; make it once for each pattern.

The kernels compile for an H100, and are tested in Pallas' interpreter against NumPy. They were not run on a GPU.
"""

from __future__ import annotations

import dataclasses
import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl

from rigl_jax.execution.kernels import arrays, block
from rigl_jax.execution.kernels.bilinear import Kind, bilinear
from rigl_jax.execution.kernels.block import BlockPattern
from rigl_jax.execution.kernels.families import clear_padding

Array = jax.Array
SIDES = (64, 128)
DTYPES = ("bfloat16", "float16", "float32")
SHARED = 226 << 10  # bytes of shared memory that a block may use, less a few for barriers
MOST_STAGES = 4


@functools.partial(
    jax.tree_util.register_dataclass,
    data_fields=["tiles", "starts", "order", "columns_t", "starts_t"],
    meta_fields=[],
)
@dataclasses.dataclass(frozen=True)
class TilePattern:
    """A `BlockPattern`, and its tiles by row.

    Attributes:
      tiles: the pattern.
      starts: int32[columns of tiles + 1], where the tiles of a column start.
      order: int32[tiles], the tile that comes k-th when they are sorted by row.
      columns_t: int32[tiles], the column of that tile.
      starts_t: int32[rows of tiles + 1], where the tiles of a row start in that order.
    """

    tiles: BlockPattern
    starts: Array
    order: Array
    columns_t: Array
    starts_t: Array


def tile_pattern(pattern: BlockPattern) -> TilePattern:
    """The pattern with what the kernels read. Works under jit.

    >>> import numpy as np
    >>> pattern = block.make_block_pattern(np.kron([[0, 1], [1, 1]], np.ones((2, 2))).astype(bool), (2, 2))
    >>> tile_pattern(pattern).starts.tolist(), tile_pattern(pattern).order.tolist()
    ([0, 1, 3], [1, 0, 2])
    """
    down, across = pattern.grid
    order = jnp.argsort(pattern.rows, stable=True).astype(jnp.int32)
    starts = jnp.searchsorted(pattern.columns, jnp.arange(across + 1), side="left")
    starts_t = jnp.searchsorted(pattern.rows[order], jnp.arange(down + 1), side="left")
    found = (starts.astype(jnp.int32), order, pattern.columns[order], starts_t.astype(jnp.int32))
    return TilePattern(pattern, *found)


def matmul(x: Array, values: Array, pattern: BlockPattern | TilePattern, *, transpose: bool = False) -> Array:
    """x[..., in] @ W -> [..., out], or x[..., out] @ W.T -> [..., in], as `block.matmul`; derivatives of any order.

    On Hopper GPUs by the kernels of this module where they take the tiles and the dtype, elsewhere in plain XLA. Sums
    are in float32; the result has the promoted dtype.

    Args:
      x: floating [..., in]. The batch is filled up to a multiple of 64 or 128.
      values: floating [pattern.nnz].
      pattern: from `tile_pattern`; of a `BlockPattern` it is made in each call.
      transpose: multiply with W.T.

    Raises:
      ValueError: sizes that do not fit the pattern.

    Example:
      pattern = tile_pattern(make_block_pattern(mask, (128, 128)))
      y = mosaic.matmul(x, gather(kernel, pattern.tiles), pattern)
    """
    if isinstance(pattern, BlockPattern):
        pattern = tile_pattern(pattern)
    tiles = pattern.tiles
    inputs, outputs = tiles.shape[::-1] if transpose else tiles.shape
    block.check_sizes("mosaic matmul", tiles)
    arrays.check_operands("mosaic matmul", x, values, inputs=inputs, nnz=tiles.nnz)
    dtype = jnp.result_type(x, values)
    product = _product.transposed if transpose else _product
    y = product(x.reshape(-1, inputs).astype(dtype), values.astype(dtype), pattern, None)
    return y.reshape(*x.shape[:-1], outputs)


def _shape(kind: Kind, a: tuple[int, ...], b: tuple[int, ...], pattern: TilePattern, options: Any) -> tuple[int, ...]:
    del b, options
    inputs, outputs = pattern.tiles.shape
    return {"forward": (a[0], outputs), "input_gradient": (a[0], inputs), "values_gradient": (pattern.tiles.nnz,)}[kind]


def _plain(kind: Kind, a: Array, b: Array, pattern: TilePattern, options: Any) -> Array:
    """The product in plain XLA."""
    del options
    tiles = pattern.tiles
    if kind != "values_gradient":
        return block.matmul(a, b, tiles, transpose=kind == "input_gradient")
    (down, across), (height, width), at = tiles.grid, tiles.tile, block.inside(tiles)
    x, dy = a.reshape(-1, down, height)[:, at.rows], b.reshape(-1, across, width)[:, at.columns]
    total = jnp.promote_types(a.dtype, jnp.float32)
    # XLA on CPUs has no such product of bfloat16.
    products = jnp.einsum("bth,btw->thw", x.astype(total), dy.astype(total)).astype(a.dtype)
    return clear_padding(products.reshape(-1), tiles)


def takes(pattern: BlockPattern, dtype: Any, batch: int) -> bool:
    """Whether the kernels take such operands; otherwise a product is made in plain XLA."""
    return all(side in SIDES for side in pattern.tile) and str(dtype) in DTYPES and 0 not in (batch, pattern.nnz)


def _on_hopper() -> bool:
    """Whether the GPUs are of the generation that the kernels are written for."""
    try:
        return all(device.compute_capability == "9.0" for device in jax.devices("cuda"))
    except RuntimeError:  # none is here: the program is compiled for another machine
        return True


def _run_cuda(kind: Kind, a: Array, b: Array, pattern: TilePattern, options: Any) -> Array:
    if not (takes(pattern.tiles, a.dtype, a.shape[0]) and _on_hopper()):
        return _plain(kind, a, b, pattern, options)
    return run(kind, a, b, pattern)


def run(kind: Kind, a: Array, b: Array, pattern: TilePattern, *, interpret: Any = None) -> Array:
    """The product `kind` of `bilinear` by its kernel; `interpret`: Pallas' parameters for interpreting it."""
    tiles = pattern.tiles
    size = a.shape[0]
    rows = 128 if size > 64 and a.dtype.itemsize == 2 else 64
    a = jnp.pad(a, ((0, -size % rows), (0, 0)))
    if kind == "values_gradient":
        b = jnp.pad(b, ((0, -size % rows), (0, 0)))
        return clear_padding(_values_gradient(a, b, pattern, interpret).reshape(-1), tiles)
    stack = b.reshape(-1, *tiles.tile)
    make = _forward if kind == "forward" else _input_gradient
    return make(a, stack, pattern, rows, interpret)[:size]


_product = bilinear("rigl_tile_matmul", _shape, _plain, _plain)
_product.lowered_by(_run_cuda, "cuda")


class _Operand(NamedTuple):
    """What one side of the products reads: an array, the blocks of it that a step takes, and how they lie."""

    array: Array
    block: tuple[Any, ...]
    flip: bool  # whether a block is transposed before it is multiplied


def _forward(x: Array, tiles: Array, pattern: TilePattern, rows: int, interpret: Any) -> Array:
    height, width = tiles.shape[1:]
    short = tiles.dtype.itemsize == 2
    stored = tiles if short else tiles.swapaxes(1, 2)
    right = _Operand(stored, (None, *stored.shape[1:]), not short)

    def steps(at: tuple[Any, Any], starts: Any, sources: Any) -> Any:
        first, count = _range(starts, at[1], len(tiles))
        return (
            count,
            lambda k: (at[0], sources[first + k]),
            lambda k: (first + k, 0, 0),
        )

    out = jax.ShapeDtypeStruct((x.shape[0], pattern.tiles.shape[1]), x.dtype)
    left = _Operand(x, (rows, height), False)
    return _summed(left, right, (pattern.starts, pattern.tiles.rows), steps, out, (rows, width), interpret)


def _input_gradient(dy: Array, tiles: Array, pattern: TilePattern, rows: int, interpret: Any) -> Array:
    height, width = tiles.shape[1:]

    def steps(at: tuple[Any, Any], starts: Any, order: Any, columns: Any) -> Any:
        first, count = _range(starts, at[1], len(tiles))
        return (
            count,
            lambda k: (at[0], columns[first + k]),
            lambda k: (order[first + k], 0, 0),
        )

    out = jax.ShapeDtypeStruct((dy.shape[0], pattern.tiles.shape[0]), dy.dtype)
    left, right = _Operand(dy, (rows, width), False), _Operand(tiles, (None, height, width), True)
    index = (pattern.starts_t, pattern.order, pattern.columns_t)
    return _summed(left, right, index, steps, out, (rows, height), interpret)


def _values_gradient(x: Array, dy: Array, pattern: TilePattern, interpret: Any) -> Array:
    (height, width), count = pattern.tiles.tile, pattern.tiles.rows.shape[0]
    rows = 64
    short = x.dtype.itemsize == 2
    if short:
        left, right = _Operand(x, (rows, height), True), _Operand(dy, (rows, width), False)
    else:
        left, right = _Operand(x.T, (height, rows), False), _Operand(dy.T, (width, rows), True)
    place = lambda k, at: (k, at) if short else (at, k)  # noqa: E731

    def steps(at: tuple[Any, Any], sources: Any, targets: Any) -> Any:
        source, target = sources[at[1]], targets[at[1]]
        return x.shape[0] // rows, lambda k: place(k, source), lambda k: place(k, target)

    # Tile t is rows t * height and on of one tall matrix.
    out = jax.ShapeDtypeStruct((count * height, width), x.dtype)
    at = block.inside(pattern.tiles)
    index = (at.rows, at.columns)
    return _summed(left, right, index, steps, out, (height, width), interpret, tall=True)


def _range(starts: Any, of: Any, count: int) -> tuple[Any, Any]:
    """The first tile of a column or row, and how many it has; within the arrays, whatever an invalid pattern holds.

    Blocks that an invalid pattern places outside of a matrix are loaded as zeros by the hardware.
    """
    first, end = (jnp.clip(starts[i], 0, count) for i in (of, of + 1))
    return first, end - first


def _laid_out(minor: int, itemsize: int) -> tuple[Any, ...]:
    """How a block lies in shared memory, so that tensor cores read it: from the size of its last axis."""
    from jax.experimental.pallas import mosaic_gpu as plgpu

    swizzle = plgpu.find_swizzle(minor * itemsize * 8)
    return plgpu.TilingTransform((8, swizzle // itemsize)), plgpu.SwizzleTransform(swizzle)


def _summed(
    left: _Operand,
    right: _Operand,
    index: tuple[Array, ...],
    steps: Any,
    out: jax.ShapeDtypeStruct,
    result: tuple[int, int],
    interpret: Any,
    *,
    tall: bool = False,
) -> Array:
    """Each block of `out` as a sum of products of blocks.

    Args:
      left: blocks of `result[0]` rows, as they are multiplied.
      right: blocks of `result[1]` columns, as they are multiplied.
      index: int32 arrays in main memory.
      steps: `((row, column of the block of out), *index) -> (number of products, block of left, block of right)`, the
        last two functions of the number of the product.
      out: the result.
      result: shape of a block of it.
      interpret: see `run`.
      tall: `out` is one column of blocks, and the number of a block is its second coordinate.
    """
    from jax.experimental.pallas import mosaic_gpu as plgpu  # not in every build of jaxlib

    n_index, itemsize = len(index), out.dtype.itemsize
    grid = (1, out.shape[0] // result[0]) if tall else (out.shape[0] // result[0], out.shape[1] // result[1])

    def spec(operand: _Operand, at: Any) -> Any:
        return plgpu.BlockSpec(operand.block, at, delay_release=1, transforms=_laid_out(operand.block[-1], itemsize))

    loaded = sum(itemsize * operand.block[-2] * operand.block[-1] for operand in (left, right))
    stages = min(MOST_STAGES, (SHARED - itemsize * result[0] * result[1]) // loaded)

    def kernel(left_ref: Any, right_ref: Any, *refs: Any) -> None:
        at, out_ref = (lax.axis_index("i"), lax.axis_index("j")), refs[n_index]
        count, left_at, right_at = steps(at, *refs[:n_index])

        def accumulated(total: Any) -> Any:
            def step(_: Any, a: Any, b: Any) -> None:
                a, b = (s.transpose((1, 0)) if o.flip else s for s, o in ((a, left), (b, right)))
                plgpu.wgmma(total, a, b)
                plgpu.wgmma_wait(1)  # the product before is done, and what it read may be overwritten

            @pl.when(count > 0)
            def _() -> None:
                specs = [spec(left, left_at), spec(right, right_at)]
                pipeline = plgpu.emit_pipeline(step, grid=(count,), in_specs=specs, max_concurrent_steps=stages)
                pipeline(left_ref, right_ref)

            return total[...]

        total = pl.run_scoped(accumulated, plgpu.ACC(result))

        def write(shared: Any) -> None:
            shared[...] = total.astype(shared.dtype)
            plgpu.commit_smem()
            row, column = (at[1], 0) if tall else at
            place = pl.ds(row * result[0], result[0]), pl.ds(column * result[1], result[1])
            plgpu.copy_smem_to_gmem(shared, out_ref.at[place])
            plgpu.wait_smem_to_gmem(0, wait_read_only=True)

        pl.run_scoped(write, plgpu.SMEM(result, dtype=out.dtype, transforms=_laid_out(result[1], itemsize)))

    parameters = plgpu.CompilerParams(lowering_semantics=plgpu.LoweringSemantics.Warpgroup)
    call = plgpu.kernel(
        kernel, out_type=out, grid=grid, grid_names=("i", "j"), compiler_params=parameters, interpret=interpret
    )
    return call(left.array, right.array, *index)
