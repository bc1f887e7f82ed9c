"""Pictures of masks and of what happened to them: matplotlib axes in, the same axes out.

`pip install 'rigl_jax[plot]'` brings matplotlib. It is imported only where no axes are given, which then are those of
`matplotlib.pyplot`. What a function does not set (title, size, limits) is the caller's. The curves read the dicts of
`rx.metrics`, and the "masks" lines of a run's `metrics.jsonl`, which have the same fields.
"""

from __future__ import annotations

import importlib
import re
import statistics
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import jax.numpy as jnp
import numpy as np

from rigl_jax import base
from rigl_jax.messages import kind, shown
from rigl_jax.tracing import to_matrix

__all__ = ["accuracy", "churn", "densities", "explored", "masks"]

COLOURS = ("#0072B2", "#E69F00", "#009E73", "#D55E00", "#CC79A7", "#56B4E9", "#333333")
"""Told apart by most people with a colour vision deficiency (Okabe and Ito 2008)."""
ACROSS = 40
"""How many letters of labels fit side by side, in an axes of half a page's width."""


def masks(mask: Any, axes: Any = None, *, of: base.Axes | None = None, **options: Any) -> Any:
    """The mask of one leaf as a picture: inputs down, outputs across, active weights dark.

    Args:
      mask: bool[*shape], at least two axes.
      axes: matplotlib axes; None: the current ones.
      of: which axes of the weight are what (`plan[name].axes`). None: the last axis are outputs, all others inputs, as
        in Flax.
      **options: of `axes.imshow`.

    Raises:
      ValueError: no bool array of two axes or more.

    >>> from matplotlib.figure import Figure
    >>> axes = Figure().subplots()
    >>> masks(np.eye(4, 6, dtype=bool), axes) is axes
    True
    >>> axes.get_xlabel()
    'outputs'
    """
    mask = np.asarray(mask)
    if mask.dtype != np.bool_ or mask.ndim < 2:
        raise ValueError(f"masks: mask must be a bool array of two axes or more, got {kind(mask)}")
    flat: Any = mask.reshape(-1, mask.shape[-1]) if of is None else to_matrix(jnp.asarray(mask), of)
    axes = _axes(axes)
    look = {"cmap": "Greys", "vmin": 0, "vmax": 1.25, "aspect": "auto", "interpolation": "nearest"}
    axes.imshow(flat.reshape(-1, flat.shape[-1]), **(look | options))  # stacked layers below each other
    axes.set(xticks=[], yticks=[], xlabel="outputs", ylabel="inputs")
    return axes


def densities(density: Mapping[str, float], axes: Any = None, *, planned: Mapping[str, float] | None = None) -> Any:
    """The density of each leaf as a bar.

    Args:
      density: {leaf: share of active weights}, such as `rx.metrics(state)["density"]`. Drawn in natural order of names,
        `Dense_2` before `Dense_10`.
      axes: matplotlib axes; None: the current ones.
      planned: the same before training, as a wide grey bar behind.

    Raises:
      ValueError: no leaf.

    >>> from matplotlib.figure import Figure
    >>> axes = densities({"Dense_10": 0.5, "Dense_2": 0.1}, Figure().subplots())
    >>> [text.get_text() for text in axes.get_xticklabels()]
    ['Dense_2', 'Dense_10']
    """
    for name, given in (("density", density), ("planned", {} if planned is None else planned)):
        if not isinstance(given, Mapping) or (name == "density" and not given):
            raise ValueError(f"densities: {name} must be {{leaf: density}}, got {kind(given)}")
    axes = _axes(axes)
    leaves = sorted(density, key=natural)
    x = np.arange(len(leaves))
    if planned is not None:
        axes.bar(x, [planned.get(leaf, np.nan) for leaf in leaves], 0.86, color="#DDDDDD", label="planned")
    axes.bar(x, [density[leaf] for leaf in leaves], 0.6, color=COLOURS[0], label="density")
    turned = len(leaves) > 4 or len(leaves) * max(map(len, leaves)) > ACROSS
    axes.set_xticks(x, leaves, rotation=60 if turned else 0, ha="right" if turned else "center")
    axes.set_ylabel("density (share of active weights)")
    axes.set_ylim(bottom=0)
    if planned is not None:
        axes.legend()
    return axes


def churn(history: Iterable[Mapping[str, Any]], axes: Any = None, *, label: str = "") -> Any:
    """The share of active weights that was dropped (line) and grown (marks) since the entry before.

    Args:
      history: dicts of `rx.metrics(state, previous)`, in order; those without churn are left out.
      axes: matplotlib axes; None: the current ones.
      label: of the line in a legend, where several runs are drawn into the same axes.

    Raises:
      ValueError: entries without a step, or none with churn.

    >>> from matplotlib.figure import Figure
    >>> history = [{"step": step, "dropped_fraction": 0.3, "grown_fraction": 0.3} for step in (0, 100)]
    >>> len(churn(history, Figure().subplots()).lines)
    2
    """
    history, known = list(history), "rx.metrics(state, previous=...) with the state before"
    dropped, grown = (_series("churn", history, f"{what}_fraction", known) for what in ("dropped", "grown"))
    axes = _axes(axes)
    before = f"{label}: " if label else ""
    (line,) = axes.plot(*dropped, label=f"{before}dropped")
    axes.plot(*grown, "o", color=line.get_color(), label=f"{before}grown")
    axes.set(xlabel="training step", ylabel="replaced, share of active weights")
    axes.set_ylim(bottom=0)
    axes.legend()
    return axes


def explored(history: Iterable[Mapping[str, Any]], axes: Any = None, *, label: str = "") -> Any:
    """R_s, the share of weights that have been active at least once, over the steps.

    Args:
      history: dicts of `rx.metrics`, in order; those in which it is not known are left out. The state of `itop` holds
        it; for other methods keep the union of the masks, and give it to `rx.metrics(..., explored=)`.
      axes: matplotlib axes; None: the current ones.
      label: of the line in a legend.

    Raises:
      ValueError: entries without a step, or none that knows the share.

    >>> from matplotlib.figure import Figure
    >>> axes = explored([{"step": 0, "explored": 0.1}, {"step": 100, "explored": 0.15}], Figure().subplots())
    >>> axes.lines[0].get_ydata().tolist()
    [0.1, 0.15]
    """
    known = "rx.metrics of the state of itop, or rx.metrics(..., explored=...) with the union of the masks so far"
    series = _series("explored", list(history), "explored", known)
    axes = _axes(axes)
    axes.plot(*series, label=label or None)
    axes.set(xlabel="training step", ylabel="ever active so far ($R_s$), share of weights")
    axes.set_ylim(bottom=0)
    if label:
        axes.legend()
    return axes


def accuracy(results: Mapping[str, Iterable[tuple[float, float]]], axes: Any = None) -> Any:
    """Accuracy against sparsity, a line a method; a band of one sample standard deviation over seeds.

    Args:
      results: {method: pairs of (sparsity, accuracy)}; pairs of equal sparsity are seeds, whose mean is drawn.
      axes: matplotlib axes; None: the current ones.

    Raises:
      ValueError: a sparsity outside of [0, 1].

    >>> from matplotlib.figure import Figure
    >>> axes = accuracy({"RigL": [(0.9, 0.91), (0.9, 0.93), (0.8, 0.95)]}, Figure().subplots())
    >>> [[round(float(value), 3) for value in pair] for pair in axes.lines[0].get_xydata()]
    [[80.0, 0.95], [90.0, 0.92]]
    """
    if not isinstance(results, Mapping):
        raise ValueError(f"accuracy: results must be {{method: [(sparsity, accuracy), ...]}}, got {kind(results)}")
    axes = _axes(axes)
    for number, (name, pairs) in enumerate(results.items()):
        seeds: dict[float, list[float]] = {}
        for sparsity, value in pairs:
            if not 0 <= sparsity <= 1:
                raise ValueError(f"accuracy: results of {name!r} need sparsities in [0, 1], got {shown(sparsity)}")
            seeds.setdefault(float(sparsity), []).append(float(value))
        at = sorted(seeds)
        mean = np.array([statistics.mean(seeds[s]) for s in at])
        spread = np.array([statistics.stdev(seeds[s]) if len(seeds[s]) > 1 else 0.0 for s in at])
        percent, colour = 100 * np.array(at), COLOURS[number % len(COLOURS)]
        axes.plot(percent, mean, marker="o", color=colour, label=name)
        if spread.any():
            axes.fill_between(percent, mean - spread, mean + spread, color=colour, alpha=0.16, linewidth=0)
    axes.set(xlabel="sparsity, %", ylabel="accuracy")
    axes.legend()
    return axes


def natural(name: str) -> list[tuple[int, int, str]]:
    """Sort key that puts `Dense_2` before `Dense_10`.

    >>> sorted(["Dense_10", "Dense_2"], key=natural)
    ['Dense_2', 'Dense_10']
    """
    parts = [part for part in re.split(r"([0-9]+)", name) if part]
    # Numbers compare by length and then by digits: a name may hold more of them than int takes.
    numbers = [part.lstrip("0") if re.fullmatch("[0-9]+", part) else None for part in parts]
    return [(1, 0, p) if n is None else (0, len(n), n) for p, n in zip(parts, numbers, strict=True)]


def _series(who: str, history: Sequence[Mapping[str, Any]], field: str, known: str) -> tuple[list[int], list[float]]:
    """Steps and values of the entries that have a field; `known` says where it comes from."""
    for entry in history:
        if not isinstance(entry, Mapping) or "step" not in entry:
            raise ValueError(f"{who}: history must be dicts with a step, as of rx.metrics, got {shown(entry)}")
    found = [(entry["step"], entry[field]) for entry in history if entry.get(field) is not None]
    if not found:
        raise ValueError(f"{who}: history must have entries with {field!r}, as of {known}; got {len(history)} without")
    return [step for step, _ in found], [value for _, value in found]


def _axes(axes: Any) -> Any:
    if axes is not None:
        return axes
    try:
        return importlib.import_module("matplotlib.pyplot").gca()
    except ImportError as error:
        raise ImportError("rx.plot needs matplotlib: pip install 'rigl_jax[plot]'") from error
