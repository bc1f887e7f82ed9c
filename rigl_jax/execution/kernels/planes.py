"""The native 2-D convolutions: their geometry, planes and calls.

The kernels interleave images: the same pixel of 4, 8 or 16 images (the vector length of the level) lies side by side,
with margins around each image. A run of pixels is then a run of vectors, and a tap of the kernel is an offset, so one
loop serves all strides and paddings, without im2col. A batch that is not a multiple of the vector length is padded with
zeros, so batches below 8 are correct but inefficient. All sums are float32, and results are rounded while they are
written.

Where the processor multiplies bfloat16, planes of more than 16 bfloat16 images hold bfloat16, of 32 images side by
side. Otherwise these images are converted while planes are made.

The gradient of the input is the same loop over the transposed pattern. With strides, only the taps of its own phase
reach an input pixel, so entries are sorted by phase first and no product is wasted. A pattern does not know into how
many groups a convolution divides its channels: an output reads the planes of its own group, and for the gradient of the
input entries are sorted by group too.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from rigl_jax import native
from rigl_jax.execution.kernels.pattern import Pattern

Array = jax.Array
Pair = tuple[int, int]
Sizes = tuple[int, ...]
ROW_BUFFER = 16384  # ROW_BUFFER in native/kernels.h


class Geometry(NamedTuple):
    """The static arguments of a call, for each axis of the image: (height, width), or (depth, height, width)."""

    image: Sizes
    strides: Sizes
    padding: tuple[Pair, ...]
    dilation: Sizes
    groups: int
    level: str


class _Numbers(NamedTuple):
    """What planes hold.

    Attributes:
      targets: what the names of the native calls begin with.
      images: side by side, at the widest level.
      stored: dtype of the planes.
      values: dtype of the values of a kernel.
    """

    targets: str
    images: int
    stored: Any
    values: Any


_FLOATS = _Numbers("rigl_", 16, np.float32, jnp.float32)
_HALVES = _Numbers("rigl_half_", 32, np.uint16, jnp.bfloat16)


def covered(pattern: Pattern, dilation: Sizes) -> list[int]:
    """Size of what the kernel covers, along each axis of an image."""
    return [(taps - 1) * apart + 1 for taps, apart in zip(pattern.shape[:-2], dilation, strict=True)]


def out_size(geometry: Geometry, pattern: Pattern) -> Sizes:
    """Size of an image of the result."""
    windows = covered(pattern, geometry.dilation)
    sizes = zip(geometry.image, geometry.padding, windows, geometry.strides, strict=True)
    return tuple(max(0, (n + sum(pad) - k) // s + 1) for n, pad, k, s in sizes)


def inputs(geometry: Geometry, pattern: Pattern) -> int:
    """Channels of x."""
    return pattern.shape[-2] * geometry.groups


def fits(pattern: Pattern, geometry: Geometry) -> bool:
    """Whether the native kernels can run this."""
    return _fit(pattern, geometry, _FLOATS)


def _fit(pattern: Pattern, geometry: Geometry, numbers: _Numbers) -> bool:
    """Whether strides fit the buffer of the kernels, and offsets within a group of images int32."""
    rows, columns = _axes(pattern, geometry)
    x = rows.padded * columns.padded * inputs(geometry, pattern)
    dy = rows.padded_t * columns.padded_t * pattern.shape[3]
    return max(geometry.strides) * numbers.images <= ROW_BUFFER and max(x, dy) * numbers.images < 1 << 31


def _numbers(images: Array, pattern: Pattern, geometry: Geometry) -> _Numbers:
    several = images.shape[0] > _FLOATS.images  # fewer would fill at most half of a group of bfloat16
    halves = several and images.dtype == jnp.bfloat16 and native.multiplies_halves(geometry.level)
    return _HALVES if halves and _fit(pattern, geometry, _HALVES) else _FLOATS


class _Margins(NamedTuple):
    """The margins of one axis of a convolution, rows or columns.

    Attributes:
      before: margin before x in its planes.
      padded: size of the planes of x.
      before_t: margin before dy in its planes.
      padded_t: size of the planes of dy.
      shifts: for each tap, the row of the planes of x that it reads for output 0.
      shifts_t: for each tap, the row of the planes of dy that it reads for the first input pixel of its phase.
      phases_t: for each tap, its phase: input pixel modulo stride.
    """

    before: int
    padded: int
    before_t: int
    padded_t: int
    shifts: list[int]
    shifts_t: list[int]
    phases_t: list[int]


def _margins(size: int, out: int, count: int, apart: int, stride: int, pad: int) -> _Margins:
    taps = [k * apart for k in range(count)]
    phases = [(k - pad) % stride for k in taps]
    # Tap k connects input pixel stride * q + phase with output q + shift.
    shifts = [(phase + pad - k) // stride for k, phase in zip(taps, phases, strict=True)]
    before = max(0, -min(shifts))
    padded = before + max(out, -(-size // stride) + max(0, *shifts))
    return _Margins(pad, (out - 1) * stride + taps[-1] + 1, before, padded, taps, [before + s for s in shifts], phases)


def _axes(pattern: Pattern, geometry: Geometry) -> list[_Margins]:
    out, starts = out_size(geometry, pattern), (geometry.padding[0][0], geometry.padding[1][0])
    sizes = zip(geometry.image, out, pattern.shape[:-2], geometry.dilation, geometry.strides, starts, strict=True)
    return [_margins(*axis) for axis in sizes]


def _planes(image: Array, before: Pair, padded: Pair, numbers: _Numbers, level: np.int64) -> Array:
    batch, height, width, channels = image.shape
    room = -(-batch // numbers.images) * numbers.images * padded[0] * padded[1] * channels
    sizes = (batch, height, width, channels, *before, *padded)
    return native.call(f"{numbers.targets}planes", (room,), image, dtype=numbers.stored, sizes=sizes, level=level)


def _x_planes(x: Array, rows: _Margins, columns: _Margins, numbers: _Numbers, level: np.int64) -> Array:
    return _planes(x, (rows.before, columns.before), (rows.padded, columns.padded), numbers, level)


def _dy_planes(dy: Array, rows: _Margins, columns: _Margins, numbers: _Numbers, level: np.int64) -> Array:
    return _planes(dy, (rows.before_t, columns.before_t), (rows.padded_t, columns.padded_t), numbers, level)


def _reader(batch: int, rows: _Margins, columns: _Margins, p: Pattern, geometry: Geometry) -> tuple[int, ...]:
    """The sizes of struct Reader in native/kernels.h, for reading planes of x."""
    planes = (batch, rows.padded, columns.padded, inputs(geometry, p), p.block // p.taps)
    return (*planes, *out_size(geometry, p), p.shape[3], *geometry.strides, 1, 1, geometry.groups)


def forward(x: Array, values: Array, p: Pattern, geometry: Geometry) -> Array:
    """The images y, of the dtype of x: float32 or bfloat16, as in the others."""
    (rows, columns), level = _axes(p, geometry), native.level_number(geometry.level)
    numbers = _numbers(x, p, geometry)
    planes = _x_planes(x, rows, columns, numbers, level)
    return native.call(
        f"{numbers.targets}conv_forward",
        (x.shape[0], *out_size(geometry, p), p.shape[3]),
        *(planes, values.astype(numbers.values), p.indices, p.starts),
        dtype=x.dtype,
        sizes=_reader(x.shape[0], rows, columns, p, geometry),
        rows=rows.shifts,
        columns=columns.shifts,
        level=level,
    )


def input_gradient(dy: Array, values: Array, p: Pattern, geometry: Geometry, dtype: Any = None) -> Array:
    """The images dx, of that dtype; by default of that of dy."""
    (rows, columns), level = _axes(p, geometry), native.level_number(geometry.level)
    numbers, image = _numbers(dy, p, geometry), (*geometry.image, inputs(geometry, p))
    planes = _dy_planes(dy, rows, columns, numbers, level)
    sizes = (dy.shape[0], rows.padded_t, columns.padded_t, p.shape[3], p.block_t // p.taps)
    return native.call(
        f"{numbers.targets}conv_input_gradient",
        (dy.shape[0], *image),
        *(planes, values.astype(numbers.values), p.order_t, p.indices_t, p.starts_t),
        dtype=dtype or dy.dtype,
        sizes=(*sizes, *image, 1, 1, *geometry.strides, geometry.groups),
        rows=rows.shifts_t,
        columns=columns.shifts_t,
        row_phases=rows.phases_t,
        column_phases=columns.phases_t,
        level=level,
    )


def values_gradient(x: Array, dy: Array, p: Pattern, geometry: Geometry) -> Array:
    """The gradient of the values, in float32."""
    (rows, columns), level = _axes(p, geometry), native.level_number(geometry.level)
    numbers = _numbers(x, p, geometry)
    planes = _x_planes(x, rows, columns, numbers, level), _dy_planes(dy, rows, columns, numbers, level)
    return native.call(
        f"{numbers.targets}conv_values_gradient",
        (p.nnz,),
        *(*planes, p.indices, p.starts),
        sizes=_reader(x.shape[0], rows, columns, p, geometry),
        dy_sizes=(*dy.shape, rows.before_t, columns.before_t, rows.padded_t, columns.padded_t),
        rows=rows.shifts,
        columns=columns.shifts,
        level=level,
    )


PRODUCTS = {"forward": forward, "input_gradient": input_gradient, "values_gradient": values_gradient}
