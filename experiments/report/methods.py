"""How each method is called and drawn, everywhere the same."""

from __future__ import annotations

import zlib
from typing import NamedTuple

# Okabe and Ito's eight colours, told apart with every common form of colour blindness; yellow is too pale for lines.
_BLACK, _ORANGE, _SKY, _GREEN = "#333333", "#E69F00", "#56B4E9", "#009E73"
_BLUE, _VERMILION, _PURPLE = "#0072B2", "#D55E00", "#CC79A7"


class Style(NamedTuple):
    """How one method looks; the marker tells it apart without colour."""

    label: str
    colour: str
    marker: str
    dash: str = "-"


STYLES: dict[str, Style] = {
    "dense": Style("Dense", _BLACK, "s", "--"),
    "static": Style("Static", _SKY, "v"),
    "set": Style("SET", _ORANGE, "^"),
    "rigl": Style("RigL", _BLUE, "o"),
    "snfs": Style("SNFS", _GREEN, "D"),
    "dsr": Style("DSR", _PURPLE, "P"),
    "deep_r": Style("Deep R", _VERMILION, "X"),
    "snip": Style("SNIP", _GREEN, "<", ":"),
    "gmp": Style("GMP", _VERMILION, ">", "-."),
}
"""Known methods, in the order of tables and legends."""


def style(method: str) -> Style:
    """The style of a method; one without an entry gets a colour of its own that depends on its name alone."""
    method = method.removesuffix("_")  # rx.set_ bears the underscore for Python's sake only
    if method in STYLES:
        return STYLES[method]
    number = zlib.crc32(method.encode(errors="surrogatepass"))
    return Style(method, (_GREEN, _PURPLE, _VERMILION)[number % 3], "dph*"[number % 4], ("-.", ":")[number // 4 % 2])


def label(method: str) -> str:
    """The name in print: `"rigl"` -> `"RigL"`, `"set_"` -> `"SET"`."""
    return style(method).label


def rank(method: str) -> tuple[int, str]:
    """Sorts methods: known ones in the order of `STYLES`, then the others by name."""
    known = list(STYLES)
    name = method.removesuffix("_")
    return (known.index(name) if name in known else len(known), name)


def distribution_label(name: str) -> str:
    """The name of a distribution in print: `"erk"` -> `"ERK"`."""
    return {"erk": "ERK", "erdos_renyi": "Erdős-Rényi"}.get(name, name)
