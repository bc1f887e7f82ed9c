"""Weights whose axes are not those of their pattern.

`Folded`: of more than two axes, used as a matrix: attention's [in, heads, size] and [heads, size, out], and the kernels
[taps, in, out] of 1-D convolutions. `Moved`: the kernels [out, in, ...] of Equinox and PyTorch.
"""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from rigl_jax import arguments as rules
from rigl_jax.arguments import arguments
from rigl_jax.execution.kernels.block import BlockPattern
from rigl_jax.execution.kernels.n_of_m import NMPattern
from rigl_jax.execution.kernels.pattern import Pattern
from rigl_jax.execution.kernels.slabs import Slabs


@functools.partial(jax.tree_util.register_dataclass, data_fields=["matrix"], meta_fields=["shape", "split"])
@dataclasses.dataclass(frozen=True)
class Folded:
    """The pattern of a weight that is stored as a matrix: its first axes are the inputs, the others the outputs.

    Where the model stores outputs first, both are exchanged.

    Attributes:
      matrix: pattern of the weight reshaped to [prod(shape[:split]), prod(shape[split:])].
      shape: of the dense weight; static.
      split: how many axes are inputs; static.
    """

    matrix: Pattern | BlockPattern | NMPattern | Slabs
    shape: tuple[int, ...]
    split: int

    @property
    def nnz(self) -> int:
        """Number of values."""
        return self.matrix.nnz


@functools.partial(jax.tree_util.register_dataclass, data_fields=["matrix"], meta_fields=["shape", "axes"])
@dataclasses.dataclass(frozen=True)
class Moved:
    """The pattern of the kernel of a convolution whose axes have another order than WIO, HWIO or DHWIO.

    Attributes:
      matrix: pattern of the weight transposed by `axes`; for WIO, of that as a matrix [taps * in, out].
      shape: of the dense weight; static.
      axes: those of the weight in the order of the pattern: its window, inputs, outputs; static.
    """

    matrix: Pattern | BlockPattern | NMPattern | Slabs
    shape: tuple[int, ...]
    axes: tuple[int, ...]

    @property
    def nnz(self) -> int:
        """Number of values."""
        return self.matrix.nnz

    @property
    def transposed(self) -> tuple[int, ...]:
        """The shape of the weight transposed by `axes`."""
        return tuple(self.shape[axis] for axis in self.axes)


def matrix_of(pattern: Any) -> Any:
    """The pattern of what a weight is used as: that in a `Folded` or `Moved`, else the pattern itself."""
    return pattern.matrix if isinstance(pattern, (Folded, Moved)) else pattern


def inward(dense: Any, pattern: Any) -> Any:
    """A dense weight in the shape of `matrix_of(pattern)`."""
    if isinstance(pattern, Moved):
        return dense.transpose(pattern.axes).reshape(pattern.matrix.shape)
    return dense.reshape(as_matrix(pattern.shape, pattern.split)) if isinstance(pattern, Folded) else dense


def outward(dense: Any, pattern: Folded | Moved) -> Any:
    """The inverse of `inward`."""
    if isinstance(pattern, Moved):
        return dense.reshape(pattern.transposed).transpose(np.argsort(pattern.axes))
    return dense.reshape(pattern.shape)


def check_sizes(who: str, pattern: Folded | Moved) -> None:
    """ValueError if the matrix does not have the shape that the static fields imply. Works under jit."""
    if isinstance(pattern, Moved):
        sound = sorted(pattern.axes) == list(range(len(pattern.shape)))
        if not sound or tuple(pattern.matrix.shape) not in (pattern.transposed, as_matrix(pattern.transposed, 2)):
            raise ValueError(
                f"{who}: a Moved of shape {pattern.shape} with axes {pattern.axes} needs a pattern of that transposed, "
                f"got one of shape {pattern.matrix.shape}"
            )
        return
    if not 0 < pattern.split < len(pattern.shape) or as_matrix(pattern.shape, pattern.split) != pattern.matrix.shape:
        raise ValueError(
            f"{who}: a Folded of shape {pattern.shape} split at {pattern.split} needs a pattern of that matrix, "
            f"got one of shape {pattern.matrix.shape}"
        )


@arguments(shape=rules.shape, split=rules.whole(0))
def as_matrix(shape: tuple[int, ...], split: int) -> tuple[int, int]:
    """(in, out) of a weight whose first `split` axes are inputs.

    >>> as_matrix((64, 8, 16), 1)
    (64, 128)
    """
    return math.prod(shape[:split]), math.prod(shape[split:])


@arguments(shape=rules.shape)
def squarest_split(shape: tuple[int, ...]) -> int:
    """How many of the first axes are inputs: the split that makes the matrix most nearly square, the first if tied.

    This is a guess, since a weight alone does not say which axes are inputs. It is right for projections whose heads
    together are about as wide as the model.

    >>> squarest_split((512, 8, 64)), squarest_split((8, 64, 512))
    (1, 2)
    """
    if len(shape) < 2:
        raise ValueError(f"squarest_split: shape must have at least two axes, got {shape}")
    return min(range(1, len(shape)), key=lambda split: abs(float(np.log(np.divide(*as_matrix(shape, split))))))


def spread(x: jax.Array, apart: Sequence[int]) -> jax.Array:
    """Images with zeros between their pixels, as a transposed convolution reads them."""
    if set(apart) == {1}:
        return x
    return jax.lax.pad(x, jnp.zeros((), x.dtype), [(0, 0, 0), *((0, 0, n - 1) for n in apart), (0, 0, 0)])


def windows(
    x: jax.Array,
    taps: int,
    *,
    stride: int = 1,
    padding: tuple[int, int] = (0, 0),
    dilation: int = 1,
    groups: int = 1,
) -> jax.Array:
    """What a convolution along axis 1 multiplies: x[n, size, ..., in] -> [n, positions, ..., taps * in].

    Of each group of channels in turn, all taps; of each tap, the channels. It copies x `taps / stride` times.

    Args:
      x: the images, channels last.
      taps: of the kernel.
      stride: from one position to the next.
      padding: how many zeros are added before and after.
      dilation: from one tap to the next.
      groups: parts of equal size into which the channels are divided.

    >>> windows(jnp.arange(4).reshape(1, 4, 1), 2)[0].tolist()
    [[0, 1], [1, 2], [2, 3]]
    """
    x = jnp.pad(x, ((0, 0), padding, *((0, 0),) * (x.ndim - 2)))
    x = x.reshape(*x.shape[:-1], groups, x.shape[-1] // groups)
    end = max(0, x.shape[1] - dilation * (taps - 1))
    seen = [x[:, tap * dilation : tap * dilation + end : stride] for tap in range(taps)]
    return jnp.concatenate(seen, axis=-1).reshape(*seen[0].shape[:-2], taps * groups * x.shape[-1])
