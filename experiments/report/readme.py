"""Tables inside a document, written from committed records and never by hand."""

from __future__ import annotations

import difflib
import re
from pathlib import Path

from experiments.report.runs import read
from experiments.report.tables import markdown
from rigl_jax import trees

_OPEN = re.compile(r"<!-- table:(?P<name>[^ ]+) -->\n")
_CLOSE = "<!-- /table -->"


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
    parts, position = [], 0
    for match in _OPEN.finditer(text):
        name = match["name"]
        end = text.find(_CLOSE, match.end())
        following = _OPEN.search(text, match.end())
        if end < 0 or (following and following.start() < end):
            raise ValueError(f'report: expected "{_CLOSE}" after "{match[0].strip()}", found none')
        if not (records / name).is_dir():
            known = sorted(path.name for path in records.iterdir() if path.is_dir()) if records.is_dir() else []
            there = f"{known}{trees.hint(name, known)}"
            raise ValueError(f"report: no records named {name!r} for a table, there are {there}")
        parts += [text[position : match.end()], "\n", markdown(read(records / name)), "\n"]
        position = end
    return "".join([*parts, text[position:]])


def differences(old: str, new: str, name: str) -> str:
    """What `fill` would change, as a unified diff; "" if nothing."""
    return "".join(
        difflib.unified_diff(old.splitlines(keepends=True), new.splitlines(keepends=True), name, f"{name} (generated)")
    )
