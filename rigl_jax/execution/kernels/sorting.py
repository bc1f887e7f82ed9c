"""The arrays of a `Pattern`, made on the host: positions of nonzeros, sorted as the kernels read them."""

from __future__ import annotations

import ctypes
import math
from collections.abc import Sequence
from typing import Any

import numpy as np

from rigl_jax import native

MOST = (1 << 31) - 2  # rows, entries, segments: they are counted in int32
LARGEST_BLOCK = 1 << 16  # an index within a block has 16 bits
RANKS = (2, 4, 5)  # of the dense weight
PADDING = 0xFFFF  # the index of an entry that is only room for later ones


def index(
    entries: np.ndarray, shape: tuple[int, ...], height: int, block: int, block_t: int, room: int = 0
) -> tuple[np.ndarray, ...]:
    """The five arrays of a `Pattern`, with `room` entries of padding at the end.

    Args:
      entries: int64[n], ascending positions row * units + unit.
      shape: of the dense weight.
      height: of a run.
      block: rows in a block.
      block_t: the same for the transposed order.
      room: number of entries of padding.
    """
    make = _index if native.library() is None else _index_native
    indices, starts, indices_t, starts_t, order_t = make(entries, shape, height, block, block_t)
    if height == 1:  # padding stays where it is
        indices_t = _padded(indices_t, room)
        order_t = np.append(order_t, np.arange(len(entries), len(entries) + room, dtype=np.int32))
    return _padded(indices, room), starts, indices_t, starts_t, order_t


def _index_native(
    entries: np.ndarray, shape: tuple[int, ...], height: int, block: int, block_t: int
) -> tuple[np.ndarray, ...]:
    entries = np.ascontiguousarray(entries, np.int64)
    (taps, channels), units = taps_and_channels(shape), shape[-1] // height
    segments, segments_t = -(-channels * taps // block) * units, -(-units * taps // block_t) * channels
    n, n_t, starts_t = len(entries), len(entries), np.empty(segments_t + 1, np.int32)
    if height > 1:
        n_t, starts_t = 0, np.zeros(1, np.int32)
    indices, indices_t, order_t = (np.empty(size, dtype) for size, dtype in ((n, "u2"), (n_t, "u2"), (n_t, "i4")))
    starts = np.empty(segments + 1, np.int32)
    arrays = indices, starts, indices_t, starts_t, order_t
    sizes = map(ctypes.c_int64, (taps, channels, units, block, block_t))
    library: Any = native.library()
    if _with_memory(library.rigl_index(ctypes.c_int64(n), _pointer(entries), *sizes, *_pointers(arrays, height))):
        raise ValueError(f"make_pattern: entries must ascend within a weight of shape {shape}")
    return arrays


def _pointer(array: np.ndarray) -> ctypes.c_void_p:
    return array.ctypes.data_as(ctypes.c_void_p)


def _pointers(arrays: Sequence[np.ndarray], height: int) -> list[ctypes.c_void_p | None]:
    """Those of the five arrays; runs have no transposed order."""
    return [_pointer(array) if i < 2 or height == 1 else None for i, array in enumerate(arrays)]


def _index(
    entries: np.ndarray, shape: tuple[int, ...], height: int, block: int, block_t: int
) -> tuple[np.ndarray, ...]:
    (taps, channels), units = taps_and_channels(shape), shape[-1] // height
    rows = (entries // max(1, units)).astype(np.int32)
    outs = (entries - rows.astype(entries.dtype) * units).astype(np.int32)
    indices, starts, position = _sort(rows, outs, block, -(-channels * taps // block), units)
    if height > 1:
        return indices, starts, np.empty(0, np.uint16), np.zeros(1, np.int32), np.empty(0, np.int32)
    channel = rows // np.int32(taps)
    rows_t = outs if taps == 1 else outs * np.int32(taps) + (rows - channel * np.int32(taps))
    indices_t, starts_t, position_t = _sort(rows_t, channel, block_t, -(-units * taps // block_t), channels)
    order_t = np.empty(len(rows), np.int32)
    order_t[position_t] = position
    return indices, starts, indices_t, starts_t, order_t


def _sort(rows: np.ndarray, units: np.ndarray, block: int, blocks: int, unit_count: int) -> tuple[np.ndarray, ...]:
    """(indices, starts, position of each entry) of entries sorted by (block of rows, unit), stable."""
    segment = rows // block * np.int64(unit_count) + units
    order = np.argsort(segment, kind="stable")
    starts = np.zeros(blocks * unit_count + 1, np.int32)
    np.cumsum(np.bincount(segment, minlength=blocks * unit_count), out=starts[1:])
    position = np.empty(len(rows), np.int32)
    position[order] = np.arange(len(rows), dtype=np.int32)
    return (rows % block)[order].astype(np.uint16), starts, position


def is_index(arrays: Sequence[np.ndarray], shape: tuple[int, ...], height: int, block: int, block_t: int) -> bool:
    """Whether arrays of the right sizes are those that `index` builds of some entries.

    Both orders are checked as they are, because sorting the entries again would take several times as long.
    """
    check = _is_index if native.library() is None else _is_index_native
    return check(arrays, shape, height, block, block_t)


def _is_index_native(
    arrays: Sequence[np.ndarray], shape: tuple[int, ...], height: int, block: int, block_t: int
) -> bool:
    arrays = [np.ascontiguousarray(array) for array in arrays]
    taps, channels = taps_and_channels(shape)
    sizes = map(ctypes.c_int64, (len(arrays[0]), taps, channels, shape[-1] // height, block, block_t))
    library: Any = native.library()
    sound = _with_memory(library.rigl_is_index(*sizes, *_pointers(arrays, height)))
    return sound and (height == 1 or not arrays[3].any())


def _with_memory(answer: int) -> bool:
    """The answer, 0 or 1, of a native function; 2 says that it got no memory."""
    if answer == 2:
        raise MemoryError("the native functions for patterns got no memory")
    return bool(answer)


def _is_index(arrays: Sequence[np.ndarray], shape: tuple[int, ...], height: int, block: int, block_t: int) -> bool:
    indices, starts, indices_t, starts_t, order_t = arrays
    (taps, channels), units = taps_and_channels(shape), shape[-1] // height
    n = starts[-1]
    there = placed(indices, starts, block, max(1, units), channels * taps)
    if there is None or not ascends(there[0], starts):
        return False
    if height > 1:
        return not starts_t.any()
    there_t = placed(indices_t, starts_t, block_t, max(1, channels), units * taps)
    if there_t is None or starts_t[-1] != n or not np.array_equal(order_t[n:], np.arange(n, len(order_t))):
        return False
    (rows, outs), (rows_t, channel), own = there, there_t, order_t[:n]
    if n and not 0 <= own.min() <= own.max() < n:
        return False
    outs_t, taps_t = (rows_t, np.int32(0)) if taps == 1 else np.divmod(rows_t, np.int32(taps))
    same = np.array_equal(rows[own], channel * np.int32(taps) + taps_t) and np.array_equal(outs[own], outs_t)
    return same and ascends(taps_t * np.int32(units) + outs_t, starts_t)


def taps_and_channels(shape: tuple[int, ...]) -> tuple[int, int]:
    """The sizes (taps, channels) of the rows of a weight. The depth of a 3-D kernel is a part of the channels.

    >>> taps_and_channels((3, 3, 8, 16)), taps_and_channels((5, 3, 3, 8, 16)), taps_and_channels((8, 16))
    ((9, 8), (9, 40), (1, 8))
    """
    return math.prod(shape[-4:-2]), math.prod(shape[:-4]) * shape[-2]


def fits(shape: tuple[int, ...]) -> bool:
    """Whether a pattern can be of a weight of this shape: a matrix, or a kernel of at most 65536 taps."""
    return len(shape) in RANKS and taps_and_channels(shape)[0] <= LARGEST_BLOCK


def swapped(place: np.ndarray, units: int, first: int, second: int) -> np.ndarray:
    """Positions in [depth, first, second, units] as positions in [depth, second, first, units]."""
    if 1 in (first, second):
        return place
    row, unit = np.divmod(place, units)
    slice_, row = np.divmod(row, first * second)
    i, k = np.divmod(row, second)
    return (slice_ * first * second + k * first + i) * units + unit


def as_rows(dense: Any, shape: tuple[int, ...]) -> Any:
    """A dense weight [[kd,] kh, kw, in, out] as [kd, in, kh * kw, out]: its rows in the order of `Pattern`."""
    taps, _ = taps_and_channels(shape)
    return dense.reshape(math.prod(shape[:-4]), taps, *shape[-2:]).swapaxes(1, 2)


def from_rows(matrix: Any, shape: tuple[int, ...]) -> Any:
    """The inverse of `as_rows`."""
    taps, _ = taps_and_channels(shape)
    return matrix.reshape(math.prod(shape[:-4]), shape[-2], taps, shape[-1]).swapaxes(1, 2).reshape(shape)


def placed(
    indices: np.ndarray, starts: np.ndarray, block: int, units: int, rows: int
) -> tuple[np.ndarray, np.ndarray] | None:
    """Row and unit, int32, of every entry that is no padding; None where an array holds what `index` never makes."""
    n = starts[-1]
    if not 0 == starts[0] <= n <= len(indices) or (starts[1:] < starts[:-1]).any() or (indices[n:] != PADDING).any():
        return None
    segments, lengths = np.arange(len(starts) - 1, dtype=np.int32), np.diff(starts)
    row = np.repeat(segments // np.int32(units) * np.int32(block), lengths) + indices[:n]
    if n and not (indices[:n].max() < block and row.min() >= 0 and row.max() < rows):  # it may have overflowed
        return None
    return row, np.repeat(segments % np.int32(units), lengths)


def ascends(keys: np.ndarray, starts: np.ndarray) -> bool:
    """Whether the keys of each segment ascend, each once."""
    rises = keys[1:] > keys[:-1]
    first = starts[(starts > 0) & (starts < len(keys))]
    rises[first - 1] = True
    return bool(rises.all())


def _padded(indices: np.ndarray, room: int) -> np.ndarray:
    return np.pad(indices, (0, room), constant_values=PADDING) if room else indices


def positions(entries: np.ndarray, size: int) -> np.ndarray:
    """Entries as int64, if they are ascending positions in [0, size)."""
    given = np.asarray(entries)
    if given.ndim != 1 or (given.size and not np.issubdtype(given.dtype, np.integer)):
        raise ValueError(f"make_pattern_at: entries must be int[n], got {given.dtype} of shape {given.shape}")
    if given.size > MOST:
        raise ValueError(f"make_pattern_at: entries must be at most {MOST}, got {given.size}")
    if given.size and not (given[0] >= 0 and int(given[-1]) < size and bool((given[1:] > given[:-1]).all())):
        span = f"from {given.min()} to {given.max()}"
        raise ValueError(f"make_pattern_at: entries must ascend, each once, within [0, {size}), got {span}")
    return given.astype(np.int64)
