"""The trainings of a recipe of `rx.recipes` as ordinary run directories: `runs(folder)(config)` is a training function.

    train, network = runs("lottery")(config), first_network(config)
    plan_at = rx.recipes.plan_by_rate(rx.make_plan(network, 0.5))
    for ticket in rx.recipes.lottery_ticket(train, network, plan_at, levels=8, steps=config.steps, key=key):
        print(ticket.sparsity, ticket.aux["test_accuracy"])

A network is `{"params", "batch_stats"}`, so that batch statistics go where the weights go. An interrupted recipe is
started again from its beginning: trainings that are finished are read from their directories, the one that was
interrupted resumes from its last checkpoint, and all has the same bits as without the interruption.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import optax

from experiments.build import check
from experiments.config import DENSE
from experiments.io import checkpoint, digests, files
from experiments.loop import init
from experiments.step import TrainState
from experiments.task import Task, prepare
from experiments.train import train
from rigl_jax.base import Array, Masks, PyTree, Train, Trained


class Interrupted(Exception):
    """A training was interrupted before its last step; started again, the recipe goes on there."""


def first_network(config: Mapping[str, Any], devices: Sequence[jax.Device] | None = None) -> dict[str, PyTree]:
    """The dense network of a config before its first step, `{"params", "batch_stats"}`, on the devices of `runs`."""
    state = init(prepare({**check(config), "method": {"name": DENSE}}, devices))
    return {"params": state.params, "batch_stats": state.batch_stats}


def runs(
    folder: str | Path,
    *,
    devices: Sequence[jax.Device] | None = None,
    interrupted: Callable[[int], bool] = lambda step: False,
) -> Callable[[Mapping[str, Any]], Train]:
    """`config -> train`, whose trainings lie in `folder/run_000`, `run_001`, ... in the order in which they are called.

    Each trains by the config from step `start` to `stop`, which takes the place of `config.steps`; the learning rate
    is that of its step. The key gives `config.seed`, and so the order of the data and dropout. The optimizer starts
    anew. `config.method` is "static" where a recipe fixes masks; a dynamic method starts with the masks given.
    `check_every` is off, as counts differ from the config's. `Trained.aux` is the summary of the run.

    Args:
      folder: of the recipe, made if missing. Use one for one recipe with one key.
      devices: see `experiments.train`.
      interrupted: `step -> bool`; see `experiments.train`. On True the training function raises `Interrupted`.

    Raises:
      ValueError: from training: a directory holds a run that began otherwise.
    """
    folder, numbers = Path(folder), itertools.count()

    def make(config: Mapping[str, Any]) -> Train:
        plain = check(config)

        def one(network: PyTree, masks: Masks, start: int, stop: int, key: Array) -> Trained:
            workdir = folder / f"run_{next(numbers):03d}"
            own = {**plain, "steps": stop, "stop_at": 0, "check_every": 0, "seed": int(jax.random.bits(key))}
            _check_start(workdir, {"start": start, "digest": int(digests.digest((network, masks)))})
            first = lambda task: _state(task, network, masks, start)  # noqa: E731
            summary = train(own, workdir, devices=devices, interrupted=interrupted, start=first)
            if summary["steps"] < stop:
                raise Interrupted(f"{workdir}: interrupted at step {summary['steps']} of {stop}")
            task = prepare(own, devices)
            state = _last_state(task, workdir)
            now = {
                "params": task.execution.masks(state),
                "batch_stats": jax.tree.map(lambda _: None, state.batch_stats),
            }
            return Trained({"params": state.params, "batch_stats": state.batch_stats}, summary, now)

        return one

    return make


def _state(task: Task, network: PyTree, masks: Masks, start: int) -> TrainState:
    """The state at step `start`: learning rate and method are at that step, all else of the optimizer is new.

    Raises:
      ValueError: the optimizer has no clock of its learning rate to be set.
    """
    state = init(task, network["params"], masks["params"])
    opt_state = state.opt_state
    if start:
        if not optax.tree_utils.tree_get_all_with_path(opt_state, "count", _is_clock):
            raise ValueError(
                f"recipes: config.optimizer must count its steps in optax.scale_by_schedule to begin at step {start}"
            )
        algorithm = task.algorithm
        skipped = 0 if algorithm is None or not algorithm.skip_step else sum(map(task.execution.due, range(start)))
        opt_state = optax.tree_utils.tree_set(opt_state, _is_clock, count=jnp.asarray(start - skipped, jnp.int32))
        opt_state = opt_state._replace(step=jnp.full_like(opt_state.step, start))
    return state._replace(
        step=jnp.full_like(state.step, start),
        batch_stats=jax.tree.map(jnp.copy, network["batch_stats"]),
        opt_state=opt_state,
    )


def _is_clock(path: Any, value: Any) -> bool:
    """Whether a part of an optimizer's state counts the steps of its learning rate."""
    del value
    return any(getattr(entry, "tuple_name", None) == "ScaleByScheduleState" for entry in path)


def _check_start(workdir: Path, facts: dict[str, int]) -> None:
    """Writes down how a run begins, or compares with what an earlier call wrote."""
    before = files.read_json(workdir / "start.json")
    if before is None:
        workdir.mkdir(parents=True, exist_ok=True)
        files.write_json(workdir / "start.json", facts)
    elif before != facts:
        raise ValueError(
            f"recipes: {workdir} holds a run that began with other weights or at another step; a folder is for one "
            "recipe with one key"
        )


def _last_state(task: Task, workdir: Path) -> TrainState:
    store = checkpoint.open_checkpoints(workdir / "checkpoints", keep=task.config["keep"], config=task.config)
    try:
        found = store.restore(task.execution.abstract())
    finally:
        store.close()
    if found is None:
        raise ValueError(f"recipes: {workdir} holds no checkpoint of its finished run")
    return found[0]
