"""The run directory: the files of one run.

    config.json  env.json  metrics.jsonl  summary.json  checkpoints/  tensorboard/  lock

`metrics.jsonl` contains one JSON object a line, with a `kind` and a `step`, the number of training steps done. A run
without `summary.json` is not finished. The process that trains locks the file `lock`.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from experiments.io import files
from experiments.io.environment import environment


def make(workdir: Path) -> None:
    """Makes the run directory, if it is missing.

    Raises:
      OSError: one line that names it.
    """
    with files.one_line_errors(workdir):
        workdir.mkdir(parents=True, exist_ok=True)


def begin(workdir: Path, config: Mapping[str, Any]) -> None:
    """Makes the run directory and writes config and environment, unless an earlier start has."""
    make(workdir)
    if not (workdir / "env.json").exists():
        files.write_json(workdir / "env.json", environment())
    if not (workdir / "config.json").exists():
        files.write_json(workdir / "config.json", dict(config))


SUMMARY = ("test_accuracy", "steps", "seed", "method", "final_sparsity", "flops_inference_x_dense", "seconds")
"""Fields of `summary.json` that commands read."""


def read_summary(workdir: Path) -> dict[str, Any] | None:
    """The summary of a finished run, None for an unfinished one.

    Raises:
      ValueError: the file is damaged; it names the fields that are missing.
    """
    summary = files.read_json(workdir / "summary.json")
    if summary is None:
        return None
    if missing := [name for name in SUMMARY if name not in summary]:
        raise ValueError(f"{workdir / 'summary.json'}: expected the summary of a run, it lacks {', '.join(missing)}")
    for name in SUMMARY:
        number = isinstance(summary[name], (int, float)) or (name == "test_accuracy" and summary[name] is None)
        if name != "method" and not number:
            raise ValueError(f"{workdir / 'summary.json'}: {name} must be a number, got {summary[name]!r:.50}")
    return summary


def finished(workdir: Path) -> bool:
    """Whether a run has a valid summary; a damaged one is written again from the last checkpoint."""
    try:
        return read_summary(workdir) is not None
    except ValueError:
        return False
