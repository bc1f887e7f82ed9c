"""y = x @ W for a W with n active weights in every m consecutive inputs, in plain XLA on any backend.

The n values and their places (one byte each) are stored. If runs of `width` consecutive outputs share their places, the
inputs of each run are gathered and multiplied as one smaller dense product: n / m of the work. With width 1 every
output has places of its own, and only special hardware can use them: W is made dense for the call, which saves memory
but no time.
"""

from __future__ import annotations

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np

from rigl_jax import arguments as rules
from rigl_jax.arguments import arguments
from rigl_jax.execution.kernels import arrays
from rigl_jax.execution.kernels.bilinear import varying_alike

Array = jax.Array


@functools.partial(jax.tree_util.register_dataclass, data_fields=["places"], meta_fields=["shape", "n", "m", "width"])
@dataclasses.dataclass(frozen=True)
class NMPattern:
    """Which n of every m consecutive inputs are active.

    Attributes:
      places: uint8[in // m, n, out // width], input within its group of m, ascending.
      shape: (in, out) of the dense weight; static.
      n: active weights in a group; static.
      m: inputs in a group, at most 256; static.
      width: consecutive outputs that share their places; static.
    """

    places: Array
    shape: tuple[int, int]
    n: int
    m: int
    width: int

    @property
    def entry(self) -> tuple[int, int]:
        """Inputs and outputs of an entry."""
        return 1, self.width

    @property
    def nnz(self) -> int:
        """Number of values: in * out * n / m."""
        return self.shape[0] // self.m * self.n * self.shape[1]

    @property
    def rows(self) -> Array:
        """int32[in // m * n, out // width]: the input of every entry."""
        group = jnp.arange(self.shape[0] // self.m, dtype=jnp.int32)[:, None, None] * self.m
        return (group + self.places.astype(jnp.int32)).reshape(-1, self.shape[1] // self.width)


@arguments(mask=rules.host_array(), n=rules.whole(1), m=rules.whole(1), width=rules.whole(1))
def make_nm_pattern(mask: np.ndarray, n: int, m: int, *, width: int = 1) -> NMPattern:
    """The pattern of a mask bool[in, out] with n active of every m consecutive inputs, on the host.

    Raises:
      ValueError: another rank, sizes that do not divide, or a mask that is not n:m or not equal within runs.

    >>> make_nm_pattern(np.array([[1], [0], [1], [0]], bool), 2, 4).nnz
    2
    """
    mask = np.asarray(mask, dtype=bool)
    if mask.ndim != 2 or not 0 < n <= m <= 256 or mask.shape[0] % m or mask.shape[1] % width:
        raise ValueError(f"make_nm_pattern: mask (in, out) must divide into {n}:{m} and {width}, got {mask.shape}")
    runs = mask.reshape(mask.shape[0], -1, width)
    groups = runs[..., 0].reshape(-1, m, mask.shape[1] // width)
    if not (runs == runs[..., :1]).all() or not (groups.sum(axis=1) == n).all():
        raise ValueError(f"make_nm_pattern: mask must have {n} of every {m} inputs, alike in runs of {width} outputs")
    places = np.argsort(~groups, axis=1, kind="stable")[:, :n].astype(np.uint8)
    return NMPattern(jnp.asarray(places), (mask.shape[0], mask.shape[1]), n, m, width)


def rebuild(pattern: NMPattern, mask: np.ndarray, capacity: int | None) -> NMPattern:
    """The pattern of another mask. It has as many entries, whatever the capacity: nothing is ever padded."""
    del capacity
    return make_nm_pattern(mask, pattern.n, pattern.m, width=pattern.width)


def count(pattern: NMPattern) -> int:
    """How many entries are no padding: all."""
    return pattern.nnz // pattern.width


def check_sizes(who: str, pattern: NMPattern) -> None:
    """ValueError if the array of a pattern does not have the size that its static fields imply. Works under jit."""
    (inputs, outputs), n, m, width = pattern.shape, pattern.n, pattern.m, pattern.width
    if not 0 < n <= m <= 256 or inputs % m or width < 1 or outputs % width:
        raise ValueError(f"{who}: shape of the NMPattern must divide into {n}:{m} and {width}, got {pattern.shape}")
    arrays.expect(who, pattern, places=(np.uint8, (inputs // m, n, outputs // width)))


def check_content(who: str, pattern: NMPattern) -> None:
    """ValueError if places are outside of their groups, repeated, or out of order. Accepts traced arrays."""
    check_sizes(who, pattern)
    given = arrays.host(pattern.places)
    if given is None or not given[0].size:
        return
    places = given[0]
    if not (places.max() < pattern.m and (places[:, 1:] > places[:, :-1]).all()):
        raise ValueError(f"{who}: the pattern must hold what make_nm_pattern made, got other places ({arrays.HINT})")


def _intact(values: Array, pattern: NMPattern) -> Array:
    return arrays.intact(values, pattern.places.max() < pattern.m) if pattern.places.size else values


@jax.jit
def gather(dense: Array, pattern: NMPattern) -> Array:
    """The values of a dense weight [in, out], [nnz]: row-major in (entry, output)."""
    rows = jnp.repeat(pattern.rows, pattern.width, axis=1)
    return jnp.take_along_axis(dense, rows, axis=0).reshape(-1)


@jax.jit
def scatter(values: Array, pattern: NMPattern) -> Array:
    """The dense weight [in, out] of values [nnz]; zeros elsewhere."""
    inputs, outputs = pattern.shape
    stored = _intact(values, pattern).reshape(inputs // pattern.m, pattern.n, 1, outputs)
    places = jnp.repeat(pattern.places, pattern.width, axis=2)[:, :, None, :]
    here = places == jnp.arange(pattern.m, dtype=jnp.uint8)[None, None, :, None]
    return jnp.where(here, stored, 0).sum(axis=1, dtype=values.dtype).reshape(pattern.shape)


def matmul(x: Array, values: Array, pattern: NMPattern, *, transpose: bool = False) -> Array:
    """x[..., in] @ W -> [..., out], or x[..., out] @ W.T -> [..., in]. Sums in f32; the result has the promoted dtype.

    Raises:
      ValueError: sizes that do not fit the pattern.
    """
    inputs, outputs = pattern.shape[::-1] if transpose else pattern.shape
    check_sizes("n:m matmul", pattern)
    arrays.check_operands("n:m matmul", x, values, inputs=inputs, nnz=pattern.nnz)
    dtype = jnp.result_type(x, values)
    total = jnp.promote_types(dtype, jnp.float32)
    x, values = varying_alike(x, values)  # devices sum the gradients of values, not those of a dense weight
    flat = x.reshape(-1, inputs).astype(dtype)
    if pattern.width == 1 or transpose:
        dense = scatter(values, pattern).astype(dtype)
        y = jnp.matmul(flat, dense.T if transpose else dense, preferred_element_type=total)
    else:
        runs = pattern.shape[1] // pattern.width
        stored = _intact(values, pattern).reshape(-1, runs, pattern.width).astype(dtype)
        y = jnp.einsum("ber,erw->brw", flat[:, pattern.rows], stored, preferred_element_type=total)
    return y.reshape(*x.shape[:-1], outputs).astype(dtype)
