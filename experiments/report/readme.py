"""Tables inside a document, written from committed records and never by hand."""

from __future__ import annotations

from pathlib import Path

from experiments import pages
from experiments.report.runs import read
from experiments.report.tables import markdown
from rigl_jax import trees


def fill(text: str, records: str | Path) -> str:
    """Replaces what stands between each `<!-- table:NAME -->` and the next `<!-- /table -->`.

    Args:
      text: the document.
      records: the folder that holds a folder of runs for each NAME.

    Returns:
      The document with every table made anew from `records/NAME`; without markers, the text as it was.

    Raises:
      ValueError: a table is not closed, there are no records of that name, or a record is damaged or unfinished.
    """
    records = Path(records)

    def table(name: str) -> str:
        if not (records / name).is_dir():
            known = sorted(path.name for path in records.iterdir() if path.is_dir()) if records.is_dir() else []
            there = f"{known}{trees.hint(name, known)}"
            raise ValueError(f"report: no records named {name!r} for a table, there are {there}")
        return markdown(read(records / name))

    return pages.fill(text, "table", table)
