"""docs/mnist1d_results.md, from the records of `experiments.studies.mnist1d`.

python -m experiments.studies.mnist1d_page            # writes the page
python -m experiments.studies.mnist1d_page --check    # fails if the page is out of date
"""

from __future__ import annotations

import argparse
import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from experiments import pages
from experiments.studies.method_page import CLAIMED, LABELS, against, percents, setting
from experiments.studies.mnist1d import ABLATIONS, METHODS, SPARSITIES, TICKETS, Cell, cells, read

PAGE = Path(__file__).parents[2] / "docs" / "mnist1d_results.md"
TICKET_LABELS = {
    "static": "random masks, static",
    "ticket": "ticket, static",
    "rigl": "random masks, RigL",
    "ticket_rigl": "ticket, RigL",
}
Records = Mapping[Cell, Mapping[str, Any]]


def _accuracy(records: Records, cell: Cell) -> str:
    return pages.spread(percents(records[cell]), 1) if cell in records else ""


def _facts(record: Mapping[str, Any]) -> list[str]:
    """Share of the weights that were ever active, survival of grown weights, hidden units without input or unread."""
    runs = record["runs"]
    if "explored" not in runs[0]:
        return ["", "", ""]
    kept = [run["survival"] for run in runs if run["survival"] is not None]
    cut = statistics.mean(run["without_input"]["Dense_0/kernel"] + run["without_input"]["Dense_1/kernel"]
                          + run["unused_inputs"]["Dense_1/kernel"] + run["unused_inputs"]["Dense_2/kernel"]
                          for run in runs)  # fmt: skip
    survival = f"{100 * statistics.mean(kept):.0f} %" if kept else ""
    return [f"{100 * statistics.mean(run['explored'] for run in runs):.1f} %", survival, f"{cut:.1f}"]


def methods(records: Records, sparsity: float) -> str:
    """All methods at one sparsity."""
    rows = []
    for method in METHODS:
        cell = Cell("table", method, 0.0 if method == "dense" else sparsity)
        if cell in records:
            rivals = [against(records, cell, Cell("table", rival, sparsity)) for rival in ("static", "set")]
            facts = _facts(records[cell])
            row = [LABELS[method], _accuracy(records, cell), *rivals, setting(records[cell]["settings"]), *facts]
            rows.append(row)
    if len(rows) < 2:
        return ""
    head = ["", "accuracy", "against static", "against SET", "chosen", "ever active", "grown kept", "units cut off"]
    return f"### {100 * sparsity:.0f} % sparse\n\n{pages.table(head, rows)}\n"


def longer(records: Records) -> str:
    """Longer training; the empty text where it was not run."""
    rows = []
    for sparsity in SPARSITIES[:2]:
        for method in ("static", "set", "rigl"):
            found = [_accuracy(records, Cell("table", method, sparsity, k)) for k in (1, 2, 5)]
            rows.append([LABELS[method], f"{100 * sparsity:.0f} %", *found])
    rows = [row for row in rows if any(row[3:])]
    return pages.table(["", "sparsity", "M = 1", "M = 2", "M = 5"], rows) if rows else "Not run yet.\n"


def ablations(records: Records) -> str:
    """What changes when one thing of RigL is changed."""
    base = Cell("ablations", next(iter(ABLATIONS)), 0.95)
    rows = []
    for name in ABLATIONS:
        cell = Cell("ablations", name, 0.95)
        if cell in records:
            rows.append([name, _accuracy(records, cell), against(records, cell, base), *_facts(records[cell])])
    head = ["RigL, 95 % sparse", "accuracy", "difference to the first", "ever active", "grown kept", "units cut off"]
    return pages.table(head, rows) if rows else "Not run yet.\n"


def tickets(records: Records) -> str:
    """Lottery tickets, as in Table 3 of the RigL paper."""
    rows = []
    for sparsity in SPARSITIES[:2]:
        for name in TICKETS:
            cell = Cell("tickets", name, sparsity)
            if cell in records:
                rivals = [against(records, cell, Cell("tickets", rival, sparsity)) for rival in ("static", "rigl")]
                rows.append([TICKET_LABELS[name], f"{100 * sparsity:.0f} %", _accuracy(records, cell), *rivals])
    head = ["masks, training", "sparsity", "accuracy", "against random, static", "against random, RigL"]
    return pages.table(head, rows, left=[True, False, False, False, False]) if rows else "Not run yet.\n"


def verdicts(records: Records) -> str:
    """What the tables say about the paper's claims, from the same tests."""
    lines = []
    for rival, label in CLAIMED.items():
        for sparsity in SPARSITIES:
            ours, theirs = (Cell("table", method, sparsity) for method in ("rigl", rival))
            if ours in records and theirs in records:
                found = against(records, ours, theirs)
                lines.append(f"* RigL against {label} at {100 * sparsity:.0f} %: {found}.\n")
    return "".join(lines) or "Not run yet.\n"


def page(records: Records) -> str:
    """docs/mnist1d_results.md."""
    wanted = list(cells())
    dense = records.get(Cell("table", "dense", 0.0))
    told = "not run yet" if dense is None else f"{pages.spread(percents(dense), 1)} % here"
    return f"""# Results on MNIST-1D

Generated by `python -m experiments.studies.mnist1d_page` from
[experiments/records/mnist1d](../experiments/records/mnist1d). {sum(cell in records for cell in wanted)} of the
{len(wanted)} cells have been run; `python -m experiments.studies.mnist1d` runs the others. No data are needed: the
set is generated. To make one row again, beside the committed records:

    python -m experiments.studies.mnist1d --part table --method rigl --sparsity 0.98 --records again

{SETTING}
The dense network: {told}; the [paper of MNIST-1D](https://arxiv.org/abs/2011.14439) has 68 % for a
network of this kind, trained for 6,000 steps on all 4,000 signals; here 1,000 of them are for validation.

## Methods

Test accuracy in percent, mean and standard deviation over 5 seeds. Differences are in points, with the p-value of a
paired t-test over seeds, bold below 0.05; with so many tests some are below 0.05 by chance. "Ever active" is a share of
all weights; "grown kept" the share of grown weights that the next rewiring left; "units cut off" counts
hidden units that have no input or that nothing reads, one that is both twice. Masks of SNIP, GMP and GraNet begin with
more weights than they end with.

RigL, the difference in points:

{verdicts(records)}
What goes with these differences is in the columns to the right: the share of grown weights that the next rewiring
kept, how many weights were tried at all, and how many units were given up, so that the others have more inputs each.

{"".join(methods(records, sparsity) for sparsity in SPARSITIES)}## Longer training

{longer(records)}
## Ablations

RigL without tuning, one thing changed at a time. Erdos-Renyi (ER) and ERK are the same for this network.

{ablations(records)}
## Lottery tickets

The masks of the largest weights of the dense network after its training, and the weights of its start (one shot), not
tuned. The paper of RigL (Table 3) finds that random masks with RigL do better than a ticket with static masks.

{tickets(records)}
"""


SETTING = """The network has two hidden layers of 100 units and 15,000 weights, which all can be pruned; ERK at the
start. It is trained on 3,000 signals with SGD (momentum 0.9, Nesterov, weight decay 5e-4 on kernels), batches of 128, a
rate that falls by a cosine, 65 epochs (1,495 steps). 1,000 signals are for validation and the 1,000
of the test part are looked at once. Masks change until 3/4 of the training.

Every method has the same budget of tuning: four settings, two seeds each, and the best mean on the validation part
is run with five other seeds. Methods that rewire at intervals try rates 0.05 and 0.2 with (every 50 steps, fraction
0.3) and (every 200, 0.5); the others rates 0.03, 0.05, 0.1, 0.2. What is not tuned has rate 0.2, every 50 steps,
fraction 0.3. So small a budget can miss a method's best
setting: where "chosen" has the largest rate that was tried, a larger one may be better.
"""


def main(argv: Sequence[str] | None = None) -> int:
    """Writes the page, or checks it; returns the exit code."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--check", action="store_true", help="change nothing, fail if the page is out of date")
    return pages.update({PAGE: page(read())}, check=parser.parse_args(argv).check, command="make figures")


if __name__ == "__main__":
    raise SystemExit(main())
