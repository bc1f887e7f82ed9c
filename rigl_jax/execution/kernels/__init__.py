"""Sparse kernels behind one interface: `make_pattern`, `gather`, `scatter`, `matmul`, `conv`.

    pattern = kernels.make_pattern(mask)             # host, at every rewiring
    values = kernels.gather(kernel, pattern)         # [nnz], what the optimizer sees
    y = kernels.matmul(x, values, pattern)           # differentiable in x and values
    kernel = kernels.scatter(values, pattern)        # the dense weight again

`Pattern` (unstructured, constant fan-in, runs of 4, 8 or 16 outputs, convolutions) runs natively on CPUs and in plain
JAX elsewhere; `BlockPattern` (whole tiles) and `NMPattern` (n of every m inputs) in plain XLA everywhere. `Folded` is
any of them for a weight of more axes that a model uses as a matrix.
`backends()` says what there is.
"""

from __future__ import annotations

import dataclasses
from typing import Any, NamedTuple

import jax
import numpy as np

from rigl_jax import arguments as rules
from rigl_jax import native
from rigl_jax.arguments import arguments
from rigl_jax.execution.kernels import block, folded, linear, n_of_m, pattern
from rigl_jax.execution.kernels.block import BlockPattern, make_block_pattern
from rigl_jax.execution.kernels.conv import conv
from rigl_jax.execution.kernels.folded import Folded, as_matrix, squarest_split
from rigl_jax.execution.kernels.n_of_m import NMPattern, make_nm_pattern
from rigl_jax.execution.kernels.pattern import Pattern, coordinates, make_pattern, make_pattern_at

__all__ = [
    "AnyPattern",
    "Backend",
    "BlockPattern",
    "Folded",
    "NMPattern",
    "Pattern",
    "as_matrix",
    "backends",
    "check",
    "conv",
    "coordinates",
    "gather",
    "make_block_pattern",
    "make_nm_pattern",
    "make_pattern",
    "make_pattern_at",
    "matmul",
    "rebuild",
    "scatter",
    "squarest_split",
]

Array = jax.Array


class Backend(NamedTuple):
    """Whether a family of kernels is there, and which, or why not."""

    available: bool
    detail: str


def backends() -> dict[str, Backend]:
    """What this process can run: native CPU kernels (and their instruction sets), and plain JAX.

    >>> backends()["jax"].available
    True
    """
    levels = [level for level in native.levels() if level != "avx2_wide"]  # that one is for tests
    detail = f"{levels[-1]} in use, of {', '.join(levels)}" if levels else native.reason()
    return {
        "native": Backend(bool(levels), detail),
        "jax": Backend(True, "any platform: jaxlib's CSR product on the CPU, else a dense product"),
    }


MatrixPattern = Pattern | BlockPattern | NMPattern
AnyPattern = MatrixPattern | Folded
_ANY = rules.one_of(AnyPattern, "a pattern, such as make_pattern gives")


@arguments(who=rules.word, at=_ANY, content=rules.flag)
def check(who: str, at: AnyPattern, *, content: bool = False) -> None:
    """ValueError if a pattern's arrays have not the sizes that its static fields imply.

    Args:
      who: for the message.
      at: the pattern.
      content: also check what the arrays hold, on the host; arrays that are traced pass.
    """
    if isinstance(at, Folded):
        folded.check_sizes(who, at)
        at = at.matrix
    family: Any = block if isinstance(at, BlockPattern) else n_of_m if isinstance(at, NMPattern) else pattern
    (family.check_content if content else family.check_sizes)(who, at)


@arguments(x=rules.array(), values=rules.array(1), at=_ANY, transpose=rules.flag, level=rules.word)
def matmul(x: Array, values: Array, at: AnyPattern, *, transpose: bool = False, level: str = "auto") -> Array:
    """x[..., in] @ W -> [..., out], or x[..., out] @ W.T -> [..., in]; see `matmul` of linear, block and n_of_m.

    Of a `Folded`, `in` and `out` are those of its matrix. `level` concerns `Pattern` only.
    """
    if isinstance(at, Folded):
        at = at.matrix
    if isinstance(at, BlockPattern):
        return block.matmul(x, values, at, transpose=transpose)
    if isinstance(at, NMPattern):
        return n_of_m.matmul(x, values, at, transpose=transpose)
    return linear.matmul(x, values, at, transpose=transpose, level=level)


@arguments(at=_ANY, mask=rules.host_array())
def rebuild(at: AnyPattern, mask: np.ndarray) -> AnyPattern:
    """The pattern of another mask, stored as `at` is: with as many active weights, every static size is kept."""
    if isinstance(at, Folded):
        return dataclasses.replace(at, matrix=_rebuild(at.matrix, mask.reshape(as_matrix(at.shape, at.split))))
    return _rebuild(at, mask)


def _rebuild(at: MatrixPattern, mask: np.ndarray) -> MatrixPattern:
    if isinstance(at, BlockPattern):
        return make_block_pattern(mask, at.tile)
    if isinstance(at, NMPattern):
        return make_nm_pattern(mask, at.n, at.m, width=at.width)
    return make_pattern(mask, height=at.height, block=at.block)


@arguments(dense=rules.array(), at=_ANY)
def gather(dense: Array, at: AnyPattern) -> Array:
    """The values [nnz] of a dense weight, in the order in which `at` stores them."""
    if not isinstance(at, AnyPattern) or jax.numpy.shape(dense) != tuple(at.shape):
        wanted = tuple(at.shape) if isinstance(at, AnyPattern) else "a pattern"
        raise ValueError(f"gather: dense must have the pattern's shape {wanted}, got {jax.numpy.shape(dense)}")
    check("gather", at)
    if isinstance(at, Folded):
        return gather(dense.reshape(as_matrix(at.shape, at.split)), at.matrix)
    if isinstance(at, BlockPattern):
        return block.gather(dense, at)
    return n_of_m.gather(dense, at) if isinstance(at, NMPattern) else pattern.gather(dense, at)


@arguments(values=rules.array(1), at=_ANY)
def scatter(values: Array, at: AnyPattern) -> Array:
    """The dense weight of values [nnz]: the inverse of `gather`, zeros elsewhere."""
    if not isinstance(at, AnyPattern) or jax.numpy.shape(values) != (at.nnz,):
        wanted = (at.nnz,) if isinstance(at, AnyPattern) else "a pattern"
        raise ValueError(f"scatter: values must have shape {wanted}, got {jax.numpy.shape(values)}")
    check("scatter", at)
    if isinstance(at, Folded):
        return scatter(values, at.matrix).reshape(at.shape)
    if isinstance(at, BlockPattern):
        return block.scatter(values, at)
    return n_of_m.scatter(values, at) if isinstance(at, NMPattern) else pattern.scatter(values, at)
