"""docs/results.md and its figures, from the records of `experiments.studies.method_table`.

python -m experiments.studies.method_page            # writes the page and draws the figures
python -m experiments.studies.method_page --check    # fails if the page is out of date
"""

from __future__ import annotations

import argparse
import statistics
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from scipy import stats

from experiments import pages
from experiments.report import drawing
from experiments.studies.method_table import MODELS, Cell, cells, read
from rigl_jax.algorithms.registry import METHODS as REGISTRY

ROOT = Path(__file__).parents[2]
PAGE = ROOT / "docs" / "results.md"
SPARSITIES = (0.8, 0.9, 0.95, 0.98, 0.99)
TITLES = {
    "lenet_300_100": "LeNet-300-100 (266,200 weights)",
    "lenet5": "LeNet-5 (44,190 weights)",
    "wrn10_1": "WRN-10-1 (77,056 weights)",
}
LABELS = {"dense": "Dense", "small_dense": "Small dense"} | {name: entry.label for name, entry in REGISTRY.items()}
LOOKS: Mapping[str, tuple[str, str, str]] = {
    "static": ("#56B4E9", "v", "-"),
    "snip": ("#009E73", "<", ":"),
    "small_dense": ("#333333", "s", "--"),
    "set": ("#E69F00", "^", "-"),
    "dsr": ("#CC79A7", "P", "-"),
    "deep_r": ("#D55E00", "X", "-"),
    "snfs": ("#009E73", "D", "-"),
    "rigl": ("#0072B2", "o", "-"),
    "srigl": ("#0072B2", "*", ":"),
    "granet": ("#CC79A7", "h", "--"),
    "gmp": ("#D55E00", "d", "-."),
}
"""Colour, marker and line of the methods, in the order of tables and legends."""
CLAIMED = {"static": "static masks", "snip": "SNIP", "small_dense": "small dense networks", "set": "SET"}
"""What the paper finds RigL to be better than at the same sparsity, on ResNet-50."""
LEVEL = 0.05

Records = Mapping[Cell, Mapping[str, Any]]


def percents(record: Mapping[str, Any]) -> np.ndarray:
    """Test accuracy of each seed in percent, float64[seeds]."""
    return 100 * np.array([run["test"] for run in record["runs"]])


def tests(records: Mapping[Any, Mapping[str, Any]], cell: Any) -> np.ndarray | None:
    """The same for a cell; None where it was not run."""
    return percents(records[cell]) if cell in records else None


def paired(ours: np.ndarray | None, theirs: np.ndarray | None) -> tuple[float, float] | None:
    """Mean difference and the p-value of a paired t-test over seeds; None where either was not run."""
    if ours is None or theirs is None:
        return None
    return float(np.mean(ours - theirs)), float(stats.ttest_rel(ours, theirs).pvalue)


def verdict(found: tuple[float, float] | None, digits: int = 2) -> str:
    """A difference with its p-value, in bold if it is significant at 5 %."""
    if found is None:
        return ""
    difference, p = found
    text = f"{difference:+.{digits}f}, p {p:.3f}" if p >= 0.001 else f"{difference:+.{digits}f}, p < 0.001"
    return f"**{text}**" if p < LEVEL else text


def against(records: Mapping[Any, Mapping[str, Any]], ours: Any, theirs: Any) -> str:
    """The verdict on two cells; empty for a cell against itself, and where one was not run."""
    return "" if ours == theirs else verdict(paired(tests(records, ours), tests(records, theirs)))


def setting(chosen: Mapping[str, Any]) -> str:
    """The values of what is tuned."""
    names = {"rate": "rate", "period": "every", "fraction": "fraction"}
    return ", ".join(f"{text} {chosen[name]:g}" for name, text in names.items() if name in chosen)


def _mean(record: Mapping[str, Any], fact: str) -> float:
    return statistics.mean(run[fact] for run in record["runs"])


def _by_sparsity(model: str, methods: Iterable[str], text: Callable[[Cell], str]) -> str:
    rows = [[LABELS[m], *(text(Cell(model, m, s)) for s in SPARSITIES)] for m in methods]
    filled = [row for row in rows if any(row[1:])]
    return pages.table(["", *(f"{100 * s:.0f} %" for s in SPARSITIES)], filled) if filled else "Not run yet.\n"


def accuracies(records: Records, model: str) -> str:
    """Test accuracy by method and sparsity."""
    return _by_sparsity(model, LOOKS, lambda cell: pages.spread(tests(records, cell)))


def differences(records: Records, model: str, to: str) -> str:
    """How much better every other method is than `to`, in points."""

    def text(cell: Cell) -> str:
        return against(records, cell, cell._replace(method=to))

    return _by_sparsity(model, [m for m in LOOKS if m != to], text)


def costs(records: Records, model: str, fact: str) -> str:
    """FLOPs of a forward pass or a training step, as multiples of the dense network's."""
    dense = records.get(Cell(model, "dense", 0.0))

    def text(cell: Cell) -> str:
        return "" if cell not in records or dense is None else f"{_mean(records[cell], fact) / _mean(dense, fact):.3f}"

    return _by_sparsity(model, LOOKS, text)


def reasons(records: Records, model: str) -> str:
    """What the masks of the dynamic methods did."""
    rows = []
    for method in ("static", "set", "rigl", "snfs", "dsr", "deep_r", "srigl", "granet"):
        for sparsity in SPARSITIES:
            record = records.get(Cell(model, method, sparsity))
            if record is None:
                continue
            runs = record["runs"]
            survival = [run["survival"] for run in runs if run["survival"] is not None]
            units, unused = (
                statistics.mean(sum(run[fact].values()) for run in runs) for fact in ("without_input", "unused_inputs")
            )
            kept = f"{100 * statistics.mean(survival):.0f} %" if survival else ""
            row = [f"{100 * _mean(record, 'explored'):.1f} %", kept, f"{units:.1f}", f"{unused:.1f}"]
            rows.append([LABELS[method], f"{100 * sparsity:.0f} %", *row])
    head = ["", "sparsity", "weights ever active", "grown weights kept", "units without input", "units not read"]
    return pages.table(head, rows)


def claims(records: Records, model: str) -> str:
    """One line for each claim of the paper: at how many sparsities it holds."""
    lines = []
    for rival, name in CLAIMED.items():
        found = {s: paired(*(tests(records, Cell(model, m, s)) for m in ("rigl", rival))) for s in SPARSITIES}
        kinds: dict[str, list[str]] = {"better": [], "not told apart": [], "worse": []}
        for sparsity, pair in found.items():
            if pair is not None:
                kind = "not told apart" if pair[1] >= LEVEL else "better" if pair[0] > 0 else "worse"
                kinds[kind].append(f"{100 * sparsity:.0f} %")
        told = "; ".join(f"{kind} at {', '.join(at)}" for kind, at in kinds.items() if at) or "not run"
        lines.append(f"* RigL against {name}: {told}.\n")
    return "".join(lines)


def figure(records: Records, model: str) -> Figure:
    """Accuracy over sparsity and over training FLOPs; bars are one standard deviation over seeds."""
    dense = records.get(Cell(model, "dense", 0.0))
    with matplotlib.rc_context(drawing.LOOK):
        result, [row] = drawing.new_figure(2, 1, 4.6, 3.9)
        lowest = 100.0
        for method, (colour, marker, dash) in LOOKS.items():
            found = [(s, records[cell]) for s in SPARSITIES if (cell := Cell(model, method, s)) in records]
            if not found:
                continue
            values = [percents(record) for _, record in found]
            means, bars = [float(np.mean(v)) for v in values], [np.std(v, ddof=1) for v in values]
            lowest = lowest if method == "small_dense" else min(lowest, *means)
            look = {"color": colour, "marker": marker, "linestyle": dash, "markersize": 4, "linewidth": 1.2}
            places = [SPARSITIES.index(s) for s, _ in found]
            row[0].errorbar(places, means, bars, label=LABELS[method], capsize=2, **look)
            if dense is not None:
                flops = [_mean(record, "training") / _mean(dense, "training") for _, record in found]
                row[1].errorbar(flops, means, bars, capsize=2, **look)
        _finish(row, None if dense is None else float(np.mean(percents(dense))), lowest)
    return result


def _finish(row: Sequence[Axes], dense: float | None, lowest: float) -> None:
    """Axes and legend; small dense networks, which are far below the rest, are outside of the limits."""
    row[0].set_xticks(range(len(SPARSITIES)), [f"{100 * s:.0f} %" for s in SPARSITIES])
    row[0].set_xlabel("Sparsity")
    row[0].set_ylabel("Test accuracy, %")
    row[0].set_xlim(-0.3, len(SPARSITIES) - 0.7)
    row[1].set_xscale("log")
    row[1].set_xlim(0.008, 1.2)
    row[1].set_xticks(ticks := [0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1.0], [f"{tick:g}" for tick in ticks])
    row[1].minorticks_off()
    row[1].set_xlabel("Training FLOPs, dense = 1")
    for axes in row:
        if dense is not None:
            axes.axhline(dense, color="#333333", linewidth=0.8, linestyle=(0, (1, 2)))
        top = axes.get_ylim()[1] if dense is None else dense + 0.5
        axes.set_ylim(max(axes.get_ylim()[0], lowest - 0.2 * (top - lowest)), top)
    row[0].legend(fontsize=7, ncols=2, loc="lower left")


def picture(model: str) -> Path:
    """Where the figure of a model is."""
    return ROOT / "docs" / "figures" / f"methods_{model}.png"


def section(records: Records, model: str) -> str:
    """The section of one model."""
    dense = tests(records, Cell(model, "dense", 0.0))
    if not any(cell.model == model for cell in records):
        return f"## {TITLES[model]}\n\nNot run yet.\n"
    told, seeds = "not run" if dense is None else pages.spread(dense), len(MODELS[model]["seeds"])
    return f"""## {TITLES[model]}

![accuracy over sparsity and over training FLOPs](figures/{picture(model).name})

Dense: {told}. Test accuracy in percent, mean and standard deviation over {seeds} seeds:

{accuracies(records, model)}
### Against what the paper claims

{claims(records, model)}
"Better" and "worse" are differences that a paired t-test over {seeds} seeds tells from 0 at the level of 5 %. So
few seeds cannot show a small difference. The paper claims all four for ResNet-50 on ImageNet.

### Differences to RigL

Points of test accuracy, positive where the method is better than RigL; p of a paired t-test, bold below 0.05. With
this many tests some are below 0.05 by chance.

{differences(records, model, "rigl")}
### Differences to static

{differences(records, model, "static")}
### Inference FLOPs, dense = 1

{costs(records, model, "forward")}
### Training FLOPs, dense = 1

{costs(records, model, "training")}
### What the masks did

Weights ever active are a share of all weights of the sparse layers. A grown weight is kept if the next change of masks
leaves it. Units without input, and units that no weight reads, are counted over the sparse layers after training.

{reasons(records, model)}"""


def _seconds(records: Records) -> str:
    """What the entry that the page makes again took."""
    return f"{records[Cell('lenet5', 'rigl', 0.98)]['cpu_seconds']:.0f}"


def page(records: Records) -> str:
    """docs/results.md."""
    wanted = list(cells())
    missing = [cell for cell in wanted if cell not in records]
    beyond = len(list(cells(whole=True))) - len(wanted)
    return f"""# Results on Fashion-MNIST

Generated by `python -m experiments.studies.method_page` from
[experiments/records/method_table](../experiments/records/method_table). {len(wanted) - len(missing)} of the
{len(wanted)} planned cells have been run; `python -m experiments.studies.method_table` runs the others, and with
`--whole` also the {beyond} that the plans for the slower networks leave out. To make one entry again, beside the
committed record:

    apt-get install dataset-fashion-mnist
    python -m experiments.studies.method_table --model lenet5 --method rigl --sparsity 0.98 --records again

That takes {_seconds(records)} seconds of one processor. On the same kind of processor the `runs` in the new record are
those of the committed one.

{METHOD}
{"".join(section(records, model) + chr(10) for model in MODELS)}{NOT_RUN}"""


METHOD = """Every cell is a network, a method and a sparsity, with ERK at the start, trained on the first 50,000
images with SGD (momentum 0.9, Nesterov, weight decay 5e-4 on kernels) at a learning rate that falls by a cosine.
LeNet-300-100 has 5,850 steps of 128 images (15 epochs) from a rate of 0.1. LeNet-5 and a WideResNet (Zagoruyko and
Komodakis, 2016) of ten layers and width 1 without dropout, whose first convolutions are dense, are slow on a CPU: they
have 2,000 steps of 32 images (1.3 epochs) from 0.05 and 0.1, three seeds instead of five, the two sparsities 95 % and
98 %, and fewer methods; so their accuracies are those of a short training, and are not to be compared with published
ones. The last 10,000 training images are for validation and the test images are
looked at once, after the last step. Seeds share initial weights and the order of images between methods, so that
differences are taken pair by pair.

No setting was tuned. Methods that change masks do so every 100 steps until 3/4 of the training. RigL, SET and SRigL
move 0.3 of the weights at first, SNFS and GraNet 0.5, falling to 0 by a cosine; GraNet goes from 50 % sparse to the
end's sparsity, gradual pruning (GMP) from dense, along a cubic that begins at 0.3 of the training. SNIP ranks all
layers together on one batch. DSR aims at 0.2 % of all weights a time. DeepR has the drift and noise of its authors'
MNIST script. A small dense network has the same shape with fewer units, and no more weights than the sparse ones.
"""

NOT_RUN = """## What was not run

* Tuning and longer training: for static masks, SET and RigL at 98 % and 99 % they are in
  [tuned_results.md](tuned_results.md), for all methods on MNIST-1D in [mnist1d_results.md](mnist1d_results.md).
* The paper's WRN-22-2 on Fashion-MNIST, which takes hours here:
  `python -m experiments.main --config configs/cifar10_wrn22_2.py --config.dataset.name=fashion_mnist` runs it.
* CIFAR-10 and ImageNet, whose data are not to be had here: `configs/cifar10_wrn22_2.py`,
  `configs/imagenet_resnet50.py` and `configs/imagenet_mobilenet.py` run them.
* Ablations; on MNIST-1D they are in [mnist1d_results.md](mnist1d_results.md).
* Elsewhere: widths found by RigL, tickets and paths between solutions are in
  [solutions_results.md](solutions_results.md), language models in [language_results.md](language_results.md).
* The arithmetic of the paper is in [paper_tables.md](paper_tables.md): it needs no run.
"""


def main(argv: Sequence[str] | None = None) -> int:
    """Writes page and figures, or checks the page; returns the exit code."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--check", action="store_true", help="change nothing, fail if the page is out of date")
    check, records = parser.parse_args(argv).check, read()
    for model in () if check else sorted({cell.model for cell in records}):
        picture(model).write_bytes(drawing.png(figure(records, model)))
    return pages.update({PAGE: page(records)}, check=check, command="make figures")


if __name__ == "__main__":
    raise SystemExit(main())
