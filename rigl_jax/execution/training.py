"""Training on packed weights: ordinary steps use active weights only, rewirings use the masked form.

A rewiring is rare and needs dense gradients, so weights are unpacked, rewired by the step of `sparsify`, and packed
again. Therefore masks are equal to those of a masked run, for every method whose other steps need no dense array.
`streaming` rewires as RigL does, without dense arrays.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import optax

from rigl_jax import checks, trees
from rigl_jax.base import Algorithm, Array, InPatterns, PyTree
from rigl_jax.execution import kernels, layout
from rigl_jax.execution.packed import (
    Choose,
    Packed,
    Whole,
    best_choice,
    checked,
    gather_leaf,
    leaf_patterns,
    make_patterns,
    masks_of,
    scatter_leaf,
    unpack,
)
from rigl_jax.execution.repacking import same_kernels
from rigl_jax.messages import kind
from rigl_jax.transform import SparseState, sparsify


class PackedTraining(NamedTuple):
    """What a training loop on packed weights calls.

    Attributes:
      init: `params -> (packed, state)`, on the host.
      update: `(grads, state, packed) -> (packed, state)`: an ordinary step; `grads` are parallel to `packed.values`.
        For jit, with packed and state donated; outside of jit every step checks the patterns. Extra keywords go to the
        inner optimizer. The caller must ask `algorithm.due(step)`: `update` never rewires, also on a step that is due.
      rewire: `(grads, state, packed) -> (packed, state)`: a step that is due; `grads` are dense, parallel to params,
        taken at `unpack(packed)`. On the host. Nothing is compiled again while the sizes of the values stay the same.
      pack: `(params, state, like=None) -> (packed, state)`: continues a masked run, on the host. `like` is a `Packed`
        whose kernels are used again.
      unpack: `(packed, state) -> (params, state)`: the exact inverse. A masked run continues from there with
        `sparsify`, so packed and masked runs can use each other's checkpoints.
    """

    init: Callable[[PyTree], tuple[Packed, SparseState]]
    update: Callable[..., tuple[Packed, SparseState]]
    rewire: Callable[..., tuple[Packed, SparseState]]
    pack: Callable[..., tuple[Packed, SparseState]]
    unpack: Callable[[Packed, SparseState], tuple[PyTree, SparseState]]


def packed_training(
    inner: optax.GradientTransformation,
    algorithm: Algorithm,
    *,
    key: Array,
    choose: Choose | None = None,
    sharding: jax.sharding.Sharding | None = None,
) -> PackedTraining:
    """`sparsify` for packed weights: the same arguments, the same masks, the same weights up to float rounding.

    Where a method changes the counts (GMP, GraNet, DSR), the arrays keep their sizes until a quarter of what they hold
    is padding, or a leaf does not fit: a network that is pruned to 5 % of its weights is compiled about ten times, in
    however many steps it is pruned. Padding is 0, has no gradient, and takes part in no product.

    The optimizer gets values only, so its state has the size of the active weights. It must treat weights one by one,
    or together only through sums (clipping by a global norm, LAMB): one that uses a weight as a matrix (Adafactor,
    Muon) is refused by `init`. Masks of weight decay that ask for `ndim >= 2` must be made from the dense shapes.

    Args:
      inner: any such optax optimizer.
      algorithm: a method that needs dense gradients on its rewirings at most, and keeps no weights behind its masks.
      key: as for `sparsify`.
      choose: the kernel of each leaf; see `pack`. By default the plan's axes decide how a leaf of three or more axes is
        split into inputs and outputs, and leaves that it says are stacks of layers are packed layer by layer, for
        `lax.scan` and `nn.scan`. `rx.execution.fastest(plan=plan)` measures these kernels; without the plan it
        does not know the axes.
      sharding: for several devices; see also `batch` of `run_packed`. `NamedSharding(mesh, PartitionSpec())` lays
        patterns and values whole on each device. `PartitionSpec("data")` cuts them, what the optimizer keeps for them,
        and dense leaves, along their largest axes that the devices divide: each device holds its part, and for a
        product all have that leaf whole. `PartitionSpec(None, "model")` cuts weights by their outputs: a device holds
        the active weights of its own outputs and multiplies with these only, if the mesh of `batch` has that axis.
        Weights whose outputs do not divide, in whole runs or tiles, are cut as `PartitionSpec("data")` cuts them.
        `unpack` and `rewire` cut params, masks and moments in the same way, so no device holds the dense model;
        params, state and gradients that are given may lie in any way on these devices. Whole are what the devices do
        not divide, and the masks from which every process builds the patterns on its host.

    As in `sparsify`, the state decides the counts: one with masks of other counts than the plan's (`replace_masks`)
    keeps them. `check_masked(unpack(packed), masks_of(packed), plan)` checks this.

    Raises:
      ValueError: the algorithm stores, trains or observes more than the active weights (GMP with recovery, STE,
        Top-KAST, SNFS ...). From its functions: a state of another algorithm, optimizer or set of leaves, or one whose
        optimizer state does not fit the packed weights.

    >>> import jax.numpy as jnp
    >>> import rigl_jax as rx
    >>> params = {"w": jnp.ones((8, 8))}
    >>> algorithm = rx.rigl(rx.make_plan(params, 0.75), period=2)
    >>> training = packed_training(optax.adam(0.1), algorithm, key=jax.random.key(0))
    >>> packed, state = training.init(params)
    >>> loss = lambda packed, x: jnp.sum(rx.run_packed(lambda p, x: x @ p["w"])(packed, x) ** 2)
    >>> for step in range(4):
    ...     x = jnp.ones((2, 8))
    ...     if algorithm.due(step):
    ...         dense = lambda params: jnp.sum((x @ params["w"]) ** 2)
    ...         packed, state = training.rewire(jax.grad(dense)(rx.unpack(packed)), state, packed)
    ...     else:
    ...         grads = jax.grad(lambda values: loss(packed._replace(values=values), x))(packed.values)
    ...         packed, state = training.update(grads, state, packed)
    >>> packed.values["w"].shape, int(state.step)
    ((16,), 4)
    """
    checks.algorithm("packed_training", algorithm)
    checks.optimizer("packed_training", inner)
    checks.optional_functions("packed_training", choose=choose)
    layout.check("packed_training", sharding)
    if not algorithm.active_only:
        raise ValueError(
            "packed_training: this method keeps weights behind its masks, or reads dense gradients on ordinary steps; "
            "train it masked (a method of your own that does neither must say active_only=True)"
        )
    masked, inner = sparsify(inner, algorithm, key=key), optax.with_extra_args_support(inner)
    run = _Run(
        inner,
        algorithm,
        masked,
        choose or best_choice(algorithm.plan),
        sharding,
        # One program, in which the positions of a pattern's values are computed once.
        gather=jax.jit(functools.partial(_gather, inner, sharding)),
        scatter=jax.jit(functools.partial(_scatter, inner, sharding)),
        masked_step=jax.jit(functools.partial(_masked_step, inner, masked, sharding)),
    )
    return PackedTraining(*(functools.partial(f, run) for f in (_init, _update, _rewire, _pack, _unpack)))


class _Run(NamedTuple):
    """The arguments of `packed_training`, its masked form, and the compiled conversions between the two."""

    inner: optax.GradientTransformationExtraArgs
    algorithm: Algorithm
    masked: optax.GradientTransformationExtraArgs
    choose: Choose
    sharding: jax.sharding.Sharding | None
    gather: Callable[[PyTree, SparseState, PyTree], tuple[Packed, SparseState]]
    scatter: Callable[[Packed, SparseState], tuple[PyTree, SparseState]]
    masked_step: Callable[..., tuple[PyTree, SparseState]]


def _init(run: _Run, params: PyTree) -> tuple[Packed, SparseState]:
    if isinstance(params, Packed):
        raise ValueError("packed_training: init takes params, got packed weights; rx.unpack gives the params")
    init = run.masked.init
    if layout.cuts(run.sharding):
        init = jax.jit(lambda params: layout.laid(run.sharding, run.masked.init(params)))
    return _enter(run, params, init(params))


def _pack(run: _Run, params: PyTree, state: Any, like: Packed | None = None) -> tuple[Packed, SparseState]:
    who = "packed_training: pack"
    if like is not None:
        checked(f"{who}: like", like)
    if isinstance(params, Packed):
        raise ValueError(f"{who} takes params, got packed weights; rx.unpack gives the params")
    if not _is_state(state) or not jax.tree.leaves(state.algorithm.masks):
        raise ValueError(
            f"{who} takes the state of a masked run, got "
            + ("one that is packed already; training.unpack gives both" if _is_state(state) else repr(type(state)))
        )
    checks.algorithm_state(who, run.algorithm, state.algorithm)
    checks.optimizer_state(who, jax.eval_shape(run.inner.init, params), state.inner)
    return _enter(run, params, state, like)


def _enter(run: _Run, params: PyTree, state: Any, like: Packed | None = None) -> tuple[Packed, SparseState]:
    """The packed form of a masked run, with the kernels of `like` where they fit."""
    choose, masks = run.choose, layout.readable(run.sharding, state.masks)
    if like is not None:
        choose = same_kernels(like, masks, choose, padded=not run.algorithm.keeps_counts)
    # Leaves that are stored dense get their masks' places last.
    patterns = layout.placed(run.sharding, make_patterns(params, masks, layout.chosen(run.sharding, choose)))
    if like is None:
        _check_optimizer(run.inner, params, patterns)
    without = state.algorithm._replace(masks=InPatterns())
    values, state = run.gather(params, state._replace(algorithm=without), patterns)
    return Packed(values, patterns), state


def _gather(
    inner: optax.GradientTransformation, sharding: Any, params: PyTree, state: SparseState, patterns: PyTree
) -> tuple[PyTree, SparseState]:
    def one(part: Array, pattern: Any) -> Array:
        return layout.laid(sharding, gather_leaf(part, pattern))

    packed = Packed(jax.tree.map(one, params, patterns), patterns)
    optimizer = map_inner(inner, lambda part, box: one(part, box.content), state.inner, _boxes(packed))
    return packed.values, state._replace(inner=optimizer)


def _scatter(
    inner: optax.GradientTransformation, sharding: Any, packed: Packed, state: SparseState
) -> tuple[PyTree, SparseState]:
    optimizer = map_inner(inner, lambda part, box: scatter_leaf(part, box.content), state.inner, _boxes(packed))
    masked = state._replace(algorithm=state.algorithm._replace(masks=masks_of(packed)), inner=optimizer)
    return layout.laid(sharding, (unpack(packed), masked))


def _unpack(run: _Run, packed: Packed, state: SparseState) -> tuple[PyTree, SparseState]:
    who = "packed_training: unpack"
    return run.scatter(checked(who, packed), _checked_state(run, who, packed, state))


def _update(run: _Run, grads: PyTree, state: SparseState, packed: Packed, **extra: Any) -> tuple[Packed, SparseState]:
    who = "packed_training: update"
    values: Any = checked(who, packed).values
    _checked_state(run, who, packed, state)
    checks.gradients(who, grads, values, of="packed.values")
    updates, optimizer = run.inner.update(grads, state.inner, values, **extra)
    values = optax.apply_updates(values, updates)
    if layout.cuts(run.sharding) or not run.algorithm.keeps_counts:
        values = jax.tree.map(_without_padding, values, packed.patterns)
    values, optimizer = layout.laid(run.sharding, (values, optimizer))
    return Packed(values, packed.patterns), state._replace(step=state.step + 1, inner=optimizer)


def _without_padding(values: Array, pattern: Any) -> Array:
    return values if pattern is None or isinstance(pattern, Whole) else kernels.clear_padding(values, pattern)


def _rewire(run: _Run, grads: PyTree, state: SparseState, packed: Packed, **extra: Any) -> tuple[Packed, SparseState]:
    who = "packed_training: rewire"
    packed, state = checked(who, packed), _checked_state(run, who, packed, state)
    checks.gradients(who, grads, jax.eval_shape(unpack, packed))
    params, state = run.masked_step(grads, state, packed, **extra)
    return _enter(run, params, state, packed)


def _masked_step(
    inner: optax.GradientTransformation,
    masked: optax.GradientTransformationExtraArgs,
    sharding: Any,
    grads: PyTree,
    state: SparseState,
    packed: Packed,
    **extra: Any,
) -> tuple[PyTree, SparseState]:
    """The params and the state of the masked run after a step that rewires."""
    params, dense = _scatter(inner, sharding, packed, state)
    updates, after = masked.update(grads, dense, params, rewire=True, **extra)
    return layout.laid(sharding, (optax.apply_updates(params, updates), after))


def _checked_state(run: _Run, who: str, packed: Packed, state: Any) -> SparseState:
    state = check_state(who, run.inner, packed, state)
    checks.algorithm_state(who, run.algorithm, state.algorithm, _masked(packed))
    return state


def check_state(who: str, inner: optax.GradientTransformation, packed: Packed, state: Any) -> SparseState:
    """The state, if it is that of a packed run with this optimizer and as many weights.

    Raises:
      ValueError: the state of a masked run, of another optimizer or of another number of weights; no state.
    """
    if not _is_state(state):
        raise ValueError(f"{who}: state must be what packed_training gives, got {kind(state)}")
    if jax.tree.leaves(state.algorithm.masks):
        raise ValueError(f"{who}: state must be that of a packed run, got a masked run's; training.pack gives both")
    checks.optimizer_state(who, jax.eval_shape(inner.init, packed.values), state.inner)
    return state


def _masked(packed: Packed) -> dict[str, bool]:
    """The names of the leaves that have a mask."""
    named = zip(trees.named_leaves(packed.values), leaf_patterns(packed), strict=True)
    return {name: True for name, pattern in named if pattern is not None}


def _is_state(state: Any) -> bool:
    return isinstance(state, SparseState) and hasattr(state.algorithm, "masks")


class Box:
    """Makes any object (a pattern, a move) one leaf of a pytree."""

    def __init__(self, content: Any):
        self.content = content


def _boxes(packed: Packed) -> PyTree:
    return jax.tree.unflatten(jax.tree.structure(packed.values), [Box(pattern) for pattern in leaf_patterns(packed)])


def map_inner(inner: optax.GradientTransformation, f: Callable[..., Array], state: PyTree, boxes: PyTree) -> PyTree:
    """`f(part, box)` for every part of an optimizer's state that belongs to a weight; boxes are parallel to params."""

    def one(part: Any, box: Any) -> Any:
        return part if isinstance(part, optax.MaskedNode) else f(part, box)

    return optax.tree.map_params(inner.init, one, state, boxes, is_leaf=lambda x: isinstance(x, optax.MaskedNode))


def _check_optimizer(inner: optax.GradientTransformation, params: PyTree, patterns: PyTree) -> None:
    """Raises a ValueError for an optimizer that treats packed values otherwise than params: its state tells."""
    shapes = jax.tree.map(lambda p: Box(p.shape), params)
    values = jax.eval_shape(lambda: jax.tree.map(gather_leaf, params, patterns))

    def check(part: Any, box: Any) -> Any:
        if part.shape != box.content:
            raise ValueError(
                "packed_training: the optimizer must keep for each weight what has the weight's shape, got "
                f"{part.shape} for one of shape {box.content}; it uses weights as matrices, so train masked"
            )
        return part

    dense = map_inner(inner, check, jax.eval_shape(inner.init, params), shapes)
    if jax.tree.structure(dense) != jax.tree.structure(jax.eval_shape(inner.init, values)):
        raise ValueError(
            "packed_training: the optimizer treats packed values otherwise than the weights they are of (by their "
            "number of axes, as Muon does); train masked"
        )
