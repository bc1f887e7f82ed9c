"""Every method at every sparsity on Fashion-MNIST: two LeNets and a small WRN, ERK; one process, resumable.

    python -m experiments.studies.method_table                  # all planned cells that have no record yet
    python -m experiments.studies.method_table --whole          # also those that the plan leaves out
    python -m experiments.studies.method_table --model lenet5 --method rigl --sparsity 0.98

A cell is a model, a method and a sparsity. A finished cell is one line of experiments/records/method_table/MODEL.jsonl,
and a second start runs the cells that are missing. Cells of LeNet-5 and WRN-10-1 have three seeds and fewer steps than
those of LeNet-300-100, which have five, and the plan holds fewer of them. The first 50,000 images are for training, the
last 10,000 for validation, and the 10,000 test images are used once, after the last step. All methods have the same
initial weights, order of the images, optimizer, learning rate, and period: masks change every 100 steps until 3/4 of
training. So the runs of one seed are paired.

The data are the four IDX files of Fashion-MNIST: `apt-get install dataset-fashion-mnist`, or `--source FOLDER`.
"""

from __future__ import annotations

import bisect
import itertools
import math
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

import rigl_jax as rx
from experiments.io.environment import environment
from experiments.models import MODELS as NETWORKS
from experiments.studies import cells as store
from experiments.studies.method_networks import params_of
from experiments.studies.method_training import LANGEVIN, OPTIMIZER, Run, compile_run, load, measure

RECORDS = store.FOLDER / "method_table"
SPARSITIES = (0.9, 0.95, 0.98, 0.8, 0.99)
"""In the order in which they are run."""
_GRID = 2000  # scales for the widths of a small dense network

MODELS: Mapping[str, Mapping[str, Any]] = {
    "lenet_300_100": {
        "network": "mlp", "options": {"features": (300, 100)}, "steps": 5850, "batch": 128, "rate": 0.1, "dense": None,
        "seeds": (0, 1, 2, 3, 4), "leaves_out": (), "sparsities": SPARSITIES,
    },
    "lenet5": {
        "network": "lenet5", "options": {"features": (6, 16, 120, 84)}, "steps": 2000, "batch": 32, "rate": 0.05,
        "dense": "conv1/kernel", "seeds": (0, 1, 2), "leaves_out": ("snfs", "dsr", "deep_r"),
        "sparsities": (0.98, 0.95),
    },
    "wrn10_1": {
        "network": "wide_resnet", "options": {"depth": 10, "width": 1, "dropout": 0.0}, "steps": 2000, "batch": 32,
        "rate": 0.1, "dense": "params/conv1/kernel", "seeds": (0, 1, 2),
        "leaves_out": ("small_dense", "snip", "snfs", "granet", "srigl", "dsr", "deep_r"), "sparsities": (0.95, 0.98),
    },
}  # fmt: skip
"""`rate` is the peak of the learning rate, `dense` the kernel that stays dense. `leaves_out` and `sparsities` make the
plan of a slow network shorter."""

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


class Cell(NamedTuple):
    """The key of a record. `multiplier` is the length of the training as a multiple of the model's."""

    model: str
    method: str
    sparsity: float
    multiplier: int = 1


def cells(
    models: Sequence[str] = tuple(MODELS),
    *,
    methods: Sequence[str] = tuple(METHODS),
    multiplier: int = 1,
    whole: bool = False,
) -> Iterator[Cell]:
    """The planned cells, in the order in which they are run: the comparisons of the paper first.

    With `whole` also those that the plan of a model leaves out, after the others.
    """
    for model in models:
        planned = list(_planned(model, methods, multiplier))
        yield from planned
        if whole:
            yield from (cell for cell in _every(model, methods, SPARSITIES, multiplier) if cell not in planned)


def _planned(model: str, methods: Sequence[str], multiplier: int) -> Iterator[Cell]:
    """At the inner sparsities the comparisons of the paper, then the other methods, all of them at the outer ones."""
    spec = MODELS[model]
    kept = [method for method in methods if method not in spec["leaves_out"]]
    inner = [s for s in spec["sparsities"] if s in SPARSITIES[:3]]
    outer = [s for s in spec["sparsities"] if s not in inner]
    for some, sparsities in ((kept[:4], inner), (kept[4:], (0.98,)), (kept[4:], (0.95, 0.9)), (kept, outer)):
        yield from _every(model, some, [s for s in sparsities if s in spec["sparsities"]], multiplier)


def _every(model: str, methods: Sequence[str], sparsities: Sequence[float], multiplier: int) -> Iterator[Cell]:
    widths = "features" in MODELS[model]["options"]  # what a small dense network has fewer of
    for method, sparsity in itertools.product([m for m in methods if widths or m != "small_dense"], sparsities):
        if method != "dense":
            yield Cell(model, method, sparsity, multiplier)
        elif sparsity == MODELS[model]["sparsities"][0]:
            yield Cell(model, method, 0.0, multiplier)


def small_features(model: str, weights: int) -> tuple[int, ...]:
    """Widths of the dense network of the same shape with at most that many weights; every layer keeps a unit."""
    widths = MODELS[model]["options"]["features"]

    def scaled(k: float) -> tuple[int, ...]:
        return tuple(max(1, round(k * width)) for width in widths)

    def size(k: int) -> int:
        return _n_weights(_shapes(_module(model, features=scaled(k / _GRID))))

    return scaled(max(1, bisect.bisect_right(range(_GRID), weights, key=size) - 1) / _GRID)


def _module(model: str, **options: Any) -> nn.Module:
    spec = MODELS[model]
    return NETWORKS[spec["network"]](10, **{**spec["options"], **options})


def _shapes(module: nn.Module) -> Any:
    image = jax.ShapeDtypeStruct((1, 28, 28, 1), jnp.float32)
    return params_of(jax.eval_shape(module.init, jax.random.key(0), image))


def _n_weights(params: Any) -> int:
    return sum(math.prod(p.shape) for p in jax.tree.leaves(params) if len(p.shape) > 1)


def prepare(cell: Cell, steps: int | None = None, **changes: Any) -> tuple[Run, dict[str, Any]]:
    """The compiled run of a cell and its settings for the record.

    Args:
      cell: what is run.
      steps: of a training whose multiplier is 1; the model's if not given.
      **changes: another `rate`, and options of the method in place of those in `METHODS`.
    """
    spec, options, noisy = MODELS[cell.model], {**METHODS[cell.method], **changes}, cell.method == "deep_r"
    steps, rate = (steps or spec["steps"]) * cell.multiplier, options.pop("rate", spec["rate"])
    module, algorithm = _module(cell.model), None
    shapes = _shapes(module)
    for option in options.keys() & {"start", "stop"}:
        options[option] = int(steps * options[option])
    if cell.method != "dense":
        structure = rx.fan_in() if cell.method == "srigl" else rx.unstructured()
        rules = [(spec["dense"], None)] if spec["dense"] else []
        plan = rx.make_plan(shapes, cell.sparsity, rx.erk, rules=[*rules, (".*kernel", structure), (".*", None)])
        if cell.method == "small_dense":
            pruned = sum(math.prod(leaf.shape) - leaf.n_active for leaf in plan.values())
            module = _module(cell.model, features=small_features(cell.model, _n_weights(shapes) - pruned))
        else:
            algorithm = rx.ALGORITHMS[cell.method](plan, **options)
    settings = {"steps": steps, "batch": spec["batch"], "rate": rate, **OPTIMIZER, **options}
    settings |= {name: getattr(module, name) for name in spec["options"]} | (LANGEVIN if noisy else {})
    return compile_run(module, algorithm, steps, rate, noisy=noisy, batch=spec["batch"]), settings


def read(folder: Path = RECORDS) -> dict[Cell, dict[str, Any]]:
    """All records of a folder, by cell."""
    return store.read(folder, Cell)


def main(argv: Sequence[str] | None = None) -> None:
    """Runs every planned cell that has no record."""
    parser = store.parser(__doc__, RECORDS, MODELS)
    parser.add_argument("--whole", action="store_true", help="also the cells that the plan leaves out")
    parser.add_argument("--method", action="append", choices=METHODS)
    parser.add_argument("--sparsity", action="append", type=float)
    parser.add_argument("--multiplier", type=int, default=1, help="trains so many times as long")
    options = parser.parse_args(argv)
    data, done = load(options.source), read(options.records)
    models, methods = options.model or tuple(MODELS), options.method or tuple(METHODS)
    for cell in cells(models, methods=methods, multiplier=options.multiplier, whole=options.whole):
        if cell in done or (options.sparsity and cell.sparsity not in options.sparsity):
            continue
        started, before = time.process_time(), environment()
        run, settings = prepare(cell)
        runs = [measure(run, data, seed) for seed in MODELS[cell.model]["seeds"]]
        seconds = round(time.process_time() - started, 1)
        record = {**cell._asdict(), "settings": settings, "runs": runs, "cpu_seconds": seconds, "environment": before}
        store.append(options.records, record)
        print(f"{time.strftime('%H:%M')} {cell} {np.mean([r['test'] for r in runs]):.4f} in {seconds} s", flush=True)


if __name__ == "__main__":
    main()
