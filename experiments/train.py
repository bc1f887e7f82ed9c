"""Training: `train(config, workdir) -> summary`.

The host runs ahead of the devices and waits for them only where it writes a line.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from experiments import checkpoint, measure, records
from experiments.build import check
from experiments.packed import compile_packed
from experiments.steps import Compiled, Task, TrainState, compile_task, evaluate, masks, prepare
from rigl_jax import trees
from rigl_jax.base import Array, PyTree


def train(
    config: Mapping[str, Any], workdir: str | Path, *, devices: Sequence[jax.Device] | None = None
) -> dict[str, Any]:
    """Trains, or goes on training, and writes a run directory (see `experiments.records`).

    Called again on the same workdir it goes on from the last checkpoint and arrives at the same bits as a run that was
    never interrupted; a finished run is not repeated.

    Args:
      config: see `configs/common.py`; an `ml_collections.ConfigDict` or any mapping.
      workdir: the run directory, made if missing.
      devices: to train on; all by default. The batch is split among them.

    Returns:
      What `summary.json` holds. With `config.stop_at` it is that of the unfinished run, which is not written.

    Raises:
      ValueError: anything wrong with the config, or a workdir that holds a run of another config.
      FloatingPointError: the loss is not finite.

    Example::

      from configs import digits_mlp
      summary = train(digits_mlp.get_config("smoke"), "runs/try")
      summary["test_accuracy"]
    """
    config, workdir, started = check(config), Path(workdir), time.monotonic()
    before = records.read_json(workdir / "config.json")
    if before is not None:
        checkpoint.check_config(before, config)
    summary = records.read_json(workdir / "summary.json")
    if summary is not None:
        return summary
    task = prepare(config, devices)
    compiled = compile_task(task) if task.packed is None else compile_packed(task)
    if jax.process_index() == 0:
        records.begin(workdir, config)
    store = checkpoint.open_checkpoints(workdir / "checkpoints", keep=config["keep"])
    try:
        state, facts = store.restore(compiled.abstract()) or (compiled.init(), {})
        journal = Journal(task, compiled, workdir, state, facts, started)
        try:
            state = _loop(task, compiled, state, journal, store)
        finally:
            journal.close()
        summary = journal.summary(state)
    finally:
        store.close()
    # Written last: whoever finds it finds everything.
    if jax.process_index() == 0 and summary["steps"] == config["steps"]:
        records.write_json(workdir / "summary.json", summary)
    return summary


def _loop(
    task: Task, compiled: Compiled, state: TrainState, journal: Journal, store: checkpoint.Checkpoints
) -> TrainState:
    """From the state's step to the last. Everything about a step is written before its checkpoint."""
    config, first = task.config, int(state.step)
    steps, every = config["steps"], config["checkpoint_every"]
    last = min(steps, config["stop_at"] or steps)
    batches, state = task.data.train(first), compiled.enter(state)
    for done in range(first + 1, last + 1):
        rewire = task.algorithm is not None and bool(task.algorithm.due(done - 1))
        state, counts = compiled.steps[rewire](state, compiled.place(next(batches)))
        journal.stepped(done, counts)
        if done % config["log_every"] == 0 or done == steps:
            state = state._replace(totals=journal.trained(done, state.totals))
        if done % config["eval_every"] == 0 or done == steps:
            journal.evaluated(done, state)
        if done == steps:
            journal.pictured(done, compiled.leave(state))
        if done == last or (every and done % every == 0):
            store.save(done, compiled.leave(state), journal.facts(), journal.accuracy(done))
    return compiled.leave(state)


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
        done = max(self.first, 0)
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
        loss, accuracy = values["loss"] / values["steps"], values["accuracy"] / values["steps"]
        records.check_finite(loss, step)
        examples = (step - self.since_step) * self.task.config["dataset"]["batch_size"]
        line = {
            "loss": loss,
            "accuracy": accuracy,
            "learning_rate": self.learning_rate(step),
            "examples_per_s": examples / max(time.monotonic() - self.since, 1e-9),
        }
        self.writer.write("train", step, line)
        self.since, self.since_step = time.monotonic(), step
        self._show(f"train {100 * accuracy:.1f} %")
        return self.compiled.no_totals()

    def learning_rate(self, step: int) -> float:
        """The rate of the last weight update; steps that a rewiring skipped do not count."""
        skipped = self.rewired if self.task.algorithm is not None and self.task.algorithm.skip_step else 0
        return float(self.compiled.rate(max(step - skipped - 1, 0)))

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
        self.writer.write("first_layer", step, measure.picture(name, jax.device_get(mask)))

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
        return {"seconds": time.monotonic() - self.started, "evals": self.evals}

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
            masks=jax.device_get(masks(state)),
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
        }
