"""Curves over sparsity and seeds: the fair comparison that ShrinkBench asks for."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from rigl_jax import checks
from rigl_jax.arguments import arguments, function, sequence
from rigl_jax.messages import shown
from rigl_jax.tables import html_table, table

LEAST_POINTS, LEAST_SEEDS = 5, 3
"""What a curve needs at least: Blalock et al. (2020) ask for five points and for means with their spread."""


class Curve(NamedTuple):
    """Measures of a method at several sparsities and seeds; from `curve`.

    Attributes:
      at: the points, such as sparsities.
      seeds: of the runs at each point.
      values: `{measure: float64[points, seeds]}`.
    """

    at: tuple[float, ...]
    seeds: tuple[int, ...]
    values: dict[str, np.ndarray]

    def mean(self, measure: str) -> np.ndarray:
        """Over seeds, float64[points]."""
        return self.values[measure].mean(axis=1)

    def std(self, measure: str) -> np.ndarray:
        """Over seeds, of a sample (n - 1), float64[points]."""
        return self.values[measure].std(axis=1, ddof=1)

    def rows(self) -> list[list[str]]:
        """A line a point: mean +- standard deviation of each measure."""
        rows = [["at", *self.values]]
        for i, at in enumerate(self.at):
            parts = [f"{self.mean(name)[i]:.4g} +- {self.std(name)[i]:.2g}" for name in self.values]
            rows.append([f"{at:g}", *parts])
        return rows

    def __str__(self) -> str:
        return table(self.rows(), words=0)

    def _repr_html_(self) -> str:
        return html_table(self.rows(), words=0)


@arguments(run=function, at=sequence, seeds=sequence)
def curve(run: Callable[[float, int], Mapping[str, Any]], at: Sequence[float], seeds: Sequence[int]) -> Curve:
    """Runs a method at each point with each seed, and collects its measures (Blalock et al. 2020, ShrinkBench).

    Compare methods by curves that were run with the same points, seeds, first network and fine-tuning, each against a
    measure of the whole model, such as `compression` or `speedup`. With one point a method wins where another is not
    looked at.

    Args:
      run: `(point, seed) -> {measure: finite number}`, the same measures every time: such as prune to a sparsity,
        fine-tune, evaluate.
      at: the points, at least 5, all different.
      seeds: whole numbers, at least 3, all different.

    Raises:
      ValueError: too few points or seeds; a run that returns other measures than the first, or one that is no finite
        number.

    >>> from rigl_jax import diagnostics
    >>> run = lambda sparsity, seed: {"accuracy": 1 - sparsity**4 + seed / 100, "compression": 1 / (1 - sparsity)}
    >>> found = diagnostics.curve(run, (0, 0.5, 0.75, 0.9, 0.95), seeds=(0, 1, 2))
    >>> found.mean("compression").round(2).tolist()
    [1.0, 2.0, 4.0, 10.0, 20.0]
    >>> print(str(found).splitlines()[2])
     0.5  0.9475 +- 0.01       2 +- 0
    """
    points = tuple(checks.number("curve", "at", x, "must be numbers", lambda _: True) for x in at)
    if len(set(points)) < LEAST_POINTS or len(set(points)) < len(points):
        raise ValueError(f"curve: at must be at least {LEAST_POINTS} different points, got {shown(at)}")
    if not all(map(checks.is_whole, seeds)) or not LEAST_SEEDS <= len(set(seeds)) == len(seeds):
        raise ValueError(f"curve: seeds must be at least {LEAST_SEEDS} different whole numbers, got {shown(seeds)}")
    rows: dict[tuple[int, int], dict[str, float]] = {}
    for i, point in enumerate(points):
        for j, seed in enumerate(seeds):
            rows[i, j] = _measures(run(point, int(seed)), rows.get((0, 0)))
    values = {
        name: np.array([[rows[i, j][name] for j in range(len(seeds))] for i in range(len(points))])
        for name in rows[0, 0]
    }
    return Curve(points, tuple(map(int, seeds)), values)


def _measures(found: Any, first: dict[str, float] | None) -> dict[str, float]:
    names = found.keys() if isinstance(found, Mapping) else ()
    if not names or (first is not None and names != first.keys()):
        expected = "{measure: number}" if first is None else f"the measures {sorted(first)}"
        raise ValueError(f"curve: run must return {expected}, got {shown(found)}")
    numbers = {}
    for name, value in found.items():
        try:
            numbers[name] = float(value)
        except (TypeError, ValueError):
            numbers[name] = math.nan
        if not math.isfinite(numbers[name]):
            raise ValueError(f"curve: run must return one finite number for {name!r}, got {shown(value)}")
    return numbers
