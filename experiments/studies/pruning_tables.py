"""The tables of docs/pruning_results.md, from the records of `experiments.studies.pruning`."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from experiments import pages
from experiments.studies.pruning import BUDGETS, SPARSITIES, Cell
from experiments.studies.pruning_cells import BIMP_ROUNDS, CRITERIA, CYCLES, MEMBERS, ROUNDS
from experiments.studies.pruning_training import MODELS, REWIND_TO

TICKETS = {
    "rewind_0": "ticket, rewound to step 0",
    "rewind_k": f"ticket, rewound to step {REWIND_TO}",
    "learning_rate": "learning rate rewound",
    "reinit": "control: ticket's masks, new weights",
    "shuffled": "control: masks shuffled in each layer",
    "random": "control: masks shuffled over all layers",
}
RETRAINING = {
    "finetune": "FT",
    "rewind": "LRW",
    "slr": "SLR",
    "clr": "CLR",
    "llr": "LLR",
    "allr": "ALLR",
    "bimp": f"BIMP, {BIMP_ROUNDS} rounds",
}
ENSEMBLES = {
    "dense": "dense",
    "rigl": "RigL, one run",
    "edst": f"EDST, {MEMBERS} members",
    "sup_tickets": f"Sup-Tickets, CAA of {CYCLES}",
    "equal_flops": "dense, FLOPs of RigL",
}


class Place(NamedTuple):
    """What the seeds of a comparison have in common. Each level of a ticket, and each control, is a place."""

    model: str
    study: str
    method: str
    sparsity: float
    epochs: float


Runs = Mapping[Place, Sequence[Mapping[str, Any]]]
Fact = Callable[[Mapping[str, Any]], float]


def gather(records: Mapping[Cell, Mapping[str, Any]]) -> Runs:
    """The runs of seeds 0, 1, ..., by place; a place that lacks a planned seed is left out."""
    found: dict[Place, list[Mapping[str, Any]]] = {}
    for cell, record in sorted(records.items(), key=lambda item: item[0].seed):
        place = Place(*cell[:-1])
        parts = {place: record}
        if "levels" in record:
            parts = {
                place._replace(method=place.method if name == "ticket" else name, sparsity=level["sparsity"]): {
                    "after": level[name]
                }
                for level in record["levels"]
                for name in level.keys() - {"sparsity"}
            }
        for part, facts in parts.items():
            if len(runs := found.setdefault(part, [])) == cell.seed:  # after a gap, seeds are no pairs any more
                runs.append(facts)
    return {place: runs for place, runs in found.items() if len(runs) >= MODELS[place.model]["seeds"]}


def fact(when: str, which: int, split: str = "test") -> Fact:
    """Reads a measure of a run: accuracy in percent (0), cross-entropy (1), ECE in percent (2)."""
    return lambda run: run[when][split][which] * (1 if which == 1 else 100)


ACCURACY, LOSS, ECE = fact("after", 0), fact("after", 1), fact("after", 2)


def values(runs: Runs, place: Place, read_fact: Fact) -> np.ndarray | None:
    """A measure of each seed, float64[seeds]; None where the place was not run."""
    return np.array([read_fact(run) for run in runs[place]]) if place in runs else None


def grid(
    runs: Runs, labels: Mapping[str, str], columns: Mapping[str, tuple[str, float, float]], model: str, read_fact: Fact,
    digits: int = 2,
) -> str:  # fmt: skip
    """A table of methods by columns `{title: (study, sparsity, epochs)}`, without empty rows and columns."""
    texts = {
        name: [
            pages.spread(values(runs, Place(model, c[0], name, *c[1:]), read_fact), digits) for c in columns.values()
        ]
        for name in labels
    }
    kept = [i for i in range(len(columns)) if any(row[i] for row in texts.values())]
    rows = [[labels[name], *(row[i] for i in kept)] for name, row in texts.items() if any(row)]
    return pages.table(["", *(list(columns)[i] for i in kept)], rows) if rows else "Not run yet.\n"


def percent(sparsity: float) -> str:
    """A sparsity as text."""
    return f"{100 * sparsity:.4g} %"


def label(name: str) -> str:
    """A row of the table of criteria."""
    if name == "iterative":
        return f"Magnitude in {ROUNDS} rounds, global"
    return f"{CRITERIA[name].label}, {CRITERIA[name].scope}"


def criteria(runs: Runs, model: str) -> str:
    """Before and after fine-tuning."""
    columns = {percent(s): ("criteria", s, BUDGETS[1]) for s in SPARSITIES}
    once = {name: label(name) for name in CRITERIA}
    tables = [
        ("Cross-entropy before fine-tuning:", grid(runs, once, columns, model, fact("before", 1), 3)),
        ("Accuracy before fine-tuning, percent:", grid(runs, once, columns, model, fact("before", 0))),
        (
            "Accuracy after fine-tuning, percent:",
            grid(runs, once | {"iterative": label("iterative")}, columns, model, ACCURACY),
        ),
    ]
    return "\n".join(f"{title}\n\n{table}" for title, table in tables)


def levels(runs: Runs, model: str) -> list[float]:
    """The sparsities of the lottery ticket."""
    return sorted({place.sparsity for place in runs if (place.model, place.study) == (model, "lottery")})


def lottery(runs: Runs, model: str) -> str:
    """Tickets and controls."""
    columns = {percent(s): ("lottery", s, 0.0) for s in levels(runs, model)}
    return grid(runs, TICKETS, columns, model, ACCURACY)


def retraining(runs: Runs, model: str) -> str:
    """Schedules by sparsity and budget."""
    columns = {f"{percent(s)}, {e:g} epochs": ("retraining", s, e) for s in (0.95, 0.98) for e in BUDGETS}
    return grid(runs, RETRAINING, columns, model, ACCURACY)


def ensembles(runs: Runs, model: str) -> str:
    """Accuracy, NLL and ECE."""
    rows = []
    for sparsity in (0.0, 0.9, 0.95):
        for name, text in ENSEMBLES.items():
            place = Place(model, "ensembles", name, sparsity, 0.0)
            if place in runs:
                measures = (pages.spread(values(runs, place, f), d) for f, d in ((ACCURACY, 2), (LOSS, 4), (ECE, 2)))
                rows.append([text, percent(sparsity), *measures])
                rows += _inside(runs, place)
    head = ["", "sparsity", "accuracy, %", "NLL", "ECE, %"]
    return pages.table(head, rows) if rows else "Not run yet.\n"


def _inside(runs: Runs, place: Place) -> list[list[str]]:
    """The members of an ensemble, and the networks that Sup-Tickets could have ended with."""
    parts: dict[str, Callable[[Any], Any]] = {}
    if "members" in runs[place][0]:
        parts["EDST, its members"] = lambda run: np.mean([member["test"] for member in run["members"]], axis=0)
    if "cima" in runs[place][0]:
        parts = {
            f"Sup-Tickets, CIMA of {CYCLES}": lambda run: run["cima"]["test"],
            "Sup-Tickets, its last cycle alone": lambda run: run["last_cycle"]["test"],
        }
    rows = []
    for text, part in parts.items():
        found = np.array([part(run) for run in runs[place]]) * (100, 1, 100)
        rows.append(
            [text, percent(place.sparsity), *(pages.spread(found[:, i], d) for i, d in ((0, 2), (1, 4), (2, 2)))]
        )
    return rows
