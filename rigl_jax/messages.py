"""Values and names in error messages, shortened so that a message is always one line of limited length."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

LONGEST = 160
MOST = 12


def printable(name: str) -> str:
    r"""The name with line ends and other control characters escaped.

    >>> printable("a\nb"), printable("größe")
    ('a\\nb', 'größe')
    """
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in name)


def shown(value: Any) -> str:
    """The value's repr on one line, its middle left out where it is long; of an array with axes, type and shape.

    >>> import numpy as np
    >>> shown(2.5), shown(np.ones((2, 3))), len(shown([0] * 100_000))
    ('2.5', 'float64[2, 3]', 160)
    """
    try:
        if hasattr(value, "dtype") and isinstance(value.shape, tuple) and value.shape:
            return f"{value.dtype}{list(value.shape)}"
        # Slices first: only what may be shown of a long one is made into text.
        text = repr(value[: 10 * LONGEST] if isinstance(value, (str, bytes, list, tuple)) else value)
    except Exception:  # the repr of an unknown type may raise anything
        text = f"<{type(value).__name__}>"
    return line(text)


def line(text: str, longest: int = LONGEST) -> str:
    """A text on one line: control characters escaped, the middle left out where it is long."""
    text = printable(" ".join(text.split()))
    half = (longest - 5) // 2
    return text if len(text) <= longest else f"{text[: longest - 5 - half]} ... {text[-half:]}"


def kind(value: Any) -> str:
    """What a value is: numbers, words and arrays as `shown`, of anything else the type, for a repr may be a whole tree.

    >>> kind(3), kind({"a": 1})
    ('3', 'dict')
    """
    plain = isinstance(value, (str, int, float, type(None))) or (hasattr(value, "dtype") and hasattr(value, "shape"))
    return shown(value) if plain else type(value).__name__


def listed(names: Iterable[str]) -> str:
    """Names with commas, printable, the first few where there are many; "none" where there is none.

    >>> listed("abc")
    'a, b, c'
    >>> listed(map(str, range(1000)))
    '0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11 and 988 more'
    """
    names = list(names)
    parts = [printable(name if len(name) <= LONGEST else f"{name[:LONGEST]}...") for name in names[:MOST]]
    first = ", ".join(parts)
    return (first if len(names) <= MOST else f"{first} and {len(names) - MOST} more") or "none"
