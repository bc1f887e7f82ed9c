"""The types that every other module shares, and the arithmetic of one layer of a plan."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

Array = jax.Array
PyTree = Any
Shape = tuple[int, ...]
Masks = PyTree
"""A pytree parallel to params; a leaf is `bool[*shape]` (True: active) or None where the weight is dense."""


class InPatterns(NamedTuple):
    """In place of the masks in the state of a packed run: the patterns of its weights are they.

    Unlike a tree of None it is not taken for masks of dense leaves. `rx.execution.masks_of(packed)` gives the masks.
    """


Distribution = Callable[[Mapping[str, Shape], float], dict[str, float]]
"""`(shapes, sparsity) -> {name: sparsity}`, on the host: how a total sparsity is shared among leaves."""


class Signals(NamedTuple):
    """All that a score may look at.

    Attributes:
      params: the weights; those that are not stored are exactly 0.
      grads: the gradient of the loss at the masked weights, **dense**: inactive positions included.
      step: int32 scalar, the number of `update` calls before this one.
      key: a typed PRNG key, already folded with the step. Equal on every replica.
      extra: the further keywords of `tx.update`, by name.
    """

    params: PyTree
    grads: PyTree
    step: Any
    key: Array
    extra: Mapping[str, Any] = {}


Score = Callable[[Signals], PyTree]
"""`Signals -> tree of arrays parallel to params`; higher means more worth keeping (or growing).

-inf is the lowest rank. A NaN or +inf, where a rewiring reads it, leaves the masks of the leaf as they are."""


class Axes(NamedTuple):
    """Which axes of a weight are what. Together they name every axis once; negative numbers count from the last.

    A dense kernel of Flax is `Axes((0,), (1,))`, one of Equinox `Axes((1,), (0,))`, a convolution of PyTorch
    `Axes((1,), (0,), window=(2, 3))`, and `Axes((-2,), (-1,), stack=(0,))` is a scanned dense layer.

    Attributes:
      inputs: what a product sums over.
      outputs: what it writes.
      window: the spatial axes of a convolution. They are inputs too: of other pixels.
      stack: along which layers lie that are trained as one array (`nn.scan`, `eqx.filter_vmap`, experts). Each layer
        has its own count and its own ranking.
    """

    inputs: tuple[int, ...]
    outputs: tuple[int, ...]
    window: tuple[int, ...] = ()
    stack: tuple[int, ...] = ()


class Role(NamedTuple):
    """What a leaf is for its network.

    Attributes:
      axes: which of its axes are what; None where that is not known.
      dense: why it is dense where no rule says otherwise; None: it is a kernel, and sparse.
    """

    axes: Axes | None = None
    dense: str | None = None


def _no_axes(units: Shape) -> tuple[int, ...]:
    del units
    return ()


class Structure(NamedTuple):
    """How a weight is cut into units that live or die together, and which units compete with each other.

    `pool` turns an array of the weight's shape into one number a unit; `expand` turns one bool a unit back into the
    weight's shape. `axes` says along which axes of the pooled array units compete: all of them (one group) for
    unstructured sparsity, only the input axes for a constant fan-in. No axis is flattened on the way, so a
    sharded weight stays sharded.

    Attributes:
      name: what reports and errors call it.
      pool: `scores[*shape] -> scores[*units]`.
      expand: `(bool[*units], shape) -> bool[*shape]`.
      units: `shape -> units`, the pooled shape; raises ValueError for a shape that does not divide.
      axes: `units -> axes`, along which the units of one group lie.
      sparsity: the sparsity that the structure itself imposes (0.5 for 2:4), or None where the plan chooses.
      stack: `units -> axes`, along which stacked layers lie, none of them among `axes`. Weights are dropped within a
        layer.
      bind: the same structure for a weight with these axes; None: it reads none.
      needs_axes: whether it means something else where inputs and outputs lie otherwise, so that `make_plan` must know
        them.
    """

    name: str
    pool: Callable[[Array], Array]
    expand: Callable[[Array, Shape], Array]
    units: Callable[[Shape], Shape]
    axes: Callable[[Shape], tuple[int, ...]]
    sparsity: float | None = None
    stack: Callable[[Shape], tuple[int, ...]] = _no_axes
    bind: Callable[[Axes], Structure] | None = None
    needs_axes: bool = False

    def active(self, mask: Array) -> Array:
        """bool[*units] of a mask bool[*shape]: the units that hold an active weight."""
        return self.pool(mask.astype(jnp.float32)) > 0

    def layer_axes(self, units: Shape) -> tuple[int, ...]:
        """The axes of the pooled array over which a layer extends: all but those of the stack."""
        stack = self.stack(units)
        return tuple(axis for axis in range(len(units)) if axis not in stack)


class LayerPlan(NamedTuple):
    """What the plan says of one sparse weight.

    Attributes:
      name: its path, `"a/b/kernel"`.
      shape: its shape.
      structure: the structure its mask must keep.
      n_active: how many units stay active in each group of the structure.
      axes: which of its axes are what; None where that is not known.

    >>> from rigl_jax.structures import n_of_m
    >>> layer = LayerPlan("kernel", (8, 6), n_of_m(2, 4), 2)
    >>> layer.groups, layer.group_size, layer.unit_size, layer.active_weights
    (12, 4, 1, 24)
    """

    name: str
    shape: Shape
    structure: Structure
    n_active: int
    axes: Axes | None = None

    @property
    def units(self) -> Shape:
        """The shape of the pooled array."""
        return self.structure.units(self.shape)

    @property
    def group_size(self) -> int:
        """How many units compete in each group."""
        units = self.units
        return math.prod(units[axis] for axis in self.structure.axes(units))

    @property
    def groups(self) -> int:
        """How many groups there are, in a stack those of all its layers."""
        return math.prod(self.units) // self.group_size

    @property
    def layers(self) -> int:
        """How many layers are stacked in the weight; 1 where it is no stack."""
        units = self.units
        return math.prod(units[axis] for axis in self.structure.stack(units))

    @property
    def size(self) -> int:
        """How many weights there are, active or not."""
        return math.prod(self.shape)

    @property
    def unit_size(self) -> int:
        """How many weights are in a unit."""
        return self.size // math.prod(self.units)

    @property
    def active_units(self) -> int:
        """How many units the plan keeps active."""
        return self.groups * self.n_active

    @property
    def active_weights(self) -> int:
        """How many weights the plan keeps active."""
        return self.active_units * self.unit_size

    @property
    def is_unstructured(self) -> bool:
        """Whether all single weights of a layer compete, so that they may with those of other leaves."""
        return self.groups == self.layers and self.unit_size == 1

    def active(self, mask: Array) -> Array:
        """bool[*units] of a mask bool[*shape]: the units that hold an active weight."""
        return self.structure.active(mask)

    def layer_axes(self) -> tuple[int, ...]:
        """The axes of the pooled array over which a layer extends: all but those of the stack."""
        return self.structure.layer_axes(self.units)

    def count_units(self, which: Array) -> Array:
        """How many units are True: int32 scalar; in a stack for each layer, int32 with the axes of `which` kept."""
        if self.layers == 1:
            return jnp.sum(which, dtype=jnp.int32)
        return jnp.sum(which, axis=self.layer_axes(), keepdims=True, dtype=jnp.int32)


Leaf = LayerPlan
"""The former name of `LayerPlan`."""

Plan = Mapping[str, LayerPlan]
"""The sparse leaves by name; leaves that are not in it are dense. By name, because the same weights may come as a
dict, a module or an NNX state. It holds functions: close over it, never trace it."""


class Rewired(NamedTuple):
    """What a rewiring did.

    Attributes:
      state: the algorithm's new state, with the new `masks`.
      fresh: bool tree of the weights born now, whose value and optimizer moments are reset. None means those that
        the new masks hold and the old ones did not.
      values: tree of the fresh weights' values, read at fresh positions only; infinite and NaN ones count as 0. None
        means zeros.
      delta: tree parallel to params of what is added to weights that are kept, which keep their optimizer moments;
        read at kept positions only, infinite and NaN entries count as 0. None, for a leaf or for all: nothing.
    """

    state: Any
    fresh: Masks | None = None
    values: PyTree | None = None
    delta: PyTree | None = None


def _masks(state: Any) -> Masks:
    return state.masks


def _ignore(state: Any, signals: Signals) -> Any:
    del signals
    return state


class Algorithm(NamedTuple):
    """A sparse-training method: pure functions over a state of its own, and facts about its steps.

    Most methods need the first four. `stored` and `trained` are for those that keep pruned weights behind the mask, and
    `observe` for those that look at every step. What a wrapper does not change it passes on by `_replace`.

    Attributes:
      init: `(key, params) -> state`; the state is a NamedTuple of arrays with a field `masks`.
      update: `(state, signals) -> Rewired`, called on steps that are due.
      due: `step -> bool`: does this step rewire? Takes a Python int (and then answers with a bool) or a tracer.
      dense_grads: `step -> bool`: does this step read gradients of inactive weights? Takes what `due` takes, and also
        an array of steps, elementwise (for `training_cost`).
      skip_step: True: a rewiring step changes masks only and trains nothing.
      stored: `state -> masks` of the weights that may differ from 0; a None leaf means all. Default: the masks. Where
        it is more, `latent` must be True.
      trained: `state -> masks` of the weights that get gradients; a None leaf means all. Default: the masks. Stored
        weights that are not trained keep their value.
      observe: `(state, signals) -> state`, called on every step, before `update`. Default: nothing.
      keeps_counts: does every leaf keep the plan's number of active weights throughout?
      plan: the plan that it follows; None: `sparsify` does not check that a state has its leaves.
      state: the type of its state, a NamedTuple; None: `sparsify` does not check that a state is of it.
      latent: are pruned weights kept behind the mask? The network's weights are then not the params: take the loss at
        `straight_through(params, state.masks)`.
      active_only: do steps that are not due read and change active weights alone? Packed training needs it.
    """

    init: Callable[[Array, PyTree], Any]
    update: Callable[[Any, Signals], Rewired]
    due: Callable[[Any], Any]
    dense_grads: Callable[[Any], Any]
    skip_step: bool = False
    stored: Callable[[Any], Masks] = _masks
    trained: Callable[[Any], Masks] = _masks
    observe: Callable[[Any, Signals], Any] = _ignore
    keeps_counts: bool = False
    plan: Plan | None = None
    state: type | None = None
    latent: bool = False
    active_only: bool = False

    def __hash__(self) -> int:
        """So that `jax.jit` takes an algorithm as a static argument: a plan has no hash of its own."""
        return hash((self.init, self.update, self.due))


Criterion = Callable[[PyTree, Any], PyTree]
"""`(params, batch) -> scores`, a tree of arrays parallel to params; higher means more worth keeping.

`params` are masked: pruned weights are 0. `batch` is the data that the criterion takes, None if it needs none. Scores
off the masks are not read. -inf is the lowest rank; NaN ranks below it. `rx.criteria` holds those of the library."""


class Pruned(NamedTuple):
    """What pruning left.

    Attributes:
      params: the weights, exactly 0 off the masks.
      masks: parallel to params: bool[*shape], None for a dense leaf.
    """

    params: PyTree
    masks: Masks


Surgeon = Callable[[Plan, PyTree, Masks, Any], Pruned]
"""`(plan, params, masks, batch) -> Pruned`: prunes to the plan's counts and also moves the weights that stay (OBS)."""


class Trained(NamedTuple):
    """What a training run left.

    Attributes:
      params: the weights, exactly 0 off the masks.
      aux: anything else, such as the optimizer's state or a summary. No recipe reads it.
      masks: the masks at the end, where training moved them; None: those that it was given.
    """

    params: PyTree
    aux: Any = None
    masks: Masks | None = None


Train = Callable[[PyTree, Masks, int, int, Array], Trained]
"""`(params, masks, start, stop, key) -> Trained`: the user's training from step `start` to step `stop`.

It must depend on its arguments alone, keep pruned weights 0 and leave its arguments as they are."""
