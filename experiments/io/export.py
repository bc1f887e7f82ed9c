"""Copies the part of finished runs that is committed.

python -m experiments.io.export runs/fashion_mnist experiments/records/fashion_mnist
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from experiments import texts
from experiments.io import files
from experiments.io.run_directory import read_summary


def export(run: Path, records: Path, *, points: int = 40, pictures: bool = False) -> Path:
    """Copies the part of a finished run that is committed into `records/<name of the run>`.

    It consists of config, environment and summary, and of the eval lines and at most `points` evenly spaced masks
    lines of the metrics (the first and the last included), with floats rounded to 6 digits. `pictures` keeps the
    first-layer masks too, which are the largest lines.

    Raises:
      ValueError: the run is not finished.
    """
    if files.read_json(run / "summary.json") is None:
        raise ValueError(f"export: {run.name} is not finished, it has no summary.json")
    if absent := [name for name in ("config.json", "env.json", "metrics.jsonl") if not (run / name).exists()]:
        raise ValueError(f"export: {run.name} has no {absent[0]}")
    target = records / run.name
    target.mkdir(parents=True, exist_ok=True)
    for name in ("config.json", "env.json", "summary.json"):
        value = files.read_json(run / name) or {}
        if name == "config.json" and isinstance(value.get("dataset"), dict):
            value["dataset"].pop("data_dir", None)  # a path of the machine the run was made on
        files.write_json(target / name, value)
    lines = files.read_lines(run / "metrics.jsonl")
    masks = [line for line in lines if line["kind"] == "masks"]
    spaced = {round(i * (len(masks) - 1) / max(points - 1, 1)) for i in range(min(points, len(masks)))}
    dropped = {id(line) for i, line in enumerate(masks) if len(masks) > points and i not in spaced}
    kinds = {"eval", "masks"} | ({"first_layer"} if pictures else set())
    kept = [line for line in lines if line["kind"] in kinds and id(line) not in dropped]
    text = "".join(json.dumps(_rounded(line), separators=(",", ":")) + "\n" for line in kept)
    files.write_atomically(target / "metrics.jsonl", text)
    return target


def _rounded(value: Any) -> Any:
    if isinstance(value, float):
        return round(value, 6)
    return {k: _rounded(v) for k, v in value.items()} if isinstance(value, dict) else value


def main(argv: Sequence[str] | None = None) -> int:
    """The command; returns the exit code."""
    parser = argparse.ArgumentParser(description="Copy what is worth committing of the finished runs of a study.")
    parser.add_argument("study", type=Path, help="folder of run directories")
    parser.add_argument("records", type=Path, help="folder to write to")
    arguments = parser.parse_args(argv)
    try:
        for path in sorted(arguments.study.glob("*/summary.json")):
            summary = read_summary(path.parent) or {}
            # One seed's pictures are enough to look at.
            print(texts.plain(export(path.parent, arguments.records, pictures=summary.get("seed") == 0).name))
    except (ValueError, OSError) as error:
        print(f"error: {texts.plain(error)}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
