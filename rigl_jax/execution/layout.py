"""Where the arrays of a packed run lie on several devices: whole on each of them, or cut among them."""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import numpy as np
from jax.sharding import AxisType, NamedSharding, PartitionSpec

from rigl_jax.base import Array, Masks, PyTree, Shape
from rigl_jax.execution import kernels
from rigl_jax.execution.packed import Choose
from rigl_jax.messages import shown


def check(who: str, sharding: Any) -> None:
    """ValueError if it neither lays arrays whole on each device nor cuts one axis over one mesh axis."""
    if sharding is None or (isinstance(sharding, jax.sharding.Sharding) and sharding.is_fully_replicated):
        return
    *before, axis = sharding.spec if isinstance(sharding, NamedSharding) and len(sharding.spec) else (None,)
    known = before in ([], [None]) and isinstance(axis, str)
    if not known or AxisType.Explicit in sharding.mesh.axis_types:
        raise ValueError(
            f"{who}: sharding must lay arrays whole on each device, or cut them, PartitionSpec('data'), or weights by "
            "their outputs, PartitionSpec(None, 'model'), over one axis of a mesh without explicit axes, "
            f"got {shown(sharding)}"
        )


def cuts(sharding: Any) -> bool:
    """Whether arrays are cut."""
    return sharding is not None and not sharding.is_fully_replicated


def _slabs(sharding: Any) -> bool:
    """Whether weights are cut by their outputs."""
    return cuts(sharding) and len(sharding.spec) == 2


def _devices(sharding: Any) -> int:
    return sharding.mesh.shape[sharding.spec[-1]] if cuts(sharding) else 1


def chosen(sharding: Any, choose: Choose) -> Choose:
    """The patterns of `choose` on their devices, in slabs or with padding up to a size that the devices divide.

    Every process builds a pattern whole, and each device gets its part before the next leaf's is built.
    """
    if sharding is None:
        return choose

    def on_devices(name: str, mask: np.ndarray) -> Any:
        pattern, devices = choose(name, mask), _devices(sharding)
        if pattern is not None:
            pattern = _divided(sharding, pattern, mask)
            entries = kernels.capacity(pattern)
            if not _in_slabs(pattern) and entries % devices:
                pattern = kernels.rebuild(pattern, mask, capacity=-(-entries // devices) * devices)
        return placed(sharding, pattern)

    return on_devices


def _in_slabs(pattern: Any) -> bool:
    return isinstance(kernels.kernel_of(pattern), kernels.Slabs)


def _divided(sharding: Any, pattern: Any, mask: np.ndarray) -> Any:
    """The pattern in slabs, if the devices divide its outputs, in whole runs or tiles.

    One in slabs of another mesh is made anew.
    """
    found, wanted = kernels.kernel_of(pattern), (_devices(sharding), sharding.spec[-1]) if _slabs(sharding) else None
    if isinstance(found, kernels.Slabs) and (found.number, found.over) == wanted:
        return pattern
    kernel = kernels.slabs.whole(found) if isinstance(found, kernels.Slabs) else found
    if wanted and kernels.slabs.divides(wanted[0], kernel.shape, kernel.entry):
        kernel = kernels.slabs.empty(kernel, *wanted)
    return pattern if kernel is found else _remade(pattern, kernel, mask)


def _remade(pattern: Any, kernel: Any, mask: np.ndarray) -> Any:
    """The pattern of a mask, as `pattern` is one, but with another kernel."""
    stack = isinstance(pattern, kernels.Stacked)
    one = pattern.layer if stack else pattern
    one = kernel if kernels.matrix_of(one) is one else dataclasses.replace(one, matrix=kernel)
    return kernels.make_stacked(mask, one) if stack else kernels.rebuild(one, mask)


def of(sharding: Any, shape: Shape) -> Any:
    """The sharding of one array."""
    if not cuts(sharding):  # over a mesh axis of one device, too, whatever the rank of the array
        return NamedSharding(sharding.mesh, PartitionSpec()) if isinstance(sharding, NamedSharding) else sharding
    spec = cut_along(shape, sharding.spec[-1], _devices(sharding), outputs=_slabs(sharding))
    return NamedSharding(sharding.mesh, spec)


def cut_along(shape: Shape, over: str, devices: int, *, outputs: bool) -> PartitionSpec:
    """An array cut over a mesh axis of so many devices: along its largest axis that they divide, else whole.

    With `outputs` the last axis comes first.
    """
    fits = [axis for axis, size in enumerate(shape) if size and size % devices == 0]
    if not fits:
        return PartitionSpec()
    best = max(fits, key=lambda axis: (outputs and axis == len(shape) - 1, shape[axis]))
    return PartitionSpec(*[None] * best, over)


def placed(sharding: Any, tree: PyTree) -> PyTree:
    """Arrays that every process holds whole, on their devices."""
    if sharding is None:
        return tree

    def one(array: Array, at: Any = None) -> Array:
        at = at or of(sharding, array.shape)
        if isinstance(array, jax.Array) and array.sharding == at:
            return array
        host = np.asarray(array)
        return jax.make_array_from_callback(host.shape, at, lambda index: host[index])

    def of_pattern(pattern: Any) -> Any:
        if isinstance(pattern, kernels.Pattern):
            # On a mesh of two axes XLA (of jaxlib 0.10.2) repeats wrongly by differences of starts that are cut.
            whole = NamedSharding(sharding.mesh, PartitionSpec()) if cuts(sharding) else None
            at = dict.fromkeys(("starts", "starts_t"), whole)
            arrays: dict[str, Any] = {
                name: one(getattr(pattern, name), at.get(name)) for name in kernels.pattern.FIELDS
            }
            return dataclasses.replace(pattern, **arrays)
        layers = [None] if isinstance(pattern, kernels.Stacked) else []
        at = NamedSharding(sharding.mesh, PartitionSpec(*layers, kernels.kernel_of(pattern).over))
        return jax.tree.map(lambda a: one(a, at), pattern)

    def known(x: Any) -> bool:
        return _in_slabs(x) or isinstance(x, kernels.Pattern)

    return jax.tree.map(lambda x: of_pattern(x) if known(x) else one(x), tree, is_leaf=known)


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
