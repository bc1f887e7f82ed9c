"""Convolution with a sparse kernel, HWIO or DHWIO, channels last: native on the CPU, plain JAX elsewhere.

The native kernels interleave images: the same pixel of 4, 8 or 16 images (the vector length of the level) lies side by
side, with margins around each image. A run of pixels is then a run of vectors, and a tap of the kernel is an offset, so
one loop serves all strides and paddings, without im2col. A batch that is not a multiple of the vector length is padded
with zeros, so batches below 8 are correct but inefficient.

The gradient of the input is the same loop over the transposed pattern. With strides, only the taps of its own phase
reach an input pixel, so entries are sorted by phase first and no product is wasted. A pattern does not know into how
many groups a convolution divides its channels: an output reads the planes of its own group, and for the gradient of the
input entries are sorted by group too.

A 3-D convolution is a 2-D one of its slices: `windows` writes the slices that the taps along the depth see side by
side, as channels, and the kernel [kd, kh, kw, in, out] is read as one of kd * in channels. This copies the image
kd / stride times; in return a batch of few images has many slices, which the native kernels lay side by side.
"""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from rigl_jax import arguments as rules
from rigl_jax import checks, native
from rigl_jax.arguments import arguments
from rigl_jax.execution.kernels import arrays, reference
from rigl_jax.execution.kernels.bilinear import Kind, bilinear, varying_alike
from rigl_jax.execution.kernels.folded import windows
from rigl_jax.execution.kernels.linear import matmul
from rigl_jax.execution.kernels.pattern import Pattern, check_sizes
from rigl_jax.messages import shown

Array = jax.Array
Pair = tuple[int, int]
Sizes = tuple[int, ...]
GROUP = 16  # images to a group at the widest level
LONGEST_STRIDE = 1024  # ROW_BUFFER / GROUP in native/kernels.h


class Geometry(NamedTuple):
    """The static arguments of a call, for each axis of the image: (height, width), or (depth, height, width)."""

    image: Sizes
    strides: Sizes
    padding: tuple[Pair, ...]
    dilation: Sizes
    groups: int
    level: str


@arguments(
    x=rules.array(),
    values=rules.array(1),
    pattern=rules.one_of(Pattern, "a Pattern"),
    strides=rules.optional(rules.steps),
    dilation=rules.optional(rules.steps),
    groups=rules.whole(1),
    level=rules.word,
)
def conv(
    x: Array,
    values: Array,
    pattern: Pattern,
    *,
    strides: Sizes | None = None,
    padding: str | Sequence[Pair] = "SAME",
    dilation: Sizes | None = None,
    groups: int = 1,
    level: str = "auto",
) -> Array:
    """x[batch, height, width, in] convolved with a sparse kernel HWIO -> [batch, out height, out width, out].

    As `jax.lax.conv_general_dilated` with NHWC, HWIO, NHWC; for images with a depth, NDHWC, DHWIO, NDHWC.
    Differentiable as `matmul` is. A 1 x 1 kernel without padding and groups is a matrix product.

    Args:
      x: floating [batch, height, width, in], or [batch, depth, height, width, in].
      values: floating [pattern.nnz], in storage order.
      pattern: from `make_pattern` of a mask [kh, kw, in / groups, out], or [kd, kh, kw, in / groups, out].
      strides: one for each axis of an image, each at least 1. Default: 1.
      padding: "SAME", "VALID", or for each axis of an image (before, after), none negative.
      dilation: pixels from one tap of the kernel to the next, along each axis, each at least 1. Default: 1.
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
    axes, (*_, depth, outputs) = len(pattern.shape) - 2, pattern.shape
    if axes not in (2, 3):
        raise ValueError(f"conv: pattern must be of a kernel ([kd,] kh, kw, in, out), got one of shape {pattern.shape}")
    if outputs % groups:
        raise ValueError(f"conv: groups must divide the {outputs} outputs of the pattern, got {groups}")
    if x.ndim != axes + 2 or x.shape[-1] != depth * groups:
        expected = f"(batch, {'depth, ' * (axes - 2)}height, width, {depth * groups})"
        raise ValueError(f"conv: x must have shape {expected}, got {x.shape}")
    arrays.check_operands("conv", x, values, inputs=depth * groups, nnz=pattern.nnz)
    strides, dilation = _steps("strides", strides, axes), _steps("dilation", dilation, axes)
    if level != "jax":
        native.level_number(level)
    image = x.shape[1:-1]
    pads = _explicit(padding, image, _covered(pattern, dilation), strides)
    dtype = jnp.result_type(x, values)
    if math.prod(pattern.shape[:-2]) == groups == 1 and not any(map(any, pads)):
        return matmul(x[:, *(slice(None, None, stride) for stride in strides)], values, pattern, level=level)
    geometry = Geometry(image, strides, pads, dilation, groups, level)
    return _product(x.astype(dtype), values.astype(dtype), pattern, geometry)


def _steps(name: str, given: Sizes | None, axes: int) -> Sizes:
    if given is not None and len(given) != axes:
        raise ValueError(f"conv: {name} must be {axes} whole numbers here, got {shown(given)}")
    return given or (1,) * axes


def _explicit(
    padding: str | Sequence[Pair], image: Sizes, window: Sequence[int], strides: Sequence[int]
) -> tuple[Pair, ...]:
    named = isinstance(padding, str)
    if (named and padding not in ("SAME", "VALID")) or (not named and not _are_pads(padding, len(image))):
        expected = f"'SAME', 'VALID' or {len(image)} pairs (before, after), whole numbers of at least 0"
        raise ValueError(f"conv: padding must be {expected}, got {shown(padding)}")
    pads = jax.lax.padtype_to_pads(image, window, strides, padding) if isinstance(padding, str) else padding
    return tuple((int(before), int(after)) for before, after in pads)


def _are_pads(padding: Any, axes: int) -> bool:
    pairs = isinstance(padding, Sequence) and len(padding) == axes
    return pairs and all(isinstance(p, Sequence) and len(p) == 2 and all(map(checks.is_whole, p)) for p in padding)


def _covered(pattern: Pattern, dilation: Sizes) -> list[int]:
    """Size of what the kernel covers, along each axis of an image."""
    return [(taps - 1) * apart + 1 for taps, apart in zip(pattern.shape[:-2], dilation, strict=True)]


def out_size(geometry: Geometry, pattern: Pattern) -> Sizes:
    """Size of an image of the result."""
    covered = _covered(pattern, geometry.dilation)
    sizes = zip(geometry.image, geometry.padding, covered, geometry.strides, strict=True)
    return tuple(max(0, (n + sum(pad) - k) // s + 1) for n, pad, k, s in sizes)


def inputs(geometry: Geometry, pattern: Pattern) -> int:
    """Channels of x."""
    return pattern.shape[-2] * geometry.groups


def _shape(kind: Kind, a: tuple[int, ...], b: tuple[int, ...], pattern: Pattern, geometry: Geometry) -> tuple[int, ...]:
    del b
    return {
        "forward": (a[0], *out_size(geometry, pattern), pattern.shape[-1]),
        "input_gradient": (a[0], *geometry.image, inputs(geometry, pattern)),
        "values_gradient": (pattern.nnz,),
    }[kind]


def _run_cpu(kind: Kind, a: Array, b: Array, pattern: Pattern, geometry: Geometry) -> Array:
    served = native.library() is not None and geometry.level != "jax" and a.dtype.itemsize <= 4
    empty = 0 in (pattern.nnz, *a.shape, *out_size(geometry, pattern))
    if not served or empty or not _fits(*_of_slices(pattern, geometry)):
        return reference.run_conv(kind, a, b, pattern, geometry)
    run = _run_native if len(geometry.image) == 2 else _run_slices
    return run(kind, a, b, pattern, geometry).astype(a.dtype)


def _run_native(kind: Kind, a: Array, b: Array, pattern: Pattern, geometry: Geometry) -> Array:
    native_run = {"forward": _forward, "input_gradient": _input_gradient, "values_gradient": _values_gradient}[kind]
    return native_run(a.astype(jnp.float32), b.astype(jnp.float32), pattern, geometry)


def _of_slices(pattern: Pattern, geometry: Geometry) -> tuple[Pattern, Geometry]:
    """The 2-D convolution of the slices, with the depth of the kernel among its channels."""
    *_, height, width, channels, out = pattern.shape
    shape = (height, width, math.prod(pattern.shape[:-4]) * channels, out)
    of_slices = geometry._replace(
        image=geometry.image[-2:],
        strides=geometry.strides[-2:],
        padding=geometry.padding[-2:],
        dilation=geometry.dilation[-2:],
    )
    return dataclasses.replace(pattern, shape=shape), of_slices


def _slices(x: Array, taps: int, geometry: Geometry) -> Array:
    """x[batch, depth, height, width, in] -> [batch * out depth, height, width, kd * in]: what each slice sees."""
    steps = {"stride": geometry.strides[0], "padding": geometry.padding[0], "dilation": geometry.dilation[0]}
    return _merged(windows(x, taps, **steps, groups=geometry.groups))


def _merged(x: Array) -> Array:
    return x.reshape(x.shape[0] * x.shape[1], *x.shape[2:])


def _run_slices(kind: Kind, a: Array, b: Array, pattern: Pattern, geometry: Geometry) -> Array:
    """The product `kind` of a 3-D convolution."""
    of_slices = _of_slices(pattern, geometry)
    unfold = functools.partial(_slices, taps=pattern.shape[0], geometry=geometry)
    if kind == "values_gradient":
        return _run_native(kind, unfold(a), _merged(b), *of_slices)
    if kind == "forward":
        y = _run_native(kind, unfold(a), b, *of_slices)
        return y.reshape(a.shape[0], -1, *y.shape[1:])
    dx = _run_native(kind, _merged(a), b, *of_slices)
    image, _ = varying_alike(jnp.zeros((a.shape[0], *geometry.image, inputs(geometry, pattern)), dx.dtype), dx)
    return jax.linear_transpose(unfold, image)(dx)[0]


def _fits(pattern: Pattern, geometry: Geometry) -> bool:
    """Whether the native kernels can run this: strides fit their buffer, offsets within a group of images int32."""
    rows, columns = _axes(pattern, geometry)
    x = rows.padded * columns.padded * inputs(geometry, pattern)
    dy = rows.padded_t * columns.padded_t * pattern.shape[3]
    return max(geometry.strides) <= LONGEST_STRIDE and max(x, dy) * GROUP < 1 << 31


def patches(x: Array, pattern: Pattern, strides: Sizes, padding: Sequence[Pair], dilation: Sizes) -> Array:
    """What a convolution without groups multiplies by its kernel: for each output pixel its rows [pattern.rows]."""
    geometry = Geometry(x.shape[1:-1], strides, tuple(padding), dilation, 1, "auto")
    if x.ndim == 5:
        x = _slices(x, pattern.shape[0], geometry)
    flat, of = _of_slices(pattern, geometry)
    numbers = ("NHWC", "HWIO", "NHWC")
    return jax.lax.conv_general_dilated_patches(
        x, flat.shape[:2], of.strides, of.padding, rhs_dilation=of.dilation, dimension_numbers=numbers
    )


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
    sizes = zip(geometry.image, out, pattern.shape[:-2], geometry.dilation, geometry.strides, starts, strict=True)
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
