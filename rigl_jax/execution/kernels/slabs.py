"""Weights cut by their outputs into slabs of equal width, one for each device of a mesh axis: a pattern for each.

A device that holds its slab computes its outputs from all inputs, and its share of a product with the transposed
matrix; `execution.over` does so. Here all slabs are multiplied one after another.
"""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from rigl_jax import arguments as rules
from rigl_jax.arguments import arguments
from rigl_jax.execution.kernels import arrays, families
from rigl_jax.execution.kernels.families import OnePattern, family
from rigl_jax.messages import kind, shown

Array = jax.Array
ROOM = 1.125
"""Size of the slabs, in units of the fullest: the fullest of the next mask may hold more."""


@functools.partial(jax.tree_util.register_dataclass, data_fields=["parts"], meta_fields=["shape", "over"])
@dataclasses.dataclass(frozen=True)
class Slabs:
    """The patterns of a weight's slabs. All have the same sizes, some with padding.

    Values are those of the first slab, then those of the second, and so on.

    Attributes:
      parts: pattern of a slab [..., out // slabs], whose arrays have one more axis, of slabs, in front.
      shape: of the dense weight, as in `Pattern`; static.
      over: the mesh axis whose devices hold a slab each; static.
    """

    parts: OnePattern
    shape: tuple[int, ...]
    over: str

    @property
    def part(self) -> Any:
        """The pattern of one slab, with shapes in the place of its arrays."""
        return jax.tree.map(lambda a: jax.ShapeDtypeStruct(a.shape[1:], a.dtype), self.parts)

    @property
    def number(self) -> int:
        """How many slabs there are."""
        return jax.tree.leaves(self.parts)[0].shape[0]

    @property
    def entry(self) -> tuple[int, int]:
        """Inputs and outputs of an entry."""
        return self.parts.entry

    @property
    def nnz(self) -> int:
        """Number of values, those of padding included: slabs * those of a slab."""
        return self.number * self.part.nnz


@arguments(
    mask=rules.host_array(),
    like=rules.one_of(OnePattern, "a pattern of a whole matrix or kernel"),
    slabs=rules.whole(1),
    over=rules.word,
    capacity=rules.optional(rules.whole(0)),
)
def make_slabs(mask: np.ndarray, like: OnePattern, slabs: int, over: str, *, capacity: int | None = None) -> Slabs:
    """The patterns of a weight's slabs, on the host.

    Args:
      mask: bool[in, out], or that of a convolution's kernel, outputs last.
      like: a pattern of the whole weight: the slabs get its kernel and its blocks.
      slabs: how many slabs there are; each must have whole entries (runs, tiles) of `like`.
      over: the mesh axis whose devices hold a slab each.
      capacity: how many entries each slab has room for. Default: 9/8 of the fullest slab's. Those of n:m are as many as
        they are.

    Raises:
      ValueError: outputs that do not divide, a mask that does not fit the kernel or the capacity.

    >>> mask = np.eye(4, dtype=bool)
    >>> slabs = make_slabs(mask, families.pattern.make_pattern(mask), 2, "model")
    >>> slabs.number, slabs.parts.shape
    (2, (4, 2))
    """
    if mask.ndim != len(like.shape) or not divides(slabs, mask.shape, like.entry):
        raise ValueError(
            f"make_slabs: mask must have {len(like.shape)} axes, and outputs that {slabs} slabs of runs of "
            f"{like.entry[1]} divide, got {mask.shape}"
        )
    if capacity is None:
        capacity = room_for(mask, slabs, like.entry)
    narrow = _of_width(like, mask.shape[-1] // slabs)
    made = [family(like).module.rebuild(narrow, part, capacity) for part in np.split(mask, slabs, axis=-1)]
    return Slabs(jax.tree.map(lambda *a: jnp.stack(a), *made), tuple(mask.shape), over)


def parted(matrix: Any) -> tuple[int, Any]:
    """The number of the slabs of a matrix and their pattern; 1 and the pattern itself where it has none."""
    return (matrix.number, matrix.parts) if isinstance(matrix, Slabs) else (1, matrix)


def as_kernel(matrix: Any) -> Any:
    """The pattern of a matrix as that of the kernel of a convolution, of one pixel."""
    if isinstance(matrix, Slabs):
        matrix = dataclasses.replace(matrix, parts=as_kernel(matrix.parts))
    return dataclasses.replace(matrix, shape=(1, 1, *matrix.shape))


def divides(slabs: int, shape: tuple[int, ...], entry: tuple[int, int]) -> bool:
    """Whether so many slabs divide the outputs of a weight, in whole entries."""
    return shape[-1] % (slabs * entry[1]) == 0


def fullest(mask: np.ndarray, slabs: int, entry: tuple[int, int]) -> int:
    """How many entries the fullest of so many slabs of a mask has."""
    return max(int(part.sum()) for part in np.split(mask, slabs, axis=-1)) // math.prod(entry)


def room_for(mask: np.ndarray, slabs: int, entry: tuple[int, int]) -> int:
    """The default capacity."""
    return min(math.ceil(ROOM * fullest(mask, slabs, entry)), mask.size // (slabs * math.prod(entry)))


def rebuild(at: Slabs, mask: np.ndarray, capacity: int | None) -> Slabs:
    """The slabs of another mask, with the same kernel."""
    return make_slabs(mask, at.parts, at.number, at.over, capacity=capacity)


def empty(like: OnePattern, slabs: int, over: str) -> Slabs:
    """For `rebuild`: slabs with the kernel of a pattern of the whole weight, and nothing in them."""
    narrow = _of_width(like, like.shape[-1] // slabs)
    parts = jax.tree.map(lambda a: jax.ShapeDtypeStruct((slabs, 0, *a.shape[1:]), a.dtype), narrow)
    return Slabs(parts, tuple(like.shape), over)


def whole(at: Slabs) -> OnePattern:
    """For `rebuild`: a pattern of the whole weight with the kernel of its slabs, and shapes in the place of arrays."""
    return _of_width(at.part, at.shape[-1])


def _of_width(like: Any, outputs: int) -> Any:
    """The pattern as one of a weight of so many outputs, for `rebuild`."""
    return dataclasses.replace(like, shape=(*like.shape[:-1], outputs))


def count(at: Slabs) -> Array:
    """How many entries are no padding; under jit too."""
    return jax.vmap(family(at.parts).module.count)(at.parts).sum()


def check_sizes(who: str, at: Slabs) -> None:
    """ValueError if the slabs do not have the number and the shape that the weight's shape implies; under jit too."""
    if not isinstance(at, Slabs) or not isinstance(at.parts, OnePattern):
        raise ValueError(f"{who}: expected Slabs, got {kind(at)}")
    numbers = {getattr(a, "shape", ())[:1] for a in jax.tree.leaves(at.parts)}
    *lead, width = at.parts.shape
    if len(numbers) != 1 or numbers == {()} or tuple(at.shape) != (*lead, width * at.number):
        raise ValueError(f"{who}: Slabs of shape {shown(at.shape)} need parts that make it up, got {kind(at.parts)}")
    family(at.parts).module.check_sizes(who, at.part)


def check_content(who: str, at: Slabs) -> None:
    """ValueError if a part is not the pattern that its entries would give. Accepts traced arrays."""
    check_sizes(who, at)
    if arrays.host(*jax.tree.leaves(at.parts)) is not None:
        host = jax.tree.map(np.asarray, at.parts)
        for k in range(at.number):
            family(at.parts).module.check_content(who, jax.tree.map(lambda a, k=k: a[k], host))


def clear_padding(values: Array, at: Slabs) -> Array:
    """The values [nnz], with 0 in the places that are padding."""
    return jax.vmap(families.clear_padding)(values.reshape(at.number, -1), at.parts).reshape(-1)


@jax.jit
def gather(dense: Array, at: Slabs) -> Array:
    """The values of a dense weight in storage order, [nnz], 0 for padding."""
    return jax.vmap(family(at.parts).gather)(_split(dense, at), at.parts).reshape(-1)


@jax.jit
def scatter(values: Array, at: Slabs) -> Array:
    """The dense weight of values [nnz]; zeros elsewhere."""
    return _joined(jax.vmap(family(at.parts).scatter)(values.reshape(at.number, -1), at.parts))


def matmul(x: Array, values: Array, at: Slabs, *, transpose: bool = False) -> Array:
    """x[..., in] @ W -> [..., out], or x[..., out] @ W.T -> [..., in], slab after slab; see `matmul` of linear.

    Raises:
      ValueError: sizes that do not fit the slabs.
    """
    check_sizes("matmul", at)
    arrays.check_operands("matmul", x, values, inputs=at.shape[int(transpose)], nnz=at.nnz)
    product = functools.partial(family(at.parts).matmul, transpose=transpose)
    return one_by_one(product, x, values, at, (transpose, not transpose))


def one_by_one(product: Callable[..., Array], x: Array, values: Array, at: Slabs, cut: tuple[bool, bool]) -> Array:
    """The product of x and a weight, of one slab after another.

    Args:
      product: `(x, values, pattern) -> y` of a slab.
      x: the other operand.
      values: of all slabs.
      at: the slabs.
      cut: whether a slab takes its part of the last axis of x, and gives its part of the last axis of y. What is no
        part of y is a term of a sum. A term has the dtype of y: short floats are rounded before they are summed.
    """
    parts = values.reshape(at.number, -1), at.parts
    if cut[0]:
        y = jax.lax.map(lambda pair: product(pair[0], *pair[1]), (_split(x, at), parts))
    else:
        y = jax.lax.map(lambda part: product(x, *part), parts)
    return _joined(y) if cut[1] else y.sum(axis=0)


def _split(x: Array, at: Slabs) -> Array:
    """The last axis in parts, first."""
    return jnp.moveaxis(x.reshape(*x.shape[:-1], at.number, x.shape[-1] // at.number), -2, 0)


def _joined(parts: Array) -> Array:
    """The inverse of `_split`."""
    x = jnp.moveaxis(parts, 0, -2)
    return x.reshape(*x.shape[:-2], -1)
