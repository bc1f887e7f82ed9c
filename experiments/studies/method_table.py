"""Every method at every sparsity on Fashion-MNIST: LeNet-300-100 and LeNet-5, ERK, 5 seeds; one process, resumable.

    python -m experiments.studies.method_table                  # all cells that have no record yet
    python -m experiments.studies.method_table --model lenet5 --method rigl --sparsity 0.98

A cell is a model, a method and a sparsity. A finished cell is one line of experiments/records/method_table/MODEL.jsonl,
and a second start goes on with the cells that are missing. Training takes the first 50,000 images, the last 10,000 are
for validation, and the 10,000 test images are looked at once, after the last step. Methods share what is not theirs:
initial weights, order of the images, optimizer, learning rate, and the period of 100 steps at which masks change until
3/4 of training. So the runs of one seed are paired.

The data are the four IDX files of Fashion-MNIST: `apt-get install dataset-fashion-mnist`, or `--source FOLDER`.
"""

from __future__ import annotations

import argparse
import bisect
import functools
import itertools
import json
import math
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax import Array, lax

import rigl_jax as rx
from experiments.data import idx
from experiments.io.environment import environment
from experiments.models import MODELS as NETWORKS

RECORDS = Path(__file__).parents[1] / "records" / "method_table"
SOURCE = "/usr/share/datasets/fashion-mnist"
SEEDS = (0, 1, 2, 3, 4)
SPARSITIES = (0.9, 0.95, 0.98, 0.8, 0.99)
"""In the order in which they are run."""
BATCH, VALIDATION = 128, 10_000
_GRID = 2000  # scales that are tried for the widths of a small dense network

MODELS: Mapping[str, Mapping[str, Any]] = {
    "lenet_300_100": {"network": "mlp", "features": (300, 100), "epochs": 15, "rate": 0.1, "dense": None},
    "lenet5": {"network": "lenet5", "features": (6, 16, 120, 84), "epochs": 10, "rate": 0.05, "dense": "conv1/kernel"},
}
"""`rate` is the peak of the learning rate, `dense` the kernel that stays dense."""
OPTIMIZER = {"momentum": 0.9, "nesterov": True, "weight_decay": 5e-4}

PERIODIC = {"period": 100, "stop": 0.75}
METHODS: Mapping[str, Mapping[str, Any]] = {
    "dense": {},
    "static": {},
    "rigl": {**PERIODIC, "fraction": 0.3},
    "set": {**PERIODIC, "fraction": 0.3},
    "small_dense": {},
    "gmp": {**PERIODIC, "start": 0.3},
    "snip": {"jointly": True},
    "snfs": {**PERIODIC, "fraction": 0.5, "momentum": 0.9},
    "granet": {**PERIODIC, "fraction": 0.5, "initial_sparsity": 0.5},
    "srigl": {**PERIODIC, "fraction": 0.3, "never_ablate": [".*(Dense_2|logits)/kernel"]},
    "dsr": {**PERIODIC, "target": 0.002},
    "deep_r": {},
}
"""Options by method, in the order in which they are run; `start` and `stop` are shares of the training."""
LANGEVIN = {"l1": 1e-5, "noise": 1e-5}
"""DeepR's drift, and the standard deviation of its noise as a multiple of the learning rate: its authors' for MNIST."""


class Cell(NamedTuple):
    """What one record stands for. `multiplier` is the length of the training in units of the model's."""

    model: str
    method: str
    sparsity: float
    multiplier: int = 1


class Images(NamedTuple):
    """Standardised images `float32[N, 28, 28, 1]` and labels `int32[N]`."""

    x: Array
    y: Array


class Data(NamedTuple):
    """The three parts of the data set."""

    train: Images
    validation: Images
    test: Images


class State(NamedTuple):
    """All that changes in one run.

    Attributes:
      params: the weights, masked.
      opt_state: `rx.SparseState`, or the bare optax state of a dense run.
      explored: masks of the weights that were ever active; None for a dense run.
      born: masks of the weights that the last change of masks grew; None for a dense run.
      survival: float32[2], of all grown weights how many the next change of masks kept, and how many there were.
    """

    params: Any
    opt_state: Any
    explored: Any
    born: Any
    survival: Array


class Run(NamedTuple):
    """One cell made ready: compiled functions, and facts on the host."""

    steps: int
    algorithm: rx.Algorithm | None
    module: nn.Module
    init: Callable[[Array], State]
    train: Callable[..., State]
    accuracy: Callable[[Any, Images], Array]
    settings: Mapping[str, Any]


def cells(models: Sequence[str] = tuple(MODELS), *, methods: Sequence[str] = tuple(METHODS)) -> Iterator[Cell]:
    """Every cell, in the order in which they are run: what the paper compares first, the outer sparsities last."""
    inner, outer = SPARSITIES[:3], SPARSITIES[3:]
    parts = ((methods[:4], inner), (methods[4:], (0.98,)), (methods[4:], (0.95, 0.9)), (methods, outer))
    for model, (some, sparsities) in itertools.product(models, parts):
        for method, sparsity in itertools.product(some, sparsities):
            if method != "dense":
                yield Cell(model, method, sparsity)
            elif sparsity == inner[0]:
                yield Cell(model, method, 0.0)


def load(source: str | Path = SOURCE) -> Data:
    """Fashion-MNIST, standardised by mean and deviation of the training part.

    Raises:
      ValueError: the folder does not hold the four IDX files.
    """
    parts = idx.read_folder(source)
    (images, labels), test = parts["train"], parts["test"]
    split = len(images) - VALIDATION
    mean, std = images[:split].mean(), images[:split].std()

    def part(x: np.ndarray, y: np.ndarray) -> Images:
        return Images(jnp.asarray((x.astype(np.float32) - mean) / std), jnp.asarray(y, jnp.int32))

    return Data(part(images[:split], labels[:split]), part(images[split:], labels[split:]), part(*test))


def small_features(model: str, weights: int) -> tuple[int, ...]:
    """Widths of the dense network of the same shape with at most so many weights; every layer keeps a unit."""
    spec = MODELS[model]

    def scaled(k: float) -> tuple[int, ...]:
        return tuple(max(1, round(k * width)) for width in spec["features"])

    def size(k: int) -> int:
        return _n_weights(_shapes(NETWORKS[spec["network"]](10, features=scaled(k / _GRID))))

    return scaled(max(1, bisect.bisect_right(range(_GRID), weights, key=size) - 1) / _GRID)


def _shapes(module: nn.Module) -> Any:
    return jax.eval_shape(module.init, jax.random.key(0), jax.ShapeDtypeStruct((1, 28, 28, 1), jnp.float32))["params"]


def _n_weights(params: Any) -> int:
    return sum(math.prod(p.shape) for p in jax.tree.leaves(params) if len(p.shape) > 1)


def prepare(cell: Cell, n_train: int, epochs: int | None = None) -> Run:
    """Builds a cell: model, plan, method, optimizer, and the programs of an ordinary and a rewiring step."""
    spec, options = MODELS[cell.model], dict(METHODS[cell.method])
    epochs = (epochs or spec["epochs"]) * cell.multiplier
    steps = epochs * (n_train // BATCH)
    module = NETWORKS[spec["network"]](10, features=spec["features"])
    shapes, plan = _shapes(module), None
    if cell.method != "dense":
        structure = rx.fan_in() if cell.method == "srigl" else rx.unstructured()
        rules = [(spec["dense"], None)] if spec["dense"] else []
        plan = rx.make_plan(shapes, cell.sparsity, rx.erk, rules=[*rules, (".*kernel", structure), (".*", None)])
    if cell.method == "small_dense":
        pruned = sum(math.prod(leaf.shape) - leaf.n_active for leaf in plan.values())
        module = NETWORKS[spec["network"]](10, features=small_features(cell.model, _n_weights(shapes) - pruned))
    algorithm = None
    if cell.method not in ("dense", "small_dense"):
        for option in options.keys() & {"start", "stop"}:
            options[option] = int(steps * options[option])
        algorithm = rx.ALGORITHMS[cell.method](plan, **options)
    rate = optax.cosine_decay_schedule(spec["rate"], steps)
    settings = {"epochs": epochs, "steps": steps, "batch": BATCH, "rate": spec["rate"], **OPTIMIZER, **options}
    settings |= {"features": list(module.features)} | (LANGEVIN if cell.method == "deep_r" else {})
    transform = functools.partial(_transform, algorithm, rate, cell.method == "deep_r")
    train = jax.jit(functools.partial(_train, module, transform), static_argnames="rewire", donate_argnums=0)
    accuracy = jax.jit(functools.partial(_accuracy, module))
    return Run(
        steps, algorithm, module, jax.jit(functools.partial(_init, module, transform)), train, accuracy, settings
    )


def _transform(
    algorithm: rx.Algorithm | None, rate: optax.Schedule, noisy: bool, key: Array
) -> optax.GradientTransformationExtraArgs:
    """The optimizer of a member of the ensemble of seeds; its key may be traced."""

    def kernels(params: Any) -> Any:
        return jax.tree.map(lambda p: p.ndim > 1, params)

    momentum = optax.sgd(rate, momentum=OPTIMIZER["momentum"], nesterov=OPTIMIZER["nesterov"])
    inner = optax.chain(optax.add_decayed_weights(OPTIMIZER["weight_decay"], mask=kernels), momentum)
    if noisy:
        heat = LANGEVIN["noise"] ** 2 / 2  # the noise has variance 2 rate temperature
        noise = rx.langevin(rate, l1=LANGEVIN["l1"], temperature=lambda count: heat * rate(count), key=key)
        inner = optax.chain(inner, optax.masked(noise, kernels))
    return optax.with_extra_args_support(inner) if algorithm is None else rx.sparsify(inner, algorithm, key=key)


def _init(module: nn.Module, transform: Callable[..., Any], seed: Array) -> State:
    first, masks = jax.random.split(jax.random.key(seed))
    params = module.init(first, jnp.zeros((1, 28, 28, 1)))["params"]
    opt_state = transform(masks).init(params)
    if not isinstance(opt_state, rx.SparseState):
        return State(params, opt_state, None, None, jnp.zeros(2))
    born = jax.tree.map(jnp.zeros_like, opt_state.masks)
    explored = jax.tree.map(jnp.copy, opt_state.masks)
    return State(rx.apply_masks(params, opt_state.masks), opt_state, explored, born, jnp.zeros(2))


def _train(
    module: nn.Module, transform: Callable[..., Any], state: State, data: Images, order: Array, start: Any, stop: Any,
    *, rewire: bool,
) -> State:  # fmt: skip
    """The steps from `start` up to `stop`, all of one kind; `order` is int32[steps, batch]."""
    tx = transform(jax.random.key(0))  # the state brings its own key

    def loss(params: Any, rows: Array) -> Array:
        logits = module.apply({"params": params}, data.x[rows])
        return optax.softmax_cross_entropy_with_integer_labels(logits, data.y[rows]).mean()

    def step(i: Array, state: State) -> State:
        grads = jax.grad(loss)(state.params, order[i])
        extra = {} if state.explored is None else {"rewire": rewire}
        updates, opt_state = tx.update(grads, state.opt_state, state.params, **extra)
        new = state._replace(params=optax.apply_updates(state.params, updates), opt_state=opt_state)
        return _followed(state, new) if rewire else new

    return lax.fori_loop(start, stop, step, state)


def _followed(old: State, new: State) -> State:
    """Writes down what a change of masks grew, and what it left of that which the one before had grown."""
    before, after = old.opt_state.masks, new.opt_state.masks
    kept, born = (_total(tree) for tree in (jax.tree.map(jnp.logical_and, old.born, after), old.born))
    return new._replace(
        explored=jax.tree.map(jnp.logical_or, old.explored, after),
        born=jax.tree.map(lambda a, b: b & ~a, before, after),
        survival=old.survival + jnp.stack([kept, born]),
    )


def _total(masks: Any) -> Array:
    return sum(jnp.sum(mask, dtype=jnp.float32) for mask in jax.tree.leaves(masks))


def _accuracy(module: nn.Module, params: Any, images: Images) -> Array:
    """Share of right answers, float32 scalar."""

    def right(part: Images) -> Array:
        return jnp.sum(jnp.argmax(module.apply({"params": params}, part.x), -1) == part.y)

    parts = jax.tree.map(lambda x: x.reshape(-1, 1000, *x.shape[1:]), images)
    return jnp.sum(lax.map(right, parts)) / images.y.size


def segments(algorithm: rx.Algorithm | None, steps: int) -> list[tuple[bool, int, int]]:
    """`(rewires, first, one past the last)` of the longest runs of steps of one kind."""
    due = [algorithm is not None and bool(algorithm.due(step)) for step in range(steps)]
    lengths = [(kind, len(list(group))) for kind, group in itertools.groupby(due)]
    ends = list(itertools.accumulate(length for _, length in lengths))
    return [(kind, end - length, end) for (kind, length), end in zip(lengths, ends, strict=True)]


def order(seed: int, steps: int, n_train: int) -> np.ndarray:
    """int32[steps, BATCH], which images make each batch: a new permutation each epoch, as `experiments.data` has it."""
    per_epoch = n_train // BATCH
    epochs = [np.random.default_rng([seed, epoch]).permutation(n_train) for epoch in range(-(-steps // per_epoch))]
    return np.concatenate([p[: per_epoch * BATCH].reshape(-1, BATCH) for p in epochs])[:steps].astype(np.int32)


def measure(run: Run, data: Data, seed: int) -> dict[str, Any]:
    """Trains one seed to its end and says what came out."""
    state, batches = run.init(seed), order(seed, run.steps, len(data.train.y))
    image = jax.ShapeDtypeStruct((1, 28, 28, 1), jnp.float32)
    counted = rx.flops(lambda params, x: run.module.apply({"params": params}, x), state.params, image)
    sizes = {name: p.size for name, p in rx.trees.named_leaves(state.params).items()}
    forward, costs = counted.total, []
    for rewire, first, last in segments(run.algorithm, run.steps):
        state = run.train(state, data.train, batches, first, last, rewire=rewire)
        if state.explored is not None:
            active = rx.trees.named_leaves(_counts(state.opt_state.masks))
            density = {name: int(n) / sizes[name] for name, n in active.items()}
            forward = counted._replace(density={**counted.density, **density}).total
        costs += [forward] * (last - first)
    found = {
        "seed": seed,
        "validation": round(float(run.accuracy(state.params, data.validation)), 4),
        "test": round(float(run.accuracy(state.params, data.test)), 4),
        "forward": forward,
        "training": 3 * forward
        if run.algorithm is None
        else rx.training_cost(run.algorithm, costs, counted.total, run.steps),
        "weights": sum(int(jnp.count_nonzero(p)) for p in jax.tree.leaves(state.params) if p.ndim > 1),
    }
    return found if state.explored is None else found | _topology(state)


_counts = jax.jit(functools.partial(jax.tree.map, jnp.count_nonzero))


def _topology(state: State) -> dict[str, Any]:
    """Facts about the masks: explored share, survival of grown weights, units that are cut off."""
    masks = {name: np.asarray(mask) for name, mask in rx.trees.named_leaves(state.opt_state.masks).items()}
    kept, grown = (float(value) for value in state.survival)
    size = sum(mask.size for mask in masks.values())
    return {
        "active": {name: int(mask.sum()) for name, mask in masks.items()},
        "explored": float(_total(state.explored)) / size,
        "survival": kept / grown if grown else None,
        "without_input": {
            name: int((~mask.any(axis=tuple(range(mask.ndim - 1)))).sum()) for name, mask in masks.items()
        },
        "unused_inputs": {name: int((~mask.any(axis=-1)).sum()) for name, mask in masks.items()},
    }


def key_of(record: Mapping[str, Any]) -> Cell:
    """The cell of a record."""
    return Cell(*(record[field] for field in Cell._fields))


def read(folder: Path = RECORDS) -> dict[Cell, dict[str, Any]]:
    """All records of a folder, by cell."""
    lines = [line for path in sorted(folder.glob("*.jsonl")) for line in path.read_text().splitlines()]
    return {key_of(record): record for record in map(json.loads, lines)}


def main(argv: Sequence[str] | None = None) -> None:
    """Runs every cell that has no record."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--source", default=SOURCE, help="folder of the four IDX files")
    parser.add_argument("--records", type=Path, default=RECORDS, help="folder of the records")
    parser.add_argument("--model", action="append", choices=MODELS)
    parser.add_argument("--method", action="append", choices=METHODS)
    parser.add_argument("--sparsity", action="append", type=float)
    options = parser.parse_args(argv)
    data, done = load(options.source), read(options.records)
    options.records.mkdir(parents=True, exist_ok=True)
    for cell in cells(options.model or tuple(MODELS), methods=options.method or tuple(METHODS)):
        if cell in done or (options.sparsity and cell.sparsity not in options.sparsity):
            continue
        started, before = time.monotonic(), environment()
        run = prepare(cell, len(data.train.y))
        runs = [measure(run, data, seed) for seed in SEEDS]
        seconds = round(time.monotonic() - started, 1)
        record = {**cell._asdict(), "settings": run.settings, "runs": runs, "seconds": seconds, "environment": before}
        with (options.records / f"{cell.model}.jsonl").open("a") as file:
            file.write(json.dumps(record) + "\n")
        print(f"{time.strftime('%H:%M')} {cell} {np.mean([r['test'] for r in runs]):.4f} in {seconds} s", flush=True)


if __name__ == "__main__":
    main()
