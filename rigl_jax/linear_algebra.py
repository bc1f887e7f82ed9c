"""What several families compute of matrices."""

from __future__ import annotations

import jax.numpy as jnp

from rigl_jax.base import Array


def energy_rank(matrix: Array, energy: Array | float) -> Array:
    """The least number of singular values that hold a share of the sum of their squares.

    Args:
      matrix: float[rows, columns].
      energy: the share, above 0 and up to 1; within 1e-6 of it counts.

    Returns:
      int32 scalar, from 0 (a matrix of zeros) to min(rows, columns).

    >>> int(energy_rank(jnp.diag(jnp.array([3.0, 1.0, 0.0])), 0.9))  # 9 of 10
    1
    """
    squares = jnp.square(jnp.linalg.svd(matrix, compute_uv=False))
    total = jnp.sum(squares)
    held = jnp.cumsum(squares) / jnp.where(total > 0, total, 1)
    return jnp.where(total > 0, jnp.sum(held < energy - 1e-6) + 1, 0).astype(jnp.int32)
