"""The native functions that make and check the arrays of a pattern do as those in NumPy."""

import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from rigl_jax import native
from rigl_jax.execution.kernels import sorting

pytestmark = pytest.mark.skipif(native.library() is None, reason=native.reason())

SHAPES = [(7, 5), (40, 64), (1, 16), (300, 16), (3, 3, 5, 8), (1, 3, 4, 6), (2, 3, 3, 4, 6), (5, 0), (0, 16)]


@st.composite
def patterns(draw):
    """Positions in a weight, its shape, the height of its runs and the two sizes of blocks."""
    shape = draw(st.sampled_from(SHAPES))
    height = draw(st.sampled_from([1, 4, 8])) if len(shape) == 2 and shape[1] % 8 == 0 else 1
    taps, _ = sorting.taps_and_channels(shape)
    size = math.prod(shape) // height
    rng = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    entries = np.flatnonzero(rng.random(size) < draw(st.sampled_from([0.0, 0.05, 0.5, 1.0]))).astype(np.int64)
    return entries, shape, height, *(taps * draw(st.sampled_from([1, 2, 7, 100])) for _ in range(2)), rng


@settings(max_examples=200, deadline=None)
@given(patterns(), st.sampled_from([0, 3]))
def test_the_arrays_are_those_of_numpy(case, room):
    entries, *how, _ = case
    made = sorting._index_native(entries, *how)
    for native_array, array in zip(made, sorting._index(entries, *how), strict=True):
        assert native_array.dtype == array.dtype
        np.testing.assert_array_equal(native_array, array)
    padded = sorting.index(entries, *how, room)
    assert sorting._is_index_native(padded, *how)
    assert sorting._is_index(padded, *how)


@settings(max_examples=300, deadline=None)
@given(patterns(), st.integers(0, 4), st.sampled_from(["swap", "set", "shift"]), st.sampled_from([0, 3]))
def test_damage_is_found_as_in_numpy(case, which, how_damaged, room):
    entries, *how, rng = case
    arrays = [array.copy() for array in sorting.index(entries, *how, room)]
    array = arrays[which]
    if array.size:
        i, j = rng.integers(array.size, size=2)
        if how_damaged == "swap":
            array[i], array[j] = array[j], array[i]
        else:
            limits = np.iinfo(array.dtype)
            array[i] = rng.choice([limits.min, limits.max, 0, 1, array[j]]) if how_damaged == "set" else array[i] ^ 1
    assert sorting._is_index_native(arrays, *how) == bool(sorting._is_index(arrays, *how))


@pytest.mark.parametrize("entries", [[3, 2], [2, 2], [-1, 4], [0, 35]])
def test_positions_that_do_not_ascend_within_the_weight_are_refused(entries):
    with pytest.raises(ValueError, match=r"entries must ascend within a weight of shape \(7, 5\)"):
        sorting._index_native(np.array(entries), (7, 5), 1, 2, 3)


@pytest.mark.parametrize("entries", [np.arange(9, dtype=np.int32), np.arange(18)[::2], np.arange(17, -1, -1)[::-2]])
def test_positions_in_any_memory_are_read_as_they_are(entries):
    how = (7, 5), 1, 2, 3
    for native_array, array in zip(sorting._index_native(entries, *how), sorting._index(entries, *how), strict=True):
        np.testing.assert_array_equal(native_array, array)


@pytest.mark.parametrize(
    ("shape", "block", "block_t"),
    [((7, 5), 0, 3), ((7, 5), 2, 0), ((7, 5), 1 << 17, 3), ((3, 3, 2, 2), 9, 4), ((1 << 40, 1 << 40), 2, 3)],
)
def test_sizes_that_do_not_fit_are_refused_before_an_array_is_read(shape, block, block_t):
    """The arrays here are empty: reading or writing them would be out of bounds."""
    library, none = native.library(), np.empty(0, np.int64)
    taps, channels = sorting.taps_and_channels(shape)
    sizes = [sorting.ctypes.c_int64(size) for size in (taps, channels, shape[-1], block, block_t)]
    pointers = sorting._pointers([none] * 5, 1)
    assert library.rigl_index(sorting.ctypes.c_int64(0), sorting._pointer(none), *sizes, *pointers) == 1
    assert library.rigl_is_index(sorting.ctypes.c_int64(0), *sizes, *pointers) == 0
