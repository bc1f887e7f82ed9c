"""How the arrays of a run are sharded: a mesh of devices, and rules that shard weights over it.

    config.mesh = {"data": -1, "model": 4}
    config.sharding = ((".*/kernel", (None, "model")), (".*/embedding", "fsdp"))

Batches are split over the axis "data". A rule is a regular expression on "layer/kernel" and the mesh axes of the
leaf's *last* axes: `(None, "model")` shards the outputs of a dense kernel and of a convolution. "fsdp" means
the largest axis that the mesh axis "data" divides; "outputs" the last axis if the mesh axis "model" divides it, else
the largest that it divides. The first match wins; a leaf that no rule matches is whole on every device. Masks, moments
and everything else in the state with a weight's name and shape are sharded like the weight.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import numpy as np
from jax.experimental import multihost_utils
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from rigl_jax import trees
from rigl_jax.base import Array, PyTree, Shape
from rigl_jax.execution import layout

DATA = "data"
MODEL = "model"
FSDP = "fsdp"
OUTPUTS = "outputs"
ALL_FSDP, ALL_OUTPUTS = ((".*", FSDP),), ((".*", OUTPUTS),)
"""The rules for packed weights that are cut over devices."""
Rules = Sequence[tuple[str, Any]]


def mesh(axes: Mapping[str, int], devices: Sequence[jax.Device]) -> Mesh:
    """The devices in a grid, in the order given; neighbours along the last axis are neighbours in the list.

    Args:
      axes: sizes by name, "data" among them; one may be -1 and takes the devices that are left. {} is all data.
      devices: all of them are used.

    Raises:
      ValueError: sizes that do not multiply to the number of devices; a part of the batch that two processes would have
        to hold, each of which reads its own examples.

    >>> dict(mesh({"data": -1, "model": 1}, jax.devices()[:1]).shape)
    {'data': 1, 'model': 1}
    """
    sizes = dict(axes) or {DATA: -1}
    free = [name for name, size in sizes.items() if size == -1]
    wrong = [name for name, size in sizes.items() if not isinstance(size, int) or (size < 1 and size != -1)]
    if DATA not in sizes or wrong or len(free) > 1:
        raise ValueError(
            f"config.mesh: expected sizes by axis, one of them {DATA!r}, each at least 1 or one of them -1, got {sizes}"
        )
    fixed = math.prod(size for size in sizes.values() if size != -1)
    if free and len(devices) % fixed == 0:
        sizes[free[0]] = len(devices) // fixed
    if math.prod(sizes.values()) != len(devices):
        raise ValueError(f"config.mesh: {sizes} does not use exactly {len(devices)} devices")
    grid = np.asarray(devices).reshape(tuple(sizes.values()))
    rows = np.moveaxis(grid, list(sizes).index(DATA), 0).reshape(sizes[DATA], -1)
    for row in rows:
        if len({device.process_index for device in row}) > 1:
            raise ValueError(
                f"config.mesh: {sizes} spreads one part of the batch over several processes; the axes other than "
                f"{DATA!r} must fit into the {jax.local_device_count()} devices of one"
            )
    return Mesh(grid, tuple(sizes))


def check_convolutions(init: Callable[[], Any], mesh: Mesh) -> None:
    """Refuses grouped convolutions on a mesh of several axes.

    With the batch split over one of them, XLA multiplies the gradient of such a kernel by the size of the others (seen
    in jaxlib 0.10.2).

    Args:
      init: traces the model.
      mesh: of the run.

    Raises:
      ValueError: the model has grouped convolutions, and more than one axis of the mesh has several devices.
    """
    axes = {name: size for name, size in mesh.shape.items() if size > 1}
    if len(axes) > 1 and re.search(r"feature_group_count=(?!1\b)\d", str(jax.make_jaxpr(init)())):
        raise ValueError(
            "config.mesh: a model with grouped convolutions takes a mesh of one axis, because XLA multiplies the "
            f"gradients of their kernels by the size of the other axes, got {axes}"
        )


def whole(mesh: Mesh) -> NamedSharding:
    """An array that is whole on each device."""
    return NamedSharding(mesh, PartitionSpec())


def split(mesh: Mesh) -> NamedSharding:
    """An array whose first axis is split like the batch."""
    return NamedSharding(mesh, PartitionSpec(DATA))


def outputs(mesh: Mesh) -> NamedSharding:
    """Packed weights that are cut by their outputs over the axis "model"."""
    return NamedSharding(mesh, PartitionSpec(None, MODEL))


def place(batch: Mapping[str, np.ndarray], mesh: Mesh, *, indexed: bool = False) -> dict[str, Array]:
    """A batch on the devices. Each process gives its own examples. Their index stays on the host, unless `indexed`."""
    at, taken = split(mesh), [name for name in batch if indexed or name != "index"]
    return {name: jax.make_array_from_process_local_data(at, batch[name]) for name in taken}


def check_rules(rules: Rules) -> None:
    """Checks the form of a rule.

    Raises:
      ValueError: names the rule by its place.
    """
    for i, rule in enumerate(rules):
        fits = isinstance(rule, (list, tuple)) and len(rule) == 2 and isinstance(rule[0], str)
        if not fits or not (rule[1] in (FSDP, OUTPUTS) or isinstance(rule[1], (list, tuple))):
            raise ValueError(
                f"config.sharding[{i}]: expected (regular expression, {FSDP!r}, {OUTPUTS!r} or mesh axes of the last "
                f"axes), got {rule!r}"
            )


def specs(rules: Rules, params: PyTree, mesh: Mesh) -> dict[str, PartitionSpec]:
    """The partition of each weight, by name.

    Args:
      rules: see the module.
      params: arrays or shapes.
      mesh: gives the names and sizes of axes.

    Raises:
      ValueError: a rule that matches no leaf, an axis that the mesh lacks or that does not divide the leaf's.
    """
    check_rules(rules)
    shapes = {name: tuple(p.shape) for name, p in trees.named_leaves(params).items()}
    chosen = trees.first_match("config.sharding", [(pattern, spec) for pattern, spec in rules], list(shapes))
    return {
        name: _spec(name, shape, chosen[name], mesh) if name in chosen else PartitionSpec()
        for name, shape in shapes.items()
    }


def _spec(name: str, shape: Shape, wanted: Any, mesh: Mesh) -> PartitionSpec:
    if wanted in (FSDP, OUTPUTS):
        over = DATA if wanted == FSDP else MODEL
        _check_axis(over, name, mesh)
        return layout.cut_along(shape, over, mesh.shape[over], outputs=wanted == OUTPUTS)
    if len(wanted) > len(shape):
        raise ValueError(f"config.sharding: leaf {name!r} of shape {shape} has fewer axes than {wanted!r}")
    entries = [tuple(entry) if isinstance(entry, (list, tuple)) else entry for entry in wanted]
    for entry, size in zip(reversed(entries), reversed(shape), strict=False):
        axes = () if entry is None else entry if isinstance(entry, tuple) else (entry,)
        for axis in axes:
            _check_axis(axis, name, mesh)
        parts = math.prod(mesh.shape[axis] for axis in axes)
        if size % parts:
            raise ValueError(f"config.sharding: leaf {name!r} of shape {shape} does not divide by {parts} at {entry!r}")
    return PartitionSpec(*[None] * (len(shape) - len(entries)), *entries)


def _check_axis(axis: str, name: str, mesh: Mesh) -> None:
    if axis not in mesh.shape:
        raise ValueError(f"config.sharding: no mesh axis {axis!r} for leaf {name!r}; there is {', '.join(mesh.shape)}")


def shardings(rules: Rules, state: PyTree, params: PyTree, mesh: Mesh) -> PyTree:
    """The sharding of everything in a state: a weight's for all that ends in its name and has its shape.

    Args:
      rules: see the module.
      state: arrays or shapes; `state.opt_state.inner[0].mu["a"]["kernel"]` belongs to the weight "a/kernel".
      params: the weights, arrays or shapes.
      mesh: where.

    Returns:
      A tree parallel to `state` of `NamedSharding`.
    """
    found = specs(rules, params, mesh)
    shapes = {name: tuple(p.shape) for name, p in trees.named_leaves(params).items()}

    def one(name: str, leaf: Any) -> NamedSharding:
        parts = name.split("/")
        suffixes = ["/".join(parts[i:]) for i in range(len(parts))]  # the longest that is a weight's name counts
        owner = next((suffix for suffix in suffixes if suffix in found), None)
        fits = owner is not None and shapes[owner] == tuple(leaf.shape)
        return NamedSharding(mesh, found[owner] if owner is not None and fits else PartitionSpec())

    return jax.tree.map(one, trees.names(state), state)


def gather(tree: PyTree) -> PyTree:
    """The arrays of a tree on the host, whole, in every process. All processes must call it."""
    if jax.process_count() == 1:
        return jax.device_get(tree)
    return jax.tree.map(lambda x: np.asarray(multihost_utils.process_allgather(x, tiled=True)), tree)


def all_agree(held: bool) -> bool:
    """Whether it holds in every process. All processes must call it; none returns before all have called."""
    return held if jax.process_count() == 1 else bool(np.all(multihost_utils.process_allgather(np.asarray(held))))


def check_agreement(digest: Array, step: int) -> None:
    """Checks that all processes, and all devices of each, hold the same masks. All processes must call it.

    Weights that are whole on every device are computed on each of them from a gradient that was summed once, so masks
    cannot differ unless hardware, versions or configs do; then training must stop. Sharded masks exist once.

    Args:
      digest: uint32 scalar, computed from the masks by every device for itself.
      step: steps done, for the message.

    Raises:
      ValueError: lists the digests by process.
    """
    own = np.asarray([np.asarray(shard.data) for shard in digest.addressable_shards], np.uint32)
    table = np.asarray(multihost_utils.process_allgather(own)).reshape(jax.process_count(), -1)
    compare(table, step)


def compare(table: np.ndarray, step: int) -> None:
    """Checks `uint32[processes, devices of each]`: see `check_agreement`."""
    if (table != table[0, 0]).any():
        held = [", ".join(f"{d:08x}" for d in sorted(set(row.tolist()))) for row in table]
        seen = "; ".join(f"process {i}: {digests}" for i, digests in enumerate(held))
        raise ValueError(
            f"train: the masks differ between devices after step {step} ({seen}); nothing was saved since the last "
            "checkpoint. Do all hosts run the same versions, config and data?"
        )
