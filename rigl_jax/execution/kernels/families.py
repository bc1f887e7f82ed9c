"""The functions of each class of patterns of what one device multiplies: a matrix, or the kernel of a convolution."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from rigl_jax.execution.kernels import block, linear, moving, n_of_m, pattern
from rigl_jax.execution.kernels.block import BlockPattern
from rigl_jax.execution.kernels.n_of_m import NMPattern
from rigl_jax.execution.kernels.pattern import Pattern

Array = jax.Array
OnePattern = Pattern | BlockPattern | NMPattern


class Family(NamedTuple):
    """The functions of one class of patterns.

    Attributes:
      module: has its `check_sizes`, `check_content`, `rebuild` and `count`.
      matmul: `(x, values, at, transpose=) -> y`.
      gather: `(dense, at) -> values`.
      scatter: `(values, at) -> dense`.
    """

    module: Any
    matmul: Callable[..., Array]
    gather: Callable[[Array, Any], Array]
    scatter: Callable[[Array, Any], Array]


FAMILIES: dict[type, Family] = {
    Pattern: Family(pattern, linear.matmul, moving.gather, moving.scatter),
    BlockPattern: Family(block, block.matmul, block.gather, block.scatter),
    NMPattern: Family(n_of_m, n_of_m.matmul, n_of_m.gather, n_of_m.scatter),
}


def family(at: OnePattern) -> Family:
    """The functions for a pattern."""
    return FAMILIES[type(at)]


def clear_padding(values: Array, at: OnePattern) -> Array:
    """The values [nnz], with 0 in the places that are padding, which come last."""
    active = family(at).module.count(at) * math.prod(at.entry)
    return jnp.where(jnp.arange(at.nnz) < active, values, jnp.zeros((), values.dtype))
