"""A config as objects: data, model, plan, method and execution."""

from __future__ import annotations

import functools
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax.sharding import Mesh

from experiments import build, sharding
from experiments.data import Data
from experiments.data_pruning import DataPruning
from experiments.execution import Execution
from experiments.finite import SKIP
from experiments.models.adapters import Model
from experiments.step import Objective
from rigl_jax.base import Algorithm, Plan
from rigl_jax.messages import kind


class Task(NamedTuple):
    """A config as objects.

    Attributes:
      config: checked, plain data.
      data: batches.
      data_pruning: which examples they hold.
      model: the network.
      plan, algorithm: None for a dense run.
      execution: the compiled functions that train and evaluate it.
      schedule: learning rate by weight updates done.
      mesh: the devices; batches are split along its axis "data".
    """

    config: dict[str, Any]
    data: Data
    data_pruning: DataPruning
    model: Model
    plan: Plan | None
    algorithm: Algorithm | None
    execution: Execution
    schedule: optax.Schedule
    mesh: Mesh


def prepare(
    config: Mapping[str, Any], devices: Sequence[jax.Device] | None = None, *, subset: Sequence[int] | None = None
) -> Task:
    """Builds everything that a config names.

    Args:
      config: see `configs/common.py`.
      devices: to train on; all by default.
      subset: the training examples to use, by index; all by default.

    Raises:
      ValueError: the config is wrong, or a batch does not divide among the devices.
    """
    config = build.check(config)
    devices = jax.devices() if devices is None else devices
    batch_size = config["dataset"]["batch_size"]
    mesh = sharding.mesh(config["mesh"], devices)
    if batch_size % mesh.shape[sharding.DATA]:
        raise ValueError(
            f"config.dataset.batch_size: {batch_size} examples do not divide among {mesh.shape['data']} devices"
        )
    data = build.data(config, subset)
    pruning = build.data_pruning(config, data.num_train)
    _check_pruning(config, pruning, subset)
    model = build.model(config, data.num_classes)
    image = jax.ShapeDtypeStruct((1, *data.image_shape), jnp.float32)
    variables = jax.eval_shape(functools.partial(model.init, train=False), jax.random.key(0), image)
    logits = jax.eval_shape(functools.partial(model.apply, train=False), variables, image)
    _check_logits(config["model"]["name"], logits, data)
    shapes = variables["params"]
    plan = build.plan(config, shapes)
    algorithm = build.algorithm(config, plan)
    objective = Objective(
        model, data.image_shape, config["seed"], pruning, config["label_smoothing"], config["on_nonfinite"] == SKIP
    )
    execution = build.execution(config, objective, build.optimizer(config, shapes), algorithm, mesh)
    return Task(config, data, pruning, model, plan, algorithm, execution, build.learning_rate(config), mesh)


def _check_pruning(config: Mapping[str, Any], pruning: DataPruning, subset: Any) -> None:
    """Checks what only the data can tell.

    Raises:
      ValueError: fewer examples are kept than a batch holds; a subset is given besides.
    """
    batch_size, kept = config["dataset"]["batch_size"], pruning.kept
    if kept < batch_size:
        raise ValueError(
            f"config.data_pruning: {config['data_pruning']['name']} must keep at least the {batch_size} examples of "
            f"config.dataset.batch_size, got {kept}"
        )
    if subset is not None and kept < len(subset):
        raise ValueError("config.data_pruning: expected 'none' where a subset of the examples is given")


def _check_logits(name: str, logits: Any, data: Data) -> None:
    """The loss would take other shapes too, and a label without a logit would count as no class.

    Raises:
      ValueError: they are not `[1, classes]`, of an image.
    """
    shape = getattr(logits, "shape", ())
    if len(shape) != 2 or shape[0] != 1 or shape[1] < data.num_classes:
        raise ValueError(
            f"config.model: {name} must give logits [batch, {data.num_classes}], one for each class of the data, "
            f"got {kind(logits)} for a batch of 1"
        )
