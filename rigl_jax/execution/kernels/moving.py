"""Between a dense weight and the values of its `Pattern`."""

from __future__ import annotations

import math
from collections.abc import Callable

import jax
import jax.numpy as jnp

from rigl_jax import native
from rigl_jax.execution.kernels import arrays, sorting
from rigl_jax.execution.kernels.pattern import Pattern, coordinates, ends_sound
from rigl_jax.topology import topk

Array = jax.Array


def gather(dense: Array, pattern: Pattern) -> Array:
    """The values of a dense weight in storage order, [nnz], 0 for padding; the inverse of `scatter` on the mask."""
    return (_take if _moved_natively(dense, pattern) else plain_gather)(dense, pattern)


def scatter(values: Array, pattern: Pattern) -> Array:
    """The dense weight of values [nnz] in storage order; zeros elsewhere."""
    return (_fill if _moved_natively(values, pattern) else plain_scatter)(values, pattern)


@jax.jit
def plain_gather(dense: Array, pattern: Pattern) -> Array:
    """`gather` in plain JAX."""
    rows, units = coordinates(pattern)
    matrix = sorting.as_rows(dense, pattern.shape).reshape(-1, pattern.units, pattern.height)
    return matrix.at[rows, units].get(mode="fill", fill_value=0).reshape(-1)


@jax.jit
def plain_scatter(values: Array, pattern: Pattern) -> Array:
    """`scatter` in plain JAX: NaN where segments do not end with the entries. The native one refuses any bad index."""
    rows, units = coordinates(pattern)
    values = arrays.intact(values, ends_sound(pattern.starts, pattern.indices))
    matrix = jnp.zeros((pattern.rows, pattern.units, pattern.height), values.dtype)
    matrix = matrix.at[rows, units].set(values.reshape(-1, pattern.height), mode="drop", unique_indices=True)
    return sorting.from_rows(matrix, pattern.shape)


def _moved_natively(x: Array, pattern: Pattern) -> bool:
    """Whether the native library moves numbers between a dense weight and its values: where it selects on a CPU."""
    return jnp.dtype(x.dtype).itemsize <= 4 and pattern.nnz > 0 and topk.native_platform(x) == "cpu"


def _natively(
    target: str, shape: Callable[[Pattern], tuple[int, ...]], plain: Callable[[Array, Pattern], Array]
) -> Callable[[Array, Pattern], Array]:
    """`plain` on the native library: XLA moves single numbers one after another, on one thread.

    Moving is linear, so the derivatives are those of `plain`.
    """

    @jax.custom_jvp
    def move(x: Array, pattern: Pattern) -> Array:
        return jax.lax.platform_dependent(x, pattern, cpu=on_cpu, default=plain)

    def on_cpu(x: Array, p: Pattern) -> Array:
        sizes = {"rows": p.rows, "depth": math.prod(p.shape[:-4]), "taps": p.taps, "outputs": p.shape[-1]}
        sizes |= {"height": p.height, "block": p.block}
        return native.call(target, shape(p), x, p.indices, p.starts, dtype=x.dtype, vmap_method="sequential", **sizes)

    move.defjvp(lambda primals, tangents: (move(*primals), plain(tangents[0], primals[1])))
    return jax.jit(move)


_take = _natively("rigl_take", lambda pattern: (pattern.nnz,), plain_gather)
_fill = _natively("rigl_fill", lambda pattern: tuple(pattern.shape), plain_scatter)
