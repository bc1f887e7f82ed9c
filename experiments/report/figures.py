"""Runs to matplotlib figures. Each function takes the runs of one (dataset, model); None: nothing to draw."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import PercentFormatter

from experiments import texts
from experiments.config import DENSE
from experiments.report import drawing
from experiments.report.drawing import Line, Panel
from experiments.report.first_layer import first_layer
from experiments.report.methods import Style, distribution_label, style
from experiments.report.runs import Run
from experiments.report.tables import group, sparsity_text
from rigl_jax import plot

_PLATE = {"facecolor": "white", "edgecolor": "none", "pad": 0.6, "alpha": 0.85}


def accuracy(runs: Iterable[Run]) -> Figure | None:
    """Test accuracy over steps, one panel a sparsity, one line a method, a band of one std over seeds."""
    groups = group(runs)
    if not any(drawing.series(run, "eval", "accuracy") for members in groups.values() for run in members):
        return None
    panels = drawing.panels(groups)
    with matplotlib.rc_context(drawing.LOOK):
        figure, [row] = drawing.new_figure(len(panels), 1, 4.8 if len(panels) > 1 else 6.4, 3.9)
        for axes, panel in zip(row, panels, strict=True):
            values: list[float] = []
            for line in drawing.lines(groups, panel, dense=True):
                curves = [drawing.series(run, "eval", "accuracy") for run in line.runs]
                drawing.draw(axes, line.text, line.look, curves)
                values += [value for curve in curves for value in curve.values()]
            axes.set_title(drawing.title(panel))
            drawing.step_axis(axes)
            axes.yaxis.set_major_formatter(PercentFormatter(1.0))
            # The first evaluations are far below the rest; without a limit the end would be one flat line.
            if not values:
                continue
            low, high = float(np.nanquantile(values, 0.15)), float(np.nanmax(values))
            margin = 0.3 * (high - low) + 1e-3
            axes.set_ylim(max(0.0, low - margin), min(1.0, high + margin / 2))
            axes.legend(loc="best")
        row[0].set_ylabel("Test accuracy")
    return figure


def tradeoff(runs: Iterable[Run]) -> Figure | None:
    """Test accuracy at the last step over sparsity, one line a method; None for runs of fewer than two sparsities."""
    found: dict[str, dict[float, list[float]]] = {}
    looks: dict[str, Style] = {}
    dense: list[float] = []
    groups = group(runs)
    distributions = {key.distribution for key, _ in groups if key.method != DENSE}
    for (key, settings), members in groups.items():
        values = [run.summary["test_accuracy"] for run in members if run.summary is not None]
        if key.method == DENSE:
            dense += values
            continue
        look = style(key.method)
        several = distribution_label(key.distribution) if len(distributions) > 1 else ""
        text = texts.figure(", ".join(filter(None, (look.label, several, settings))))
        looks[text] = look
        found.setdefault(text, {})[key.sparsity] = values
    sparsities = sorted({sparsity for places in found.values() for sparsity in places})
    if len(sparsities) < 2:
        return None
    with matplotlib.rc_context(drawing.LOOK):
        figure, [[axes]] = drawing.new_figure(1, 1, 6.4, 4.2)
        for text, places in found.items():
            points = sorted(places.items())
            bars = [float(np.std(values, ddof=1)) if len(values) > 1 else 0.0 for _, values in points]
            look = {"color": looks[text].colour, "marker": looks[text].marker, "linestyle": looks[text].dash}
            x = [sparsities.index(sparsity) for sparsity, _ in points]
            axes.errorbar(x, [np.mean(values) for _, values in points], bars, label=text, capsize=2, **look)
        if dense:
            axes.axhline(float(np.mean(dense)), label="Dense", color="#333333", linewidth=1.2, linestyle=":")
        axes.set_xticks(range(len(sparsities)), [texts.figure(sparsity_text(sparsity)) for sparsity in sparsities])
        axes.set_xlabel("Sparsity")
        axes.set_ylabel("Test accuracy")
        axes.yaxis.set_major_formatter(PercentFormatter(1.0))
        figure.legend(*axes.get_legend_handles_labels(), loc="outside lower center", ncols=min(3, len(found) + 1))
    return figure


def density(runs: Iterable[Run]) -> Figure | None:
    """Density of each sparse leaf: planned (the first masks) as a grey bar, at the end one bar a method."""
    groups = _with_masks(runs)
    panels = [panel for panel in drawing.panels(groups) if drawing.lines(groups, panel, dense=False)]
    if not panels:
        return None
    found = {leaf for members in groups.values() for run in members for leaf in run.of_kind("masks")[0]["density"]}
    leaves = sorted(found, key=plot.natural)
    width = max(4.8 if len(panels) > 1 else 6.4, 1.5 + 0.3 * len(leaves))
    with matplotlib.rc_context(drawing.LOOK):
        figure, [row] = drawing.new_figure(len(panels), 1, width, 3.9)
        for axes, panel in zip(row, panels, strict=True):
            _density_panel(axes, panel, leaves, drawing.lines(groups, panel, dense=False))
            axes.set_title(drawing.title(panel))
        row[0].set_ylabel("Density (share of weights in use)")
        handles = row[0].get_legend_handles_labels()
        figure.legend(*handles, loc="outside lower center", ncols=min(len(handles[0]), 3 * len(panels)))
    return figure


def _with_masks(runs: Iterable[Run]) -> dict:
    groups = {which: [run for run in members if run.of_kind("masks")] for which, members in group(runs).items()}
    return {which: members for which, members in groups.items() if members}


def _density_of(runs: Sequence[Run], leaves: Sequence[str], which: int) -> np.ndarray:
    densities = [run.of_kind("masks")[which]["density"] for run in runs]
    return np.mean([[one.get(leaf, np.nan) for leaf in leaves] for one in densities], axis=0)


def _density_panel(axes: Axes, panel: Panel, leaves: Sequence[str], lines: Sequence[Line]) -> None:
    x = np.arange(len(leaves))
    planned = _density_of(lines[0].runs, leaves, 0)
    axes.bar(x, planned, 0.86, color="#DDDDDD", label="Planned")
    each = 0.7 / len(lines)
    for number, line in enumerate(lines):
        place = x - 0.35 + each * (number + 0.5)
        measured = _density_of(line.runs, leaves, -1)
        axes.bar(place, measured, each * 0.82, color=line.look.colour, label=f"{line.text} at the end")
    if len(leaves) <= 8:
        for position, value in zip(x, planned, strict=True):
            above = {"xytext": (0, 4), "textcoords": "offset points"}
            axes.annotate(
                f"{100 * value:.3g} %", (position, value), ha="center", fontsize=9, zorder=4, bbox=_PLATE, **above
            )
    axes.axhline(1 - panel[0], color="#333333", linewidth=1.2, linestyle=":", label="Uniform")
    short = [texts.figure(leaf.removesuffix("/kernel")) for leaf in leaves]
    crowded = len(leaves) > 4
    axes.set_xticks(x, short, rotation=60 if crowded else 0, ha="right" if crowded else "center")
    axes.grid(axis="x", visible=False)
    axes.yaxis.set_major_formatter(PercentFormatter(1.0))
    axes.set_ylim(0, 1.15 * max(float(np.nanmax(planned)), 1 - panel[0]))


def churn(runs: Iterable[Run]) -> Figure | None:
    """Above: share of active weights dropped (line) and grown (marks) at each rewiring; below: explored share R_s."""
    groups = _with_masks(runs)
    panels = [panel for panel in drawing.panels(groups) if drawing.lines(groups, panel, dense=False)]
    if not panels:
        return None
    with matplotlib.rc_context(drawing.LOOK):
        figure, rows = drawing.new_figure(len(panels), 2, 4.8 if len(panels) > 1 else 6.4, 2.9)
        for above, below, panel in zip(*rows, panels, strict=True):
            lines = drawing.lines(groups, panel, dense=False)
            for number, line in enumerate(lines):
                # Methods with one schedule replace equal shares: their lines coincide, so the first are drawn wider.
                _replaced(above, line.text, line.look, line.runs, 1.8 + 2.2 * (len(lines) - 1 - number))
                _explored(below, line.text, line.look, line.runs)
            above.set_title(drawing.title(panel))
            for axes in (above, below):
                axes.yaxis.set_major_formatter(PercentFormatter(1.0))
                axes.set_ylim(bottom=0)
                drawing.step_axis(axes)
            above.set_xlim(below.get_xlim())
            if above.get_legend_handles_labels()[0]:
                above.legend(loc="upper right")
            below.legend(loc="best")
        rows[0][0].set_ylabel("Replaced at a rewiring,\nshare of active weights")
        rows[1][0].set_ylabel("Ever active so far ($R_s$),\nshare of all weights")
    return figure


def _replaced(axes: Axes, text: str, look: Style, runs: Sequence[Run], width: float) -> None:
    rewired = [run for run in runs if len(run.of_kind("masks")) > 1]
    for field, options in (
        ("dropped_fraction", {"marker": "", "label": f"{text}: dropped", "linewidth": width}),
        ("grown_fraction", {"linestyle": "none", "label": f"{text}: grown"}),
    ):
        # The first line of a run is its initial mask, where nothing has been dropped yet.
        curves = [dict(list(drawing.series(run, "masks", field).items())[1:]) for run in rewired]
        drawing.draw(axes, text, look, curves, **options)


def _explored(axes: Axes, text: str, look: Style, runs: Sequence[Run]) -> None:
    curves = []
    for run in runs:
        curve = drawing.series(run, "masks", "explored")
        # Masks that no longer change are drawn as a horizontal line up to the end of training.
        curves.append(curve | ({run.last_step: curve[max(curve)]} if curve else {}))
    drawing.draw(axes, text, look, curves)


FIGURES: dict[str, tuple[Callable[[Iterable[Run]], Figure | None], str]] = {
    "accuracy": (
        accuracy,
        "Test accuracy over training. Lines are means over seeds, bands one standard deviation; "
        "the first, lowest evaluations are cut off.",
    ),
    "tradeoff": (
        tradeoff,
        "Test accuracy at the last step over sparsity; sparsities are evenly spaced. Marks are means over seeds, "
        "bars one standard deviation.",
    ),
    "density": (density, "Density of each sparse layer: planned (grey), and measured on the last masks."),
    "churn": (
        churn,
        "Above: the share of active weights that each rewiring replaced (line: dropped, marks: grown). "
        "Below: the share of weights that have been active at least once (R_s).",
    ),
    "first_layer": (
        first_layer,
        "The first sparse layer seen from its input: how many active connections each pixel has, at the start, at the "
        "end, and the change. Look for connections that left the empty border of the image.",
    ),
}
"""name -> (drawing function, caption), in the order of the page."""
