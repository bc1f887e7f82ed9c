"""Records of studies that run cell by cell: one JSON line a cell, so that a second start runs only what is missing."""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

FOLDER = Path(__file__).parents[1] / "records"
"""Each study has a folder of its own in it, with a file for each model."""
SOURCE = "/usr/share/datasets/fashion-mnist"


def read(folder: Path, cell: Any) -> dict[Any, dict[str, Any]]:
    """All records of a folder, by cell; `cell` is the NamedTuple whose fields every record has."""
    lines = [line for path in sorted(folder.glob("*.jsonl")) for line in path.read_text().splitlines()]
    return {cell(*(record[field] for field in cell._fields)): record for record in map(json.loads, lines)}


def append(folder: Path, record: Mapping[str, Any]) -> None:
    """Adds a record to the file of its model; makes the folder if there is none."""
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / f"{record['model']}.jsonl").open("a") as file:
        file.write(json.dumps(record) + "\n")


def parser(about: str, folder: Path, models: Iterable[str]) -> argparse.ArgumentParser:
    """The flags that all studies have: `--source`, `--records`, `--model`.

    Args:
      about: the docstring of the module; its first line is shown.
      folder: of the records, unless the flag says another.
      models: names that `--model`, which may be repeated, can have.
    """
    made = argparse.ArgumentParser(description=about.splitlines()[0])
    made.add_argument("--source", default=SOURCE, help="folder of the four IDX files")
    made.add_argument("--records", type=Path, default=folder, help="folder of the records")
    made.add_argument("--model", action="append", choices=list(models))
    return made
