"""What a run logs while it goes: lines of metrics and the progress bar; and the summary at its end.

Nothing here waits for the devices but where a line is due.
"""

from __future__ import annotations

import dataclasses
import functools
import logging
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from experiments import loop, measure, sharding
from experiments.execution import State
from experiments.feeding import scored
from experiments.finite import SKIP, check_finite
from experiments.io.metrics import MetricWriter, open_writer
from experiments.progress import Clock, Progress, open_progress
from experiments.step import TrainState
from experiments.task import Task
from rigl_jax import mask_metrics, trees
from rigl_jax.base import Array, PyTree, Shape


@dataclasses.dataclass
class History:
    """What a run remembers beside its state.

    Attributes:
      evals: [step, loss, accuracy] of each evaluation.
      skipped: batches that were left out because they were not finite.
      missed: those of them that would have updated weights.
      rewirings: so far.
      step: steps done.
      sparsity: at the last line.
    """

    evals: list[list[float]]
    skipped: int
    missed: int
    rewirings: int
    step: int
    sparsity: float = 0.0


class Log(NamedTuple):
    """The parts of a run's log; the functions of this module write to them.

    Attributes:
      task: what is trained.
      writer: lines; only the first process writes.
      progress: the bar.
      clock: of the run.
      history: changes during the run.
      shapes: of the sparse leaves, by name; {} for a dense run.
      rate: learning rate by weight updates done, compiled.
    """

    task: Task
    writer: MetricWriter
    progress: Progress
    clock: Clock
    history: History
    shapes: dict[str, Shape]
    rate: Callable[[int], Array]


def open_log(task: Task, workdir: Path, state: TrainState, facts: Mapping[str, Any], started: float) -> Log:
    """The log of a run that starts or resumes from `state`.

    Args:
      task: what is trained.
      workdir: the run directory.
      state: of the first step, or of the checkpoint.
      facts: those of the checkpoint; {} starts a run.
      started: when this start of the run began, by `time.monotonic`.
    """
    config, schedule, done = task.config, task.schedule, int(state.step)
    active = jax.process_index() == 0
    history = History(
        evals=facts.get("evals", []),
        skipped=facts.get("skipped", 0),
        missed=facts.get("missed", 0),
        rewirings=sum(map(task.execution.due, range(done))),
        step=done,
    )
    log = Log(
        task,
        open_writer(workdir, done if facts else -1, tensorboard=config["tensorboard"], active=active),
        open_progress(config["steps"], done, active=active and config["progress"]),
        Clock(started - facts.get("seconds", 0.0), done),
        history,
        measure.shapes(task.execution.masks(state)),
        jax.jit(lambda updates: jnp.asarray(schedule(updates), jnp.float32)),
    )
    if active and (lost := facts.get("lines", 0) - log.writer.lines()) > 0:
        logging.warning("train: %s lost %d lines from before step %d", workdir / "metrics.jsonl", lost, done)
    if log.shapes:
        now = masks_now(task, state)
        history.sparsity = now["sparsity"]
        if not facts:
            log.writer.write("masks", 0, now)
            log_first_layer(log, 0, state)
    return log


def facts_of(log: Log) -> dict[str, Any]:
    """What a checkpoint keeps besides the state. All lines so far are on disk then."""
    log.writer.sync()
    return {
        "seconds": log.clock.seconds(),
        "evals": log.history.evals,
        "skipped": log.history.skipped,
        "missed": log.history.missed,
        "lines": log.writer.lines(),
    }


def close(log: Log) -> None:
    """Closes the bar and the files."""
    log.progress.close()
    log.writer.close()


# --- lines -------------------------------------------------------------------------------------------------------


def log_step(log: Log, step: int, counts: Array | None) -> None:
    """Advances the bar; a "masks" line after a rewiring, whose counts stay on the device until the next line."""
    log.history.step = step
    log.progress.advance(step)
    if counts is not None:
        log.history.rewirings += 1
        log.writer.write_later("masks", step, functools.partial(_mask_values, log, counts))


def log_training(log: Log, step: int, totals: Mapping[str, Array]) -> None:
    """A "train" line: means since the last one.

    Raises:
      FloatingPointError: the mean loss is not finite.
    """
    config, history = log.task.config, log.history
    sums = {name: float(value) for name, value in jax.device_get(dict(totals)).items()}
    taken = sums["steps"]  # 0 where every batch since the last line was skipped: there is no mean then
    loss, accuracy = (sums[name] / taken if taken else None for name in ("loss", "accuracy"))
    log.writer.flush()
    check_finite(loss or 0.0, step)
    history.skipped, history.missed = history.skipped + int(sums["skipped"]), history.missed + int(sums["missed"])
    steps, seconds = log.clock.lap(step)
    values = {
        "loss": loss,
        "accuracy": accuracy,
        "learning_rate": learning_rate(log, step),
        "examples_per_s": steps * config["dataset"]["batch_size"] / seconds,
        **({"skipped": int(sums["skipped"])} if config["on_nonfinite"] == SKIP else {}),
    }
    log.writer.write("train", step, values)
    _describe(log, f"train {100 * accuracy:.1f} %" if accuracy is not None else "")


def learning_rate(log: Log, step: int) -> float:
    """The rate of the last weight update. Steps that update no weights do not count."""
    algorithm, history = log.task.algorithm, log.history
    without = history.rewirings if algorithm is not None and algorithm.skip_step else 0
    return float(log.rate(max(step - without - history.missed - 1, 0)))


def log_evaluation(log: Log, step: int, state: State) -> None:
    """Evaluates, and writes an "eval" line; at the last step of the config a "first_layer" line too.

    Raises:
      FloatingPointError: the test loss is not finite.
    """
    with log.clock.paused():
        found = loop.evaluate(log.task, state)
        log.writer.flush()
        check_finite(found["loss"], step)
        log.writer.write("eval", step, {"split": "test", **found})
        log.history.evals.append([step, found["loss"], found["accuracy"]])
    _describe(log)
    if step == log.task.config["steps"]:
        log_first_layer(log, step, log.task.execution.to_masked(state))


def log_first_layer(log: Log, step: int, state: TrainState) -> None:
    """A "first_layer" line: the mask of the layer that sees the image. Nothing for a dense run."""
    if log.shapes:
        apply, image = _network(log.task, state)
        name = measure.first_layer(apply, state.params, image, set(log.shapes))
        mask = trees.named_leaves(log.task.execution.masks(state))[name]
        log.writer.write("first_layer", step, measure.pack_mask(name, sharding.gather(mask)))


def last_accuracy(log: Log, step: int) -> float | None:
    """Test accuracy at exactly this step, if it was measured."""
    evals = log.history.evals
    return evals[-1][2] if evals and evals[-1][0] == step else None


def _describe(log: Log, train: str = "") -> None:
    history = log.history
    test = f"test {100 * history.evals[-1][2]:.1f} %" if history.evals else ""
    sparse = f"sparsity {100 * history.sparsity:.1f} %, {history.rewirings} rewirings" if log.shapes else "dense"
    log.progress.describe(" ".join(text for text in (train, test, sparse) if text))


def masks_now(task: Task, state: TrainState) -> dict[str, Any]:
    """The values of a "masks" line for the masks of a sparse run as they are."""
    masks = task.execution.masks(state)
    counts = jax.jit(mask_metrics.mask_counts, out_shardings=sharding.whole(task.mesh))(masks, masks, state.explored)
    return mask_metrics.mask_values(measure.shapes(masks), np.asarray(counts))


def _mask_values(log: Log, counts: Array) -> dict[str, Any]:
    values = mask_metrics.mask_values(log.shapes, np.asarray(counts))
    log.history.sparsity = values["sparsity"]
    return values


def _network(task: Task, state: TrainState) -> tuple[Callable[[PyTree, Array], Any], jax.ShapeDtypeStruct]:
    """The network without dropout, `(params, image) -> logits`, and the shape of an image."""
    model, stats = task.model, state.batch_stats
    image = jax.ShapeDtypeStruct((1, *task.data.image_shape), jnp.float32)
    return lambda params, image: model.apply({"params": params, "batch_stats": stats}, image, train=False), image


# --- the summary -------------------------------------------------------------------------------------------------


def summarize(task: Task, state: TrainState, history: History, seconds: float) -> dict[str, Any]:
    """What `summary.json` holds of a run that took so many seconds."""
    config, evals, sparse = task.config, history.evals, task.algorithm is not None
    final = masks_now(task, state) if sparse else {"sparsity": 0.0, "explored": 1.0}
    best = max(evals, key=lambda e: (e[2], e[0]), default=[None] * 3)
    apply, image = _network(task, state)
    cost = measure.cost(
        apply,
        state.params,
        image,
        masks=sharding.gather(task.execution.masks(state)),
        algorithm=task.algorithm,
        steps=config["steps"],
        scoring=scored(task) / (config["steps"] * config["dataset"]["batch_size"]),
    )
    return {
        "test_accuracy": evals[-1][2] if evals else None,
        "test_loss": evals[-1][1] if evals else None,
        "best_accuracy": best[2],
        "best_step": best[0],
        "steps": int(state.step),
        "seed": config["seed"],
        "method": config["method"]["name"],
        "sparsity": config["sparsity"] if sparse else 0.0,
        "distribution": config["distribution"]["name"] if sparse else None,
        "dataset": config["dataset"]["name"],
        "model": config["model"]["name"],
        **cost,
        "seconds": round(seconds, 2),
        "final_sparsity": final["sparsity"],
        "explored": final["explored"],
        "skipped": history.skipped,
        **({} if state.examples is None else _examples(task, state)),
    }


def _examples(task: Task, state: TrainState) -> dict[str, Any]:
    """How the examples were chosen, and how many are in use at the end."""
    used = int(np.count_nonzero(np.asarray(state.examples.weight)))  # pyrefly: ignore[missing-attribute]
    return {"data_pruning": task.config["data_pruning"]["name"], "examples": used}
