"""Pruning on Fashion-MNIST: criteria, lottery tickets, retraining schedules, ensembles; one process, resumable.

    python -m experiments.studies.pruning                       # all planned cells that have no record yet
    python -m experiments.studies.pruning --whole               # also those that the plan leaves out
    python -m experiments.studies.pruning --model lenet_300_100 --study criteria --seed 0

A cell is one seed of one comparison. A finished cell is one line of experiments/records/pruning/MODEL.jsonl, and a
second start goes on with the cells that are missing. The dense network of a seed is trained once in a process, and all
cells of the seed share it, the order of the images after it, and the images that criteria see. The last 10,000 training
images are for validation. What the study itself chooses, the learning rate of fine-tuning, it chooses by them: the
schedule with the best mean over seeds of `CHOICE`. Test images are looked at once for each network that is reported.

The data are the four IDX files of Fashion-MNIST: `apt-get install dataset-fashion-mnist`, or `--source FOLDER`.
"""

from __future__ import annotations

import functools
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from experiments.io.environment import environment
from experiments.studies import cells as store
from experiments.studies import pruning_cells as kinds
from experiments.studies.method_training import load
from experiments.studies.pruning_training import MODELS, Bench, make_bench
from rigl_jax.recipes import retraining

RECORDS = store.FOLDER / "pruning"
SEEDS = (0, 1, 2, 3, 4)
SPARSITIES = (0.8, 0.9, 0.95, 0.98)
BUDGETS = (0.25, 0.5, 1.0)
"""Epochs of retraining; criteria are compared at the second."""
STUDIES = ("retraining", "criteria", "ensembles", "lottery")


class Cell(NamedTuple):
    """What one record stands for. `epochs` is the length of the retraining; 0 where there is none."""

    model: str
    study: str
    method: str
    sparsity: float
    epochs: float
    seed: int


CHOICE = ("retraining", 0.95, BUDGETS[1])
"""Study, sparsity and epochs at which the learning rate of fine-tuning is chosen."""


def cells(models: Sequence[str] = tuple(MODELS), *, whole: bool = False) -> Iterator[Cell]:
    """The planned cells, in the order in which they are run: first those that fine-tuning is chosen by.

    With `whole`, every model has all seeds and all budgets of retraining.
    """
    for model in models:
        seeds, budgets = (len(SEEDS), True) if whole else (MODELS[model]["seeds"], MODELS[model]["budgets"])
        for study, method, sparsity, epochs in _comparisons():
            if budgets or study != "retraining" or (sparsity, epochs) == CHOICE[1:]:
                for seed in SEEDS[:seeds]:
                    yield Cell(model, study, method, sparsity, epochs, seed)


def _comparisons() -> Iterator[tuple[str, str, float, float]]:
    schedules = [*kinds.SCHEDULES, "bimp"]
    yield from (("retraining", method, *CHOICE[1:]) for method in schedules)
    yield from _criteria(0.95)
    yield ("ensembles", "dense", 0.0, 0.0)
    yield from _ensembles(0.9)
    yield ("lottery", "rewind_0", kinds.DEEPEST, 0.0)
    yield from _criteria(0.98)
    yield from (("retraining", method, 0.98, epochs) for epochs in BUDGETS for method in schedules)
    yield from (("lottery", method, kinds.DEEPEST, 0.0) for method in ("rewind_k", "learning_rate"))
    yield from _ensembles(0.95)
    yield from _criteria(0.9)
    yield from _criteria(0.8)
    yield from (("retraining", method, 0.95, epochs) for epochs in (BUDGETS[0], BUDGETS[2]) for method in schedules)


def _criteria(sparsity: float) -> Iterator[tuple[str, str, float, float]]:
    return (("criteria", method, sparsity, BUDGETS[1]) for method in [*kinds.CRITERIA, "iterative"])


def _ensembles(sparsity: float) -> Iterator[tuple[str, str, float, float]]:
    return (("ensembles", method, sparsity, 0.0) for method in ("rigl", "edst", "sup_tickets", "equal_flops"))


def choose(records: Mapping[Cell, Any], model: str) -> str | None:
    """The schedule of fine-tuning, by validation accuracy; None before all that it is chosen by was run."""
    means = {}
    for name in kinds.SCHEDULES:
        wanted = [Cell(model, CHOICE[0], name, *CHOICE[1:], seed) for seed in SEEDS[: MODELS[model]["seeds"]]]
        if any(cell not in records for cell in wanted):
            return None
        means[name] = np.mean([records[cell]["after"]["validation"][0] for cell in wanted])
    return max(means, key=means.__getitem__)


def run(bench: Bench, rigl: Callable[[float], kinds.Dynamic], cell: Cell, schedule: str | None) -> dict[str, Any]:
    """What comes out of a cell.

    Args:
      bench: of the cell's model.
      rigl: RigL at a sparsity, compiled.
      cell: which.
      schedule: of fine-tuning, from `choose`; not read by the retraining schedules, tickets and ensembles.
    """
    _, study, method, sparsity, epochs, seed = cell
    steps = round(epochs * bench.epoch)
    if study == "lottery":
        return kinds.lottery(bench, method, seed)
    if study == "ensembles":
        if method == "dense":
            return kinds.dense(bench, seed)
        own = kinds.dense_of_equal_flops if method == "equal_flops" else kinds.dynamic
        return own(bench, rigl(sparsity), method, seed)
    if study == "retraining":
        if method == "bimp":
            lengths = retraining.split(steps, kinds.BIMP_ROUNDS)
            return kinds.in_rounds(bench, lengths, sparsity, seed, "allr")
        return kinds.in_rounds(bench, [steps], sparsity, seed, method)
    if schedule is None:
        raise ValueError(f"run: cells of {study!r} need all records of {CHOICE}, by which fine-tuning is chosen")
    if method == "iterative":
        return kinds.in_rounds(bench, retraining.split(steps, kinds.ROUNDS), sparsity, seed, schedule)
    return kinds.one_shot(bench, method, sparsity, steps, seed, schedule)


def read(folder: Path = RECORDS) -> dict[Cell, dict[str, Any]]:
    """All records of a folder, by cell."""
    return store.read(folder, Cell)


def main(argv: Sequence[str] | None = None) -> None:
    """Runs every cell that has no record."""
    parser = store.parser(__doc__, RECORDS, MODELS)
    parser.add_argument("--study", action="append", choices=STUDIES)
    parser.add_argument("--method", action="append")
    parser.add_argument("--whole", action="store_true", help="all seeds and budgets of every model")
    parser.add_argument("--seed", action="append", type=int, choices=SEEDS)
    options = parser.parse_args(argv)
    wanted = {name: value for name in ("study", "method", "seed") if (value := getattr(options, name))}
    data, done = load(options.source), read(options.records)
    for model in options.model or MODELS:
        bench = make_bench(model, data)
        rigl = functools.cache(functools.partial(kinds.make_dynamic, bench))
        for cell in cells([model], whole=options.whole):
            if cell in done or any(getattr(cell, name) not in values for name, values in wanted.items()):
                continue
            started, schedule = time.monotonic(), choose(done, model)
            found = run(bench, rigl, cell, schedule)
            facts = environment()
            record = {**cell._asdict(), "schedule": schedule, **found, "seconds": round(time.monotonic() - started, 1)}
            record["environment"] = {name: facts[name] for name in store.FACTS}
            done[cell] = record
            store.append(options.records, record)
            print(time.strftime("%H:%M:%S"), *cell, record.get("after"), record["seconds"], flush=True)


if __name__ == "__main__":
    main()
