"""Weights of stacked layers in a model: the layers one by one."""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp

from rigl_jax.base import Array
from rigl_jax.execution import kernels
from rigl_jax.execution.weight import Weight
from rigl_jax.tracing.geometry import Dot
from rigl_jax.tracing.walk import Walker


def is_stack(x: Any) -> bool:
    """Whether it is a packed weight of stacked layers."""
    return isinstance(x, Weight) and isinstance(x.pattern, kernels.Stacked)


def in_layers(stack: Weight) -> Weight:
    """The weights of all layers, for `scan`: arrays with an axis of layers in front."""
    values = kernels.stacked.in_layers(stack.values, stack.pattern)
    return dataclasses.replace(stack, values=values, pattern=stack.pattern.layers)


def product(walker: Walker, dot: Dot, side: int, stack: Weight, x: Array) -> Array | None:
    """The result of a `dot_general` as `vmap` makes it: of each layer with its part of x, or with all of x.

    Args:
      walker: computes the product of one layer.
      dot: the axes of the `dot_general`.
      side: 0 if the stack is its left operand, 1 if it is the right one.
      stack: the weight.
      x: the other operand.

    Returns:
      The result; None for a product that sums over layers, or has other axes beside theirs for each of which there is a
      product.
    """
    own, other = dot.batch[side], dot.batch[1 - side]
    if 0 in dot.summed[side] or own not in ((), (0,)):
        return None
    summed = [axis - 1 for axis in dot.summed[side]]
    rest = [axis - (axis > at) for axis in dot.summed[1 - side] for at in (other or (x.ndim,))]

    def of_one(w: Array, x: Array) -> Array:
        operands, axes = ((w, x), (summed, rest)) if side == 0 else ((x, w), (rest, summed))
        return jax.lax.dot_general(*operands, (axes, ((), ())))

    parts = jnp.moveaxis(x, other[0], 0) if other else None
    shape = jax.ShapeDtypeStruct(x.shape if parts is None else parts.shape[1:], x.dtype)
    program = jax.make_jaxpr(of_one)(jax.ShapeDtypeStruct(stack.shape[1:], stack.dtype), shape)
    if parts is not None:
        return jax.lax.map(lambda pair: walker(program, list(pair))[0], (in_layers(stack), parts))
    y = jax.lax.map(lambda layer: walker(program, [layer, x])[0], in_layers(stack))
    return jnp.moveaxis(y, 0, 0 if side == 0 else len(dot.free[0]))
