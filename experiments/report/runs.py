"""Run directories as values."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

from experiments.config import flat
from experiments.io import files
from experiments.rules import is_number
from rigl_jax import checks


class Run(NamedTuple):
    """One run directory.

    Attributes:
      name: its path below the folder that was read, `"rigl-0.9-s0"`.
      path: its folder.
      config: `config.json`.
      env: `env.json`, empty where there is none.
      metrics: the lines of `metrics.jsonl`, in order.
      summary: `summary.json`, or None: the run is unfinished.
    """

    name: str
    path: Path
    config: dict[str, Any]
    env: dict[str, Any]
    metrics: list[dict[str, Any]]
    summary: dict[str, Any] | None

    @property
    def last_step(self) -> int:
        """The last step that left a line, 0 where none did."""
        return max((line["step"] for line in self.metrics), default=0)

    def of_kind(self, kind: str) -> list[dict[str, Any]]:
        """The metric lines of one kind: `"train"`, `"eval"`, `"masks"` or `"first_layer"`."""
        return [line for line in self.metrics if line["kind"] == kind]


def _json(path: Path) -> dict[str, Any] | None:
    try:
        return files.read_json(path)
    except ValueError as error:
        raise ValueError(f"report: {error}") from None


def _lines(path: Path, *, finished: bool) -> list[dict[str, Any]]:
    if not path.exists():
        if finished:
            raise ValueError(f"report: {path} is missing although the run has a summary.json")
        return []
    try:
        # A run that is still training may be in the middle of writing its last line.
        lines = files.read_lines(path, growing=not finished)
    except ValueError as error:
        raise ValueError(f"report: {error}") from None
    for number, line in enumerate(lines, 1):
        for field, (fits, expected) in _FIELDS.get(line["kind"], {}).items():
            if not fits(line.get(field)):
                given = f"got {line[field]!r:.60}" if field in line else "which is missing"
                where = f"{path} line {number}: {field} of a line of kind {line['kind']}"
                raise ValueError(f"report: {where} must be {expected}, {given}")
    return lines


def _is_shape(value: Any) -> bool:
    return isinstance(value, list) and 0 < len(value) <= 8 and all(checks.is_whole(size, 1) for size in value)


_NUMBER = (lambda value: value is None or is_number(value), "a number")
_TEXT = (lambda value: isinstance(value, str), "a word")
_FIELDS: dict[str, dict[str, tuple[Callable[[Any], bool], str]]] = {
    "eval": {"accuracy": _NUMBER},
    "masks": {
        "density": (lambda value: isinstance(value, dict) and all(map(is_number, value.values())), "numbers by leaf"),
        **dict.fromkeys(("dropped_fraction", "grown_fraction", "explored"), _NUMBER),
    },
    "first_layer": {"leaf": _TEXT, "shape": (_is_shape, "a list of sizes"), "rows_packed": _TEXT},
}
"""What is read of a line, and what it must be."""


def read_run(path: str | Path, name: str | None = None) -> Run:
    """Reads one run directory.

    Args:
      path: a folder with a `config.json`.
      name: what to call the run; the folder's name if not given.

    Returns:
      The run. Its `summary` is None where `summary.json` is missing.

    Raises:
      ValueError: a file is missing or damaged; the message names the file and, in `metrics.jsonl`, the line.
    """
    path = Path(path)
    if (config := _json(path / "config.json")) is None:
        raise ValueError(f"report: expected a run directory, but {path} has no config.json")
    summary = _json(path / "summary.json")
    return Run(
        name=name or path.name,
        path=path,
        config=config,
        env=_json(path / "env.json") or {},
        metrics=_lines(path / "metrics.jsonl", finished=summary is not None),
        summary=summary,
    )


def read(root: str | Path) -> list[Run]:
    """Reads every run directory in or below a folder, in order of their names.

    Args:
      root: a run directory, or a folder that holds some at any depth.

    Returns:
      The runs, finished and unfinished.

    Raises:
      ValueError: the folder does not exist or holds no run, or a run is damaged.

    Example:
      >>> runs = read("runs/demo")  # doctest: +SKIP
      >>> [run.name for run in runs if run.summary is None]  # doctest: +SKIP
      ['rigl-s2']
    """
    root = Path(root)
    if not root.is_dir():
        raise ValueError(f"report: expected a folder of runs, but there is no folder {root}")
    found = sorted(_run_directories(root))
    if not found:
        raise ValueError(f"report: expected run directories below {root}, but none has a config.json")
    return [read_run(path, path.relative_to(root).as_posix() if path != root else path.name) for path in found]


def _run_directories(root: Path) -> Iterator[Path]:
    for folder, below, names in os.walk(root):
        if "config.json" in names:
            yield Path(folder)
            below.clear()  # checkpoints are many files, and no runs


def split(runs: Iterable[Run]) -> tuple[list[Run], list[Run]]:
    """Parts runs into the finished and the unfinished, each in the order given."""
    runs = list(runs)
    return [r for r in runs if r.summary is not None], [r for r in runs if r.summary is None]


def config_text(values: dict[str, Any]) -> dict[str, str]:
    """A config or environment as `{"seed": "0"}`: values as JSON text, so that they compare and print."""
    return {key: json.dumps(value) for key, value in flat(values).items()}
