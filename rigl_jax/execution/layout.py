"""Where the arrays of a packed run lie on several devices: whole on each of them, or cut among them."""

from __future__ import annotations

from typing import Any

import jax
import numpy as np
from jax.sharding import AxisType, NamedSharding, PartitionSpec

from rigl_jax.base import Array, PyTree
from rigl_jax.execution import kernels
from rigl_jax.execution.packed import Choose, Whole
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


def divided(sharding: Any, choose: Choose) -> Choose:
    """The patterns of `choose`, with padding up to a size that the devices divide."""
    if not cuts(sharding):
        return choose
    devices = sharding.mesh.shape[sharding.spec[0]]

    def rounded(name: str, mask: np.ndarray) -> Any:
        pattern = choose(name, mask)
        entries = None if pattern is None else kernels.capacity(pattern)
        if entries is None or entries % devices == 0:
            return pattern
        return kernels.rebuild(pattern, mask, capacity=-(-entries // devices) * devices)

    return rounded


def of(sharding: Any, shape: tuple[int, ...]) -> Any:
    """The sharding of one array: cut along its first axis that the devices divide, whole if they divide none."""
    if not cuts(sharding):
        return sharding
    axis, devices = sharding.spec[0], sharding.mesh.shape[sharding.spec[0]]
    free = [k for k, size in enumerate(shape) if size and size % devices == 0]
    return NamedSharding(sharding.mesh, PartitionSpec(*[None] * free[0], axis) if free else PartitionSpec())


def placed(sharding: Any, patterns: PyTree) -> PyTree:
    """Patterns on their devices. Every process has built them whole; each device gets its part."""
    if sharding is None:
        return patterns

    def one(pattern: Any) -> Any:
        def place(array: Array) -> Array:
            host = np.asarray(array)
            at = _whole(sharding) if isinstance(pattern, Whole) else of(sharding, host.shape)
            return jax.make_array_from_callback(host.shape, at, lambda index: host[index])

        return jax.tree.map(place, pattern)

    return jax.tree.map(one, patterns, is_leaf=_is_pattern)


def _is_pattern(x: Any) -> bool:
    return isinstance(x, (Whole, kernels.AnyPattern))


def _whole(sharding: Any) -> Any:
    return NamedSharding(sharding.mesh, PartitionSpec()) if cuts(sharding) else sharding


def kept(sharding: Any, array: Array, pattern: Any) -> Array:
    """Under jit: the values of a leaf, or what an optimizer keeps for it, where they belong."""
    if not cuts(sharding) or pattern is None or isinstance(pattern, Whole):
        return array
    return jax.lax.with_sharding_constraint(array, of(sharding, array.shape))


def gathered(sharding: Any, tree: PyTree) -> PyTree:
    """Under jit: arrays that every device is to have whole."""
    if not cuts(sharding):
        return tree
    return jax.tree.map(lambda a: jax.lax.with_sharding_constraint(a, _whole(sharding)), tree)
