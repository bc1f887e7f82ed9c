"""The command: a report of a folder of runs, or the tables of the README."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterable, Sequence
from pathlib import Path

from rich.console import Console

from experiments import pages, texts
from experiments.command import ROOT
from experiments.io import files
from experiments.report.page import draw, page
from experiments.report.readme import fill
from experiments.report.runs import Run, read
from experiments.report.tables import grids, markdown, rows, terminal, unfinished_text


def write(runs: Iterable[Run], out: str | Path, title: str) -> dict[str, Path]:
    """Writes every form of the report.

    Args:
      runs: what `read` gave.
      out: a folder, made if missing.
      title: the heading of the page.

    Returns:
      `{name: path}` of the files: "page" (index.html), "tables" (tables.md) and one PNG for each figure.
    """
    runs, out = list(runs), Path(out)
    out.mkdir(parents=True, exist_ok=True)
    figures = draw(runs)
    paths = {"page": out / "index.html", "tables": out / "tables.md"} | {n: out / f"{n}.png" for n in figures}
    files.write_atomically(paths["page"], page(runs, title, figures))
    files.write_atomically(paths["tables"], markdown(runs))
    for name, (data, _) in figures.items():
        files.write_atomically(paths[name], data)
    return paths


def show(runs: Sequence[Run], console: Console) -> None:
    """Prints the tables and names the unfinished runs."""
    for grid in grids(rows(runs)):
        console.print(terminal(grid))
    if names := unfinished_text(runs):
        console.print(texts.terminal(f"Unfinished, not in the table: {names}"))


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the command; returns its exit code (1: `--check` found differences, 2: bad input)."""
    parser = argparse.ArgumentParser("experiments.report", description="Tables and figures of finished runs.")
    parser.add_argument("runs", nargs="?", type=Path, help="a folder of run directories, at any depth")
    parser.add_argument("--out", type=Path, help="folder for index.html, tables.md and PNG figures [RUNS/report]")
    parser.add_argument("--title", help="heading of the page [the folder's name]")
    parser.add_argument("--readme", action="store_true", help="rewrite the tables of the README from the records")
    parser.add_argument("--check", action="store_true", help="change nothing; fail if the README's tables would change")
    parser.add_argument("--readme-file", type=Path, default=ROOT / "README.md", help="the document [README.md]")
    parser.add_argument("--records", type=Path, default=ROOT / "experiments" / "records", help="its records")
    options = parser.parse_args(arguments)
    if (options.runs is None) != (options.readme or options.check):
        parser.error("give either a folder of runs, or --readme (or --check)")
    try:
        if options.runs is None:
            page = options.readme_file
            new = {page: fill(page.read_text(encoding="utf-8"), options.records)}
            return pages.update(new, check=options.check, command="python -m experiments.report --readme")
        runs = read(options.runs)
        show(runs, Console())
        title = options.title or f"Runs of {options.runs.resolve().name}"
        paths = write(runs, options.out or options.runs / "report", title)
    except (ValueError, OSError) as error:
        print(texts.plain(error), file=sys.stderr)
        return 2
    print(f"report: {texts.plain(paths['page'])} and {len(paths) - 2} figures beside it")
    return 0
