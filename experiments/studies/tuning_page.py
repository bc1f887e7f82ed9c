"""docs/tuned_results.md, from the records of `experiments.studies.tuning`.

python -m experiments.studies.tuning_page            # writes the page
python -m experiments.studies.tuning_page --check    # fails if the page is out of date
"""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from experiments import pages
from experiments.studies.claims import Claim, outcome
from experiments.studies.method_page import LABELS, TITLES, against, percents, setting, tests
from experiments.studies.method_table import MODELS as NETWORKS
from experiments.studies.method_table import Cell
from experiments.studies.tuning import ALL_RATES, METHODS, MODELS, MULTIPLIERS, PAIRS, RATES, cells, choices, read

PAGE = Path(__file__).parents[2] / "docs" / "tuned_results.md"
CHANCE = 15.0
"""Percent; guessing among ten classes gives 10."""
Records = Mapping[Cell, Mapping[str, Any]]


def _facts(record: Mapping[str, Any]) -> list[str]:
    """Share of weights ever active, survival of grown weights, units without input or unread."""
    runs = record["runs"]
    kept = [run["survival"] for run in runs if run["survival"] is not None]
    cut = statistics.mean(sum(run["without_input"].values()) + sum(run["unused_inputs"].values()) for run in runs)
    explored = 100 * statistics.mean(run["explored"] for run in runs)
    return [f"{explored:.1f} %", f"{100 * statistics.mean(kept):.0f} %" if kept else "", f"{cut:.0f}"]


def lengths(records: Records, model: str, sparsity: float) -> str:
    """All methods at all lengths of the training."""
    rows = []
    for multiplier in MULTIPLIERS:
        for method in METHODS:
            cell = Cell(model, method, sparsity, multiplier)
            if cell in records:
                record = records[cell]
                row = [LABELS[method], str(multiplier), pages.spread(percents(record))]
                rivals = [against(records, cell, cell._replace(method=rival)) for rival in ("static", "set")]
                rows.append([*row, *rivals, *_facts(record)])
    head = ["", "M", "accuracy", "against static", "against SET", "ever active", "grown kept", "units cut off"]
    return pages.table(head, rows) if rows else "Not run yet.\n"


def settings(records: Records, model: str, sparsity: float) -> str:
    """What was tried, and what was chosen."""
    rows = []
    for method in METHODS:
        record = records.get(Cell(model, method, sparsity))
        if record is not None:
            found = sorted(100 * entry["validation"] for entry in record["tried"])
            row = [LABELS[method], setting(record["chosen"]), f"{found[-1]:.2f}", f"{found[0]:.2f}"]
            rows.append(row)
    head = ["", "chosen", "validation accuracy", "of the worst setting"]
    return pages.table(head, rows, left=[True, True, False, False]) if rows else ""


def _edges(records: Records) -> str:
    """How often the best rate lies on the edge of what was tried."""
    shortest = [(cell, record) for cell, record in records.items() if cell.multiplier == 1]
    largest = [r for c, r in shortest if r["chosen"]["rate"] == max(o["rate"] for o in choices(c.model, c.method))]
    return f"""
The chosen rate is the largest that was tried in {len(largest)} of {len(shortest)} cases: there a wider search may find
better.
""" if shortest else ""  # fmt: skip


def _lost(records: Records) -> str:
    """Runs that learned nothing, which a mean hides."""
    lines = []
    for cell, record in records.items():
        found = percents(record)
        others, where = found[found >= CHANCE], TITLES[cell.model].split(" ")[0]
        if 0 < len(others) < len(found):
            told = f"{LABELS[cell.method]}, {where}, {100 * cell.sparsity:.0f} %, M = {cell.multiplier}"
            lost = f"{len(found) - len(others)} of {len(found)} seeds; the others reach {others.mean():.2f} %"
            lines.append(f"* {told}: {lost}.\n")
    return f"\nRuns that ended at chance, and are in the means below:\n\n{''.join(lines)}" if lines else ""


def outcomes(records: Records) -> str:
    """Where a method is better than another."""
    rows = []
    for cell in cells(methods=("rigl",)):
        static, set_, rigl = (tests(records, cell._replace(method=method)) for method in METHODS)
        claims = [Claim("", ours, theirs) for ours, theirs in ((rigl, static), (rigl, set_), (set_, static))]
        name = f"{TITLES[cell.model].split(' ')[0]}, {100 * cell.sparsity:.0f} %, M = {cell.multiplier}"
        rows.append([name, *map(outcome, claims)])
    head = ["better?", "RigL than static", "RigL than SET", "SET than static"]
    return pages.table(head, rows, left=[True] * 4)


def section(records: Records, model: str) -> str:
    """The section of one network."""
    spec, network = MODELS[model], NETWORKS[model]
    epochs = spec["steps"] * network["batch"] / 50_000
    text = (
        f"## {TITLES[model]}\n\nM = 1 is {spec['steps']:,} steps of {network['batch']} images ({epochs:.1f} epochs); "
    )
    text += f"{len(network['seeds'])} seeds.\n"
    for sparsity in spec["sparsities"]:
        told = settings(records, model, sparsity)
        text += f"\n### {100 * sparsity:.0f} % sparse\n\n{lengths(records, model, sparsity)}"
        text += f"\n{told}" if told else ""
    return text + "\n"


def page(records: Records) -> str:
    """docs/tuned_results.md."""
    wanted = list(cells())
    rates, pairs = (", ".join(f"{k:g}" for k in some) for some in (RATES, ALL_RATES))
    tried = " or ".join(f"every {period} steps and a fraction of {fraction:g}" for period, fraction in PAIRS)
    return f"""# Tuned methods, and longer training

Generated by `python -m experiments.studies.tuning_page` from
[experiments/records/tuning](../experiments/records/tuning). {sum(cell in records for cell in wanted)} of the
{len(wanted)} cells have been run; `python -m experiments.studies.tuning` runs the others.

Static masks, SET and RigL on Fashion-MNIST, ERK, where so few weights are left that methods differ. Networks, data and
optimizer are those of [results.md](results.md). Every method has the same budget of tuning: six settings, one run each
with a seed that is not used again, and the best on the 10,000 validation images is kept. SET and RigL try
{rates} times the network's rate, each with masks that change
{tried};
static masks try {pairs} times the rate. M = 2 and M = 5 keep the setting and train so
many times as long; the decay of the rate and that of the fraction are stretched, the period is not. Masks change until
3/4 of the training.

Test accuracy in percent, mean and standard deviation over seeds; differences in points of the same M, with the p-value
of a paired t-test over seeds, bold below 0.05. "Ever active" is a share of the weights of the sparse layers; "grown
kept" the share of grown weights that the next rewiring left; "units cut off" are units without input, and units
that nothing reads, one that is both twice.
{_edges(records)}{_lost(records)}
{outcomes(records)}
{REASONS}
{"".join(section(records, model) for model in MODELS)}"""


REASONS = """What goes with it, in the columns to the right. At 98 % RigL tries fewer weights than SET and keeps a
larger part of those that it grows. So it is ahead where layers are small and the training is short (LeNet-5), and the
longer the training, the less is left of that. RigL gathers its weights on fewer units and gives up the others. At the
largest rate single runs of it are lost; no run of SET or with static masks is.
"""


def main(argv: Sequence[str] | None = None) -> int:
    """Writes the page, or checks it; returns the exit code."""
    return pages.main("experiments.studies.tuning_page", __doc__, lambda: {PAGE: page(read())}, arguments=argv)


if __name__ == "__main__":
    raise SystemExit(main())
