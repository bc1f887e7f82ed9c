"""Sparse kernels behind one interface: `make_pattern`, `gather`, `scatter`, `matmul`, `conv`.

    pattern = kernels.make_pattern(mask)             # host, at every rewiring
    values = kernels.gather(kernel, pattern)         # [nnz], what the optimizer sees
    y = kernels.matmul(x, values, pattern)           # differentiable in x and values
    kernel = kernels.scatter(values, pattern)        # the dense weight again

`Pattern` (unstructured, constant fan-in, runs of 4, 8 or 16 outputs, convolutions) runs on native kernels on CPUs, on
others on NVIDIA's GPUs where weights are sparse enough for them (`cuda.pays`), and in plain JAX elsewhere;
`BlockPattern` (whole tiles) and `NMPattern` (n of every m inputs) run in plain XLA everywhere. `Folded` is any of them
for a weight of more axes that a model uses as a matrix, `Moved` a `Pattern` for a convolution's kernel whose axes have
another order, `Slabs` one of the first three for each device's outputs, `Stacked` a `Pattern`, alone or in those, for
each of the layers that a scan uses. `backends()` lists what is available.
"""

from __future__ import annotations

import dataclasses
import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from rigl_jax import arguments as rules
from rigl_jax import native
from rigl_jax.arguments import arguments
from rigl_jax.execution.kernels import arrays, families, folded, slabs, stacked
from rigl_jax.execution.kernels.block import BlockPattern, make_block_pattern
from rigl_jax.execution.kernels.conv import conv
from rigl_jax.execution.kernels.folded import Folded, Moved, as_matrix, inward, matrix_of, outward, squarest_split
from rigl_jax.execution.kernels.n_of_m import NMPattern, make_nm_pattern
from rigl_jax.execution.kernels.pattern import Pattern, coordinates, make_pattern, make_pattern_at
from rigl_jax.execution.kernels.slabs import Slabs, make_slabs
from rigl_jax.execution.kernels.stacked import Stacked, kernel_of
from rigl_jax.messages import shown
from rigl_jax.native import cuda as cuda_library

__all__ = [
    "AnyPattern",
    "Backend",
    "BlockPattern",
    "Folded",
    "Moved",
    "NMPattern",
    "Pattern",
    "Slabs",
    "Stacked",
    "as_matrix",
    "backends",
    "capacity",
    "check",
    "clear_padding",
    "conv",
    "coordinates",
    "count",
    "gather",
    "make_block_pattern",
    "make_nm_pattern",
    "make_pattern",
    "make_pattern_at",
    "make_slabs",
    "make_stacked",
    "matmul",
    "rebuild",
    "scatter",
    "squarest_split",
]

Array = jax.Array


class Backend(NamedTuple):
    """Whether a family of kernels is available, and which kernels or the reason why not."""

    available: bool
    detail: str


def backends() -> dict[str, Backend]:
    """What this process can run: native CPU kernels (and their instruction sets), those for GPUs, and plain JAX.

    `cuda` says whether programs that are compiled for NVIDIA's GPUs get the kernels, not whether there is a GPU.

    >>> backends()["jax"].available
    True
    """
    levels = [level for level in native.levels() if level not in ("avx2_wide", "avx512_bf16")]  # the first is for tests
    detail = f"{levels[-1]} in use, of {', '.join(levels)}" if levels else native.reason()
    if native.multiplies_halves("auto"):
        detail += "; products of bfloat16 by AVX512-BF16"
    return {
        "native": Backend(bool(levels), detail),
        "cuda": Backend(cuda_library.serves(), cuda_library.reason() or "selection, single weights, runs of 16"),
        "jax": Backend(True, "any platform: jaxlib's CSR product on the CPU, else a dense product"),
    }


def native_in_use() -> bool:
    """Whether products of this process run on the native kernels."""
    return native.library() is not None and jax.default_backend() == "cpu"


MatrixPattern = families.OnePattern | Slabs
LayerPattern = MatrixPattern | Folded | Moved
AnyPattern = LayerPattern | Stacked
_LAYER = rules.one_of(LayerPattern, "a pattern of one layer, such as make_pattern gives")
_ANY = rules.one_of(AnyPattern, "a pattern, such as make_pattern gives")
_FAMILIES = {**families.FAMILIES, Slabs: families.Family(slabs, slabs.matmul, slabs.gather, slabs.scatter)}


@arguments(who=rules.word, at=_ANY, content=rules.flag)
def check(who: str, at: AnyPattern, *, content: bool = False) -> None:
    """ValueError if the arrays of a pattern do not have the sizes that its static fields imply.

    Args:
      who: for the message.
      at: the pattern.
      content: also check the content of the arrays, on the host; that of traced arrays is not checked.
    """
    if isinstance(at, Stacked):
        stacked.check_sizes(who, at)
        known = content and arrays.host(*jax.tree.leaves(at.layers)) is not None
        for layer in _layers(at) if known else (at.layer,):
            check(who, layer, content=known)
        return
    if isinstance(at, (Folded, Moved)):
        folded.check_sizes(who, at)
        at = at.matrix
    module = _FAMILIES[type(at)].module
    (module.check_content if content else module.check_sizes)(who, at)


def _layers(at: Stacked) -> list[Any]:
    """The pattern of each layer, on the host."""
    host = jax.tree.map(np.asarray, at.layers)
    return [jax.tree.map(lambda a, k=k: a[k], host) for k in range(at.shape[0])]


@arguments(x=rules.array(), values=rules.array(1), at=_LAYER, transpose=rules.flag, level=rules.word)
def matmul(x: Array, values: Array, at: LayerPattern, *, transpose: bool = False, level: str = "auto") -> Array:
    """x[..., in] @ W -> [..., out], or x[..., out] @ W.T -> [..., in]; see `matmul` of linear, block and n_of_m.

    For a `Folded`, `in` and `out` are those of its matrix. Only `Pattern` uses `level`.
    """
    at = matrix_of(at)
    options = {"level": level} if isinstance(at, Pattern) else {}
    return _FAMILIES[type(at)].matmul(x, values, at, transpose=transpose, **options)


@arguments(at=_ANY, mask=rules.host_array(), capacity=rules.optional(rules.whole(0)))
def rebuild(at: AnyPattern, mask: np.ndarray, *, capacity: int | None = None) -> AnyPattern:
    """The pattern of another mask for the kernel of `at`; with as many entries, all static sizes are equal.

    So are those of slabs into which the mask fits, if no capacity is given.

    Args:
      at: the pattern.
      mask: bool of its shape.
      capacity: how many entries, such as runs or tiles, there is to be room for, see `make_pattern`; in each layer of a
        `Stacked`, and in each slab. An `NMPattern` has as many as it has.
    """
    if capacity is None and isinstance(kernel_of(at), Slabs) and least(at, mask) <= at.nnz:
        capacity = _capacity(at)
    if isinstance(at, Stacked):
        return make_stacked(mask, at.layer, capacity=capacity)
    if isinstance(at, (Folded, Moved)):
        matrix = _FAMILIES[type(at.matrix)].module.rebuild(at.matrix, inward(mask, at), capacity)
        return dataclasses.replace(at, matrix=matrix)
    return _FAMILIES[type(at)].module.rebuild(at, mask, capacity)


@arguments(mask=rules.host_array(), like=_LAYER, capacity=rules.optional(rules.whole(0)))
def make_stacked(mask: np.ndarray, like: LayerPattern, *, capacity: int | None = None) -> Stacked:
    """The patterns of stacked layers, bool[layers, ...], on the host.

    Args:
      mask: one or more layers.
      like: a `Pattern`, in slabs or not, or a `Folded` or `Moved` of that, of any of these layers: all get its kernel
        and its blocks.
      capacity: how many entries each layer, and each of its slabs, has room for. Default: as many as the fullest has;
        for slabs see `make_slabs`.

    Raises:
      ValueError: no layer, another kind of pattern, or a mask that does not fit its kernel.

    >>> mask = np.stack([np.eye(4, dtype=bool), np.zeros((4, 4), bool)])
    >>> stack = make_stacked(mask, make_pattern(mask[0]))
    >>> stack.nnz, count(stack)
    (8, 4)
    """
    if not isinstance(slabs.parted(matrix_of(like))[1], Pattern):
        raise ValueError(f"make_stacked: like must be a Pattern, or Slabs, a Folded or Moved of one, got {shown(like)}")
    if mask.shape[1:] != tuple(like.shape) or not len(mask):
        expected = ", ".join(("layers", *map(str, like.shape)))
        raise ValueError(f"make_stacked: mask must have shape ({expected}), with one layer or more, got {mask.shape}")
    if capacity is None:
        capacity = max(_room(like, layer) for layer in mask)
    layers = [rebuild(like, layer, capacity=capacity) for layer in mask]
    return Stacked(jax.tree.map(lambda *a: jnp.stack(a), *layers), mask.shape)


def _room(at: LayerPattern, mask: np.ndarray) -> int:
    """The default capacity for a mask."""
    matrix, mask = matrix_of(at), inward(mask, at)
    if isinstance(matrix, Slabs):
        return slabs.room_for(mask, matrix.number, matrix.entry)
    return slabs.fullest(mask, 1, matrix.entry)


def least(at: AnyPattern, mask: np.ndarray) -> int:
    """How many values a pattern with the kernel of `at` has for a mask: each layer, or slab, as many as the fullest."""
    if isinstance(at, Stacked):
        return at.shape[0] * max(least(at.layer, layer) for layer in mask)
    matrix = matrix_of(at)
    number = slabs.parted(matrix)[0]
    return number * math.prod(matrix.entry) * slabs.fullest(inward(mask, at), number, matrix.entry)


@arguments(at=_ANY)
def count(at: AnyPattern) -> int:
    """How many of the values are of weights, and not of padding; on the host.

    >>> count(make_pattern(np.eye(4, dtype=bool), capacity=6))
    4
    """
    return int(_entries(at)) * math.prod(kernel_of(at).entry)


def _entries(at: AnyPattern) -> Array:
    if isinstance(at, Stacked):
        return jax.vmap(_entries)(at.layers).sum()
    at = matrix_of(at)
    return _FAMILIES[type(at)].module.count(at)


@arguments(at=_ANY)
def capacity(at: AnyPattern) -> int:
    """How many entries a pattern has room for.

    Of a `Stacked` it is the room of each layer, of `Slabs` that of each slab.

    >>> capacity(make_pattern(np.eye(4, dtype=bool), capacity=6))
    6
    """
    return _capacity(at)


def _capacity(at: AnyPattern) -> int:
    one = kernel_of(at)
    return one.nnz // (slabs.parted(one)[0] * math.prod(one.entry))


@arguments(values=rules.array(1), at=_ANY)
def clear_padding(values: Array, at: AnyPattern) -> Array:
    """The values [nnz], with 0 in the places that are padding.

    >>> clear_padding(jnp.ones(4), make_pattern(np.eye(2, dtype=bool), capacity=4)).tolist()
    [1.0, 1.0, 0.0, 0.0]
    """
    if isinstance(at, Stacked):
        return stacked.flat(jax.vmap(clear_padding)(stacked.in_layers(values, at), at.layers), at)
    at = matrix_of(at)
    return slabs.clear_padding(values, at) if isinstance(at, Slabs) else families.clear_padding(values, at)


@arguments(dense=rules.array(), at=_ANY)
def gather(dense: Array, at: AnyPattern) -> Array:
    """The values [nnz] of a dense weight, in the order in which `at` stores them."""
    if dense.shape != tuple(at.shape):
        raise ValueError(f"gather: dense must have the pattern's shape {tuple(at.shape)}, got {dense.shape}")
    check("gather", at)
    if isinstance(at, Stacked):
        return stacked.flat(jax.vmap(gather)(dense, at.layers), at)
    if isinstance(at, (Folded, Moved)):
        return gather(inward(dense, at), at.matrix)
    return _FAMILIES[type(at)].gather(dense, at)


@arguments(values=rules.array(1), at=_ANY)
def scatter(values: Array, at: AnyPattern) -> Array:
    """The dense weight of values [nnz]: the inverse of `gather`, zeros elsewhere."""
    if values.shape != (at.nnz,):
        raise ValueError(f"scatter: values must have shape {(at.nnz,)}, got {values.shape}")
    check("scatter", at)
    if isinstance(at, Stacked):
        return jax.vmap(scatter)(stacked.in_layers(values, at), at.layers)
    if isinstance(at, (Folded, Moved)):
        return outward(scatter(values, at.matrix), at)
    return _FAMILIES[type(at)].scatter(values, at)
