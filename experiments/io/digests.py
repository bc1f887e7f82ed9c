"""Checksums of trees of arrays, computed on their devices."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jax import lax

from rigl_jax.base import Array, PyTree


@jax.jit
def digest(tree: PyTree) -> Array:
    """A 32-bit checksum of the bits and positions of all values; a change of one value changes it."""
    total = jnp.uint32(0)
    for i, leaf in enumerate(jax.tree.leaves(tree)):
        bits = _bits(leaf)
        place = _index(bits.shape) * jnp.uint32(2) + jnp.uint32(1)  # odd, so that no change is lost
        total = (total + jnp.uint32(i)) * jnp.uint32(0x9E3779B1) + jnp.sum(bits * place, dtype=jnp.uint32)
    return total


def _index(shape: tuple[int, ...]) -> Array:
    """The row-major index of every position, computed axis by axis: flattening a sharded array would gather it."""
    index, stride = jnp.zeros((1,) * len(shape), jnp.uint32), 1
    for axis in reversed(range(len(shape))):
        along = tuple(size if i == axis else 1 for i, size in enumerate(shape))
        index = index + lax.broadcasted_iota(jnp.uint32, along, axis) * jnp.uint32(stride)
        stride = stride * shape[axis] % 2**32
    return index


def _bits(leaf: Array) -> Array:
    if jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key):
        leaf = jax.random.key_data(leaf)
    if leaf.dtype == jnp.bool_:
        return leaf.astype(jnp.uint32)
    if leaf.dtype.itemsize == 8:
        return lax.bitcast_convert_type(leaf, jnp.uint32)
    unsigned = {1: jnp.uint8, 2: jnp.uint16, 4: jnp.uint32}[leaf.dtype.itemsize]
    return lax.bitcast_convert_type(leaf, unsigned).astype(jnp.uint32)
