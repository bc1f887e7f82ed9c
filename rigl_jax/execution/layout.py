"""Where the arrays of a packed run lie on several devices: whole on each of them, or cut among them."""

from __future__ import annotations

from typing import Any

import jax
import numpy as np
from jax.sharding import AxisType, NamedSharding, PartitionSpec

from rigl_jax.base import Array, Masks, PyTree
from rigl_jax.execution import kernels
from rigl_jax.execution.packed import Choose
from rigl_jax.messages import shown


def check(who: str, sharding: Any) -> None:
    """ValueError if it neither lays arrays whole on each device nor cuts one axis over one mesh axis."""
    if sharding is None or (isinstance(sharding, jax.sharding.Sharding) and sharding.is_fully_replicated):
        return
    one_axis = isinstance(sharding, NamedSharding) and len(sharding.spec) == 1 and isinstance(sharding.spec[0], str)
    if not one_axis or AxisType.Explicit in sharding.mesh.axis_types:
        raise ValueError(
            f"{who}: sharding must lay arrays whole on each device, or cut one axis over one axis of a mesh without "
            f"explicit axes, say NamedSharding(mesh, PartitionSpec('data')), got {shown(sharding)}"
        )


def cuts(sharding: Any) -> bool:
    """Whether arrays are cut."""
    return sharding is not None and not sharding.is_fully_replicated


def chosen(sharding: Any, choose: Choose) -> Choose:
    """The patterns of `choose` on their devices, with padding up to a size that the devices divide.

    Every process builds a pattern whole, and each device gets its part before the next leaf's is built.
    """
    if sharding is None:
        return choose

    def on_devices(name: str, mask: np.ndarray) -> Any:
        pattern = choose(name, mask)
        entries = None if pattern is None else kernels.capacity(pattern)
        devices = sharding.mesh.shape[sharding.spec[0]] if cuts(sharding) else 1
        if entries is not None and entries % devices:
            pattern = kernels.rebuild(pattern, mask, capacity=-(-entries // devices) * devices)
        return placed(sharding, pattern)

    return on_devices


def of(sharding: Any, shape: tuple[int, ...]) -> Any:
    """The sharding of one array: cut along the largest axis that the devices divide, whole if they divide none."""
    if not cuts(sharding):
        return sharding
    axis, devices = sharding.spec[0], sharding.mesh.shape[sharding.spec[0]]
    fits = [k for k, size in enumerate(shape) if size and size % devices == 0]
    largest = max(fits, key=lambda k: shape[k], default=None)
    return NamedSharding(sharding.mesh, PartitionSpec() if largest is None else PartitionSpec(*[None] * largest, axis))


def placed(sharding: Any, tree: PyTree) -> PyTree:
    """Arrays that every process holds whole, on their devices."""
    if sharding is None:
        return tree

    def one(array: Array) -> Array:
        at = of(sharding, array.shape)
        if isinstance(array, jax.Array) and array.sharding == at:
            return array
        host = np.asarray(array)
        return jax.make_array_from_callback(host.shape, at, lambda index: host[index])

    return jax.tree.map(one, tree)


def laid(sharding: Any, tree: PyTree) -> PyTree:
    """Under jit: arrays of weights, or of what belongs to them, where they belong."""
    if not cuts(sharding):
        return tree
    return jax.tree.map(lambda a: jax.lax.with_sharding_constraint(a, of(sharding, a.shape)), tree)


def readable(sharding: Any, masks: Masks) -> Masks:
    """Masks that this process can read whole; one that is cut over several processes is put together for that."""

    def one(mask: Array) -> Any:
        if not isinstance(mask, jax.Array) or mask.is_fully_addressable or mask.is_fully_replicated:
            return mask
        return np.asarray(jax.device_put(mask, NamedSharding(sharding.mesh, PartitionSpec())))

    return jax.tree.map(one, masks)
