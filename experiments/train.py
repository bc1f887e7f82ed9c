"""Trains one network in a run directory: `train(config, workdir) -> summary`. `experiments.loop` is the loop itself."""

from __future__ import annotations

import contextlib
import functools
import logging
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax

from experiments import log as logs
from experiments import resuming, sharding
from experiments.build import check
from experiments.execution import State
from experiments.finite import SKIP, finite_state
from experiments.guard import diagnose, open_guard
from experiments.io import checkpoint, files, run_directory
from experiments.io.lock import locked
from experiments.log import Log, open_log
from experiments.loop import fit, init
from experiments.step import TrainState
from experiments.task import Task, prepare
from rigl_jax.base import Array


def train(
    config: Mapping[str, Any],
    workdir: str | Path,
    *,
    devices: Sequence[jax.Device] | None = None,
    interrupted: Callable[[int], bool] = lambda step: False,
    start: Callable[[Task], TrainState] = init,
) -> dict[str, Any]:
    """Starts or resumes a training, and writes a run directory (see `experiments.io.run_directory`).

    Called again with the same workdir, it resumes from the last checkpoint and gives the same bits as a run that was
    never interrupted. A finished run is not repeated.

    Args:
      config: see `configs/common.py`; an `ml_collections.ConfigDict` or any mapping.
      workdir: the run directory, made if missing.
      devices: to train on; all by default. The batch is split among them.
      interrupted: `step -> bool`, asked after every step. On True the run saves a checkpoint and ends. Processes that
        train together must get the answer at the same step.
      start: `task -> TrainState` of a run that has no checkpoint yet, the same in every call. The run goes on from its
        step.

    Returns:
      The content of `summary.json`. That of a run that is interrupted or ends at `config.stop_at` is not written.

    Raises:
      ValueError: the config is wrong, or workdir is a file or holds a run of another config.
      FloatingPointError: a loss, gradient or weight is not finite; names step, leaf and the last good checkpoint.
      OSError: the run directory cannot be written; earlier checkpoints are intact.

    Example::

      from configs import digits_mlp
      summary = train(digits_mlp.get_config("smoke"), "runs/try")
      summary["test_accuracy"]
    """
    config, workdir, started = check(config), Path(workdir), time.monotonic()
    if workdir.exists() and not workdir.is_dir():
        raise ValueError(f"train: workdir must be a folder, or a place for one, got the file {workdir}")
    before = files.read_json(workdir / "config.json")
    if before is not None and resuming.differences(before, config):
        prepare(config, devices)  # an error of the config itself comes first
        resuming.check_config(before, config)
    summary, damaged = _summary(workdir, begun=before is not None)
    if summary is not None:
        return summary
    task = prepare(config, devices)
    with _locked_directory(workdir):
        store = checkpoint.open_checkpoints(
            workdir / "checkpoints",
            keep=config["keep"],
            config=config,
            trusted=before is not None,
            step_of=lambda state: int(state.step),
        )
        try:
            found = store.restore(task.execution.abstract())
            if found is None and damaged is not None:
                raise damaged
            if found is None and before is not None:
                logging.warning("train: %s holds a run that was begun, but no checkpoint; it starts anew", workdir)
            if jax.process_index() == 0:
                run_directory.begin(workdir, config)  # after restoring: a folder of another run stays as it was
            state, facts = found or (start(task), {})
            log = open_log(task, workdir, state, facts, started)
            try:
                state = _fit(task, state, log, store, interrupted)
            except FloatingPointError as error:
                raise FloatingPointError(_explain(task, store, start, log.history.step, str(error))) from None
            finally:
                logs.close(log)
        finally:
            store.close()  # first of all: a process that must end has little time left
        summary = logs.summarize(task, state, log.history, log.clock.seconds())
        # Written last: it says that all other files are complete.
        if jax.process_index() == 0 and summary["steps"] == config["steps"]:
            files.write_json(workdir / "summary.json", summary)
    return summary


def _summary(workdir: Path, *, begun: bool) -> tuple[dict[str, Any] | None, ValueError | None]:
    """`(summary, None)` of a finished run; `(None, error)` of a begun run whose summary is damaged; else two None.

    Raises:
      ValueError: a damaged summary in a folder that holds no run.
    """
    try:
        return run_directory.read_summary(workdir), None
    except ValueError as error:
        if not begun:
            raise
        logging.warning("train: %s; it is made again from the last checkpoint", error)
        return None, error


@contextlib.contextmanager
def _locked_directory(workdir: Path) -> Iterator[None]:
    """Makes the run directory and holds its lock, both in the first process.

    Raises:
      OSError: in every process: another run holds the lock, or the folder cannot be made.
    """
    with contextlib.ExitStack() as held:
        failed = None
        try:
            if jax.process_index() == 0:
                run_directory.make(workdir)
                held.enter_context(locked(workdir))
        except OSError as error:
            failed = error
        if not sharding.all_agree(failed is None):
            raise failed or OSError(f"train: the first process cannot begin a run in {workdir}")
        yield


def _fit(
    task: Task, state: TrainState, log: Log, store: checkpoint.Checkpoints, interrupted: Callable[[int], bool]
) -> TrainState:
    """`loop.fit` with the guard, the log and the checkpoints of a run directory."""
    guard = open_guard(task, state)

    def after_step(step: int, state: State, counts: Array | None) -> None:
        logs.log_step(log, step, counts)
        guard.check(step, state, counts is not None)

    def log_training(step: int, totals: Mapping[str, Array]) -> None:
        guard.verify()
        logs.log_training(log, step, totals)

    def save(step: int, state: TrainState) -> None:
        guard.verify()
        if not bool(finite_state(state)):  # a state that is lost must not become the last good checkpoint
            raise FloatingPointError(f"the weights are not finite at step {step}")
        store.save(step, state, logs.facts_of(log), logs.last_accuracy(log, step))

    return fit(
        task,
        state,
        min(task.config["steps"], task.config["stop_at"] or task.config["steps"]),
        after_step=after_step,
        log=log_training,
        evaluate=functools.partial(logs.log_evaluation, log),
        save=save,
        interrupted=interrupted,
        donate=True,
    )


def _explain(
    task: Task, store: checkpoint.Checkpoints, start: Callable[[Task], TrainState], step: int, said: str
) -> str:
    """The message of a run that failed with `said`: the step, the leaf, and where the last good state is."""
    if task.config["on_nonfinite"] == SKIP:
        return f"train: {said}, although batches that are not finite are skipped; a lower learning rate may help"
    found = store.restore(task.execution.abstract())
    state = start(task) if found is None else found[0]
    good = "there is no checkpoint" if found is None else f"the last good checkpoint is that of step {int(state.step)}"
    # Nothing found: the test loss alone is too large, or the failure did not come again.
    seen = f"{said}, with finite gradients and weights when repeated"
    return (
        f"train: {diagnose(task, state, step) or seen}; {good}. A lower learning rate may help, and "
        "config.on_nonfinite=skip leaves such batches out"
    )
