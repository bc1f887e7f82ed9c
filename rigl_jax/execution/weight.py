"""A packed weight that stands for a dense one while a model runs."""

from __future__ import annotations

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp

from rigl_jax.base import Array
from rigl_jax.execution import kernels


@functools.partial(jax.tree_util.register_dataclass, data_fields=["values", "pattern"], meta_fields=["name", "flipped"])
@dataclasses.dataclass(frozen=True)
class Weight:
    """A packed weight as an operand of a model's operations.

    Attributes:
      values: float[nnz].
      pattern: their positions.
      name: the leaf's path, for warnings.
      flipped: whether the model has transposed it, outputs before inputs.
    """

    values: Array
    pattern: Any
    name: str
    flipped: bool = False

    @property
    def shape(self) -> tuple[int, ...]:
        """The shape that the model sees."""
        shape, split = tuple(self.pattern.shape), self._split
        return (*shape[split:], *shape[:split]) if self.flipped else shape

    @property
    def first(self) -> int:
        """How many leading axes are inputs, or outputs if flipped. 0 for a convolution."""
        return len(self.pattern.shape) - self._split if self.flipped else self._split

    @property
    def _split(self) -> int:
        if isinstance(self.pattern, kernels.Folded):
            return self.pattern.split
        return int(len(self.pattern.shape) == 2)

    @property
    def order(self) -> tuple[int, ...]:
        """The axes of the weight in the order of its pattern."""
        pattern = self.pattern
        return pattern.axes if isinstance(pattern, kernels.Moved) else tuple(range(len(pattern.shape)))

    @property
    def dtype(self) -> Any:
        """The dtype that the model sees."""
        return self.values.dtype

    def dense(self) -> Array:
        """The dense weight."""
        whole, split = kernels.scatter(self.values, self.pattern), self._split
        return jnp.moveaxis(whole, range(split), range(-split, 0)) if self.flipped else whole
