"""Convolution with a sparse HWIO kernel, NHWC in and out: native on the CPU, plain JAX elsewhere.

The native kernels interleave images: the same pixel of 4, 8 or 16 images (the vector length of the level) lies side by
side, with margins around each image. A run of pixels is then a run of vectors, and a tap of the kernel is an offset, so
one loop serves all strides and paddings, without im2col. A batch that is not a multiple of the vector length is padded
with zeros, so batches below 8 are correct but inefficient.

The gradient of the input is the same loop over the transposed pattern. With strides, only the taps of its own phase
reach an input pixel, so entries are sorted by phase first and no product is wasted. A pattern does not know into how
many groups a convolution divides its channels: an output reads the planes of its own group, and for the gradient of the
input entries are sorted by group too.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from rigl_jax import arguments as rules
from rigl_jax import checks, native
from rigl_jax.arguments import arguments
from rigl_jax.execution.kernels import arrays, reference
from rigl_jax.execution.kernels.bilinear import Kind, bilinear
from rigl_jax.execution.kernels.linear import matmul
from rigl_jax.execution.kernels.pattern import Pattern, check_sizes
from rigl_jax.messages import shown

Array = jax.Array
Pair = tuple[int, int]
GROUP = 16  # images to a group at the widest level
LONGEST_STRIDE = 1024  # ROW_BUFFER / GROUP in native/kernels.h


class Geometry(NamedTuple):
    """The static arguments of a call. `image` is (height, width) of x, padding is ((top, bottom), (left, right))."""

    image: Pair
    strides: Pair
    padding: tuple[Pair, Pair]
    dilation: Pair
    groups: int
    level: str


@arguments(
    x=rules.array(4),
    values=rules.array(1),
    pattern=rules.one_of(Pattern, "a Pattern"),
    strides=rules.pair,
    dilation=rules.pair,
    groups=rules.whole(1),
    level=rules.word,
)
def conv(
    x: Array,
    values: Array,
    pattern: Pattern,
    *,
    strides: Pair = (1, 1),
    padding: str | Sequence[Pair] = "SAME",
    dilation: Pair = (1, 1),
    groups: int = 1,
    level: str = "auto",
) -> Array:
    """x[batch, height, width, in] convolved with a sparse kernel HWIO -> [batch, out height, out width, out].

    As `jax.lax.conv_general_dilated` with NHWC, HWIO, NHWC. Differentiable as `matmul` is. A 1 x 1 kernel without
    padding and groups is a matrix product.

    Args:
      x: floating [batch, height, width, in].
      values: floating [pattern.nnz], in storage order.
      pattern: from `make_pattern` of a mask [kh, kw, in / groups, out].
      strides: rows and columns, each at least 1.
      padding: "SAME", "VALID", or ((top, bottom), (left, right)), none negative.
      dilation: pixels from one tap of the kernel to the next, rows and columns, each at least 1.
      groups: parts of equal size into which inputs and outputs are divided, in order: each output sees the inputs of
        its own part. `in` groups make a depthwise convolution.
      level: as in `matmul`.

    Raises:
      ValueError: sizes that do not fit the pattern, negative padding, or an unknown level.

    Example:
      pattern = make_pattern(mask)
      y = conv(x, gather(kernel, pattern), pattern, strides=(2, 2))
    """
    check_sizes("conv", pattern)
    if len(pattern.shape) != 4:
        raise ValueError(f"conv: pattern must be of a kernel (kh, kw, in, out), got one of shape {pattern.shape}")
    if pattern.shape[3] % groups:
        raise ValueError(f"conv: groups must divide the {pattern.shape[3]} outputs of the pattern, got {groups}")
    if x.ndim != 4 or x.shape[3] != pattern.shape[2] * groups:
        expected = f"(batch, height, width, {pattern.shape[2] * groups})"
        raise ValueError(f"conv: x must have shape {expected}, got {x.shape}")
    arrays.check_operands("conv", x, values, inputs=pattern.shape[2] * groups, nnz=pattern.nnz)
    if level != "jax":
        native.level_number(level)
    pads = _explicit(padding, x.shape[1:3], _windows(pattern, dilation), strides)
    dtype = jnp.result_type(x, values)
    if pattern.taps == groups == 1 and pads == ((0, 0), (0, 0)):
        return matmul(x[:, :: strides[0], :: strides[1]], values, pattern, level=level)
    pairs = (x.shape[1], x.shape[2]), (strides[0], strides[1]), pads, (dilation[0], dilation[1])
    geometry = Geometry(*pairs, groups, level)
    return _product(x.astype(dtype), values.astype(dtype), pattern, geometry)


def _explicit(
    padding: str | Sequence[Pair], image: Sequence[int], window: Sequence[int], strides: Pair
) -> tuple[Pair, Pair]:
    named = isinstance(padding, str)
    if (named and padding not in ("SAME", "VALID")) or (not named and not _are_pads(padding)):
        expected = "'SAME', 'VALID' or ((top, bottom), (left, right)), whole numbers of at least 0"
        raise ValueError(f"conv: padding must be {expected}, got {shown(padding)}")
    pads = jax.lax.padtype_to_pads(image, window, strides, padding) if isinstance(padding, str) else padding
    (top, bottom), (left, right) = pads
    return (int(top), int(bottom)), (int(left), int(right))


def _are_pads(padding: Any) -> bool:
    pairs = isinstance(padding, Sequence) and len(padding) == 2
    return pairs and all(isinstance(p, Sequence) and len(p) == 2 and all(map(checks.is_whole, p)) for p in padding)


def _windows(pattern: Pattern, dilation: Pair) -> Pair:
    """Height and width of what the kernel covers."""
    height, width = ((taps - 1) * apart + 1 for taps, apart in zip(pattern.shape[:2], dilation, strict=True))
    return height, width


def out_size(geometry: Geometry, pattern: Pattern) -> Pair:
    """Height and width of the result."""
    windows = _windows(pattern, geometry.dilation)
    sizes = zip(geometry.image, geometry.padding, windows, geometry.strides, strict=True)
    height, width = (max(0, (n + sum(pad) - k) // s + 1) for n, pad, k, s in sizes)
    return height, width


def inputs(geometry: Geometry, pattern: Pattern) -> int:
    """Channels of x."""
    return pattern.shape[2] * geometry.groups


def _shape(kind: Kind, a: tuple[int, ...], b: tuple[int, ...], pattern: Pattern, geometry: Geometry) -> tuple[int, ...]:
    del b
    return {
        "forward": (a[0], *out_size(geometry, pattern), pattern.shape[3]),
        "input_gradient": (a[0], *geometry.image, inputs(geometry, pattern)),
        "values_gradient": (pattern.nnz,),
    }[kind]


def _run_cpu(kind: Kind, a: Array, b: Array, pattern: Pattern, geometry: Geometry) -> Array:
    served = native.library() is not None and geometry.level != "jax" and a.dtype.itemsize <= 4
    empty = 0 in (pattern.nnz, *a.shape, *out_size(geometry, pattern))
    if not served or empty or not _fits(pattern, geometry):
        return reference.run_conv(kind, a, b, pattern, geometry)
    native_run = {"forward": _forward, "input_gradient": _input_gradient, "values_gradient": _values_gradient}[kind]
    return native_run(a.astype(jnp.float32), b.astype(jnp.float32), pattern, geometry).astype(a.dtype)


def _fits(pattern: Pattern, geometry: Geometry) -> bool:
    """Whether the native kernels can run this: strides fit their buffer, offsets within a group of images int32."""
    rows, columns = _axes(pattern, geometry)
    x = rows.padded * columns.padded * inputs(geometry, pattern)
    dy = rows.padded_t * columns.padded_t * pattern.shape[3]
    return max(geometry.strides) <= LONGEST_STRIDE and max(x, dy) * GROUP < 1 << 31


_product = bilinear("rigl_sparse_conv", _shape, reference.run_conv, _run_cpu)


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
    sizes = zip(geometry.image, out, pattern.shape[:2], geometry.dilation, geometry.strides, starts, strict=True)
    return [_margins(*axis) for axis in sizes]


def _planes(image: Array, before: Pair, padded: Pair, level: np.int64) -> Array:
    batch, height, width, channels = image.shape
    room = -(-batch // GROUP) * GROUP * padded[0] * padded[1] * channels
    sizes = (batch, height, width, channels, *before, *padded)
    return native.call("rigl_planes", (room,), image, sizes=sizes, level=level)


def _x_planes(x: Array, rows: _Margins, columns: _Margins, level: np.int64) -> Array:
    return _planes(x, (rows.before, columns.before), (rows.padded, columns.padded), level)


def _dy_planes(dy: Array, rows: _Margins, columns: _Margins, level: np.int64) -> Array:
    return _planes(dy, (rows.before_t, columns.before_t), (rows.padded_t, columns.padded_t), level)


def _reader(batch: int, rows: _Margins, columns: _Margins, p: Pattern, geometry: Geometry) -> tuple[int, ...]:
    """The sizes of struct Reader in native/kernels.h, for reading planes of x."""
    planes = (batch, rows.padded, columns.padded, inputs(geometry, p), p.block // p.taps)
    return (*planes, *out_size(geometry, p), p.shape[3], *geometry.strides, 1, 1, geometry.groups)


def _forward(x: Array, values: Array, p: Pattern, geometry: Geometry) -> Array:
    (rows, columns), level = _axes(p, geometry), native.level_number(geometry.level)
    return native.call(
        "rigl_conv_forward",
        (x.shape[0], *out_size(geometry, p), p.shape[3]),
        *(_x_planes(x, rows, columns, level), values, p.indices, p.starts),
        sizes=_reader(x.shape[0], rows, columns, p, geometry),
        rows=rows.shifts,
        columns=columns.shifts,
        level=level,
    )


def _input_gradient(dy: Array, values: Array, p: Pattern, geometry: Geometry) -> Array:
    (rows, columns), level = _axes(p, geometry), native.level_number(geometry.level)
    image = (*geometry.image, inputs(geometry, p))
    planes = (dy.shape[0], rows.padded_t, columns.padded_t, p.shape[3], p.block_t // p.taps)
    return native.call(
        "rigl_conv_input_gradient",
        (dy.shape[0], *image),
        *(_dy_planes(dy, rows, columns, level), values, p.order_t, p.indices_t, p.starts_t),
        sizes=(*planes, *image, 1, 1, *geometry.strides, geometry.groups),
        rows=rows.shifts_t,
        columns=columns.shifts_t,
        row_phases=rows.phases_t,
        column_phases=columns.phases_t,
        level=level,
    )


def _values_gradient(x: Array, dy: Array, p: Pattern, geometry: Geometry) -> Array:
    (rows, columns), level = _axes(p, geometry), native.level_number(geometry.level)
    return native.call(
        "rigl_conv_values_gradient",
        (p.nnz,),
        *(_x_planes(x, rows, columns, level), _dy_planes(dy, rows, columns, level), p.indices, p.starts),
        sizes=_reader(x.shape[0], rows, columns, p, geometry),
        dy_sizes=(*dy.shape, rows.before_t, columns.before_t, rows.padded_t, columns.padded_t),
        rows=rows.shifts,
        columns=columns.shifts,
        level=level,
    )
