"""Scores and selectors of examples on digits and Fashion-MNIST; one process, resumable.

    python -m experiments.studies.data                       # all cells that have no record yet
    python -m experiments.studies.data --model fashion_mlp --study dynamic

A cell is one comparison with all its seeds, which train at once. A finished cell is one line of
experiments/records/data/MODEL.jsonl, and a second start goes on with the cells that are missing.

Fashion-MNIST is its first 10,000 training images and all test images, from the four IDX files: `apt-get install
dataset-fashion-mnist`, or `--source FOLDER`.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from experiments.studies import cells as store
from experiments.studies import data_dynamic as dynamic
from experiments.studies import data_labels as labels
from experiments.studies import data_noise as noise
from experiments.studies import data_pairs as pairs
from experiments.studies import data_training as training
from experiments.studies.data_sampling import sampling

RECORDS = store.FOLDER / "data"
MODELS = ("digits_mlp", "fashion_mlp")
NOISE = (0.1, 0.2)
STUDIES = ("noise", "coresets", "dynamic", "active", "imbalanced", "self_training", "sampling", "pairs")


class Cell(NamedTuple):
    """What one record stands for. `level`: the share of wrong labels or of kept examples, or how many teachers."""

    model: str
    study: str
    method: str
    level: float


def cells(models: Sequence[str] = MODELS) -> Iterator[Cell]:
    """Every cell, in the order in which they are run."""
    for model in models:
        yield from (Cell(model, "noise", "scores", level) for level in NOISE)
        yield Cell(model, "pairs", "confident", pairs.SHARE)
        if model == "digits_mlp":
            yield from (Cell(model, "active", name, 0) for name in labels.SELECTORS)
            yield from (Cell(model, "imbalanced", name, 0) for name in labels.IMBALANCED)
            yield from (
                Cell(model, "self_training", start, teachers) for start in labels.STARTS for teachers in labels.TEACHERS
            )
        else:
            yield from (Cell(model, "coresets", name, 0.1) for name in noise.KEPT)
            yield Cell(model, "dynamic", dynamic.FULL, 1)
            for keep in dynamic.KEEP:
                yield Cell(model, "dynamic", dynamic.FULL, keep)
                yield from (Cell(model, "dynamic", name, keep) for name in dynamic.WAYS)
            yield Cell(model, "sampling", "adaptive_bins", 0)


Run = Callable[[Cell], Mapping[str, Any]]


def runners(model: str, source: str) -> Mapping[str, Run]:
    """What runs a cell of each study; data are read and programs compiled once."""
    problem = training.digits() if model == "digits_mlp" else training.fashion(source)
    dense = training.make_trainer(problem, problem.steps)
    bench = functools.cache(lambda: dynamic.make_bench(problem))
    parts = functools.cache(lambda share: noise.coresets(problem, dense, share))
    pools = labels.pools(problem) if model == "digits_mlp" else {}

    def dynamically(cell: Cell) -> Mapping[str, Any]:
        if cell.method == dynamic.FULL:
            return dynamic.full(bench(), cell.level)
        return dynamic.pruned(bench(), cell.method, cell.level)

    return {
        "noise": lambda cell: noise.scores(problem, dense, cell.level),
        "coresets": lambda cell: parts(cell.level)[cell.method](),
        "dynamic": dynamically,
        "active": lambda cell: labels.active(problem, pools["active"], cell.method),
        "imbalanced": lambda cell: labels.active(problem, pools["imbalanced"], cell.method),
        "self_training": lambda cell: labels.self_trained(problem, cell.method, int(cell.level)),
        "sampling": lambda cell: sampling(problem, dense),
        "pairs": lambda cell: pairs.pairs(problem),
    }


def read(folder: Path = RECORDS) -> dict[Cell, dict[str, Any]]:
    """All records of a folder, by cell."""
    return store.read(folder, Cell)


def main(argv: Sequence[str] | None = None) -> None:
    """Runs every cell that has no record."""
    parser = store.parser(__doc__, RECORDS, MODELS)
    parser.add_argument("--study", action="append", choices=STUDIES)
    options = parser.parse_args(argv)
    done = read(options.records)
    for model in options.model or MODELS:
        wanted = [c for c in cells([model]) if c not in done and (not options.study or c.study in options.study)]
        run = runners(model, options.source) if wanted else {}
        store.run(options.records, wanted, lambda cell, run=run: {"found": run[cell.study](cell)}, clock="seconds")


if __name__ == "__main__":
    main()
