"""Shared by the figures: style, panels, and lines with a band over seeds."""

from __future__ import annotations

import io
import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, MaxNLocator
from PIL import Image

from experiments import texts
from experiments.config import DENSE
from experiments.report.methods import Style, distribution_label, style
from experiments.report.runs import Run
from experiments.report.tables import Key, sparsity_text

LOOK: dict[Any, Any] = {
    "font.size": 9.5,
    "axes.titlesize": 10.5,
    "axes.titleweight": "bold",
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.edgecolor": "#888888",
    "axes.labelcolor": "#222222",
    "axes.grid": True,
    "grid.color": "#E4E4E4",
    "grid.linewidth": 0.8,
    "axes.axisbelow": True,
    "xtick.color": "#555555",
    "ytick.color": "#555555",
    "legend.frameon": False,
    "legend.fontsize": 9,
    "figure.dpi": 120,
}
"""matplotlib settings of every figure, applied in a context, so that those of the caller do not change."""

Panel = tuple[float, str]
"""The sparsity and the distribution of one panel."""


class Line(NamedTuple):
    """One line of a panel: its legend text, its style, and the seeds behind it."""

    text: str
    look: Style
    runs: list[Run]


def new_figure(columns: int, rows: int, width: float, height: float) -> tuple[Figure, list[list[Axes]]]:
    """A figure of `rows` x `columns` axes, each `width` x `height` inches."""
    # No pyplot: it keeps every figure in a global list.
    figure = Figure(figsize=(width * columns, height * rows), layout="constrained")
    return figure, [list(row) for row in figure.subplots(rows, columns, squeeze=False)]


def png(figure: Figure) -> bytes:
    """A figure as the bytes of a PNG file; equal figures give equal bytes."""
    raw = io.BytesIO()
    with matplotlib.rc_context(LOOK):
        figure.savefig(raw, format="png")
    # Figures have few colours: with a palette the file is a third as large and looks the same.
    image = Image.open(raw).convert("RGB").quantize(256, dither=Image.Dither.NONE)
    out = io.BytesIO()
    image.save(out, format="png", optimize=True)
    return out.getvalue()


def panels(groups: Iterable[tuple[Key, str]]) -> list[Panel]:
    """The (sparsity, distribution) pairs among groups; one dense panel if nothing is sparse."""
    return sorted({(key.sparsity, key.distribution) for key, _ in groups if key.method != DENSE}) or [(0.0, "")]


def title(panel: Panel) -> str:
    """`(0.9, "erk")` -> "90 % sparse, ERK"."""
    return texts.figure(f"{sparsity_text(panel[0])} sparse, {distribution_label(panel[1])}") if panel[1] else "Dense"


def lines(groups: Mapping[tuple[Key, str], list[Run]], panel: Panel, *, dense: bool) -> list[Line]:
    """The lines of one panel in the order of tables; with `dense`, the dense runs too, as the reference."""
    picked = []
    for (key, settings), runs in groups.items():
        here = dense if key.method == DENSE else (key.sparsity, key.distribution) == panel
        if here:
            look = style(key.method)
            picked.append(Line(texts.figure(f"{look.label}, {settings}" if settings else look.label), look, runs))
    return picked


def series(run: Run, kind: str, field: str) -> dict[int, float]:
    """One field of a run's metric lines of one kind, as `{step: value}`."""
    return {line["step"]: line[field] for line in run.of_kind(kind) if line.get(field) is not None}


def mean_and_std(curves: Sequence[Mapping[int, float]]) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Curves of several seeds as one with a spread.

    Args:
      curves: one `{step: value}` a seed.

    Returns:
      The steps that all curves have, int[n]; mean and sample standard deviation there, float64[n] (0 for one seed).
    """
    steps = sorted(set.intersection(*(set(curve) for curve in curves))) if curves else []
    if not steps:
        return np.zeros(0, int), np.zeros(0), np.zeros(0)
    values = np.array([[curve[step] for step in steps] for curve in curves], np.float64)
    std = values.std(axis=0, ddof=1) if len(curves) > 1 else np.zeros(len(steps))
    return np.array(steps), values.mean(axis=0), std


def draw(axes: Axes, text: str, look: Style, curves: Sequence[Mapping[int, float]], **options: Any) -> None:
    """Draws the mean of curves in a method's style, and a band of one standard deviation where there are several."""
    steps, mean, std = mean_and_std(curves)
    if not len(steps):
        return
    settings: dict[str, Any] = {
        "color": look.colour,
        "linestyle": look.dash,
        "linewidth": 1.8,
        "marker": look.marker,
        "markersize": 5,
        "markeredgecolor": "white",
        "markeredgewidth": 0.6,
        "markevery": math.ceil(len(steps) / 12),
        "label": text,
    }
    axes.plot(steps, mean, **(settings | options))
    if len(curves) > 1:
        axes.fill_between(steps, mean - std, mean + std, color=look.colour, alpha=0.16, linewidth=0)


def step_axis(axes: Axes) -> None:
    """Labels the x axis as training steps, with thousands separated."""
    axes.set_xlabel("Training step")
    axes.xaxis.set_major_locator(MaxNLocator(5, integer=True))
    axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:,.0f}"))
