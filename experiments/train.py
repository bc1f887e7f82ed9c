"""Training: `train(config, workdir) -> summary`.

Two compiled steps, an ordinary one and one that rewires, chosen on the host by `algorithm.due(step)`. The state is
donated, the metrics add up on the device, and the host waits for the device only where it writes a line.
"""

from __future__ import annotations

import functools
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.sharding import Mesh, NamedSharding, PartitionSpec

import rigl_jax as rx
from experiments import build, checkpoint, measure, records
from experiments.data import Data
from rigl_jax import trees
from rigl_jax.base import Algorithm, Array, Masks, Plan, PyTree

Batch = Mapping[str, Any]


class TrainState(NamedTuple):
    """All that changes while training; arrays only, so that it is donated, sharded and saved as a whole.

    Attributes:
      step: int32 scalar, steps done.
      params: the weights; pruned ones are exactly 0.
      batch_stats: running statistics of batch normalisation, {} without.
      opt_state: `rx.SparseState`, or the bare optax state of a dense run.
      key: typed key for dropout, never advanced: each step folds its number in.
      explored: masks of the weights that were ever active; None for a dense run.
      totals: sums of the training metrics since the last line, {"loss", "accuracy", "steps"}: float32 scalars.
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
      schedule: learning rate by weight updates done.
      mesh: the devices, along one axis "data".
    """

    config: dict[str, Any]
    data: Data
    model: nn.Module
    plan: Plan | None
    algorithm: Algorithm | None
    tx: optax.GradientTransformationExtraArgs
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
    if batch_size % len(devices):
        raise ValueError(f"config.dataset.batch_size: {batch_size} examples do not divide among {len(devices)} devices")
    data = build.data(config)
    model = build.model(config, data.num_classes)
    image = jax.ShapeDtypeStruct((1, *data.image_shape), jnp.float32)
    shapes = jax.eval_shape(functools.partial(model.init, train=False), jax.random.key(0), image)["params"]
    plan = build.plan(config, shapes)
    algorithm = build.algorithm(config, plan)
    inner = build.optimizer(config)
    if algorithm is None:
        tx = optax.with_extra_args_support(inner)
    else:
        tx = rx.sparsify(inner, algorithm, key=_key(config, "masks"))
    mesh = Mesh(np.asarray(devices), ("data",))
    return Task(config, data, model, plan, algorithm, tx, build.learning_rate(config), mesh)


def _key(config: Mapping[str, Any], use: str) -> Array:
    """One key for each use of randomness, all from the run's seed."""
    return trees.leaf_key(jax.random.key(config["seed"]), use)


def init(task: Task) -> TrainState:
    """The state before the first step."""
    image = jnp.zeros((1, *task.data.image_shape), jnp.float32)
    variables = dict(task.model.init(_key(task.config, "params"), image, train=False))
    params = variables.pop("params")
    opt_state = task.tx.init(params)
    explored = None
    if task.algorithm is not None:
        params = rx.apply_masks(params, opt_state.masks)
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
    return {name: jnp.zeros((), jnp.float32) for name in ("loss", "accuracy", "steps")}


def masks(state: TrainState) -> Masks | None:
    """The masks, None for a dense run."""
    return None if state.explored is None else state.opt_state.masks


def cross_entropy(logits: Array, labels: Array, smoothing: float = 0.0) -> Array:
    """Softmax cross-entropy of each example, `float32[batch]`, in nats.

    Args:
      logits: `[batch, classes]`.
      labels: `int[batch]`.
      smoothing: the share of the target that is spread over all classes, in [0, 1).
    """
    targets = jax.nn.one_hot(labels, logits.shape[-1])
    return optax.softmax_cross_entropy(logits, optax.smooth_labels(targets, smoothing))


def train_step(task: Task, state: TrainState, batch: Batch, *, rewire: bool) -> tuple[TrainState, Array | None]:
    """One step on one batch; on a rewiring also the counts of `measure.counts`."""

    def loss_of(params: PyTree) -> tuple[Array, tuple[Array, PyTree]]:
        logits, mutated = task.model.apply(
            {"params": params, "batch_stats": state.batch_stats},
            batch["image"],
            train=True,
            mutable=["batch_stats"],
            rngs={"dropout": jax.random.fold_in(state.key, state.step)},
        )
        losses = cross_entropy(logits, batch["label"], task.config["label_smoothing"])
        return jnp.mean(losses), (logits, mutated.get("batch_stats", {}))

    (loss, (logits, batch_stats)), grads = jax.value_and_grad(loss_of, has_aux=True)(state.params)
    updates, opt_state = task.tx.update(grads, state.opt_state, state.params, rewire=rewire)
    new = {"loss": loss, "accuracy": jnp.mean(jnp.argmax(logits, -1) == batch["label"]), "steps": jnp.float32(1)}
    after = state._replace(
        step=state.step + 1,
        params=optax.apply_updates(state.params, updates),
        batch_stats=batch_stats,
        opt_state=opt_state,
        totals=jax.tree.map(jnp.add, state.totals, new),
    )
    if not rewire:
        return after, None
    explored = measure.union(state.explored, opt_state.masks)
    counts = measure.counts(state.opt_state.masks, opt_state.masks, explored)
    return after._replace(explored=explored), counts


def eval_step(task: Task, state: TrainState, batch: Batch) -> Array:
    """`float32[3]`: sums of loss, right answers and weights over a test batch."""
    variables = {"params": state.params, "batch_stats": state.batch_stats}
    logits = task.model.apply(variables, batch["image"], train=False)
    right = (jnp.argmax(logits, -1) == batch["label"]).astype(jnp.float32)
    weight = batch["weight"].astype(jnp.float32)
    # Padding has the label -1, whose one-hot vector is 0; its loss is 0 and its weight too.
    return jnp.stack(
        [jnp.sum(v * weight) for v in (cross_entropy(logits, batch["label"]), right, jnp.ones_like(right))]
    )


class Compiled(NamedTuple):
    """The jitted functions, over the mesh: batches split, everything else whole on every device."""

    init: Callable[[], TrainState]
    abstract: Callable[[], TrainState]
    steps: dict[bool, Callable[[TrainState, Batch], tuple[TrainState, Array | None]]]
    evaluate: Callable[[TrainState, Batch], Array]
    counts: Callable[..., Array]
    no_totals: Callable[[], dict[str, Array]]
    rate: Callable[[int], Array]
    place: Callable[[Batch], Batch]


def compile_task(task: Task) -> Compiled:
    """Jits the steps. Nothing is compiled before it is called."""
    whole = NamedSharding(task.mesh, PartitionSpec())
    split = NamedSharding(task.mesh, PartitionSpec("data"))
    jit = functools.partial(jax.jit, out_shardings=whole)

    def place(batch: Batch) -> Batch:
        return {name: jax.make_array_from_process_local_data(split, value) for name, value in batch.items()}

    def abstract() -> TrainState:
        shapes = jax.eval_shape(functools.partial(init, task))
        return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=whole), shapes)

    return Compiled(
        init=jit(functools.partial(init, task)),
        abstract=abstract,
        steps={
            rewire: jit(functools.partial(train_step, task, rewire=rewire), donate_argnums=0)
            for rewire in (False, True)
        },
        evaluate=jit(functools.partial(eval_step, task)),
        counts=jit(measure.counts),
        no_totals=jit(_no_totals),
        rate=jit(lambda updates: jnp.asarray(task.schedule(updates), jnp.float32)),
        place=place,
    )


def evaluate(compiled: Compiled, state: TrainState, batches: Iterator[Batch]) -> dict[str, float]:
    """Mean loss and accuracy over a pass; every example counts once."""
    sums = [compiled.evaluate(state, compiled.place(batch)) for batch in batches]
    loss, right, weight = np.sum(jax.device_get(sums), axis=0, dtype=np.float64)
    return {"loss": float(loss / weight), "accuracy": float(right / weight)}


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
    config, workdir, started = build.check(config), Path(workdir), time.monotonic()
    before = records.read_json(workdir / "config.json")
    if before is not None:
        checkpoint.check_config(before, config)
    summary = records.read_json(workdir / "summary.json")
    if summary is not None:
        return summary
    task = prepare(config, devices)
    compiled = compile_task(task)
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
    batches = task.data.train(first)
    for done in range(first + 1, last + 1):
        rewire = task.algorithm is not None and bool(task.algorithm.due(done - 1))
        state, counts = compiled.steps[rewire](state, compiled.place(next(batches)))
        journal.stepped(done, counts)
        if done % config["log_every"] == 0 or done == steps:
            state = state._replace(totals=journal.trained(done, state.totals))
        if done % config["eval_every"] == 0 or done == steps:
            journal.evaluated(done, state)
        if done == steps:
            journal.pictured(done, state)
        if done == last or (every and done % every == 0):
            store.save(done, state, journal.facts(), journal.accuracy(done))
    return state


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

    def _forward(self, state: TrainState) -> Callable[[PyTree, Array], Array]:
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
