"""docs/solutions_results.md and its figure, from the records of `experiments.studies.solutions`.

python -m experiments.studies.solutions_page            # writes the page and draws the figure
python -m experiments.studies.solutions_page --check    # fails if the page is out of date
"""

from __future__ import annotations

import statistics
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from experiments import pages
from experiments.report import drawing
from experiments.studies.method_page import LOOKS, paired, verdict
from experiments.studies.solutions import (
    CURVE_STEPS,
    EXAMPLES,
    FEATURES,
    LAYERS,
    LONGER,
    MODEL,
    OFTEN,
    OTHERS,
    PLACES,
    RATE,
    SEEDS,
    SPARSITY,
    STEPS,
    Cell,
    cells,
    read,
)

ROOT = Path(__file__).parents[2]
PAGE = ROOT / "docs" / "solutions_results.md"
PICTURE = ROOT / "docs" / "figures" / "paths_lenet_300_100.png"
SEARCH = {
    "rigl": "RigL, 99 % and 89 %",
    "rigl_plus": "RigL+, 96 % and 86 %",
    "set": "SET, 99 % and 89 %",
    "static": "Static, 99 % and 89 %",
    "widths": "dense, widths and pixels of RigL",
}
TICKETS = {
    "static": "random masks, random start: static",
    "rigl": "random masks, random start: RigL",
    "ticket_static": "RigL's masks, its own start: static",
    "ticket_rigl": "RigL's masks, its own start: RigL",
    "other_static": "RigL's masks, another start: static",
    "rigl_2x": "random masks, random start: RigL, twice as long",
}
ESCAPES = {"static": "Static", "set": "SET", "rigl": "RigL"}
COLOURS = {
    "linear": ("#333333", "--"),
    "cubic, sparse": ("#D55E00", "-"),
    "cubic, dense": ("#0072B2", "-"),
}
Records = Mapping[Cell, Mapping[str, Any]]


def of(records: Records, part: str, method: str) -> list[Mapping[str, Any]] | None:
    """The records of all seeds; None where some were not run."""
    wanted = [Cell(MODEL, part, method, seed) for seed in SEEDS]
    return [records[cell] for cell in wanted] if all(cell in records for cell in wanted) else None


def _values(records: Records, part: str, method: str, fact: str = "test") -> np.ndarray | None:
    found = of(records, part, method)
    return None if found is None else 100 * np.array([record[fact] for record in found])


def _mean(found: Sequence[Mapping[str, Any]], value: Callable[[Mapping[str, Any]], float]) -> str:
    return f"{statistics.mean(value(record) for record in found):,.0f}"


def search(records: Records) -> str:
    """Widths, sizes and accuracy of the searched architectures."""
    rows = []
    for method, label in SEARCH.items():
        found = of(records, "search", method)
        if found is not None:
            widths = "-".join(_mean(found, lambda record, i=i: record["widths"][i]) for i in range(3))
            active, size = (_mean(found, lambda record, n=n: record[n]) for n in ("active_weights", "bytes"))
            ours, static = (_values(records, "search", name) for name in (method, "static"))
            against = "" if method == "static" else verdict(paired(ours, static))
            rows.append([label, widths, active, size, pages.spread(ours), against])
    head = ["", "widths left", "weights", "bytes", "test accuracy", "against static"]
    return (pages.table(head, rows) + _given_up(records)) if rows else "Not run yet.\n"


def _given_up(records: Records) -> str:
    found = of(records, "search", "rigl") or ()
    shares = [100 * (1 - np.mean([record["widths"][i] / n for record in found])) for i, n in ((0, 784), (1, 300))]
    return f"""
Here RigL gives up {shares[0]:.0f} % of the pixels and {shares[1]:.0f} % of the first layer's units, in the paper, on
MNIST, 48 % and 67 %.
"""


def tickets(records: Records) -> str:
    """Lottery initialisation."""
    rows, rigl = [], _values(records, "tickets", "rigl")
    for method, label in TICKETS.items():
        found = _values(records, "tickets", method)
        if found is not None:
            rows.append([label, pages.spread(found), "" if method == "rigl" else verdict(paired(found, rigl))])
    return pages.table(["", "test accuracy", "against RigL"], rows) if rows else "Not run yet.\n"


def escapes(records: Records) -> str:
    """Training that begins at the static solution."""
    rows, static = [], _values(records, "escape", "static")
    for method, label in ESCAPES.items():
        found, before = (_values(records, "escape", method, fact) for fact in ("test", "before"))
        if found is None:
            continue
        losses = np.array([record["losses"] for record in of(records, "escape", method) or ()]).mean(0)
        row = [label, pages.spread(before), pages.spread(found), f"{losses[0]:.3f}", f"{losses[1]:.3f}"]
        rows.append([*row, "" if method == "static" else verdict(paired(found, static))])
    head = ["", "accuracy before", "after", "training loss before", "after", "accuracy against static"]
    return pages.table(head, rows) if rows else "Not run yet.\n"


def barriers(records: Records) -> str:
    """How high the loss rises above the worse end of each path, on the images that bend the curves and on others."""
    found = of(records, "paths", "gmp")
    if found is None:
        return "Not run yet.\n"
    rows, rises = [], {}
    for name in COLOURS:
        row = [name]
        for images in ("curves", "others"):
            losses = np.array([record[images][name] for record in found])
            heights = losses.max(1) - np.maximum(losses[:, 0], losses[:, -1])
            row += [pages.spread(losses.max(1), 3), pages.spread(heights, 3)]
            rises[name] = float(heights.mean())  # of the validation images, which come last
        rows.append(row)
    ends = [np.mean([record["curves"]["linear"][i] for record in found]) for i in (0, -1)]
    told = f"The training loss is {ends[0]:.3f} at the static solution and {ends[1]:.3f} at the pruned one.\n\n"
    head = ["path", "largest training loss", "above the worse end", "largest validation loss", "above the worse end"]
    around = rises["cubic, sparse"] < rises["linear"] / 2
    found_here = "less than half as high as" if around else "at least half as high as"
    told_after = f"\nHere the barrier on the curve in the sparse space is {found_here} that on the line,\n"
    told_after += "so the paper's finding does not come out.\n" if around else "as the paper finds.\n"
    return told + pages.table(head, rows) + told_after


def figure(records: Records) -> Figure:
    """Losses on the paths, a line a seed, and accuracy before and after training from the static solution."""
    with matplotlib.rc_context(drawing.LOOK):
        panels = [draw for draw, part in ((_draw_paths, "paths"), (_draw_escapes, "escape")) if _was_run(records, part)]
        result, [row] = drawing.new_figure(len(panels), 1, 4.4, 3.6)
        for draw_panel, axes in zip(panels, row, strict=True):
            draw_panel(axes, records)
    return result


def _was_run(records: Records, part: str) -> bool:
    return any(of(records, part, cell.method) for cell in records if cell.part == part)


def _draw_paths(axes: Axes, records: Records) -> None:
    for name, (colour, dash) in COLOURS.items():
        for i, record in enumerate(of(records, "paths", "gmp") or ()):
            label = name if i == 0 else None
            places = np.linspace(0, 1, PLACES)
            axes.plot(places, record["others"][name], color=colour, linestyle=dash, linewidth=1, label=label)
    axes.set_xlabel("Place on the path: static (0) to pruned (1)")
    axes.set_ylabel("Validation loss")
    axes.legend(fontsize=7)


def _draw_escapes(axes: Axes, records: Records) -> None:
    for place, (method, label) in enumerate(ESCAPES.items()):
        before, after = (_values(records, "escape", method, fact) for fact in ("before", "test"))
        if before is None or after is None:
            continue
        means, bars = ([float(f(end)) for end in (before, after)] for f in (np.mean, lambda end: np.std(end, ddof=1)))
        colour, marker, dash = LOOKS[method]
        look = {"color": colour, "marker": marker, "linestyle": dash, "capsize": 2}
        axes.errorbar(np.array([0, 1]) + 0.02 * (place - 1), means, bars, label=label, **look)
    axes.set_xticks([0, 1], ["static solution", "trained again"])
    axes.set_xlim(-0.3, 1.3)
    axes.set_ylabel("Test accuracy, %")
    axes.legend(fontsize=7, loc="upper left")


def page(records: Records) -> str:
    """docs/solutions_results.md."""
    wanted = list(cells())
    return f"""# What RigL finds: architectures, tickets, ways out of minima

Generated by `python -m experiments.studies.solutions_page` from
[experiments/records/solutions](../experiments/records/solutions). {sum(cell in records for cell in wanted)} of the
{len(wanted)} cells have been run; `python -m experiments.studies.solutions` runs the others.

LeNet-{"-".join(map(str, FEATURES))} on Fashion-MNIST, {len(SEEDS)} seeds, {STEPS:,} steps of 128 images
({STEPS * 128 / 50_000:.1f} epochs) with SGD (momentum 0.9, Nesterov, weight decay 5e-4 on kernels) from a learning rate
of {RATE:g} that falls by a cosine. The training is much shorter than that of [results.md](results.md), so numbers of
the two pages are not to be compared. Masks change every 100 steps until 3/4 of the training. Nothing was tuned. Test
accuracy in percent, mean and standard deviation over seeds; differences in points, with the p-value of a paired t-test
over {len(SEEDS)} seeds, which shows only large ones.

## RigL as a search for architectures (Table 2)

The layers begin {100 * LAYERS["paper"][0]:.0f} % and {100 * LAYERS["paper"][1]:.0f} % sparse, or for RigL+
{100 * LAYERS["plus"][0]:.0f} % and {100 * LAYERS["plus"][1]:.0f} %; the last is dense. {LONGER * STEPS:,} steps, masks
change every {OFTEN} steps. After the training `rx.execution.compact` removes units that are cut off, and pixels that
nothing reads are not counted. "Widths left" are pixels and units of the two hidden layers, means over seeds; "bytes"
are 32 bits for each active weight and bias and a bit for each place of a weight. A dense network of the widths that
RigL found, where it was run, reads the pixels that RigL reads.

{search(records)}
The paper finds 408-100-69 and an error of 1.44 % with RigL, and 375-62-51 and 1.57 % with RigL+. Its training is far
longer, and its data are digits on an empty border.

## Lottery initialisation (Table 3)

{100 * SPARSITY:.0f} % sparse, ERK. The paper, on ResNet-50 at 80 %: RigL's masks and start with static masks 70.82,
with RigL 73.93; a random start with RigL 74.55, twice as long 76.06.

{tickets(records)}
## Out of a minimum (section 4.4)

![losses on paths, and accuracy after training from the static solution](figures/{PICTURE.name})

Training goes on from the static solution, {100 * SPARSITY:.0f} % sparse, with the learning rate of a new start; the
loss is that of 1,000 training images. The paper finds that static training stays where it is and that RigL gets out, to
a lower loss.

{escapes(records)}
Paths from the static solution to that of gradual pruning from the same start: a line, and cubic Bezier curves whose
control points descend the loss of {EXAMPLES:,} training images by {CURVE_STEPS} steps of Adam; "sparse": they stay on
the masks of the two ends. So few images are soon learned by heart, and the training loss along a curve then says
little: so the loss of {OTHERS:,} validation images is given too, and drawn. The paper finds high barriers on the line
and on curves in the sparse space, and a way around them in the dense space.

{barriers(records)}"""


def draw() -> None:
    """Draws the figure, where there is something to draw."""
    records = read()
    if any(_was_run(records, part) for part in ("paths", "escape")):
        PICTURE.write_bytes(drawing.png(figure(records)))


def main(argv: Sequence[str] | None = None) -> int:
    """Writes page and figure, or checks the page; returns the exit code."""
    return pages.main(
        "experiments.studies.solutions_page", __doc__, lambda: {PAGE: page(read())}, draw=draw, arguments=argv
    )


if __name__ == "__main__":
    raise SystemExit(main())
