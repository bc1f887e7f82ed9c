"""Generated pages: tables filled in between markers, and files that are written or compared."""

from __future__ import annotations

import argparse
import difflib
import re
import statistics
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import numpy as np

from experiments.io import files


def fill(text: str, kind: str, make: Callable[[str], str]) -> str:
    """Replaces what stands between each `<!-- KIND:NAME -->` and the next `<!-- /KIND -->` by `make(NAME)`.

    Raises:
      ValueError: a marker has no end; or what `make` raises.
    """
    opening, closing = re.compile(rf"<!-- {kind}:(?P<name>[^ ]+) -->\n"), f"<!-- /{kind} -->"
    parts, position = [], 0
    for match in opening.finditer(text):
        end, following = text.find(closing, match.end()), opening.search(text, match.end())
        if end < 0 or (following and following.start() < end):
            raise ValueError(f'pages: expected "{closing}" after "{match[0].strip()}", found none')
        parts += [text[position : match.end()], "\n", make(match["name"]), "\n"]
        position = end
    return "".join([*parts, text[position:]])


def table(head: Sequence[str], rows: Sequence[Sequence[str]], *, left: Sequence[bool] = ()) -> str:
    """A Markdown table.

    Args:
      head: a title a column.
      rows: a text a column; pipes must be escaped.
      left: which columns hold text and not numbers; the first alone if not given.
    """
    rule = ["---" if text else "---:" for text in left or [True, *[False] * (len(head) - 1)]]
    return "".join(f"| {' | '.join(line)} |\n" for line in (head, rule, *rows))


def spread(values: Sequence[float] | np.ndarray | None, digits: int = 2) -> str:
    """Mean and sample standard deviation as text; empty where there are no values (None)."""
    return "" if values is None else f"{statistics.mean(values):.{digits}f} ± {statistics.stdev(values):.{digits}f}"


def update(pages: Mapping[Path, str], *, check: bool, command: str) -> int:
    """Writes pages that differ from what they should be; with `check` prints the differences instead.

    Args:
      pages: `{path: text}`.
      check: change nothing.
      command: what brings the pages up to date, for the message.

    Returns:
      An exit code: 1 where `check` found a difference.
    """
    stale = 0
    for path, text in pages.items():
        old = path.read_text(encoding="utf-8") if path.exists() else ""
        stale += old != text
        if check and old != text:
            lines = (old.splitlines(keepends=True), text.splitlines(keepends=True))
            print("".join(difflib.unified_diff(*lines, path.name, f"{path.name} (generated)")), end="")
            print(f"{path.name} is out of date; run `{command}`")
        elif old != text:
            files.write_atomically(path, text)
    if not stale:
        print(f"{', '.join(path.name for path in pages)}: up to date")
    return int(check and stale > 0)


def main(
    module: str,
    about: str,
    make: Callable[[], Mapping[Path, str]],
    *,
    draw: Callable[[], object] = lambda: None,
    arguments: Sequence[str] | None = None,
) -> int:
    """The command that writes pages, or with `--check` only compares them; returns its exit code.

    Args:
      module: `"experiments.gallery"`.
      about: for --help.
      make: gives `{path: text}`.
      draw: draws the pictures of the pages; not called by `--check`.
      arguments: of the command line.
    """
    parser = argparse.ArgumentParser(
        f"python -m {module}", description=about, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--check", action="store_true", help="change nothing; fail if a page is out of date")
    check = parser.parse_args(arguments).check
    if not check:
        draw()
    return update(make(), check=check, command=f"python -m {module}")
