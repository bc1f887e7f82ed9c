"""Static masks, SET and RigL where sparsity is hard, each tuned, then trained 1, 2 and 5 times as long; resumable.

    python -m experiments.studies.tuning                    # all cells that have no record yet
    python -m experiments.studies.tuning --model lenet5 --method rigl

Networks, data and optimizer are those of `experiments.studies.method_table`. Every method has the same budget: six
settings, each run once with a seed of its own, and the best on the validation images is run with the seeds of the
model. Settings are tuned for the shortest training and kept for the longer ones. A cell is a method, a sparsity and a
length. A finished cell is one line of experiments/records/tuning/MODEL.jsonl.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from experiments.studies import cells as store
from experiments.studies.method_table import MODELS as NETWORKS
from experiments.studies.method_table import Cell, prepare
from experiments.studies.method_training import Data, load, measure, tune

RECORDS = store.FOLDER / "tuning"
TUNING_SEED = 10
METHODS = ("static", "set", "rigl")
MULTIPLIERS = (1, 2, 5)
MODELS: Mapping[str, Mapping[str, Any]] = {
    "lenet5": {"steps": 2000, "sparsities": (0.98,)},
    "lenet_300_100": {"steps": 1950, "sparsities": (0.98, 0.99)},
}
"""`steps` of the shortest training."""
RATES, PAIRS = (0.5, 1.0, 2.0), ((100, 0.3), (50, 0.5))
"""Tried for SET and RigL: multiples of the model's rate, each with both (period, fraction)."""
ALL_RATES = (0.25, 0.5, 0.75, 1.0, 1.5, 2.0)
"""Tried for static masks."""


def cells(models: Sequence[str] = tuple(MODELS), methods: Sequence[str] = METHODS) -> Iterator[Cell]:
    """Every cell; the shortest training of a method first."""
    for model in models:
        for multiplier, sparsity, method in itertools.product(MULTIPLIERS, MODELS[model]["sparsities"], methods):
            yield Cell(model, method, sparsity, multiplier)


def choices(model: str, method: str) -> list[dict[str, Any]]:
    """The six settings that are tried."""
    rate = NETWORKS[model]["rate"]
    if method == "static":
        return [{"rate": rate * k} for k in ALL_RATES]
    return [{"rate": rate * k, "period": period, "fraction": fraction} for k in RATES for period, fraction in PAIRS]


def tuned(cell: Cell, data: Data, steps: int) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """The setting that is best on the validation images, and all that were tried with their accuracy there."""
    make = lambda choice: prepare(cell, steps, **choice)[0]  # noqa: E731
    return tune(choices(cell.model, cell.method), make, data, (TUNING_SEED,))[1:]


def run_cell(cell: Cell, data: Data, done: Mapping[Cell, Mapping[str, Any]], steps: int) -> dict[str, Any]:
    """Facts of a cell; a longer training takes the setting of the shortest, whose record is in `done`."""
    shortest = done.get(cell._replace(multiplier=1))
    chosen, tried = tuned(cell, data, steps) if shortest is None else (shortest["chosen"], shortest["tried"])
    run, settings = prepare(cell, steps, **chosen)
    runs = [measure(run, data, seed) for seed in NETWORKS[cell.model]["seeds"]]
    test = round(float(np.mean([found["test"] for found in runs])), 4)
    return {"settings": settings, "chosen": chosen, "tried": tried, "test": test, "runs": runs}


def read(folder: Path = RECORDS) -> dict[Cell, dict[str, Any]]:
    """All records of a folder, by cell."""
    return store.read(folder, Cell)


def main(argv: Sequence[str] | None = None) -> None:
    """Runs every cell that has no record."""
    parser = store.parser(__doc__, RECORDS, MODELS)
    parser.add_argument("--method", action="append", choices=METHODS)
    options = parser.parse_args(argv)
    data = load(options.source)

    def find(cell: Cell) -> dict[str, Any]:
        return run_cell(cell, data, read(options.records), MODELS[cell.model]["steps"])

    done = read(options.records)
    wanted = [c for c in cells(options.model or tuple(MODELS), options.method or METHODS) if c not in done]
    store.run(options.records, wanted, find, clock="cpu_seconds", tell="test")


if __name__ == "__main__":
    main()
