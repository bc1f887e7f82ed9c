"""What several families compute of matrices."""

from __future__ import annotations

from collections.abc import Sequence

import jax
import jax.numpy as jnp

from rigl_jax.base import Array


def energy_rank(matrix: Array, energy: Array | float) -> Array:
    """The least number of singular values that hold a share of the sum of their squares, whatever their scale.

    Args:
      matrix: float[rows, columns].
      energy: the share, above 0 and up to 1; within 1e-6 of it counts.

    Returns:
      int32 scalar, from 0 (a matrix of zeros) to min(rows, columns).

    >>> int(energy_rank(jnp.diag(jnp.array([3.0, 1.0, 0.0])), 0.9))  # 9 of 10
    1
    """
    squares = jnp.square(jnp.linalg.svd(matrix / unit([matrix]), compute_uv=False))
    total = jnp.sum(squares)
    held = jnp.cumsum(squares) / jnp.where(total > 0, total, 1)
    return jnp.where(total > 0, jnp.sum(held < energy - 1e-6) + 1, 0).astype(jnp.int32)


def unit(arrays: Sequence[Array]) -> Array:
    """A power of two near the largest entry of several arrays: divided by it, no square over- or underflows.

    Such a division rounds nothing. Above half of the largest entry, at most it; 1 where that is 0 or not finite.

    Args:
      arrays: float32 or wider.

    Returns:
      f32 scalar.

    >>> float(unit([jnp.array([3.0, -5.0])]))
    4.0
    """
    largest = jnp.max(jnp.stack([jnp.max(jnp.abs(x), initial=0) for x in arrays])).astype(jnp.float32)
    power = jnp.clip(jnp.frexp(largest)[1] - 1, -126, 127)
    some = (largest > 0) & jnp.isfinite(largest)
    return jax.lax.stop_gradient(jnp.where(some, jnp.ldexp(jnp.float32(1), power), jnp.float32(1)))
