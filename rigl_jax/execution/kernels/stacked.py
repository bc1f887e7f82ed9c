"""Layers stacked in one weight [layers, ...], as `lax.scan` and `nn.scan` hold them: a pattern for each layer."""

from __future__ import annotations

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp

from rigl_jax.execution.kernels.folded import Folded, Moved, matrix_of
from rigl_jax.execution.kernels.pattern import Pattern
from rigl_jax.execution.kernels.slabs import Slabs, parted

Array = jax.Array


@functools.partial(jax.tree_util.register_dataclass, data_fields=["layers"], meta_fields=["shape"])
@dataclasses.dataclass(frozen=True)
class Stacked:
    """The patterns of layers that a scan uses one after another. All have the same sizes, some with padding.

    Values are those of the first layer, then those of the second, and so on. Those of layers in slabs are those of the
    first slab of all layers, then those of the second, and so on: the part of a device is in one piece.

    Attributes:
      layers: pattern of a layer, whose arrays have one more axis, of layers, in front.
      shape: of the dense weight, layers first; static.
    """

    layers: Pattern | Slabs | Folded | Moved
    shape: tuple[int, ...]

    @property
    def layer(self) -> Any:
        """The pattern of one layer, with shapes in the place of its arrays."""
        return jax.tree.map(lambda a: jax.ShapeDtypeStruct(a.shape[1:], a.dtype), self.layers)

    @property
    def nnz(self) -> int:
        """Number of values, those of padding included: layers * those of a layer."""
        return self.shape[0] * self.layer.nnz


def kernel_of(pattern: Any) -> Any:
    """As `matrix_of`; of stacked layers, that of one of them, with shapes in the place of its arrays."""
    return matrix_of(pattern.layer if isinstance(pattern, Stacked) else pattern)


def in_layers(values: Array, pattern: Stacked) -> Array:
    """The values [nnz] of a stack as [layers, nnz of a layer]."""
    return jnp.moveaxis(values.reshape(_slabs(pattern), pattern.shape[0], -1), 1, 0).reshape(pattern.shape[0], -1)


def flat(values: Array, pattern: Stacked) -> Array:
    """The inverse of `in_layers`."""
    return jnp.moveaxis(values.reshape(pattern.shape[0], _slabs(pattern), -1), 1, 0).reshape(-1)


def _slabs(pattern: Stacked) -> int:
    return parted(kernel_of(pattern))[0]


def check_sizes(who: str, pattern: Stacked) -> None:
    """ValueError if the layers do not have the number and the shape that the weight's shape implies; under jit too."""
    arrays = jax.tree.leaves(pattern.layers)
    if {getattr(a, "shape", ())[:1] for a in arrays} != {pattern.shape[:1]}:
        found = [getattr(a, "shape", None) for a in arrays]
        raise ValueError(f"{who}: a Stacked of shape {pattern.shape} needs {pattern.shape[0]} layers, got {found}")
    if tuple(pattern.layers.shape) != tuple(pattern.shape[1:]):
        raise ValueError(
            f"{who}: a Stacked of shape {pattern.shape} needs patterns of its layers, "
            f"got those of weights of shape {pattern.layers.shape}"
        )
