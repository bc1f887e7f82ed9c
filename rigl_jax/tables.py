"""Tables in plain text, for whoever prints a plan, its cost or its kernels."""

from __future__ import annotations

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
