"""Diagnostics and other systems: certified accuracy, flow, fairness, MIMO, layers, ternary weights, and more.

    python -m experiments.studies.diagnostics                 # all cells that have no record yet
    python -m experiments.studies.diagnostics --model people --study fairness

A cell is one comparison with all its seeds. A finished cell is one line of experiments/records/diagnostics/MODEL.jsonl,
and a second start goes on with the cells that are missing. Cells of fairness need the solver z3, `pip install
'rigl_jax[verify]'`, and are left out with a word where there is none.

Fashion-MNIST is the four IDX files: `apt-get install dataset-fashion-mnist`, or `--source FOLDER`.
"""

from __future__ import annotations

import functools
import importlib.util
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from experiments.studies import cells as store
from experiments.studies import data_training as training
from experiments.studies import diagnostics_certified as certified
from experiments.studies import diagnostics_dead as dead
from experiments.studies import diagnostics_ensembles as ensembles
from experiments.studies import diagnostics_fairness as fairness
from experiments.studies import diagnostics_flow as flow
from experiments.studies import diagnostics_layers as layers
from experiments.studies import diagnostics_members as members
from experiments.studies import diagnostics_resolution as resolution
from experiments.studies import diagnostics_ternary as ternary
from experiments.studies.method_training import load
from experiments.studies.pruning_training import make_bench

RECORDS = store.FOLDER / "diagnostics"
DIGITS, PEOPLE, FASHION, LENET = "digits_mlp", "people", "fashion_mlp", ensembles.MODEL
CONVOLUTIONS = {"digits_conv": DIGITS, "fashion_conv": FASHION}
"""Convolutional networks, by the model whose data they have."""
MODELS = (PEOPLE, DIGITS, LENET, FASHION, *CONVOLUTIONS)
STUDIES = ("certified", "flow", "fairness", "layers", "static", "rigl", "ensembles", "ternary", "resolution", "dead")


class Cell(NamedTuple):
    """A record stands for it. `level` is a sparsity, a weight of NRS, a share of equal rows or small steps; or 0."""

    model: str
    study: str
    method: str
    level: float


def cells(models: Sequence[str] = MODELS) -> Iterator[Cell]:
    """Every cell, in the order in which they are run."""
    measured = [
        ("layers", "measured", 0.0),
        *(("static", name, level) for level in layers.SPARSITIES for name in layers.DISTRIBUTIONS),
    ]
    of_model = {
        PEOPLE: [("flow", "cut", 0.0), *(("fairness", "magnitude", level) for level in fairness.SPARSITIES)],
        DIGITS: [
            *(("certified", name, level) for name, method in certified.METHODS.items() for level in method.levels),
            *(("dead", name, 0.0) for name in dead.METHODS),
            ("ternary", "float", 0.0),
            *(("ternary", start, 0.0) for start in ternary.STARTS),
            *(("ensembles", "deep", level) for level in (0.0, members.SPARSITY)),
            *(("ensembles", "mimo", rho) for rho in members.RHO),
            *measured,
            *(("rigl", name, level) for level in layers.SPARSITIES for name in layers.DISTRIBUTIONS),
        ],
        LENET: [
            ("ensembles", "costs", 0.0),
            ("ensembles", "deep", 0.0),
            *(("ensembles", "mimo", rho) for rho in members.RHO),
        ],
        FASHION: measured,
        **{model: [("resolution", *way) for way in resolution.cells()] for model in CONVOLUTIONS},
    }
    return (Cell(model, *cell) for model in models for cell in of_model[model])


Run = Callable[[Cell], Mapping[str, Any]]


def runners(model: str, source: str) -> Mapping[str, Run]:
    """What runs a cell of each study; data are read, networks trained and programs compiled once."""
    if model == PEOPLE:
        return {"flow": lambda cell: flow.flow(), "fairness": lambda cell: fairness.fairness(cell.level)}
    if model in (DIGITS, FASHION):
        problem = training.digits() if model == DIGITS else training.fashion(source)
        bench, small, deep = certified.Bench(problem), ternary.small(problem), layers.Bench(layers.deep(problem))
        return {
            "certified": lambda cell: certified.run(bench, cell.method, cell.level),
            "ternary": lambda cell: (
                ternary.floats(small) if cell.method == "float" else ternary.sweeps(small, cell.method)
            ),
            "ensembles": lambda cell: (members.deep if cell.method == "deep" else members.mimo_networks)(
                problem, cell.level
            ),
            "layers": lambda cell: layers.measured(deep),
            "dead": lambda cell: dead.rounds(problem, cell.method),
            **{
                how: lambda cell, how=how: layers.sparse(deep, how, cell.method, cell.level)
                for how in ("static", "rigl")
            },
        }
    if model in CONVOLUTIONS:
        made = resolution.make_bench(training.digits() if CONVOLUTIONS[model] == DIGITS else training.fashion(source))
        return {
            "resolution": lambda cell: (
                resolution.seconds(made) if cell.method == "seconds" else resolution.run(made, cell.method, cell.level)
            )
        }
    lenet = make_bench(model, load(source))
    ways = {"costs": ensembles.costs, "deep": ensembles.deep}
    return {
        "ensembles": lambda cell: ways.get(
            cell.method, functools.partial(ensembles.mimo_networks, rho=cell.level)
        )(lenet)
    }  # fmt: skip


def read(folder: Path = RECORDS) -> dict[Cell, dict[str, Any]]:
    """All records of a folder, by cell."""
    return store.read(folder, Cell)


def main(argv: Sequence[str] | None = None) -> None:
    """Runs every cell that has no record."""
    parser = store.parser(__doc__, RECORDS, MODELS)
    parser.add_argument("--study", action="append", choices=STUDIES)
    options = parser.parse_args(argv)
    done = read(options.records)
    solver = importlib.util.find_spec("z3") is not None
    for model in options.model or MODELS:
        wanted = [c for c in cells([model]) if c not in done and (not options.study or c.study in options.study)]
        if not solver and any(cell.study == "fairness" for cell in wanted):
            print("fairness is left out: z3 is not installed, pip install 'rigl_jax[verify]'", flush=True)
            wanted = [cell for cell in wanted if cell.study != "fairness"]
        run = runners(model, options.source) if wanted else {}
        store.run(options.records, wanted, lambda cell, run=run: {"found": run[cell.study](cell)}, clock="seconds")


if __name__ == "__main__":
    main()
