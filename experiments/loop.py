"""The training loop: `fit(task, state, stop) -> state`, for dense, masked and packed runs alike.

It reads and writes no file. What a run saves, logs and checks is done by functions that the caller passes in;
`experiments.train` passes those of a run directory, and a recipe that trains several times may pass none:

    task = prepare(config)
    trained = fit(task, init(task), stop=1000)
    again = fit(task, init(task, masks=task.execution.masks(trained)), stop=1000)  # the first weights, the last masks
    evaluate(task, again)

The host runs ahead of the devices and waits for them only where a function that is passed in reads a result.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from experiments import sharding
from experiments.execution import Execution, State
from experiments.feeding import open_feed
from experiments.io import digests
from experiments.step import TrainState, no_totals
from experiments.task import Task, prepare
from rigl_jax.base import Array, Masks, PyTree

__all__ = ["evaluate", "fit", "init", "prepare"]


def init(task: Task, params: PyTree | None = None, masks: Masks | None = None) -> TrainState:
    """The state before the first step.

    Args:
      task: from `prepare`.
      params: weights to start from, dense and parallel to the model's; None: the model's own, from the run's seed.
      masks: masks to start from, parallel to params, None for dense leaves; None: the method's own. Counts may differ
        from the plan's.

    Raises:
      ValueError: names the leaf that does not fit; masks for a dense run.
    """
    return task.execution.init(params, masks)


def _nothing(*_: Any) -> Any:
    """Stands for a function that the caller of `fit` did not pass."""


def fit(
    task: Task,
    state: TrainState,
    stop: int,
    *,
    after_step: Callable[[int, State, Array | None], None] = _nothing,
    log: Callable[[int, dict[str, Array]], None] = _nothing,
    evaluate: Callable[[int, State], None] = _nothing,
    save: Callable[[int, TrainState], None] = _nothing,
    interrupted: Callable[[int], bool] = _nothing,
    donate: bool = False,
) -> TrainState:
    """Trains from the state's own step to step `stop`.

    A batch depends on the seed and its step alone, so a run that is stopped and continued arrives at the same bits as
    one that is not. The functions get the number of steps done. They may read what they are given, but not keep it: the
    next step uses its memory again.

    Args:
      task: from `prepare`. Its config says when to log, evaluate and save.
      state: from `init` or a checkpoint.
      stop: steps done at the end, at most `config.steps`.
      after_step: `(step, state, counts)`, after every step; `counts` are those of a rewiring, else None.
      log: `(step, totals)`, every `log_every` steps and after the last one of the config; then totals are reset.
      evaluate: `(step, state)`, every `eval_every` steps and after the last one of the config.
      save: `(step, TrainState)`, every `checkpoint_every` steps and where training ends. It comes after all else.
      interrupted: `step -> bool`, asked after every step; on True training ends there. Processes that train together
        must get the answer at the same step.
      donate: whether the memory of `state` may be used again. By default it is copied, and stays the caller's.

    Returns:
      The state after the last step that was taken.

    Raises:
      ValueError: processes that train together hold different masks.
    """
    config, execution = task.config, task.execution
    reset_totals = jax.jit(no_totals, out_shardings=sharding.whole(task.mesh))
    first = int(state.step)
    state = execution.from_masked(state if donate else jax.tree.map(jnp.copy, state))
    feed = open_feed(task)

    for done in range(first + 1, stop + 1):
        # --- one training step, on the examples that are chosen for it
        state, batch = feed(done - 1, state)
        state, counts = execution.train(done - 1, state, batch)
        if counts is not None:
            _check_agreement(execution, state, done)
        after_step(done, state, counts)

        # --- log and evaluate
        last = done == config["steps"]
        if last or done % config["log_every"] == 0:
            log(done, state.totals)
            state = state._replace(totals=reset_totals())
        if last or done % config["eval_every"] == 0:
            evaluate(done, state)

        # --- save
        ends = done == stop or interrupted(done)
        if ends or (config["checkpoint_every"] and done % config["checkpoint_every"] == 0):
            save(done, execution.to_masked(state))
        if ends:
            break
    return execution.to_masked(state)


def _check_agreement(execution: Execution, state: State, step: int) -> None:
    """Checks that processes which train together hold the same masks; see `sharding.check_agreement`."""
    if jax.process_count() > 1:
        sharding.check_agreement(digests.digest(execution.masks(execution.to_masked(state))), step)


def evaluate(task: Task, state: State) -> dict[str, float]:
    """Mean loss and accuracy over the test split; every example counts once. The state may be in either form."""
    batches = (sharding.place(batch, task.mesh) for batch in task.data.test())
    sums = [task.execution.evaluate(state, batch) for batch in batches]
    loss, right, weight = np.asarray(jax.device_get(sums), np.float64).sum(axis=0).tolist()
    return {"loss": loss / weight, "accuracy": right / weight}
