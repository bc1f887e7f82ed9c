"""Tables as plain text and as HTML, for whoever prints a plan, its cost or its kernels."""

from __future__ import annotations

import html
from collections.abc import Sequence


def table(rows: Sequence[Sequence[str]], *, words: int) -> str:
    """Lines of aligned cells, the head first; the first `words` columns to the left, numbers to the right.

    >>> print(table([("leaf", "size"), ("kernel", "12"), ("b", "3")], words=1))
    leaf    size
    kernel    12
    b          3
    """
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return "\n".join(
        "  ".join(
            cell.ljust(width) if i < words else cell.rjust(width)
            for i, (cell, width) in enumerate(zip(row, widths, strict=True))
        ).rstrip()
        for row in rows
    )


def html_table(rows: Sequence[Sequence[str]], *, words: int, note: str = "") -> str:
    """The same as HTML for a notebook, with every cell escaped: the name of a leaf may hold anything.

    >>> html_table([("leaf",), ("<b>",)], words=1)
    '<table><tr><th style="text-align: left">leaf</th></tr><tr><td style="text-align: left">&lt;b&gt;</td></tr></table>'
    """
    lines = []
    for number, row in enumerate(rows):
        kind = "td" if number else "th"
        cells = (
            f'<{kind} style="text-align: {"left" if i < words else "right"}">{html.escape(cell)}</{kind}>'
            for i, cell in enumerate(row)
        )
        lines.append(f"<tr>{''.join(cells)}</tr>")
    return f"<table>{''.join(lines)}</table>" + (f"<p>{html.escape(note)}</p>" if note else "")
