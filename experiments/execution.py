"""How a network is executed: dense, masked or packed, behind one interface.

A masked run multiplies whole matrices in which pruned weights are 0. A packed run stores and multiplies active weights
only, and rewires through the masked step, so that its masks are those of a masked run. `experiments.build` chooses.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax.sharding import Mesh, NamedSharding

import rigl_jax as rx
from experiments import sharding
from experiments.data_pruning import Examples
from experiments.step import (
    Batch,
    Objective,
    TrainState,
    advance,
    evaluation_sums,
    example_scores,
    gradient_of,
    init_variables,
    new_state,
)
from rigl_jax import mask_metrics, trees
from rigl_jax.base import Algorithm, Array, Masks, PyTree
from rigl_jax.execution import Packed, run_packed

State = Any
"""What an execution runs on: a `TrainState`, or a `PackedState`. Both have the fields `step` and `totals`."""


class Execution(NamedTuple):
    """The compiled functions of a run. Batches are split over the mesh; the state is sharded by `config.sharding`.

    Attributes:
      init: `(params=None, masks=None) -> TrainState`, before the first step. Given weights (dense, parallel to the
        model's) and masks take the place of random ones.
      abstract: `() -> TrainState` of shapes, types and shardings, into which a checkpoint is restored.
      due: `step -> bool`, on the host: does this step, counted from 0, rewire?
      step: `(state, batch) -> state`: an ordinary training step. The state is donated.
      rewire: `(state, batch) -> (state, counts)`: a training step that is due. `counts` are those of
        `mask_metrics.mask_counts`. The state is donated. None for a dense run, which has no such step.
      evaluate: `(state, batch) -> float32[3]`; see `experiments.step.evaluation_sums`. It also takes a `TrainState`.
      gradient: `(TrainState, batch) -> (loss, gradient)`; the gradient is dense and parallel to params.
      score: `(TrainState, table float32[n], batch) -> table` with the scores of the batch's examples, at their index.
      choose: `(examples, table or None, step) -> examples`: those that are used from this step on.
      masks: `TrainState -> masks`; a tree without arrays for a dense run.
      to_masked: `state -> TrainState`. Exact; a dense or masked run runs on the `TrainState` itself.
      from_masked: `TrainState -> state`, its inverse.
    """

    init: Callable[..., TrainState]
    abstract: Callable[[], TrainState]
    due: Callable[[int], bool]
    step: Callable[[State, Batch], State]
    rewire: Callable[[State, Batch], tuple[State, Array]] | None
    evaluate: Callable[[State, Batch], Array]
    gradient: Callable[[TrainState, Batch], tuple[Array, PyTree]]
    score: Callable[[TrainState, Array, Batch], Array]
    choose: Callable[[Examples, Array | None, int], Examples]
    masks: Callable[[TrainState], Masks]
    to_masked: Callable[[State], TrainState]
    from_masked: Callable[[TrainState], State]

    def train(self, step: int, state: State, batch: Batch) -> tuple[State, Array | None]:
        """The training step of this number, counted from 0; the counts where it rewires, else None."""
        if self.rewire is not None and self.due(step):
            return self.rewire(state, batch)
        return self.step(state, batch), None


class PackedState(NamedTuple):
    """A `TrainState` whose sparse weights are packed.

    Attributes:
      step, batch_stats, key, totals, examples: as in `TrainState`.
      params: active weights and their patterns.
      opt_state: that of `rx.packed_training`: without masks, moments for active weights only.
      explored: the weights that were ever active, 8 of the last axis to the byte.
    """

    step: Array
    params: Packed
    batch_stats: PyTree
    opt_state: rx.SparseState
    key: Array
    explored: PyTree
    totals: dict[str, Array]
    examples: Examples | None


# --- dense and masked --------------------------------------------------------------------------------------------


def dense(
    objective: Objective, optimizer: optax.GradientTransformation, mesh: Mesh, rules: sharding.Rules
) -> Execution:
    """Trains by the optimizer alone, without masks."""
    tx = optax.with_extra_args_support(optimizer)
    train = functools.partial(_train_step, objective, tx, _as_they_are)

    def init(params: PyTree = None, masks: Masks = None) -> TrainState:
        if masks is not None:
            raise ValueError("init: masks must be None for a dense run, which has none")
        params, batch_stats = _first(objective, params)
        return new_state(objective, params, batch_stats, tx.init(params))

    return _compiled(
        objective,
        mesh,
        rules,
        init=init,
        train=train,
        rewire=None,
        weights=_as_they_are,
        due=lambda step: False,
        masks=lambda state: None,
    )


def masked(
    objective: Objective,
    optimizer: optax.GradientTransformation,
    algorithm: Algorithm,
    mesh: Mesh,
    rules: sharding.Rules,
) -> Execution:
    """Trains by `rx.sparsify`: dense arrays under masks."""
    tx = rx.sparsify(optimizer, algorithm, key=objective.key("masks"))
    weights = _straight_through if algorithm.latent else _as_they_are
    train = functools.partial(_train_step, objective, tx, weights)

    def init(params: PyTree = None, masks: Masks = None) -> TrainState:
        params, batch_stats = _first(objective, params)
        opt_state: Any = tx.init(params)
        if masks is not None:
            _, opt_state = rx.replace_masks(optimizer, opt_state, params, masks)
        params = rx.apply_masks(params, algorithm.stored(opt_state.algorithm))
        return new_state(objective, params, batch_stats, opt_state, jax.tree.map(jnp.copy, opt_state.masks))

    def rewire(state: TrainState, batch: Batch) -> tuple[TrainState, Array]:
        after = train(state, batch, rewire=True, updates=not algorithm.skip_step)
        explored = jax.tree.map(jnp.logical_or, state.explored, after.opt_state.masks)
        counts = mask_metrics.mask_counts(state.opt_state.masks, after.opt_state.masks, explored)
        return after._replace(explored=explored), counts

    return _compiled(
        objective,
        mesh,
        rules,
        init=init,
        train=functools.partial(train, rewire=False),
        rewire=rewire,
        weights=weights,
        due=lambda step: bool(algorithm.due(step)),
        masks=lambda state: state.opt_state.masks,
    )


def _first(objective: Objective, params: PyTree) -> tuple[PyTree, PyTree]:
    """The model's first params, or those given, and its first running statistics."""
    first, batch_stats = init_variables(objective)
    if params is None:
        return first, batch_stats
    expected, given = ({n: jnp.shape(p) for n, p in trees.named_leaves(tree).items()} for tree in (first, params))
    for name in expected | given:
        if expected.get(name) != given.get(name):
            raise ValueError(
                f"init: params must hold the model's leaf {name!r} of shape {expected.get(name)}, got {given.get(name)}"
            )
    return trees.aligned(params, first), batch_stats


def _as_they_are(state: Any, params: PyTree) -> PyTree:
    """The weights of the network are the params."""
    del state
    return params


def _straight_through(state: TrainState, params: PyTree) -> PyTree:
    """The weights of the network where the method keeps weights alive behind its masks."""
    return rx.straight_through(params, state.opt_state.masks)


def _train_step(
    objective: Objective,
    tx: optax.GradientTransformationExtraArgs,
    weights: Callable[[Any, PyTree], PyTree],
    state: TrainState,
    batch: Batch,
    *,
    updates: bool = True,
    **keywords: Any,
) -> TrainState:
    """A step on dense arrays; `updates`: whether it updates weights; `keywords` go to `tx.update`."""
    apply, of = objective.model.apply, functools.partial(weights, state)
    gradient, metrics, new = gradient_of(objective, apply, of, state.params, state, batch)
    changes, opt_state = tx.update(gradient, state.opt_state, state.params, **keywords)
    new |= {"params": optax.apply_updates(state.params, changes), "opt_state": opt_state}
    return advance(objective, state, gradient, metrics, updates=updates, **new)


def _compiled(
    objective: Objective,
    mesh: Mesh,
    rules: sharding.Rules,
    *,
    init: Callable[..., TrainState],
    train: Callable[[TrainState, Batch], TrainState],
    rewire: Callable[[TrainState, Batch], tuple[TrainState, Array]] | None,
    weights: Callable[[TrainState, PyTree], PyTree],
    due: Callable[[int], bool],
    masks: Callable[[TrainState], Masks],
) -> Execution:
    """Jits the functions of a run on dense arrays. Nothing is compiled before it is called."""
    whole, apply = sharding.whole(mesh), objective.model.apply
    sharding.check_convolutions(init, mesh)
    shapes = jax.eval_shape(init)
    laid = sharding.shardings(rules, shapes, shapes.params, mesh)

    def abstract() -> TrainState:
        return jax.tree.map(lambda x, at: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=at), shapes, laid)

    def evaluate(state: TrainState, batch: Batch) -> Array:
        return evaluation_sums(apply, weights(state, state.params), state, batch)

    def gradient(state: TrainState, batch: Batch) -> tuple[Array, PyTree]:
        of = functools.partial(weights, state)
        found, metrics, _ = gradient_of(objective, apply, of, state.params, state, batch)
        return metrics["loss"], found

    def score(state: TrainState, table: Array, batch: Batch) -> Array:
        # What masks leave out has no gradient; a method that keeps weights behind its masks is scored without them.
        held = masks(state)
        params = state.params if held is None else rx.apply_masks(state.params, held)
        return table.at[batch["index"]].set(example_scores(objective, params, state, batch))

    def choose(examples: Examples, table: Array | None, step: Array) -> Examples:
        return objective.pruning.choose(examples, table, jax.random.fold_in(objective.key("examples"), step))

    return Execution(
        init=jax.jit(init, out_shardings=laid),
        abstract=abstract,
        due=due,
        step=jax.jit(train, out_shardings=laid, donate_argnums=0),
        rewire=None if rewire is None else jax.jit(rewire, out_shardings=(laid, whole), donate_argnums=0),
        evaluate=jax.jit(evaluate),
        gradient=jax.jit(gradient),
        score=jax.jit(score, out_shardings=whole),
        choose=jax.jit(choose, out_shardings=whole),
        masks=masks,
        to_masked=lambda state: state,
        from_masked=lambda state: state,
    )


# --- packed ------------------------------------------------------------------------------------------------------


def packed(
    objective: Objective,
    optimizer: optax.GradientTransformation,
    algorithm: Algorithm,
    mesh: Mesh,
    rules: sharding.Rules,
) -> Execution:
    """Trains by `rx.packed_training`. A rewiring is the masked step itself, between `to_masked` and `from_masked`.

    Weights lie whole on each device, or, with the one rule `(".*", "fsdp")` or `(".*", "outputs")`, cut over devices in
    both forms.

    Raises:
      ValueError: a mesh or rules that split weights otherwise; a method that needs more than the active weights.
    """
    at, whole = _packed_sharding(mesh, rules), sharding.whole(mesh)
    cut = at is not None and not at.is_fully_replicated
    arrays = masked(objective, optimizer, algorithm, mesh, rules)
    training = rx.packed_training(optimizer, algorithm, key=objective.key("masks"), sharding=at)
    apply = run_packed(objective.model.apply, batch=None if at is None else sharding.split(mesh))
    laid = jax.tree.map(lambda x: x.sharding, arrays.abstract())

    def from_masked(state: TrainState, like: Packed | None = None) -> PackedState:
        params, opt_state = training.pack(state.params, state.opt_state, like)
        explored = jax.tree.map(functools.partial(jnp.packbits, axis=-1), state.explored)  # each device its part
        return PackedState(**state._replace(params=params, opt_state=opt_state, explored=explored)._asdict())

    def to_masked(state: PackedState) -> TrainState:
        params, opt_state = training.unpack(state.params, state.opt_state)
        explored = jax.tree.map(_unpackbits, state.explored, opt_state.masks)
        unpacked = TrainState(**state._replace(params=params, opt_state=opt_state, explored=explored)._asdict())
        return jax.device_put(unpacked, laid) if cut else unpacked

    def train(state: PackedState, batch: Batch) -> PackedState:
        of = lambda values: state.params._replace(values=values)  # noqa: E731
        gradient, metrics, new = gradient_of(objective, apply, of, state.params.values, state, batch)
        params, opt_state = training.update(gradient, state.opt_state, state.params)
        return advance(objective, state, gradient, metrics, updates=True, params=params, opt_state=opt_state, **new)

    def rewire(state: PackedState, batch: Batch) -> tuple[PackedState, Array]:
        after, counts = arrays.rewire(to_masked(state), batch)  # pyrefly: ignore[not-callable]
        return from_masked(after, state.params), counts

    @jax.jit
    def evaluate_packed(state: PackedState, batch: Batch) -> Array:
        return evaluation_sums(apply, state.params, state, batch)

    def evaluate(state: State, batch: Batch) -> Array:
        return (evaluate_packed if isinstance(state, PackedState) else arrays.evaluate)(state, batch)

    own = ("params", "opt_state", "explored")  # `training` lays what is cut
    out = PackedState._make(None if name in own else whole for name in PackedState._fields) if cut else whole
    return arrays._replace(
        step=jax.jit(train, out_shardings=out, donate_argnums=0),
        rewire=rewire,
        evaluate=evaluate,
        to_masked=to_masked,
        from_masked=from_masked,
    )


def _packed_sharding(mesh: Mesh, rules: sharding.Rules) -> NamedSharding | None:
    """Where packed weights lie: cut or whole on several devices, None on one."""
    if mesh.size == 1:
        return None
    given, over = tuple(tuple(rule) for rule in rules), {axis for axis, size in mesh.shape.items() if size > 1}
    if given in ((), sharding.ALL_FSDP) and over == {sharding.DATA}:
        return sharding.split(mesh) if given else sharding.whole(mesh)
    if given == sharding.ALL_OUTPUTS and over <= {sharding.DATA, sharding.MODEL} and sharding.MODEL in mesh.shape:
        return sharding.outputs(mesh)
    raise ValueError(
        "config.execution: packed weights lie whole on every device, or are all cut in one way; it takes a mesh of "
        f"{sharding.DATA!r} with sharding rules () or {sharding.ALL_FSDP}, or of {sharding.DATA!r} and "
        f"{sharding.MODEL!r} with {sharding.ALL_OUTPUTS}, got mesh {dict(mesh.shape)}, sharding {rules}"
    )


def _unpackbits(bits: Array, mask: Array) -> Array:
    return jnp.unpackbits(bits, axis=-1, count=mask.shape[-1]).astype(bool)
