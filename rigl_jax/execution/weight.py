"""A packed weight in the place of a dense one, while a model runs on it."""

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
    """A packed weight on its way through a model.

    Attributes:
      values: float[nnz].
      pattern: where they are.
      name: the leaf's path, for warnings.
      flipped: whether the model has transposed it, outputs before inputs.
    """

    values: Array
    pattern: Any
    name: str
    flipped: bool = False

    @property
    def shape(self) -> tuple[int, ...]:
        """As the model sees it."""
        shape, split = tuple(self.pattern.shape), self._split
        return (*shape[split:], *shape[:split]) if self.flipped else shape

    @property
    def first(self) -> int:
        """How many axes come first that belong together: the inputs, or if flipped the outputs. 0 in a convolution."""
        return len(self.pattern.shape) - self._split if self.flipped else self._split

    @property
    def _split(self) -> int:
        if isinstance(self.pattern, kernels.Folded):
            return self.pattern.split
        return int(len(self.pattern.shape) == 2)

    @property
    def dtype(self) -> Any:
        """As the model sees it."""
        return self.values.dtype

    def dense(self) -> Array:
        """The array that it stands for."""
        whole, split = kernels.scatter(self.values, self.pattern), self._split
        return jnp.moveaxis(whole, range(split), range(-split, 0)) if self.flipped else whole
