"""The batches of a run, on its devices: of the examples that `config.data_pruning` has chosen, if it chooses any."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import jax.numpy as jnp
import numpy as np

from experiments import sharding
from experiments.data import Batch
from experiments.execution import State
from experiments.task import Task

Feed = Callable[[int, State], tuple[State, Any]]
"""`(step, state) -> (state, batch)`: the batch of a step, counted from 0, and the state with the examples that are
chosen before it."""


def open_feed(task: Task) -> Feed:
    """The batches of a run. The first call may be for any step, and each other one is for the step after it."""
    batches: Iterator[Batch] | None = None

    def feed(step: int, state: State) -> tuple[State, Any]:
        nonlocal batches
        if task.data_pruning.due(step):
            state = state._replace(examples=_chosen(task, step, state))
            batches = None  # they hold examples that are no longer in use
        if batches is None:
            batches = _batches(task, step, state)
        return state, sharding.place(next(batches), task.mesh, indexed=state.examples is not None)

    return feed


def _chosen(task: Task, step: int, state: State) -> Any:
    """The examples from a step on, with the scores of all of them where the choice needs these."""
    execution = task.execution
    if task.data_pruning.score is None:
        return execution.choose(state.examples, None, step)
    table, whole = jnp.zeros(task.data.num_train), execution.to_masked(state)
    for batch in task.data.ordered():
        table = execution.score(whole, table, sharding.place(batch, task.mesh, indexed=True))
    return execution.choose(state.examples, table, step)


def _batches(task: Task, step: int, state: State) -> Iterator[Batch]:
    """The batches from a step on, of the examples that are in use then."""
    since = task.data_pruning.chosen_at(step)
    if since is None:
        return task.data.train(step)
    return task.data.train(step, np.flatnonzero(np.asarray(state.examples.weight)), since)


def scored(task: Task) -> int:
    """How many forward passes of one example the scores of a whole run cost."""
    pruning = task.data_pruning
    times = sum(map(pruning.due, range(task.config["steps"]))) if pruning.passes else 0
    return times * pruning.passes * task.data.num_train
