"""How many rows of a weight the kernels read as one block: what the caches of this processor hold."""

from __future__ import annotations

import functools
import os

import jax

from rigl_jax import native
from rigl_jax.execution.kernels.sorting import LARGEST_BLOCK

RUN_BLOCK = 1024  # RUN_BLOCK in native/kernels.h


@functools.cache
def _large_l2() -> bool:
    """Whether each core has a second-level cache of 2 MiB or more, which Intel's feed a vector a cycle to the core.

    Not asked where several processes run one program: each builds its patterns, and all must have the same shapes.
    """
    try:
        return jax.process_count() == 1 and os.sysconf("SC_LEVEL2_CACHE_SIZE") >= 2 << 20
    except (AttributeError, OSError, ValueError):
        return False


def best_block(channels: int, taps: int, density: float, height: int) -> int:
    """Rows in a block: as many as fit into the L1 cache with their activations, more where segments would be short.

    Where the L2 cache is large and fast, longer segments are worth more than activations from the L1 cache. Without
    the native kernels there is one block, so that a matrix is plain CSR, as jaxlib's kernel needs.
    """
    entries = 10 / max(density, 1e-6)  # rows in which a segment has ten entries
    if native.library() is None:
        wanted = RUN_BLOCK if height > 1 else LARGEST_BLOCK // taps
    elif height > 1:  # runs use each activation so often that it may lie in the L2 cache
        wanted = RUN_BLOCK
    elif taps == 1:
        # More where segments would still be almost empty, because one start is stored for each segment.
        some = min(max(256, 5 * entries), 1024) if _large_l2() else min(max(112, entries), 384)
        wanted = int(max(some, min(entries / 10, LARGEST_BLOCK)))
    else:
        wanted = int(min(max(8, 1.6 * entries / taps), 64))
    count = -(-channels // wanted)  # blocks of equal size, instead of a short one at the end
    return max(1, -(-channels // max(1, count))) * taps
