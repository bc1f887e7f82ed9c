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
    cut: tuple[bool, bool] = (False, True),
) -> Array:
    """The product of x and a weight, divided among devices.

    Args:
      batch: how the first axis of x is split; None: nothing is divided here.
      product: `(x, values, pattern) -> y`.
      x: rows, or images, first.
      weight: a weight in slabs is divided among the devices of its axis, if the mesh has as many; any other is whole.
      cut: which of x and y a slab has only its part of, see `kernels.slabs.one_by_one`.
    """
    pattern = kernels.matrix_of(weight.pattern)
    slabs = pattern if isinstance(pattern, kernels.Slabs) else None
    axis = None if slabs is None else slabs.over
    if slabs is not None and (batch is None or batch.mesh.shape.get(axis) != slabs.number):
        return kernels.slabs.one_by_one(product, x, weight.values, slabs, cut)
    if batch is None:
        return product(x, weight.values, weight.pattern)
    mesh = batch.mesh
    rows = batch.spec[0] if x.ndim > 1 and x.shape[0] % mesh.shape[batch.spec[0]] == 0 else None
    if rows == axis:  # devices that divide the weight take the whole batch
        rows = None
    if rows is None and axis is None:
        return product(x, weight.values, weight.pattern)
    lead = (rows, *[None] * (x.ndim - 2)) if x.ndim > 1 else ()
    at, out = (PartitionSpec(*lead, axis if part else None) for part in cut)
    if AxisType.Explicit in mesh.axis_types:  # there shard_map moves nothing by itself
        x = jax.reshard(x, NamedSharding(mesh, at))

    def of_slab(x: Array, values: Array, parts: kernels.families.OnePattern) -> Array:
        y = product(x, values, jax.tree.map(lambda a: a[0], parts))
        return y if cut[1] else jax.lax.psum(y, axis)

    each, held = (product, weight.pattern) if slabs is None else (of_slab, slabs.parts)
    specs = (at, PartitionSpec(axis), PartitionSpec(axis))
    return jax.shard_map(each, mesh=mesh, in_specs=specs, out_specs=out)(x, weight.values, held)
