"""Records of studies that run cell by cell: one JSON line a cell, so that a second start runs only what is missing."""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

from experiments.io.environment import environment

FOLDER = Path(__file__).parents[1] / "records"
"""Each study has a folder of its own in it, with a file for each model."""
SOURCE = "/usr/share/datasets/fashion-mnist"
FACTS = ("git_commit", "processor", "jax", "time")
"""What a line says of where it was made."""
CLOCKS: Mapping[str, Callable[[], float]] = {"seconds": time.monotonic, "cpu_seconds": time.process_time}
"""What a line can say of how long its cell took."""


def read(folder: Path, cell: Any) -> dict[Any, dict[str, Any]]:
    """All records of a folder, by cell; `cell` is the NamedTuple whose fields every record has."""
    lines = [line for path in sorted(folder.glob("*.jsonl")) for line in path.read_text().splitlines()]
    return {cell(*(record[field] for field in cell._fields)): record for record in map(json.loads, lines)}


def append(folder: Path, record: Mapping[str, Any]) -> None:
    """Adds a record to the file of its model; makes the folder if there is none."""
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / f"{record['model']}.jsonl").open("a") as file:
        file.write(json.dumps(record) + "\n")


def run(
    folder: Path,
    wanted: Iterable[Any],
    find: Callable[[Any], Mapping[str, Any]],
    *,
    clock: str,
    tell: str | None = None,
) -> None:
    """Runs cells in turn; the record of each is on disk before the next begins.

    Args:
      folder: of the records.
      wanted: NamedTuples with a field `model`.
      find: `cell -> facts`, which the record holds beside the fields of the cell.
      clock: one of `CLOCKS`, which is a field of the record too.
      tell: a fact that is printed beside cell and time.
    """
    now = CLOCKS[clock]
    for cell in wanted:
        started, facts = now(), environment()
        record = {**cell._asdict(), **find(cell)}
        record[clock] = round(now() - started, 1)
        append(folder, record | {"environment": {name: facts[name] for name in FACTS}})
        told = () if tell is None else (record.get(tell),)
        print(time.strftime("%H:%M:%S"), *cell, *told, record[clock], flush=True)


def parser(about: str, folder: Path, models: Iterable[str]) -> argparse.ArgumentParser:
    """The flags that studies share: `--records`, and `--source` and `--model` where there are several models.

    Args:
      about: the docstring of the module; its first line is shown.
      folder: of the records, unless the flag says another.
      models: names that `--model`, which may be repeated, can have; none for a study of generated data.
    """
    made = argparse.ArgumentParser(description=about.splitlines()[0])
    made.add_argument("--records", type=Path, default=folder, help="folder of the records")
    if names := list(models):
        made.add_argument("--source", default=SOURCE, help="folder of the four IDX files")
        made.add_argument("--model", action="append", choices=names)
    return made
