"""Products on several devices: each takes its part of the batch, or its slab of a weight, or both."""

from __future__ import annotations

from collections.abc import Callable

import jax
from jax.sharding import AxisType, NamedSharding, PartitionSpec

from rigl_jax.base import Array
from rigl_jax.execution import kernels
from rigl_jax.execution.weight import Weight


def over(
    batch: NamedSharding | None,
    product: Callable[..., Array],
    x: Array,
    weight: Weight,
    *,
    transpose: bool = False,
) -> Array:
    """The product of x and a weight, divided among devices.

    Args:
      batch: how the first axis of x is split; None: nothing is divided here.
      product: `(x, values, pattern) -> y`.
      x: rows first; its last axis is what the product sums over.
      weight: a weight in slabs is divided among the devices of its axis, if the mesh has as many; any other is whole.
      transpose: whether the product is that of the transposed weight, so that slabs are summed.
    """
    if batch is None:
        return product(x, weight.values, weight.pattern)
    mesh, pattern = batch.mesh, kernels.matrix_of(weight.pattern)
    slabs = pattern if isinstance(pattern, kernels.Slabs) and mesh.shape.get(pattern.over) == pattern.number else None
    axis = None if slabs is None else slabs.over
    rows = batch.spec[0] if x.ndim > 1 and x.shape[0] % mesh.shape[batch.spec[0]] == 0 else None
    if rows == axis:  # devices that divide the weight take the whole batch
        rows = None
    if rows is None and axis is None:
        return product(x, weight.values, weight.pattern)
    lead = (rows, *[None] * (x.ndim - 2)) if x.ndim > 1 else ()
    whole, cut = PartitionSpec(*lead, None), PartitionSpec(*lead, axis)
    at = cut if transpose else whole
    if AxisType.Explicit in mesh.axis_types:  # there shard_map moves nothing by itself
        x = jax.reshard(x, NamedSharding(mesh, at))

    def of_slab(x: Array, values: Array, parts: kernels.Pattern) -> Array:
        y = product(x, values, jax.tree.map(lambda a: a[0], parts))
        return jax.lax.psum(y, axis) if transpose else y

    each, held = (product, weight.pattern) if slabs is None else (of_slab, slabs.parts)
    specs = (at, PartitionSpec(axis), PartitionSpec(axis))
    return jax.shard_map(each, mesh=mesh, in_specs=specs, out_specs=whole if transpose else cut)(x, weight.values, held)
