"""docs/channel_results.md and its figures, from the records of `experiments.studies.channels`.

python -m experiments.studies.channels_page            # writes the page and draws the figures
python -m experiments.studies.channels_page --check    # fails if the page is out of date
"""

from __future__ import annotations

import argparse
import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import matplotlib
from matplotlib.figure import Figure

import rigl_jax as rx
from experiments import pages
from experiments.benchmarks import timing
from experiments.report import drawing
from experiments.studies.channels import (
    MODELS,
    SCORED,
    SCORES,
    SCRATCH,
    SEEDS,
    SHARES,
    SLIMMED,
    SLIMMING,
    Cell,
    cells,
    read,
)

ROOT = Path(__file__).parents[2]
PAGE = ROOT / "docs" / "channel_results.md"
TITLES = {"lenet5": "LeNet-5 (44,190 weights in kernels)", "resnet8": "ResNet-8 (20,680 weights in kernels)"}
LABELS = {name: entry.label for name, entry in rx.channels.CRITERIA.items()} | {
    SLIMMED: "Network Slimming",
    "scratch_e": "Scratch-E",
    "scratch_b": "Scratch-B",
}
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#777777")
MARKERS = "ovs^DPX*<>hd"
COLUMNS = sorted(SHARES, reverse=True)

Records = Mapping[Cell, Mapping[str, Any]]


def percents(records: Records, cell: Cell, fact: str = "test") -> list[float] | None:
    """A fact of each seed in percent; None where the cell was not run."""
    return [100 * run[fact] for run in records[cell]["runs"]] if cell in records else None


def rows(model: str, scope: str) -> list[tuple[str, str, str]]:
    """`(label, score, recipe)` of the rows of tables and lines of figures."""
    known = {(cell.score, cell.recipe) for cell in cells([model]) if cell.scope == scope and cell.recipe != "dense"}
    wanted = [(score, "finetune") for score in SCORES] + [("any", recipe) for recipe in SCRATCH]
    return [(LABELS[r if s == "any" else s], s, r) for s, r in wanted if (s, r) in known]


def accuracies(records: Records, model: str, scope: str, fact: str) -> str:
    """A table of one fact, a row for each score."""
    found = []
    for label, score, recipe in rows(model, scope):
        if fact == "pruned" and recipe != "finetune":
            continue
        values = [pages.spread(percents(records, Cell(model, scope, share, score, recipe), fact)) for share in COLUMNS]
        if any(values):
            found.append([label, *values])
    head = ["share of the MACs", *(f"{100 * share:.0f} %" for share in COLUMNS)]
    return pages.table(head, found) if found else "Not run yet.\n"


def figure(records: Records, model: str) -> Figure:
    """Accuracy over the share of MACs, after fine-tuning and from scratch; every layer loses the same share."""
    with matplotlib.rc_context(drawing.LOOK):
        result, [[axes]] = drawing.new_figure(1, 1, 7.2, 4.4)
        for i, (label, score, recipe) in enumerate(rows(model, "layer")):
            cell = {share: Cell(model, "layer", share, score, recipe) for share in COLUMNS}
            run = [share for share in COLUMNS if cell[share] in records]
            if not run:
                continue
            macs = [_left(records[cell[share]]) for share in run]
            means = [statistics.mean(percents(records, cell[share]) or [0.0]) for share in run]
            look = {"color": COLOURS[i % len(COLOURS)], "marker": MARKERS[i % len(MARKERS)], "markersize": 4}
            axes.plot(macs, means, label=label, linewidth=1.2, linestyle="--" if score == "any" else "-", **look)
        dense = percents(records, Cell(model, "layer", 1.0, "none", "dense"))
        if dense is not None:
            axes.axhline(statistics.mean(dense), color="#333333", linewidth=0.8, linestyle=(0, (1, 2)), label="Dense")
        axes.set_xscale("log")
        axes.set_xticks(COLUMNS, [f"{100 * share:.0f} %" for share in COLUMNS])
        axes.minorticks_off()
        axes.set_xlabel("Multiply-accumulates left")
        axes.set_ylabel("Test accuracy, %")
        axes.legend(fontsize=7, loc="center left", bbox_to_anchor=(1.01, 0.5))
    return result


def _left(record: Mapping[str, Any]) -> float:
    return statistics.mean(run["macs"][1] / run["macs"][0] for run in record["runs"])


def picture(model: str) -> Path:
    """Where the figure of a model is."""
    return ROOT / "docs" / "figures" / f"channels_{model}.png"


def drawn(records: Records) -> list[str]:
    """The models of which there is something to draw."""
    return [model for model in MODELS if any(cell.model == model and cell.recipe != "dense" for cell in records)]


def section(records: Records, model: str) -> str:
    """All about one model."""
    if not any(cell.model == model for cell in records):
        return f"## {TITLES[model]}\n\nNot run yet.\n"
    dense = pages.spread(percents(records, Cell(model, "layer", 1.0, "none", "dense"))) or "not run"
    seeds = f"mean and standard deviation over {len(SEEDS)} seeds, after fine-tuning or from scratch"
    image = f"![test accuracy over MACs](figures/{picture(model).name})\n\n" if model in drawn(records) else ""
    return f"""## {TITLES[model]}

{image}Dense: {dense}. Test accuracy in percent, {seeds}:

{accuracies(records, model, "layer", "test")}
Before fine-tuning:

{accuracies(records, model, "layer", "pruned")}
All channels ranked together, by scores divided by the mean of their layer, after fine-tuning:

{accuracies(records, model, "global_mean", "test")}
The same by scores as they are, which may leave a layer with hardly a channel (10 % is chance):

{accuracies(records, model, "global", "test")}"""


def speed() -> str:
    """The record of `experiments.benchmarks.channels`."""
    found = {row["model"]: row for row in timing.rows("channels")}
    if not found:
        return "Not measured yet.\n"
    net, low_high = found["resnet18"], found["resnet18"]["ratio_quartiles"]
    lines = [
        f"ResNet-18 with half of the channels of every layer, forward and backward on {net['images'][0]} images of "
        f"{net['images'][1]} x {net['images'][2]}: {net['half_ms']:.0f} ms against {net['dense_ms']:.0f} ms dense, "
        f"**{net['ratio']:.2f} times** as fast (median over {net['rounds']} turns, quartiles {low_high[0]} to "
        f"{low_high[1]}; {net['processor_ratio']:.2f} times in seconds of the processor), with "
        f"{net['macs'][1] / net['macs'][0]:.3f} of the MACs. The goal was 2.5.\n"
    ]
    lines += [
        f"Tracing and grouping of {title}: {row['processor_seconds']:.2f} s of the processor, {row['seconds']:.2f} s "
        f"elapsed, {row['leaves']} arrays, {row['groups']} groups. The goal was 2 s.\n"
        for title, row in (("ResNet-50", found["resnet50"]), ("a transformer of 12 layers", found["transformer"]))
    ]
    about = timing.about("channels")
    machine = f"{about['processor']}, {about['cores']} cores"
    lines.append(f"Processor: {machine}, shared with other work (load average {about['load']}).\n")
    return "\n".join(lines)


def page(records: Records) -> str:
    """docs/channel_results.md."""
    wanted = list(cells())
    run = sum(cell in records for cell in wanted)
    folder = "experiments/records/channels"
    folder = f"[{folder}](../{folder})" if records else f"`{folder}`"
    return f"""# What removed channels cost on Fashion-MNIST

Generated by `python -m experiments.studies.channels_page` from
{folder}. {run} of the {len(wanted)} cells have been run;
`python -m experiments.studies.channels` runs the others.

{METHOD}
{"".join(section(records, model) + chr(10) for model in MODELS)}## Speed

{speed()}
`python -m experiments.benchmarks.channels` measures again.

{NOT_RUN}"""


def _method() -> str:
    lenet = MODELS["lenet5"]
    images, epochs, rate, tuned = f"{lenet['images']:,} images", *(lenet[k] for k in ("epochs", "rate", "finetune"))
    return f"""The dense networks are trained on the first {images} for {epochs} epochs with SGD (momentum 0.9,
Nesterov, weight decay 5e-4 on kernels), a batch of 128 and a learning rate that falls from {rate} by a cosine.
Then every layer loses the same share of its channels, as many as leave a share of the MACs, chosen by one of
the scores from {SCORED} training images. Fine-tuning takes {tuned} epochs from a fifth of the learning rate.
Scratch-E trains new weights of the same widths for as many epochs as the dense network had, Scratch-B for twice
as many (Liu et al. 2019 double at most). As the widths are the same for every score, so are these. Network
Slimming prunes a network that was trained with its penalty ({SLIMMING:g}). The test images are looked at after
the last step. No setting was tuned. Differences of a percent or less are not told apart by so few seeds.
"""


METHOD = _method()
NOT_RUN = """## What was not run

* All 50,000 training images and long training: accuracies are below those of [results.md](results.md).
* Scratch training at the widths that a global ranking finds; iterative pruning; settings tuned for each score.
* Networks and data of the papers (VGG, ResNet-56 on CIFAR-10, ResNet-50 on ImageNet), whose data are not
  to be had here.
"""


def main(argv: Sequence[str] | None = None) -> int:
    """Writes page and figures, or checks the page; returns the exit code."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--check", action="store_true", help="change nothing, fail if the page is out of date")
    check, records = parser.parse_args(argv).check, read()
    for model in () if check else drawn(records):
        picture(model).write_bytes(drawing.png(figure(records, model)))
    return pages.update({PAGE: page(records)}, check=check, command="make figures")


if __name__ == "__main__":
    raise SystemExit(main())
