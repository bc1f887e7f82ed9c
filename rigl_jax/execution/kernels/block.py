"""y = x @ W for a W of whole tiles (32 x 32 and the like), in plain XLA on any backend.

The blocks of x that the active tiles need are gathered, multiplied by the tiles in one batched product, and summed by
column of tiles. So the cost does not depend on how tiles are spread over the columns. Every step is
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

    Tiles after them are padding, room for more: their row is the number of rows of tiles, their column that of columns.
    Their values take part in nothing.

    Attributes:
      rows: int32[capacity], the tile's row of tiles.
      columns: int32[capacity], its column of tiles, ascending.
      shape: (in, out) of the dense weight; static.
      tile: (height, width) of a tile; static.
    """

    rows: Array
    columns: Array
    shape: tuple[int, int]
    tile: tuple[int, int]

    @property
    def entry(self) -> tuple[int, int]:
        """Inputs and outputs of an entry, a tile."""
        return self.tile

    @property
    def nnz(self) -> int:
        """Number of values, those of padding included: capacity * height * width."""
        return self.rows.shape[0] * self.tile[0] * self.tile[1]

    @property
    def grid(self) -> tuple[int, int]:
        """Rows and columns of tiles."""
        return self.shape[0] // self.tile[0], self.shape[1] // self.tile[1]


@arguments(mask=rules.host_array(), tile=rules.pair, capacity=rules.optional(rules.whole(0)))
def make_block_pattern(
    mask: np.ndarray, tile: tuple[int, int] = (32, 32), *, capacity: int | None = None
) -> BlockPattern:
    """The pattern of a mask bool[in, out] made of whole tiles, on the host.

    Args:
      mask: True where a weight is active.
      tile: height and width of a tile.
      capacity: how many tiles the arrays hold, the rest of them padding. None: no padding.

    Raises:
      ValueError: another rank, a shape that the tile does not divide, a mask that cuts a tile, or more tiles than the
        capacity.

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
    room = 0 if capacity is None else capacity - len(rows)
    if room < 0:
        raise ValueError(f"make_block_pattern: capacity must be at least the {len(rows)} tiles, got {capacity}")
    padded = [
        jnp.asarray(np.pad(places, (0, room), constant_values=end), jnp.int32)
        for places, end in zip((rows, columns), active.shape, strict=True)
    ]
    return BlockPattern(*padded, shape=(mask.shape[0], mask.shape[1]), tile=(tile[0], tile[1]))


def rebuild(pattern: BlockPattern, mask: np.ndarray, capacity: int | None) -> BlockPattern:
    """The pattern of another mask, with the same tiles."""
    return make_block_pattern(mask, pattern.tile, capacity=capacity)


def count(pattern: BlockPattern) -> Array:
    """How many tiles are no padding; under jit too."""
    return (pattern.columns < pattern.grid[1]).sum()


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
    (down, across), active = pattern.grid, int((given[1] < pattern.grid[1]).sum())
    rows, columns = (places[:active] for places in given)
    place = columns * np.int64(down) + rows
    there = not active or (rows.min() >= 0 and rows.max() < down and columns.min() >= 0)
    padded = (given[0][active:] == down).all() and (given[1][active:] == across).all()
    if not (there and padded and (place[1:] > place[:-1]).all()):
        raise ValueError(f"{who}: the pattern must hold what make_block_pattern made, got other tiles ({arrays.HINT})")


def _intact(values: Array, pattern: BlockPattern) -> Array:
    (down, across), rows, columns = pattern.grid, pattern.rows, pattern.columns
    there = (rows >= 0) & (rows < down) & (columns >= 0) & (columns < across)
    padding = (rows == down) & (columns == across)
    return arrays.intact(values, (there | padding).all())


def inside(pattern: BlockPattern) -> BlockPattern:
    """The pattern with padding at the last place of the weight, for products that read and write where a tile is."""
    rows, columns = (
        jnp.minimum(at, n - 1) for at, n in zip((pattern.rows, pattern.columns), pattern.grid, strict=True)
    )
    return dataclasses.replace(pattern, rows=rows, columns=columns)


def tiles_of(values: Array, pattern: BlockPattern) -> Array:
    """The tiles [capacity, height, width], those of padding 0."""
    tiles = _intact(values, pattern).reshape(-1, *pattern.tile)
    return jnp.where((pattern.columns < pattern.grid[1])[:, None, None], tiles, 0)


@jax.jit
def gather(dense: Array, pattern: BlockPattern) -> Array:
    """The values of a dense weight [in, out], [nnz]: tile by tile, row-major within it; 0 for padding."""
    (down, across), (height, width) = pattern.grid, pattern.tile
    tiles = dense.reshape(down, height, across, width).at[pattern.rows, :, pattern.columns]
    return tiles.get(mode="fill", fill_value=0).reshape(-1)


@jax.jit
def scatter(values: Array, pattern: BlockPattern) -> Array:
    """The dense weight [in, out] of values [nnz]; zeros elsewhere."""
    (down, across), (height, width) = pattern.grid, pattern.tile
    dense = jnp.zeros((down, height, across, width), values.dtype)
    tiles = _intact(values, pattern).reshape(-1, height, width)
    dense = dense.at[pattern.rows, :, pattern.columns].set(tiles, mode="drop", unique_indices=True)
    return dense.reshape(pattern.shape)


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
    tiles, source, target = tiles_of(values, pattern), pattern.rows, pattern.columns
    if transpose:
        tiles, source, target, down, across, height = tiles.swapaxes(1, 2), target, source, across, down, width
    dtype = jnp.result_type(x, values)
    total = jnp.promote_types(dtype, jnp.float32)
    # Padding reads zeros, so that an infinite input is not multiplied by 0, and adds to no output.
    blocks = x.reshape(-1, down, height).swapaxes(0, 1).at[source].get(mode="fill", fill_value=0)
    products = jnp.einsum("tbh,thw->tbw", blocks.astype(dtype), tiles.astype(dtype), preferred_element_type=total)
    # Not marked as sorted: XLA would compile for minutes on GPUs.
    columns = jax.ops.segment_sum(products, target, num_segments=across)
    return columns.swapaxes(0, 1).reshape(*x.shape[:-1], outputs).astype(dtype)
