"""What a run writes down while it goes: lines, the progress bar, the facts of a checkpoint, the summary."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from experiments import measure, sharding
from experiments.finite import SKIP, check_finite
from experiments.io.metrics import open_writer
from experiments.progress import open_progress
from experiments.step import Compiled, Task, TrainState, evaluate, masks
from rigl_jax import trees
from rigl_jax.base import Array, PyTree


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
        self.bar = open_progress(config["steps"], done, active=active and config["progress"])
        self.writer = open_writer(workdir, self.first, tensorboard=config["tensorboard"], active=active)
        if active and (lost := facts.get("lines", 0) - self.writer.lines()) > 0:
            logging.warning("train: %s lost %d lines from before step %d", workdir / "metrics.jsonl", lost, done)
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
        check_finite(loss or 0.0, step)
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
        check_finite(found["loss"], step)
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
            "lines": self.writer.lines(),
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
