"""Tables of runs: mean and standard deviation over seeds; nothing else is averaged."""

from __future__ import annotations

import math
import statistics
from collections.abc import Iterable, Sequence
from typing import NamedTuple

from rich import box
from rich.table import Table

from experiments import own, pages, texts
from experiments.config import DENSE, MASKS_ONLY
from experiments.report.methods import distribution_label, label, rank
from experiments.report.runs import Run, config_text, split
from experiments.resuming import harmless
from experiments.rules import is_number


class Key(NamedTuple):
    """What the runs of one table row share; a dense run has sparsity 0 and no distribution."""

    dataset: str
    model: str
    method: str
    sparsity: float
    distribution: str


class Row(NamedTuple):
    """One row: runs that differ in their seed alone.

    Attributes:
      key: dataset, model, method, requested sparsity in [0, 1), distribution.
      settings: other config values that distinguish this row from rows with the same key, `"steps=500"`, else "".
      n_seeds: how many runs.
      accuracy: mean test accuracy at the last step, in [0, 1]. Never the best over evaluations: that would select
        on the test set.
      accuracy_std: sample standard deviation (n - 1), NaN for one run.
      weights: mean number of weights in use (active, with all dense leaves).
      measured_sparsity: mean sparsity measured on the last masks.
      inference, training: mean FLOPs as a multiple of dense.
    """

    key: Key
    settings: str
    n_seeds: int
    accuracy: float
    accuracy_std: float
    weights: float
    measured_sparsity: float
    inference: float
    training: float


_NEEDED = (
    "dataset", "model", "method", "sparsity", "distribution", "seed", "test_accuracy", "active_params",
    "final_sparsity", "flops_inference_x_dense", "flops_training_x_dense",
)  # fmt: skip


def key(run: Run) -> Key:
    """The row that a finished run belongs to.

    Raises:
      ValueError: the summary lacks a field; the message names file and field.
    """
    summary = run.summary
    if summary is None:
        raise ValueError(f"report: run {run.name} has no summary.json, so no row")
    if missing := [name for name in _NEEDED if name not in summary]:
        raise ValueError(f"report: {run.path / 'summary.json'} lacks {', '.join(missing)}")
    for name in _NEEDED:
        word = name in ("dataset", "model", "method", "distribution")
        fits = (isinstance(summary[name], str) or summary[name] is None) if word else is_number(summary[name])
        if not fits:
            expected = "a word" if word else "a number"
            where = run.path / "summary.json"
            raise ValueError(f"report: {where}: {name} must be {expected}, got {summary[name]!r:.60}")
    dense = summary["method"] == DENSE
    return Key(
        dataset=str(summary["dataset"]),
        model=str(summary["model"]),
        method=str(summary["method"]),
        sparsity=0.0 if dense else float(summary["sparsity"]),
        distribution="" if dense else str(summary["distribution"]),
    )


def _separates(name: str) -> bool:
    """Whether runs that differ in a config value are different rows, not seeds of one.

    A resumed run may change its kernels and how often it is evaluated; in a table these are different rows.
    """
    return name in ("execution", "eval_every") or (name != "seed" and not harmless(name))


def _settings(run: Run) -> dict[str, str]:
    values = {name: value for name, value in config_text(run.config).items() if _separates(name)}
    if run.summary is not None and run.summary["method"] == DENSE:
        values = {name: value for name, value in values.items() if name.split(".")[0] not in MASKS_ONLY}
    return values


def _row(row_key: Key, settings: str, runs: Sequence[Run]) -> Row:
    summaries = [run.summary for run in runs if run.summary is not None]
    seeds = [summary["seed"] for summary in summaries]
    if len(set(seeds)) < len(seeds):
        names = ", ".join(run.name for run in runs)
        raise ValueError(f"report: expected one run a seed, got seeds {seeds} with equal configs: {names}")

    def mean(name: str) -> float:
        return statistics.fmean(summary[name] for summary in summaries)

    accuracies = [summary["test_accuracy"] for summary in summaries]
    return Row(
        key=row_key,
        settings=settings,
        n_seeds=len(runs),
        accuracy=mean("test_accuracy"),
        accuracy_std=statistics.stdev(accuracies) if len(accuracies) > 1 else math.nan,
        weights=mean("active_params"),
        measured_sparsity=mean("final_sparsity"),
        inference=mean("flops_inference_x_dense"),
        training=mean("flops_training_x_dense"),
    )


def group(runs: Iterable[Run]) -> dict[tuple[Key, str], list[Run]]:
    """Gathers finished runs by key and by every config value but the seed.

    Args:
      runs: any runs; the unfinished are left out (see `split`).

    Returns:
      `{(key, settings): runs}` in the order of a table: dataset, model, sparsity, then method. `settings` is ""
      unless several groups share a key; then it lists the config values in which they differ.
    """
    by_key: dict[Key, dict[tuple[tuple[str, str], ...], list[Run]]] = {}
    for run in split(runs)[0]:
        by_key.setdefault(key(run), {}).setdefault(tuple(sorted(_settings(run).items())), []).append(run)
    groups: dict[tuple[Key, str], list[Run]] = {}
    for row_key in sorted(by_key, key=lambda k: (k.dataset, k.model, k.sparsity, rank(k.method), k.distribution)):
        variants = by_key[row_key]
        shared = set.intersection(*(set(settings) for settings in variants))
        for settings, members in variants.items():
            text = ", ".join(f"{name}={value}" for name, value in settings if (name, value) not in shared)
            # If only one of the groups has a key, the other has no text for it.
            groups[row_key, text or ("" if len(variants) == 1 else "(base)")] = members
    return groups


def rows(runs: Iterable[Run]) -> list[Row]:
    """The table of finished runs, one row for runs that differ in their seed alone.

    Raises:
      ValueError: a summary lacks a field, or two runs of a row have the same seed.

    Example:
      >>> rows(read("runs/demo"))[0].accuracy  # doctest: +SKIP
      0.9583
    """
    return [_row(row_key, settings, members) for (row_key, settings), members in group(runs).items()]


def sparsity_text(value: float) -> str:
    """0.9 -> "90 %", 0.965 -> "96.5 %"."""
    return f"{100 * value:.6g} %"


def accuracy_text(row: Row) -> str:
    """Percent, with the standard deviation where there are several seeds: "97.41 ± 0.12"."""
    mean = f"{100 * row.accuracy:.2f}"
    return mean if math.isnan(row.accuracy_std) else f"{mean} ± {100 * row.accuracy_std:.2f}"


def _cells(row: Row) -> list[str]:
    sparsity = sparsity_text(row.key.sparsity)
    if row.key.distribution:
        sparsity += f", {distribution_label(row.key.distribution)}"
    # With structures and reallocation the sparsity may differ from the requested one; then both are shown.
    if abs(row.measured_sparsity - row.key.sparsity) > 0.005:
        sparsity += f" ({100 * row.measured_sparsity:.1f} % measured)"
    return [
        label(row.key.method),
        sparsity,
        accuracy_text(row),
        str(row.n_seeds),
        f"{row.weights:,.0f}",
        f"{row.inference:.3f}x",
        f"{row.training:.3f}x",
        row.settings,
    ]


_HEADERS = [
    "Method", "Sparsity", "Test accuracy, %", "Seeds", "Weights in use",
    "Inference FLOPs", "Training FLOPs", "Settings",
]  # fmt: skip
_TEXT_COLUMNS = frozenset({"Method", "Sparsity", "Settings"})


class Grid(NamedTuple):
    """The cells of a table, not yet escaped for an output format: one table for each dataset and model."""

    title: str
    headers: list[str]
    cells: list[list[str]]

    def right(self, header: str) -> bool:
        """Whether a column holds numbers."""
        return header not in _TEXT_COLUMNS


def grids(table: Iterable[Row]) -> list[Grid]:
    """Cuts rows into one grid for each (dataset, model); a column of settings only where rows need it."""
    parts: dict[tuple[str, str], list[Row]] = {}
    for row in table:
        parts.setdefault((row.key.dataset, row.key.model), []).append(row)
    out = []
    for (dataset, model), part in parts.items():
        width = len(_HEADERS) if any(row.settings for row in part) else len(_HEADERS) - 1
        cells = [[texts.plain(cell) for cell in _cells(row)[:width]] for row in part]
        out.append(Grid(texts.plain(f"{own.label(dataset)}, {own.label(model)}"), _HEADERS[:width], cells))
    return out


def unfinished_text(runs: Iterable[Run]) -> str:
    """One line that names the unfinished runs and how far they came, "" if there are none."""
    unfinished = split(runs)[1]
    return ", ".join(f"{texts.plain(run.name)} (step {run.last_step:,})" for run in unfinished)


def markdown(runs: Iterable[Run]) -> str:
    """All tables of the runs as Markdown, and a line on the unfinished ones; ends with a newline."""
    runs = list(runs)
    blocks = []
    for grid in grids(rows(runs)):
        head, *cells = ([texts.markdown(cell) for cell in line] for line in (grid.headers, *grid.cells))
        text = pages.table(head, cells, left=[not grid.right(header) for header in grid.headers])
        blocks.append(f"**{texts.markdown(grid.title)}**\n\n{text}")
    if names := unfinished_text(runs):
        blocks.append(f"Unfinished, not in the table: {texts.markdown(names)}.\n")
    return "\n".join(blocks)


def terminal(grid: Grid) -> Table:
    """A grid as a rich table."""
    table = Table(title=texts.terminal(grid.title), box=box.SIMPLE_HEAD, title_style="bold", header_style="bold")
    for header in grid.headers:
        # Two short lines instead of one long: eight columns have to fit a terminal of 80 characters.
        text = header.replace(" ", "\n", 1) if grid.right(header) else header
        table.add_column(text, justify="right" if grid.right(header) else "left", no_wrap=header != "Settings")
    for cells in grid.cells:
        table.add_row(*map(texts.terminal, cells))
    return table
