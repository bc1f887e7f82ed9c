"""What runs on the devices: the state and the compiled steps, over a mesh.

Two training steps are compiled, an ordinary one and one that rewires; the loop in `experiments.train` picks one by
`algorithm.due(step)`. The state is donated, and the metrics add up in it.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.sharding import Mesh, NamedSharding, PartitionSpec

import rigl_jax as rx
from experiments import build, measure, sharding
from experiments.data import Data
from experiments.finite import SKIP, finite, left_out
from rigl_jax import trees
from rigl_jax.base import Algorithm, Array, Masks, Plan, PyTree
from rigl_jax.execution import PackedTraining

Batch = Mapping[str, Any]


class TrainState(NamedTuple):
    """All that changes while training; arrays only, so that it is donated, sharded and saved as a whole.

    Attributes:
      step: int32 scalar, steps done.
      params: the weights; those that the method does not store are exactly 0.
      batch_stats: running statistics of batch normalisation, {} without.
      opt_state: `rx.SparseState`, or the bare optax state of a dense run.
      key: typed key for dropout, never advanced: each step folds its number in.
      explored: masks of the weights that were ever active; None for a dense run.
      totals: sums of the training metrics since the last line, {"loss", "accuracy", "steps"}, of the batches left out,
        "skipped", and of those among them that would have updated weights, "missed": float32 scalars.
    """

    step: Array
    params: PyTree
    batch_stats: PyTree
    opt_state: Any
    key: Array
    explored: Masks | None
    totals: dict[str, Array]


class Task(NamedTuple):
    """What a config stands for.

    Attributes:
      config: checked, plain data.
      data: batches.
      model: the linen module.
      plan, algorithm: None for a dense run.
      tx: what updates the weights; takes `rewire=bool`.
      packed: the same on packed weights, None for a masked or dense run.
      schedule: learning rate by weight updates done.
      mesh: the devices; batches are split along its axis "data".
    """

    config: dict[str, Any]
    data: Data
    model: nn.Module
    plan: Plan | None
    algorithm: Algorithm | None
    tx: optax.GradientTransformationExtraArgs
    packed: PackedTraining | None
    schedule: optax.Schedule
    mesh: Mesh


def prepare(config: Mapping[str, Any], devices: Sequence[jax.Device] | None = None) -> Task:
    """Builds everything that a config names.

    Args:
      config: see `configs/common.py`.
      devices: to train on; all by default.

    Raises:
      ValueError: whatever is wrong with the config; a batch that does not divide among the devices.
    """
    config = build.check(config)
    devices = jax.devices() if devices is None else devices
    batch_size = config["dataset"]["batch_size"]
    mesh = sharding.mesh(config["mesh"], devices)
    if batch_size % mesh.shape[sharding.DATA]:
        raise ValueError(
            f"config.dataset.batch_size: {batch_size} examples do not divide among {mesh.shape['data']} devices"
        )
    data = build.data(config)
    model = build.model(config, data.num_classes)
    image = jax.ShapeDtypeStruct((1, *data.image_shape), jnp.float32)
    shapes = jax.eval_shape(functools.partial(model.init, train=False), jax.random.key(0), image)["params"]
    plan = build.plan(config, shapes)
    algorithm = build.algorithm(config, plan)
    tx, packed = build.training(config, build.optimizer(config, shapes), algorithm, _key(config, "masks"), mesh)
    return Task(config, data, model, plan, algorithm, tx, packed, build.learning_rate(config), mesh)


def _key(config: Mapping[str, Any], use: str) -> Array:
    """One key for each use of randomness, all from the run's seed."""
    return trees.leaf_key(jax.random.key(config["seed"]), use)


def init(task: Task) -> TrainState:
    """The state before the first step."""
    image = jnp.zeros((1, *task.data.image_shape), jnp.float32)
    variables = dict(task.model.init(_key(task.config, "params"), image, train=False))
    params = variables.pop("params")
    opt_state: Any = task.tx.init(params)
    explored = None
    if task.algorithm is not None:
        params = rx.apply_masks(params, task.algorithm.stored(opt_state.algorithm))
        explored = jax.tree.map(jnp.copy, opt_state.masks)
    return TrainState(
        step=jnp.zeros((), jnp.int32),
        params=params,
        batch_stats=variables.get("batch_stats", {}),
        opt_state=opt_state,
        key=_key(task.config, "dropout"),
        explored=explored,
        totals=_no_totals(),
    )


def _no_totals() -> dict[str, Array]:
    return {name: jnp.zeros((), jnp.float32) for name in ("loss", "accuracy", "steps", "skipped", "missed")}


def masks(state: TrainState) -> Masks | None:
    """The masks, None for a dense run."""
    return None if state.explored is None else state.opt_state.masks


def weights(task: Task, state: TrainState, params: PyTree) -> PyTree:
    """The weights of the network: the params, masked where the method keeps weights alive behind its masks."""
    if task.algorithm is None or not task.algorithm.latent:
        return params
    return rx.straight_through(params, state.opt_state.masks)


def cross_entropy(logits: Array, labels: Array, smoothing: float = 0.0) -> Array:
    """Softmax cross-entropy of each example, `float32[batch]`, in nats.

    Args:
      logits: `[batch, classes]`.
      labels: `int[batch]`.
      smoothing: the share of the target that is spread over all classes, in [0, 1).
    """
    targets = jax.nn.one_hot(labels, logits.shape[-1])
    return optax.softmax_cross_entropy(logits, optax.smooth_labels(targets, smoothing))


def loss_of(
    task: Task, apply: Callable[..., Any], params: PyTree, state: TrainState, batch: Batch
) -> tuple[Array, tuple[dict[str, Array], PyTree]]:
    """The training loss of a batch, with the step's metrics and the new running statistics."""
    logits, mutated = apply(
        {"params": params, "batch_stats": state.batch_stats},
        batch["image"],
        train=True,
        mutable=["batch_stats"],
        rngs={"dropout": jax.random.fold_in(state.key, state.step)},
    )
    loss = jnp.mean(cross_entropy(logits, batch["label"], task.config["label_smoothing"]))
    accuracy = jnp.mean(jnp.argmax(logits, -1) == batch["label"])
    metrics = {**_no_totals(), "loss": loss, "accuracy": accuracy, "steps": jnp.float32(1)}
    return loss, (metrics, mutated.get("batch_stats", {}))


def stepped(
    task: Task, state: TrainState, grads: PyTree, metrics: dict[str, Array], *, updates: bool, **new: Any
) -> TrainState:
    """The state with what a step made `new`, counted; or as it was, where a batch that is not finite is to be skipped.

    `updates` says whether the step updates weights at all; see `experiments.finite.left_out`.
    """
    totals = jax.tree.map(jnp.add, state.totals, metrics)
    after = state._replace(step=state.step + 1, totals=totals, **new)
    if task.config["on_nonfinite"] != SKIP:
        return after
    return left_out(finite((metrics["loss"], grads)), after, state, updates=updates)


def train_step(task: Task, state: TrainState, batch: Batch, *, rewire: bool) -> tuple[TrainState, Array | None]:
    """One step on one batch; on a rewiring also the counts of `measure.counts`."""

    def loss(params: PyTree) -> Any:
        return loss_of(task, task.model.apply, weights(task, state, params), state, batch)

    grads, (metrics, batch_stats) = jax.grad(loss, has_aux=True)(state.params)
    updates, opt_state = task.tx.update(grads, state.opt_state, state.params, rewire=rewire)
    new = {"params": optax.apply_updates(state.params, updates), "opt_state": opt_state, "batch_stats": batch_stats}
    updates_weights = not (rewire and task.algorithm is not None and task.algorithm.skip_step)
    after = stepped(task, state, grads, metrics, updates=updates_weights, **new)
    if not rewire:
        return after, None
    now: Any = after.opt_state
    explored = measure.union(state.explored, now.masks)
    counts = measure.counts(state.opt_state.masks, now.masks, explored)
    return after._replace(explored=explored), counts


def eval_step(task: Task, apply: Callable[..., Any], state: TrainState, batch: Batch) -> Array:
    """`float32[3]`: sums of loss, right answers and weights over a test batch."""
    variables = {"params": weights(task, state, state.params), "batch_stats": state.batch_stats}
    logits: Any = apply(variables, batch["image"], train=False)
    right = (jnp.argmax(logits, -1) == batch["label"]).astype(jnp.float32)
    weight = batch["weight"].astype(jnp.float32)
    # Padding has the label -1, whose one-hot vector is 0; its loss is 0 and its weight too.
    return jnp.stack(
        [jnp.sum(v * weight) for v in (cross_entropy(logits, batch["label"]), right, jnp.ones_like(right))]
    )


class Compiled(NamedTuple):
    """The jitted functions, over the mesh: batches split, the state as `config.sharding` says, all else whole.

    Steps and evaluation take the state in the form that runs, which `enter` makes of a masked state and `leave` turns
    back; in a masked run they are one. Everything else (checkpoints, records) knows masked states only.
    """

    init: Callable[[], TrainState]
    abstract: Callable[[], TrainState]
    steps: dict[bool, Callable[[TrainState, Batch], tuple[TrainState, Array | None]]]
    evaluate: Callable[[TrainState, Batch], Array]
    counts: Callable[..., Array]
    no_totals: Callable[[], dict[str, Array]]
    rate: Callable[[int], Array]
    place: Callable[[Batch], Batch]
    enter: Callable[[TrainState], TrainState]
    leave: Callable[[TrainState], TrainState]


def compile_task(task: Task) -> Compiled:
    """Jits the steps. Nothing is compiled before it is called."""
    whole = NamedSharding(task.mesh, PartitionSpec())
    split = NamedSharding(task.mesh, PartitionSpec(sharding.DATA))
    jit = functools.partial(jax.jit, out_shardings=whole)
    shapes = jax.eval_shape(functools.partial(init, task))
    laid = sharding.shardings(task.config["sharding"], shapes, shapes.params, task.mesh)

    def place(batch: Batch) -> Batch:
        return {name: jax.make_array_from_process_local_data(split, value) for name, value in batch.items()}

    def abstract() -> TrainState:
        return jax.tree.map(lambda x, at: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=at), shapes, laid)

    return Compiled(
        init=jit(functools.partial(init, task), out_shardings=laid),
        abstract=abstract,
        steps={
            rewire: jit(
                functools.partial(train_step, task, rewire=rewire), out_shardings=(laid, whole), donate_argnums=0
            )
            for rewire in (False, True)
        },
        evaluate=jit(functools.partial(eval_step, task, task.model.apply)),
        counts=jit(measure.counts),
        no_totals=jit(_no_totals),
        rate=jit(lambda updates: jnp.asarray(task.schedule(updates), jnp.float32)),
        place=place,
        enter=lambda state: state,
        leave=lambda state: state,
    )


def evaluate(compiled: Compiled, state: TrainState, batches: Iterator[Batch]) -> dict[str, float]:
    """Mean loss and accuracy over a pass; every example counts once."""
    sums = [compiled.evaluate(state, compiled.place(batch)) for batch in batches]
    loss, right, weight = np.asarray(jax.device_get(sums), np.float64).sum(axis=0).tolist()
    return {"loss": loss / weight, "accuracy": right / weight}
