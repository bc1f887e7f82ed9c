"""Patterns: where the nonzeros of a weight are, sorted as the kernels read them.

A weight is seen as a matrix [rows, out]: the kernel of a dense layer [in, out] as it is, that of a convolution HWIO
with rows (channel, tap), tap = ky * kw + kx, and that of a 3-D convolution DHWIO likewise, with kd * in channels.
`values` is a flat vector in *storage order*: sorted by block of rows, then by output, then by row. The forward kernel
reads it from start to end, and the gradient of the values has the same order. A block contains as many rows as fit into
the L1 cache together with their activations; an index within a block fits into 16 bits. All sizes that determine the
shape of a kernel are static, so a rewiring that keeps the number of weights compiles nothing again; nor does one that
changes it, if the arrays hold room for more entries (`capacity`).
"""

from __future__ import annotations

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np

from rigl_jax import arguments as rules
from rigl_jax import checks
from rigl_jax.arguments import arguments
from rigl_jax.execution.kernels import arrays, sorting
from rigl_jax.execution.kernels.blocks import RUN_BLOCK, best_block
from rigl_jax.execution.kernels.sorting import LARGEST_BLOCK, MOST, RANKS
from rigl_jax.messages import kind, shown

Array = jax.Array
HEIGHTS = (1, 4, 8, 16)
EXPECTED = "(in, out) or ([kd,] kh, kw, in, out)"
FIELDS = ("indices", "starts", "indices_t", "starts_t", "order_t")


@functools.partial(
    jax.tree_util.register_dataclass,
    data_fields=list(FIELDS),
    meta_fields=["shape", "height", "block", "block_t"],
)
@dataclasses.dataclass(frozen=True)
class Pattern:
    """Where the nonzeros of a weight are: a pytree of index arrays with static sizes.

    An *entry* is a run of `height` consecutive outputs that share a row, a *unit* the place of such a run: output
    // height. Segment s = block number * units + unit contains the entries starts[s] to starts[s + 1]. The transposed
    order, in which the gradient of the input reads them, exchanges input channels and outputs (taps stay in the rows).

    Entries from starts[-1] on are padding, room for more: their index is 65535, they belong to no segment, no product
    reads their values, and the gradient of these is 0.

    Attributes:
      indices: uint16[capacity], row within its block of rows.
      starts: int32[blocks * units + 1].
      indices_t: uint16[capacity], the same for the transposed order (empty if height > 1: those kernels need none).
      starts_t: int32[transposed blocks * channels + 1].
      order_t: int32[capacity], the entry that comes k-th in the transposed order.
      shape: of the dense weight, (in, out) or ([kd,] kh, kw, in, out); static.
      height: 1, 4, 8 or 16; static.
      block: rows in a block; static.
      block_t: rows in a block of the transposed order; static.
    """

    indices: Array
    starts: Array
    indices_t: Array
    starts_t: Array
    order_t: Array
    shape: tuple[int, ...]
    height: int
    block: int
    block_t: int

    @property
    def taps(self) -> int:
        """Positions of the kernel's window in an image, or in a slice of it: kh * kw, 1 for a matrix."""
        return sorting.taps_and_channels(self.shape)[0]

    @property
    def channels(self) -> int:
        """Channels of the inputs: in, or kd * in."""
        return sorting.taps_and_channels(self.shape)[1]

    @property
    def rows(self) -> int:
        """Rows of the weight seen as a matrix: channels * taps."""
        return self.channels * self.taps

    @property
    def units(self) -> int:
        """Places for a run: out / height."""
        return self.shape[-1] // self.height

    @property
    def entry(self) -> tuple[int, int]:
        """Inputs and outputs of an entry."""
        return 1, self.height

    @property
    def nnz(self) -> int:
        """Number of values, those of padding included: capacity * height."""
        return self.indices.shape[0] * self.height


_SIZES = {"height": rules.whole(1), **dict.fromkeys(("block", "block_t", "capacity"), rules.optional(rules.whole(0)))}


@arguments(mask=rules.host_array(), **_SIZES)
def make_pattern(
    mask: np.ndarray,
    *,
    height: int = 1,
    block: int | None = None,
    block_t: int | None = None,
    capacity: int | None = None,
) -> Pattern:
    """The pattern of a mask, on the host.

    Args:
      mask: bool[in, out] or bool[[kd,] kh, kw, in, out], True where a weight is active; with height > 1 whole runs.
      height: 1, or for a matrix 4, 8, 16 consecutive outputs that share an input (a block structure of 1 x height).
      block: rows in a block (for a convolution a multiple of kh * kw), at most 65536; None chooses by density. Give
        `mask.shape[0]` for a matrix that is used on single examples: short segments are slow at batch size 1.
      block_t: the same for the transposed order, whose rows are outputs.
      capacity: how many entries (runs of `height`) the arrays hold, the rest of them padding. None: no padding.

    Raises:
      ValueError: another rank or height, a number of outputs that height does not divide, a mask that cuts runs, or
        more entries than the capacity.

    >>> make_pattern(np.eye(4, dtype=bool)).nnz
    4
    """
    mask = np.asarray(mask, dtype=bool)
    if mask.ndim not in RANKS:
        raise ValueError(f"make_pattern: mask must have shape {EXPECTED}, got shape {mask.shape}")
    _check_shape("make_pattern", mask.shape, height)
    matrix = sorting.as_rows(mask, mask.shape).reshape(-1, mask.shape[-1] // height, height)
    runs = matrix[..., 0]
    if height > 1 and not (matrix == runs[..., None]).all():
        raise ValueError(f"make_pattern: mask must be made of whole runs of {height} outputs; some are cut")
    entries = np.flatnonzero(runs)
    return make_pattern_at(entries, mask.shape, height=height, block=block, block_t=block_t, capacity=capacity)


@arguments(entries=rules.host_array(1), shape=rules.shape, **_SIZES)
def make_pattern_at(
    entries: np.ndarray,
    shape: tuple[int, ...],
    *,
    height: int = 1,
    block: int | None = None,
    block_t: int | None = None,
    capacity: int | None = None,
) -> Pattern:
    """The pattern of ascending positions row * units + unit, for weights whose dense mask would not fit into memory.

    Args:
      entries: int[n], each in [0, rows * units), ascending, none twice.
      shape: (in, out) or ([kd,] kh, kw, in, out) of the dense weight.
      height: as in `make_pattern`.
      block: as in `make_pattern`.
      block_t: as in `make_pattern`.
      capacity: as in `make_pattern`.

    Raises:
      ValueError: positions that are not such integers, or are more than the capacity; a shape, height or block as in
        `make_pattern`; more than 2^31 rows, outputs, positions, or segments (blocks * units).

    >>> make_pattern_at(np.array([0, 5]), (2, 3)).nnz
    2
    """
    _check_shape("make_pattern_at", shape, height)
    (taps, channels), units = sorting.taps_and_channels(shape), shape[-1] // height
    entries = sorting.positions(entries, channels * taps * units)
    density = len(entries) / max(1, channels * taps * units)
    block = best_block(channels, taps, density, height) if block is None else block
    block_t = best_block(units, taps, density, 1) if block_t is None else block_t
    _check_blocks("make_pattern_at", shape, height, block, block_t)
    room = 0 if capacity is None else capacity - len(entries)
    if room < 0 or len(entries) + room > MOST:
        raise ValueError(f"make_pattern_at: capacity must be {len(entries)} to {MOST} here, got {capacity}")
    parts = map(jnp.asarray, sorting.index(entries, shape, height, block, block_t, room))
    return Pattern(*parts, shape=tuple(shape), height=height, block=block, block_t=block_t)


def _check_shape(who: str, shape: tuple[int, ...], height: int) -> None:
    if len(shape) not in RANKS or not all(checks.is_whole(size, 0) and size <= MOST for size in shape):
        raise ValueError(f"{who}: shape must be {EXPECTED}, got {shown(shape)}")
    if 0 in shape[:-2]:
        raise ValueError(f"{who}: shape must have kernel sizes of at least 1, got {shown(shape)}")
    if height not in (HEIGHTS if len(shape) == 2 else (1,)):
        raise ValueError(f"{who}: height must be one of {HEIGHTS}, and 1 for a convolution, got {shown(height)}")
    if shape[-1] % height:
        raise ValueError(f"{who}: out must be a multiple of height {height}, got shape {tuple(shape)}")


def _check_blocks(who: str, shape: tuple[int, ...], height: int, block: int, block_t: int) -> None:
    """Checks that indices within a block fit into 16 bits and numbers of segments into 31."""
    (taps, channels), out = sorting.taps_and_channels(shape), shape[-1]
    limit = RUN_BLOCK if height > 1 else LARGEST_BLOCK
    for name, size, most in (("block", block, limit), ("block_t", block_t, LARGEST_BLOCK)):
        if not checks.is_whole(size, 1) or size > most or size % max(1, taps):
            raise ValueError(f"{who}: {name} must be 1 to {most} and a multiple of {taps} here, got {shown(size)}")
    segments = max(-(-channels * taps // block) * (out // height), -(-out * taps // block_t) * channels)
    if max(channels * taps, out * taps, segments) > MOST:
        raise ValueError(f"{who}: rows and segments must number at most {MOST}, got {shape} in blocks of {block}")


def check_sizes(who: str, pattern: Pattern) -> None:
    """ValueError if the arrays of a pattern do not have the sizes that its static fields imply. Works under jit."""
    if not isinstance(pattern, Pattern):
        raise ValueError(f"{who}: pattern must be a Pattern, got {kind(pattern)}")
    _check_shape(who, pattern.shape, pattern.height)
    _check_blocks(who, pattern.shape, pattern.height, pattern.block, pattern.block_t)
    entries = np.shape(pattern.indices)[:1]
    segments = -(-pattern.rows // pattern.block) * pattern.units
    entries_t, segments_t = entries, -(-pattern.shape[-1] * pattern.taps // pattern.block_t) * pattern.channels
    if pattern.height > 1:
        entries_t, segments_t = (0,), 0
    arrays.expect(who, pattern, indices=(np.uint16, entries), starts=(np.int32, (segments + 1,)))
    arrays.expect(who, pattern, indices_t=(np.uint16, entries_t), starts_t=(np.int32, (segments_t + 1,)))
    arrays.expect(who, pattern, order_t=(np.int32, entries_t))


def check_content(who: str, pattern: Pattern) -> None:
    """ValueError if a pattern is not the one that `make_pattern_at` builds from its entries. Accepts traced arrays."""
    check_sizes(who, pattern)
    given = arrays.host(*(getattr(pattern, name) for name in FIELDS))
    if given is not None and not sorting.is_index(given, pattern.shape, pattern.height, pattern.block, pattern.block_t):
        raise ValueError(f"{who}: the pattern must hold what make_pattern made, got other indices ({arrays.HINT})")


@arguments(pattern=rules.one_of(Pattern, "a Pattern"))
def coordinates(pattern: Pattern) -> tuple[Array, Array]:
    """Row and unit of every entry in storage order, int32[capacity] each; works under jit.

    Those of padding are outside of the weight: the number of rows, and of units.
    """
    n = pattern.indices.shape[0]
    segments = jnp.arange(pattern.starts.shape[0] - 1, dtype=jnp.int32)
    segment = jnp.repeat(segments, jnp.diff(pattern.starts), total_repeat_length=n)
    units, active = max(1, pattern.units), jnp.arange(n, dtype=jnp.int32) < pattern.starts[-1]
    rows = segment // units * pattern.block + pattern.indices.astype(jnp.int32)
    return jnp.where(active, rows, pattern.rows), jnp.where(active, segment % units, pattern.units)


def places(pattern: Pattern) -> np.ndarray:
    """int64[entries]: row * units + unit of every entry in storage order, as `make_pattern_at` counts; on the host.

    Without padding, which comes last.
    """
    rows, units = (np.asarray(x, np.int64)[: int(count(pattern))] for x in coordinates(pattern))
    return rows * pattern.units + units


def rebuild(pattern: Pattern, mask: np.ndarray, capacity: int | None) -> Pattern:
    """The pattern of another mask, with the same blocks."""
    sizes = {"height": pattern.height, "block": pattern.block, "block_t": pattern.block_t}
    return make_pattern(mask, **sizes, capacity=capacity)


def count(pattern: Pattern) -> Array:
    """How many entries are no padding; under jit too."""
    return pattern.starts[-1]


def ends_sound(starts: Array, indices: Array) -> Array:
    """Whether the segments end with the entries, or where padding begins: a bool scalar, under jit too."""
    n = indices.shape[0]
    full, padded = starts[-1] == n, starts[-1] < n
    if n == 0:
        return (starts[0] == 0) & full
    return (starts[0] == 0) & (full | (starts[-1] >= 0) & padded & (indices[-1] == sorting.PADDING))


def dense_index(pattern: Pattern, place: np.ndarray) -> np.ndarray:
    """Where a place lies among the runs of the raveled dense weight: in a convolution taps come before channels."""
    return sorting.swapped(place, pattern.units, pattern.shape[-2], pattern.taps)


def place_of(pattern: Pattern, index: np.ndarray) -> np.ndarray:
    """The inverse of `dense_index`."""
    return sorting.swapped(index, pattern.units, pattern.taps, pattern.shape[-2])
