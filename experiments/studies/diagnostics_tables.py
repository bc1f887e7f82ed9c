"""The tables of docs/diagnostics_results.md, from the records of `experiments.studies.diagnostics`."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from experiments import pages
from experiments.studies import diagnostics_certified as certified
from experiments.studies import diagnostics_dead as dead
from experiments.studies import diagnostics_ensembles as ensembles
from experiments.studies import diagnostics_fairness as fairness
from experiments.studies import diagnostics_flow as flow
from experiments.studies import diagnostics_layers as layers
from experiments.studies import diagnostics_members as members
from experiments.studies import diagnostics_resolution as resolution
from experiments.studies import diagnostics_ternary as ternary
from experiments.studies import pruning
from experiments.studies.claims import against, facts, percent
from experiments.studies.data_training import SEEDS
from experiments.studies.diagnostics import DIGITS, LENET, PEOPLE, Cell

Records = Mapping[Cell, Mapping[str, Any]]
CUT = Cell(PEOPLE, "flow", "cut", 0.0)
NOT_RUN = "Not run yet.\n"


def _table(head: Sequence[str], rows: Sequence[Sequence[str]], labels: int = 1) -> str:
    """A table without the rows that no cell was run for."""
    kept = [row for row in rows if any(row[labels:])]
    return pages.table(head, kept, left=[i < labels for i in range(len(head))]) if kept else NOT_RUN


def certified_fact(
    records: Records, name: str, level: float, fact: str, radius: float | None = None
) -> np.ndarray | None:
    """A fact of the networks of a method, float64[seeds]; None where they were not trained."""
    path = (fact,) if radius is None else ("radii", f"{radius:g}", fact)
    return facts(records, Cell(DIGITS, "certified", name, level), *path)


def certified_accuracy(records: Records) -> str:
    """Accuracy, certified at each radius, and how many ReLUs are unstable."""
    rows = []
    for name, method in certified.METHODS.items():
        for level in method.levels:
            shown = f"{level:g}" if method.nrs == "level" else f"{100 * level:g}"
            of = lambda fact, radius=None, name=name, level=level: certified_fact(records, name, level, fact, radius)  # noqa: E731
            at = [percent(of("certified", radius)) for radius in certified.RADII]
            more = [percent(of(fact, certified.EPS)) for fact in ("attacked", "unstable", "dead")]
            rows.append([method.label.format(shown), percent(of("test")), *at, *more])
    eps = f"{certified.EPS:g}"
    head = ["test accuracy, %", *(f"certified at {radius:g}, %" for radius in certified.RADII)]
    head += [f"attacked at {eps}, %", f"unstable ReLUs at {eps}, %", f"dead at {eps}, %"]
    return _table(["network", *head], rows)


def cut(records: Records) -> str:
    """Accuracy and bias after two weights are scaled, by how they are chosen."""
    of = lambda *path: facts(records, CUT, *path)  # noqa: E731
    whole = {fact: of("whole", fact) for fact in ("accuracy", "gap", "bits")}
    rows = [["none", "1", percent(whole["accuracy"]), "", percent(whole["gap"]), "", pages.spread(whole["bits"], 3)]]
    for name, label in flow.RULES.items():
        for factor in flow.FACTORS:
            accuracy, gap, bits = (of("ways", name, f"{factor:g}", fact) for fact in ("accuracy", "gap", "bits"))
            changes = against(accuracy, whole["accuracy"]), against(gap, whole["gap"])
            shown = percent(accuracy), changes[0], percent(gap), changes[1], pages.spread(bits, 3)
            rows.append([label, f"{factor:g}", *shown])
    head = ["accuracy, %", "change", "gap, points", "change", "bits on z"]
    return _table([f"the {flow.CUT} weights with the largest", "scaled by", *head], rows, 2)


def ranks(records: Records) -> str:
    """How far scores of single weights agree with what cutting the weight changes, in a sentence."""
    if CUT not in records:
        return ""
    found = {name: pages.spread(facts(records, CUT, "ranks", name), 2) for name in ("flow", "bias", "magnitude")}
    return f"""Cutting one weight at a time, the rank correlation of its score with how much the gap falls is
{found["flow"]} for the ratio of flows, {found["bias"]} for the flow of z alone, {found["magnitude"]} for the weight.
"""


def verdicts(records: Records) -> str:
    """Boxes by verdict, for each sparsity and number of parts."""
    rows = []
    for sparsity in fairness.SPARSITIES:
        cell = Cell(PEOPLE, "fairness", "magnitude", sparsity)
        for parts in fairness.PARTS:
            found = {
                name: facts(records, cell, "parts", str(parts), name)
                for name in (*fairness.VERDICTS, "settled", "seconds")
            }
            shown = [percent(found[name], 0) for name in (*fairness.VERDICTS, "settled")]
            label = "dense" if not sparsity else f"magnitude, {100 * sparsity:g} %"
            seconds = pages.spread(found["seconds"], 2)
            rows.append([label, str(parts**3), percent(facts(records, cell, "test")), *shown, seconds])
    head = ["boxes", "test accuracy, %", *(f"{name}, %" for name in fairness.VERDICTS)]
    return _table(["network", *head, "ReLUs that intervals settle, %", "seconds a box"], rows, 2)


def _of_pruning(method: str, sparsity: float, records: Mapping[pruning.Cell, Mapping[str, Any]]) -> np.ndarray | None:
    """Accuracy, NLL and ECE of cells of the pruning study, float64[seeds, 3]."""
    wanted = [pruning.Cell(LENET, "ensembles", method, sparsity, 0.0, seed) for seed in SEEDS]
    if any(cell not in records for cell in wanted):
        return None
    return np.array([records[cell]["after"]["test"] for cell in wanted])


class Ensemble(NamedTuple):
    """A row of a table of ensembles.

    Attributes:
      label: of the row.
      values: accuracy, NLL and ECE, float64[seeds, 3]; None where it was not run.
      cost: of an answer and of the training, one dense network = 1; None if it was not counted.
    """

    label: str
    values: np.ndarray | None
    cost: Mapping[str, float] | None


COUNT = members.MEMBERS
ONE = {"answer": 1.0, "training": 1.0}


def of_ensembles(records: Records, model: str) -> dict[str, Ensemble]:
    """All rows of a model by name."""
    return _of_digits(records) if model == DIGITS else _of_lenet(records)


def _of_lenet(records: Records) -> dict[str, Ensemble]:
    known, counted = pruning.read(), records.get(Cell(LENET, "ensembles", "costs", 0.0))
    cost = lambda name: None if counted is None else counted["found"][name]  # noqa: E731
    own = lambda method, level=0.0: facts(records, Cell(LENET, "ensembles", method, level), "test")  # noqa: E731
    found = {
        "dense": Ensemble("dense", _of_pruning("dense", 0.0, known), ONE),
        "deep": Ensemble(f"deep ensemble, {COUNT} dense", own("deep"), cost("deep")),
    }
    for rho in members.RHO:
        found[f"mimo_{rho:g}"] = Ensemble(f"MIMO, {COUNT} members, rho {rho:g}", own("mimo", rho), cost("mimo"))
    for sparsity in ensembles.SPARSITIES:
        for method, label in (("rigl", "RigL, one run"), ("edst", f"EDST, {COUNT} members")):
            name, values = f"{method}_{sparsity:g}", _of_pruning(method, sparsity, known)
            found[name] = Ensemble(f"{label}, {100 * sparsity:g} %", values, cost(name))
    return found


def _of_digits(records: Records) -> dict[str, Ensemble]:
    found = {}
    for name, label, sparsity in (
        ("", "dense", 0.0),
        ("rigl_", f"RigL, {100 * members.SPARSITY:g} %", members.SPARSITY),
    ):
        cell = Cell(DIGITS, "ensembles", "deep", sparsity)
        cost = records[cell]["found"]["cost"] if cell in records else None
        one = None if cost is None else {each: value / COUNT for each, value in cost.items()}
        single, joined = (facts(records, cell, part) for part in ("single", "test"))
        found["rigl" if sparsity else "dense"] = Ensemble(label, single, one)
        found[name + "deep"] = Ensemble(f"deep ensemble, {COUNT} of it", joined, cost)
    for rho in members.RHO:
        cell = Cell(DIGITS, "ensembles", "mimo", rho)
        cost = records[cell]["found"]["cost"] if cell in records else None
        found[f"mimo_{rho:g}"] = Ensemble(f"MIMO, {COUNT} members, rho {rho:g}", facts(records, cell, "test"), cost)
    return found


def ensembles_of_three(records: Records, model: str) -> str:
    """Accuracy, NLL, ECE, and what an answer and the training cost."""
    rows = []
    for label, values, cost in of_ensembles(records, model).values():
        if values is not None:
            spent = [f"{cost[each]:.2f}" if cost else "" for each in ONE]
            measured = percent(values[:, 0], 2), pages.spread(values[:, 1], 4), percent(values[:, 2], 2)
            rows.append([label, *measured, *spent])
    head = ["accuracy, %", "NLL", "ECE, %", "FLOPs of an answer", "FLOPs of training"]
    return _table(["", *head], rows)


def by_layer(records: Records, model: str) -> str:
    """What was measured of each layer of the dense networks."""
    cell = Cell(model, "layers", "measured", 0.0)
    if cell not in records:
        return NOT_RUN
    found, rows = records[cell]["found"], []
    for i, lost in enumerate(found["lost"]):
        together = [
            pages.spread(found["o_information"][when][i], 3) if i < len(found["o_information"][when]) else ""
            for when in ("start", "end")
        ]
        numbers = percent(np.array(found["ranks"][i])), pages.spread(found["noise"][i], 3)
        rows.append([str(i + 1), *numbers, percent(np.array(lost)), *together])
    head = ["rank of the gradients, % of the outputs", "noise tolerance", "accuracy lost, points"]
    return _table(["layer", *head, "O-information at the start, nats", "at the end"], rows)


def distributions(records: Records, model: str, how: str) -> str:
    """Test accuracy by distribution and sparsity, each against ERK."""
    rows = []
    for name, label in layers.DISTRIBUTIONS.items():
        row = [label]
        for sparsity in layers.SPARSITIES:
            ours, erk = (facts(records, Cell(model, how, each, sparsity), "test") for each in (name, "erk"))
            row += [percent(ours), "" if ours is None else against(ours, erk)]
        rows.append(row)
    head = [text for sparsity in layers.SPARSITIES for text in (f"{100 * sparsity:g} %", "against ERK")]
    return _table(["density of a layer in proportion to", *head], rows)


def ternary_fact(records: Records, name: str, *path: Any) -> np.ndarray | None:
    """A fact of ternary networks, float64[seeds]; None where they were not trained."""
    return facts(records, Cell(DIGITS, "ternary", name, 0.0), *path)


def ternary_weights(records: Records) -> str:
    """Loss, accuracies and zeros after each sweep."""
    places = [("float, by gradients", "float", ("float",)), ("the same, rounded", "float", ("rounded",))]
    starts = {"rounded": "rounded weights", "random": "random weights"}
    places += [
        (f"{label}, {n} sweep{'' if n == 1 else 's'}", start, ("sweeps", n))
        for start, label in starts.items()
        for n in range(start == "rounded", ternary.SWEEPS + 1)
    ]
    rows = []
    for label, name, path in places:
        loss, train, test, zeros = (
            ternary_fact(records, name, *path, fact) for fact in ("loss", "train", "test", "zeros")
        )
        rows.append([label, pages.spread(loss, 3), percent(train), percent(test), percent(zeros)])
    return _table(
        ["weights", "training loss", "training accuracy, %", "test accuracy, %", "weights that are 0, %"], rows
    )


def dead_fact(records: Records, name: str, fact: str, round_: int) -> np.ndarray | None:
    """A fact of the networks of a round, float64[seeds]; `rate` is the sum of both shares of dead units."""
    cell = Cell(DIGITS, "dead", name, 0.0)
    if fact == "rate":
        static, dynamic = (dead_fact(records, name, each, round_) for each in ("static", "dynamic"))
        return None if static is None or dynamic is None else static + dynamic
    return facts(records, cell, fact, round_)


def dead_units(records: Records) -> str:
    """Accuracy and dead units after some rounds of pruning."""
    rows = []
    for round_ in dead.SHOWN:
        for name, label in dead.METHODS.items():
            if round_ or name == "magnitude":
                test, static, dynamic, rate = (
                    dead_fact(records, name, fact, round_) for fact in ("test", "static", "dynamic", "rate")
                )
                against_base = "" if rate is None else against(rate, dead_fact(records, "magnitude", "rate", round_))
                at = f"{100 * dead.sparsity(round_):.0f} %"
                rows.append([at, label if round_ else "dense", *map(percent, (test, static, dynamic)), against_base])
    head = ["test accuracy, %", "dead on all images, %", "else dead on an image, %", "both, against magnitude"]
    return _table(["sparsity", "pruned by", *head], rows, labels=2)


def resolutions(records: Records, model: str) -> str:
    """Test accuracy by the steps that are small, and what training costs, whole steps alone = 1."""
    of = lambda way, share, fact: facts(records, Cell(model, "resolution", way, share), fact)  # noqa: E731
    timed = {way: of("seconds", 0.0, way) for way in ("random", "images")}
    rows = []
    for way, share in resolution.cells():
        if way == "seconds":
            continue
        test, small, cost = (of(way, share, fact) for fact in ("test", "small", "cost"))
        ratio, used = timed["images" if way == "images" else "random"], ""
        if way == "short" and cost is not None:
            used = f"{cost.mean():.2f}"
        elif ratio is not None and small is not None:
            used = f"{1 - small.mean() * (1 - np.median(ratio)):.2f}"
        shown = resolution.WAYS[way].format(f"{100 * share:g} %")
        difference = "" if test is None else against(test, of("whole", 0.0, "test"))
        rows.append([shown, percent(test), difference, "" if cost is None else f"{cost.mean():.2f}", used])
    head = ["small steps", "test accuracy, %", "against none", "FLOPs of training", "CPU seconds"]
    return _table(head, rows)
