"""Convolution with a sparse kernel, HWIO or DHWIO, channels last: native on the CPU, plain JAX elsewhere.

A 3-D convolution is a 2-D one of its slices: `windows` writes the slices that the taps along the depth see side by
side, as channels, and the kernel [kd, kh, kw, in, out] is read as one of kd * in channels. This copies the image
kd / stride times; in return a batch of few images has many slices, which the native kernels lay side by side.
"""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp

from rigl_jax import arguments as rules
from rigl_jax import checks, native
from rigl_jax.arguments import arguments
from rigl_jax.execution.kernels import arrays, planes, reference
from rigl_jax.execution.kernels.bilinear import Kind, bilinear, varying_alike
from rigl_jax.execution.kernels.folded import windows
from rigl_jax.execution.kernels.linear import matmul
from rigl_jax.execution.kernels.pattern import Pattern, check_sizes
from rigl_jax.execution.kernels.planes import Geometry, Pair, Sizes, covered, inputs, out_size
from rigl_jax.messages import shown

Array = jax.Array


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
    pads = _explicit(padding, image, covered(pattern, dilation), strides)
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
    if not served or empty or not planes.fits(*_of_slices(pattern, geometry)):
        return reference.run_conv(kind, a, b, pattern, geometry)
    read_a, read_b = (x if x.dtype == jnp.bfloat16 else x.astype(jnp.float32) for x in (a, b))
    if len(geometry.image) == 2:
        return planes.PRODUCTS[kind](read_a, read_b, pattern, geometry).astype(a.dtype)
    return _run_slices(kind, read_a, read_b, pattern, geometry).astype(a.dtype)


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
        return planes.values_gradient(unfold(a), _merged(b), *of_slices)
    if kind == "forward":
        y = planes.forward(unfold(a), b, *of_slices)
        return y.reshape(a.shape[0], -1, *y.shape[1:])
    dx = planes.input_gradient(_merged(a), b, *of_slices, dtype=jnp.float32)  # rounded after the sum over slices
    image, _ = varying_alike(jnp.zeros((a.shape[0], *geometry.image, inputs(geometry, pattern)), dx.dtype), dx)
    return jax.linear_transpose(unfold, image)(dx)[0]


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
