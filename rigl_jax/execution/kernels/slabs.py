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
from rigl_jax.execution.kernels import arrays, linear, moving, pattern
from rigl_jax.execution.kernels.pattern import Pattern
from rigl_jax.messages import kind, shown

Array = jax.Array
ROOM = 1.125
"""Size of the slabs, in units of the fullest: the fullest of the next mask may hold more."""


@functools.partial(jax.tree_util.register_dataclass, data_fields=["parts"], meta_fields=["shape", "over"])
@dataclasses.dataclass(frozen=True)
class Slabs:
    """The patterns of a weight's slabs. All have the same sizes, with padding.

    Values are those of the first slab, then those of the second, and so on.

    Attributes:
      parts: pattern of a slab [..., out // slabs], whose arrays have one more axis, of slabs, in front.
      shape: of the dense weight, as in `Pattern`; static.
      over: the mesh axis whose devices hold a slab each; static.
    """

    parts: Pattern
    shape: tuple[int, ...]
    over: str

    @property
    def part(self) -> Any:
        """The pattern of one slab, with shapes in the place of its arrays."""
        return jax.tree.map(lambda a: jax.ShapeDtypeStruct(a.shape[1:], a.dtype), self.parts)

    @property
    def number(self) -> int:
        """How many slabs there are."""
        return self.parts.starts.shape[0]

    @property
    def nnz(self) -> int:
        """Number of values, those of padding included: slabs * those of a slab."""
        return self.number * self.part.nnz


@arguments(
    mask=rules.host_array(),
    like=rules.one_of(Pattern, "a Pattern"),
    slabs=rules.whole(1),
    over=rules.word,
    capacity=rules.optional(rules.whole(0)),
)
def make_slabs(mask: np.ndarray, like: Pattern, slabs: int, over: str, *, capacity: int | None = None) -> Slabs:
    """The patterns of a weight's slabs, on the host.

    Args:
      mask: bool[in, out], or that of a convolution's kernel, outputs last.
      like: a pattern of the whole weight: the slabs get its height and its blocks.
      slabs: how many slabs there are; the outputs must be a multiple of `slabs * like.height`.
      over: the mesh axis whose devices hold a slab each.
      capacity: how many entries (runs of `like.height`) each slab has room for. Default: 9/8 of the fullest slab's.

    Raises:
      ValueError: outputs that do not divide, a mask that does not fit the pattern's height or the capacity.

    >>> mask = np.eye(4, dtype=bool)
    >>> slabs = make_slabs(mask, pattern.make_pattern(mask), 2, "model")
    >>> slabs.number, slabs.parts.shape
    (2, (4, 2))
    """
    if mask.ndim != len(like.shape) or mask.shape[-1] % (slabs * like.height):
        raise ValueError(
            f"make_slabs: mask must have {len(like.shape)} axes, and outputs that {slabs} slabs of runs of "
            f"{like.height} divide, got {mask.shape}"
        )
    masks = np.split(mask, slabs, axis=-1)
    if capacity is None:
        most = masks[0].size // like.height
        capacity = min(math.ceil(ROOM * max(int(m.sum()) // like.height for m in masks)), most)
    rows_t = masks[0].shape[-1] // like.height * like.taps
    sizes = {"block": like.block, "block_t": max(1, min(like.block_t, rows_t)), "capacity": capacity}
    made = [pattern.make_pattern(m, height=like.height, **sizes) for m in masks]
    return Slabs(jax.tree.map(lambda *a: jnp.stack(a), *made), tuple(mask.shape), over)


def rebuild(at: Slabs, mask: np.ndarray, capacity: int | None) -> Slabs:
    """The slabs of another mask, with the same kernel; of the same size where they fit and no capacity is given."""
    if capacity is None and least(at, mask) <= at.nnz:
        capacity = room(at)
    return make_slabs(mask, at.parts, at.number, at.over, capacity=capacity)


def least(at: Slabs, mask: np.ndarray) -> int:
    """How many values slabs of a mask must have room for, each as many as the fullest holds."""
    return at.number * max(int(part.sum()) for part in np.split(mask, at.number, axis=-1))


def room(at: Slabs) -> int:
    """How many entries a slab has room for."""
    return at.part.nnz // at.parts.height


def count(at: Slabs) -> int:
    """How many entries are no padding; on the host."""
    return int(at.parts.starts[:, -1].sum())


def check_sizes(who: str, at: Slabs) -> None:
    """ValueError if the slabs do not have the number and the shape that the weight's shape implies; under jit too."""
    if not isinstance(at, Slabs) or not isinstance(at.parts, Pattern):
        raise ValueError(f"{who}: expected Slabs, got {kind(at)}")
    numbers = {getattr(a, "shape", ())[:1] for a in jax.tree.leaves(at.parts)}
    *lead, width = at.parts.shape
    if len(numbers) != 1 or numbers == {()} or tuple(at.shape) != (*lead, width * at.number):
        raise ValueError(f"{who}: Slabs of shape {shown(at.shape)} need parts that make it up, got {kind(at.parts)}")
    pattern.check_sizes(who, at.part)


def check_content(who: str, at: Slabs) -> None:
    """ValueError if a part is not the pattern that `make_pattern_at` builds from its entries. Accepts traced arrays."""
    check_sizes(who, at)
    if arrays.host(*jax.tree.leaves(at.parts)) is not None:
        host = jax.tree.map(np.asarray, at.parts)
        for k in range(at.number):
            pattern.check_content(who, jax.tree.map(lambda a, k=k: a[k], host))


def clear_padding(values: Array, at: Slabs, clear: Callable[[Array, Pattern], Array]) -> Array:
    """The values [nnz], with 0 in the places that are padding; `clear` does so for a slab."""
    return jax.vmap(clear)(values.reshape(at.number, -1), at.parts).reshape(-1)


@jax.jit
def gather(dense: Array, at: Slabs) -> Array:
    """The values of a dense weight in storage order, [nnz], 0 for padding."""
    return jax.vmap(moving.gather)(_split(dense, at), at.parts).reshape(-1)


@jax.jit
def scatter(values: Array, at: Slabs) -> Array:
    """The dense weight of values [nnz]; zeros elsewhere."""
    parts = jax.vmap(moving.scatter)(values.reshape(at.number, -1), at.parts)
    return _joined(parts)


def matmul(x: Array, values: Array, at: Slabs, *, transpose: bool = False) -> Array:
    """x[..., in] @ W -> [..., out], or x[..., out] @ W.T -> [..., in], slab after slab; see `matmul` of linear.

    Raises:
      ValueError: sizes that do not fit the slabs.
    """
    check_sizes("matmul", at)
    arrays.check_operands("matmul", x, values, inputs=at.shape[int(transpose)], nnz=at.nnz)
    product = functools.partial(linear.matmul, transpose=transpose)
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
