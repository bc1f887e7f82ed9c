"""y = x @ W for a W of whole tiles (32 x 32 and the like), in plain XLA on any backend.

The blocks of x that the active tiles need are gathered, multiplied by the tiles in one batched product, and summed by
column of tiles. Nothing is padded, so the cost does not depend on how tiles are spread over the columns. Every step is
an XLA operation with its own derivative; the gradient of the values is one batched product too. On a CPU with the
native kernels, runs of 16 outputs (`pattern.make_pattern(mask, height=16)`) are faster for the same mask.
"""

from __future__ import annotations

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np

from rigl_jax import arguments as rules
from rigl_jax.arguments import arguments
from rigl_jax.execution.kernels import arrays

Array = jax.Array


@functools.partial(jax.tree_util.register_dataclass, data_fields=["rows", "columns"], meta_fields=["shape", "tile"])
@dataclasses.dataclass(frozen=True)
class BlockPattern:
    """Which tiles of a weight [in, out] are active, sorted by column of tiles.

    Attributes:
      rows: int32[tiles], the tile's row of tiles.
      columns: int32[tiles], its column of tiles, ascending.
      shape: (in, out) of the dense weight; static.
      tile: (height, width) of a tile; static.
    """

    rows: Array
    columns: Array
    shape: tuple[int, int]
    tile: tuple[int, int]

    @property
    def nnz(self) -> int:
        """Number of values: tiles * height * width."""
        return self.rows.shape[0] * self.tile[0] * self.tile[1]

    @property
    def grid(self) -> tuple[int, int]:
        """Rows and columns of tiles."""
        return self.shape[0] // self.tile[0], self.shape[1] // self.tile[1]


@arguments(mask=rules.host_array(), tile=rules.pair)
def make_block_pattern(mask: np.ndarray, tile: tuple[int, int] = (32, 32)) -> BlockPattern:
    """The pattern of a mask bool[in, out] made of whole tiles, on the host.

    Raises:
      ValueError: another rank, a shape that the tile does not divide, or a mask that cuts a tile.

    >>> make_block_pattern(np.ones((4, 6), bool), (2, 3)).grid
    (2, 2)
    """
    mask = np.asarray(mask, dtype=bool)
    if min(tile) < 1 or mask.ndim != 2 or mask.shape[0] % tile[0] or mask.shape[1] % tile[1]:
        raise ValueError(f"make_block_pattern: mask must have shape (in, out) in whole tiles {tile}, got {mask.shape}")
    grid = mask.reshape(mask.shape[0] // tile[0], tile[0], mask.shape[1] // tile[1], tile[1])
    active = grid[:, 0, :, 0]
    if not (grid == active[:, None, :, None]).all():
        raise ValueError(f"make_block_pattern: mask must be made of whole tiles {tile}; some are cut")
    columns, rows = np.nonzero(active.T)
    shape = (mask.shape[0], mask.shape[1])
    return BlockPattern(jnp.asarray(rows, jnp.int32), jnp.asarray(columns, jnp.int32), shape, (tile[0], tile[1]))


def check_sizes(who: str, pattern: BlockPattern) -> None:
    """ValueError if the arrays of a pattern do not have the sizes that its static fields imply. Works under jit."""
    shape, tile = pattern.shape, pattern.tile
    if len(shape) != 2 or len(tile) != 2 or min(tile) < 1 or shape[0] % tile[0] or shape[1] % tile[1]:
        raise ValueError(f"{who}: shape of the BlockPattern must be whole tiles {tile}, got {shape}")
    tiles = np.shape(pattern.rows)[:1]
    arrays.expect(who, pattern, rows=(np.int32, tiles), columns=(np.int32, tiles))


def check_content(who: str, pattern: BlockPattern) -> None:
    """ValueError if tiles are outside of the weight, repeated, or out of order. Accepts traced arrays."""
    check_sizes(who, pattern)
    given = arrays.host(pattern.rows, pattern.columns)
    if given is None or not given[0].size:
        return
    (rows, columns), (down, across) = given, pattern.grid
    place = columns * np.int64(down) + rows
    inside = rows.min() >= 0 and rows.max() < down and columns.min() >= 0 and columns.max() < across
    if not (inside and (place[1:] > place[:-1]).all()):
        raise ValueError(f"{who}: the pattern must hold what make_block_pattern made, got other tiles ({arrays.HINT})")


def _intact(values: Array, pattern: BlockPattern) -> Array:
    (down, across), count = pattern.grid, pattern.rows.shape[0]
    if count == 0:
        return values
    return arrays.intact(values, (pattern.rows.max() < down) & (pattern.columns[-1] < across) & (pattern.rows[0] >= 0))


@jax.jit
def gather(dense: Array, pattern: BlockPattern) -> Array:
    """The values of a dense weight [in, out], [nnz]: tile by tile, row-major within it."""
    (down, across), (height, width) = pattern.grid, pattern.tile
    return dense.reshape(down, height, across, width)[pattern.rows, :, pattern.columns].reshape(-1)


@jax.jit
def scatter(values: Array, pattern: BlockPattern) -> Array:
    """The dense weight [in, out] of values [nnz]; zeros elsewhere."""
    (down, across), (height, width) = pattern.grid, pattern.tile
    dense = jnp.zeros((down, height, across, width), values.dtype)
    tiles = _intact(values, pattern).reshape(-1, height, width)
    return dense.at[pattern.rows, :, pattern.columns].set(tiles, unique_indices=True).reshape(pattern.shape)


def matmul(x: Array, values: Array, pattern: BlockPattern, *, transpose: bool = False) -> Array:
    """x[..., in] @ W -> [..., out], or x[..., out] @ W.T -> [..., in]. Sums in f32; the result has the promoted dtype.

    Raises:
      ValueError: sizes that do not fit the pattern.

    Example:
      pattern = make_block_pattern(mask, (32, 32))
      y = matmul(x, gather(kernel, pattern), pattern)
    """
    inputs, outputs = pattern.shape[::-1] if transpose else pattern.shape
    check_sizes("block matmul", pattern)
    arrays.check_operands("block matmul", x, values, inputs=inputs, nnz=pattern.nnz)
    (down, across), (height, width) = pattern.grid, pattern.tile
    tiles = _intact(values, pattern).reshape(-1, height, width)
    source, target = pattern.rows, pattern.columns
    if transpose:
        tiles, source, target, down, across, height = tiles.swapaxes(1, 2), target, source, across, down, width
    dtype = jnp.result_type(x, values)
    total = jnp.promote_types(dtype, jnp.float32)
    blocks = x.reshape(-1, down, height).swapaxes(0, 1)[source]
    products = jnp.einsum("tbh,thw->tbw", blocks.astype(dtype), tiles.astype(dtype), preferred_element_type=total)
    # Not marked as sorted: XLA would compile for minutes on GPUs.
    columns = jax.ops.segment_sum(products, target, num_segments=across)
    return columns.swapaxes(0, 1).reshape(*x.shape[:-1], outputs).astype(dtype)
