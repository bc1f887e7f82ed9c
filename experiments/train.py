"""Training: `train(config, workdir) -> summary`.

The host runs ahead of the devices and waits for them only where it writes a line.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from experiments import checkpoint, digests, guard, measure, records, resuming, sharding
from experiments.build import check
from experiments.finite import SKIP, finite
from experiments.packed import compile_packed
from experiments.steps import Compiled, Task, TrainState, compile_task, evaluate, masks, prepare
from rigl_jax import trees
from rigl_jax.base import Array, PyTree


def train(
    config: Mapping[str, Any],
    workdir: str | Path,
    *,
    devices: Sequence[jax.Device] | None = None,
    interrupted: Callable[[int], bool] = lambda step: False,
) -> dict[str, Any]:
    """Trains, or goes on training, and writes a run directory (see `experiments.records`).

    Called again on the same workdir it goes on from the last checkpoint and arrives at the same bits as a run that was
    never interrupted; a finished run is not repeated.

    Args:
      config: see `configs/common.py`; an `ml_collections.ConfigDict` or any mapping.
      workdir: the run directory, made if missing.
      devices: to train on; all by default. The batch is split among them.
      interrupted: asked after every step; on True the run saves a checkpoint there and ends, to be resumed. Processes
        that train together must get the answer at the same step.

    Returns:
      What `summary.json` holds. Interrupted, or with `config.stop_at`, it is that of the unfinished run, which is not
      written.

    Raises:
      ValueError: anything wrong with the config, or a workdir that is a file, or holds a run of another config.
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
    before = records.read_json(workdir / "config.json")
    if before is not None and resuming.differences(before, config):
        prepare(config, devices)  # what is wrong with the config itself is told first
        resuming.check_config(before, config)
    summary = records.read_summary(workdir)
    if summary is not None:
        return summary
    task = prepare(config, devices)
    compiled = compile_task(task) if task.packed is None else compile_packed(task)
    if jax.process_index() == 0:
        records.begin(workdir, config)
    store = checkpoint.open_checkpoints(workdir / "checkpoints", keep=config["keep"])
    try:
        found = store.restore(compiled.abstract())
        if found is None and before is not None:
            logging.warning("train: %s holds a run that was begun, but no checkpoint; it starts anew", workdir)
        state, facts = found or (compiled.init(), {})
        journal = Journal(task, compiled, workdir, state, facts, started)
        try:
            state = _loop(task, compiled, state, journal, store, interrupted)
        except FloatingPointError as error:
            raise FloatingPointError(_explain(task, compiled, store, journal.step, str(error))) from None
        finally:
            journal.close()
    finally:
        store.close()  # before anything else: whoever was interrupted has little time left
    summary = journal.summary(state)
    # Written last: whoever finds it finds everything.
    if jax.process_index() == 0 and summary["steps"] == config["steps"]:
        records.write_json(workdir / "summary.json", summary)
    return summary


def _loop(
    task: Task,
    compiled: Compiled,
    state: TrainState,
    journal: Journal,
    store: checkpoint.Checkpoints,
    interrupted: Callable[[int], bool],
) -> TrainState:
    """From the state's step to the last. Everything about a step is written before its checkpoint."""
    config, first = task.config, int(state.step)
    steps, every = config["steps"], config["checkpoint_every"]
    last = min(steps, config["stop_at"] or steps)
    watch = guard.open_guard(task, compiled, state)
    batches, state = task.data.train(first), compiled.enter(state)
    for done in range(first + 1, last + 1):
        rewire = task.algorithm is not None and bool(task.algorithm.due(done - 1))
        state, counts = compiled.steps[rewire](state, compiled.place(next(batches)))
        if rewire and jax.process_count() > 1:
            sharding.check_agreement(digests.digest(masks(compiled.leave(state))), done)
        journal.stepped(done, counts)
        watch.looked(done, state, rewire)
        if done % config["log_every"] == 0 or done == steps:
            watch.settle()
            state = state._replace(totals=journal.trained(done, state.totals))
        if done % config["eval_every"] == 0 or done == steps:
            journal.evaluated(done, state)
        if done == steps:
            journal.pictured(done, compiled.leave(state))
        stop = done == last or interrupted(done)
        if stop or (every and done % every == 0):
            watch.settle()
            _check_state(state, done)
            store.save(done, compiled.leave(state), journal.facts(), journal.accuracy(done))
        if stop:
            break
    return compiled.leave(state)


def _check_state(state: TrainState, step: int) -> None:
    """Keeps a state that is lost from becoming the last good checkpoint."""
    inner = state.opt_state if state.explored is None else state.opt_state.inner
    if not bool(_finite((state.params, state.batch_stats, inner, state.totals))):
        raise FloatingPointError(f"the weights are not finite at step {step}")


def _explain(task: Task, compiled: Compiled, store: checkpoint.Checkpoints, step: int, said: str) -> str:
    """What the error of a run says in which `said` was seen: step, leaf, and where the last good state is."""
    if task.config["on_nonfinite"] == SKIP:
        return f"train: {said}, although batches that are not finite are skipped; a lower learning rate may help"
    found = store.restore(compiled.abstract())
    state = compiled.init() if found is None else found[0]
    good = "there is no checkpoint" if found is None else f"the last good checkpoint is that of step {int(state.step)}"
    # Nothing found: the test loss alone is too large, or the failure did not come again.
    seen = f"{said}, with finite gradients and weights when repeated"
    return (
        f"train: {guard.diagnose(task, compiled, state, step) or seen}; {good}. A lower learning rate may help, and "
        "config.on_nonfinite=skip leaves such batches out"
    )


_finite = jax.jit(finite)


class Journal:
    """Writes down what a run does. It alone makes the host wait for the device, when a line is due."""

    def __init__(
        self,
        task: Task,
        compiled: Compiled,
        workdir: Path,
        state: TrainState,
        facts: Mapping[str, Any],
        started: float,
    ):
        self.task, self.compiled = task, compiled
        self.first = int(state.step) if facts else -1
        self.started = started - facts.get("seconds", 0.0)
        self.evals: list[list[float]] = facts.get("evals", [])  # [step, loss, accuracy]
        self.skipped, self.missed = facts.get("skipped", 0), facts.get("missed", 0)
        self.step = done = max(self.first, 0)
        self.rewired = 0 if task.algorithm is None else int(np.sum(task.algorithm.due(np.arange(done))))
        self.pending: list[tuple[int, Array]] = []
        self.since, self.since_step = time.monotonic(), done
        self.shapes = measure.shapes(masks(state))
        active = jax.process_index() == 0
        config = task.config
        self.bar = records.open_bar(config["steps"], done, active=active and config["progress"])
        self.writer = records.open_writer(workdir, self.first, tensorboard=config["tensorboard"], active=active)
        self.sparsity = self._measure(state)["sparsity"] if self.shapes else 0.0
        if self.first < 0 and self.shapes:
            self.writer.write("masks", 0, self._measure(state))
            self.pictured(0, state)

    def _measure(self, state: TrainState) -> dict[str, Any]:
        now = masks(state)
        return measure.record(self.shapes, np.asarray(self.compiled.counts(now, now, state.explored)))

    def stepped(self, step: int, counts: Array | None) -> None:
        """Keeps the counts of a rewiring, on the device, until the next line."""
        self.step = step
        if counts is not None:
            self.rewired += 1
            self.pending.append((step, counts))
        self.bar.advance(step)

    def flush(self) -> None:
        """Writes what is pending."""
        for step, counts in self.pending:
            line = measure.record(self.shapes, np.asarray(counts))
            self.sparsity = line["sparsity"]
            self.writer.write("masks", step, line)
        self.pending = []

    def trained(self, step: int, totals: dict[str, Array]) -> dict[str, Array]:
        """A train line: means since the last one. Returns the totals to go on with."""
        values = {name: float(value) for name, value in jax.device_get(totals).items()}
        self.flush()
        taken = values["steps"]  # 0 where every batch since the last line was skipped: there is no mean then
        loss, accuracy = (values[name] / taken if taken else None for name in ("loss", "accuracy"))
        records.check_finite(loss or 0.0, step)
        self.skipped, self.missed = self.skipped + int(values["skipped"]), self.missed + int(values["missed"])
        examples = (step - self.since_step) * self.task.config["dataset"]["batch_size"]
        line = {
            "loss": loss,
            "accuracy": accuracy,
            "learning_rate": self.learning_rate(step),
            "examples_per_s": examples / max(time.monotonic() - self.since, 1e-9),
            **({"skipped": int(values["skipped"])} if self.task.config["on_nonfinite"] == SKIP else {}),
        }
        self.writer.write("train", step, line)
        self.since, self.since_step = time.monotonic(), step
        self._show(f"train {100 * accuracy:.1f} %" if accuracy is not None else "")
        return self.compiled.no_totals()

    def learning_rate(self, step: int) -> float:
        """The rate of the last weight update; steps without one do not count."""
        skipped = self.rewired if self.task.algorithm is not None and self.task.algorithm.skip_step else 0
        return float(self.compiled.rate(max(step - skipped - self.missed - 1, 0)))

    def evaluated(self, step: int, state: TrainState) -> None:
        """An eval line."""
        paused = time.monotonic()
        found = evaluate(self.compiled, state, self.task.data.test())
        self.flush()
        records.check_finite(found["loss"], step)
        self.writer.write("eval", step, {"split": "test", **found})
        self.evals.append([step, found["loss"], found["accuracy"]])
        self.since += time.monotonic() - paused
        self._show()

    def pictured(self, step: int, state: TrainState) -> None:
        """A first_layer line."""
        if not self.shapes:
            return
        self.flush()
        name = measure.first_layer(self._forward(state), state.params, self._image(), set(self.shapes))
        mask = trees.named_leaves(masks(state))[name]
        self.writer.write("first_layer", step, measure.picture(name, sharding.gather(mask)))

    def _show(self, train: str = "") -> None:
        test = f"test {100 * self.evals[-1][2]:.1f} %" if self.evals else ""
        sparse = f"sparsity {100 * self.sparsity:.1f} %, {self.rewired} rewirings" if self.shapes else "dense"
        self.bar.describe(" ".join(text for text in (train, test, sparse) if text))

    def accuracy(self, step: int) -> float | None:
        """Test accuracy at exactly this step, if it was measured."""
        return self.evals[-1][2] if self.evals and self.evals[-1][0] == step else None

    def facts(self) -> dict[str, Any]:
        """What a checkpoint keeps besides the state."""
        self.flush()
        self.writer.sync()
        return {
            "seconds": time.monotonic() - self.started,
            "evals": self.evals,
            "skipped": self.skipped,
            "missed": self.missed,
        }

    def close(self) -> None:
        """Closes the files."""
        self.bar.close()
        self.writer.close()

    def _forward(self, state: TrainState) -> Callable[[PyTree, Array], Any]:
        model, stats = self.task.model, state.batch_stats
        return lambda params, image: model.apply({"params": params, "batch_stats": stats}, image, train=False)

    def _image(self) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct((1, *self.task.data.image_shape), jnp.float32)

    def summary(self, state: TrainState) -> dict[str, Any]:
        """What `summary.json` holds."""
        config, dense = self.task.config, self.task.algorithm is None
        final = self._measure(state) if self.shapes else {"sparsity": 0.0, "explored": 1.0}
        best = max(self.evals, key=lambda e: (e[2], e[0]), default=[None] * 3)
        cost = measure.cost(
            self._forward(state),
            state.params,
            self._image(),
            masks=sharding.gather(masks(state)),
            algorithm=self.task.algorithm,
            steps=config["steps"],
        )
        return {
            "test_accuracy": self.evals[-1][2] if self.evals else None,
            "test_loss": self.evals[-1][1] if self.evals else None,
            "best_accuracy": best[2],
            "best_step": best[0],
            "steps": int(state.step),
            "seed": config["seed"],
            "method": config["method"]["name"],
            "sparsity": 0.0 if dense else config["sparsity"],
            "distribution": None if dense else config["distribution"]["name"],
            "dataset": config["dataset"]["name"],
            "model": config["model"]["name"],
            **cost,
            "seconds": round(time.monotonic() - self.started, 2),
            "final_sparsity": final["sparsity"],
            "explored": final["explored"],
            "skipped": self.skipped,
        }
