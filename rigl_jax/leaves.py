"""The groups, layers and units of one sparse leaf, as its structure cuts it."""

from __future__ import annotations

import math

import jax.numpy as jnp

from rigl_jax import arguments as rules
from rigl_jax.arguments import arguments
from rigl_jax.base import Array, Axes, Leaf, Shape, Structure


@arguments(structure=rules.structure, mask=rules.array())
def active_units(structure: Structure, mask: Array) -> Array:
    """bool[*units] of a mask bool[*shape]: the units that hold an active weight."""
    return structure.pool(mask.astype(jnp.float32)) > 0


def n_stacked(shape: Shape, axes: Axes | None) -> int:
    """How many layers are stacked in a weight with these axes; 1 where they are not known."""
    return math.prod(shape[axis] for axis in axes.stack) if axes else 1


@arguments(leaf=rules.leaf)
def n_units(leaf: Leaf) -> tuple[int, int]:
    """`(groups, units in each group)` of a leaf."""
    units = leaf.structure.units(leaf.shape)
    in_group = math.prod(units[axis] for axis in leaf.structure.axes(units))
    return math.prod(units) // in_group, in_group


@arguments(leaf=rules.leaf)
def n_layers(leaf: Leaf) -> int:
    """How many layers are stacked in a leaf; 1 where it is no stack."""
    units = leaf.structure.units(leaf.shape)
    return math.prod(units[axis] for axis in leaf.structure.stack(units))


@arguments(structure=rules.structure, units=rules.shape)
def layer_axes(structure: Structure, units: Shape) -> tuple[int, ...]:
    """The axes of the pooled array over which a layer extends: all but those of the stack."""
    stack = structure.stack(units)
    return tuple(axis for axis in range(len(units)) if axis not in stack)


@arguments(leaf=rules.leaf, which=rules.array())
def count_layers(leaf: Leaf, which: Array) -> Array:
    """How many units are True: int32 scalar; in a stack for each layer, int32 with the axes of `which` kept."""
    if n_layers(leaf) == 1:
        return jnp.sum(which, dtype=jnp.int32)
    return jnp.sum(which, axis=layer_axes(leaf.structure, which.shape), keepdims=True, dtype=jnp.int32)


@arguments(leaf=rules.leaf)
def is_single(leaf: Leaf) -> bool:
    """Whether all single weights of a layer compete with each other, so that they may with those of other leaves."""
    layers = n_layers(leaf)
    return n_units(leaf) == (layers, math.prod(leaf.shape) // layers)


@arguments(leaf=rules.leaf)
def unit_size(leaf: Leaf) -> int:
    """Weights in a unit."""
    groups, units = n_units(leaf)
    return math.prod(leaf.shape) // (groups * units)


@arguments(leaf=rules.leaf)
def active_weights(leaf: Leaf) -> int:
    """How many weights the plan keeps active in a leaf."""
    groups, _ = n_units(leaf)
    return groups * leaf.n_active * unit_size(leaf)
