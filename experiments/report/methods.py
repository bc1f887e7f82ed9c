"""How each method is called and drawn, everywhere the same."""

from __future__ import annotations

import zlib
from typing import NamedTuple

from experiments import own
from experiments.config import DENSE
from rigl_jax.algorithms import METHODS

# Okabe and Ito's eight colours, told apart with every common form of colour blindness; yellow is too pale for lines.
_BLACK, _ORANGE, _SKY, _GREEN = "#333333", "#E69F00", "#56B4E9", "#009E73"
_BLUE, _VERMILION, _PURPLE = "#0072B2", "#D55E00", "#CC79A7"


class Style(NamedTuple):
    """How one method is drawn; the marker distinguishes it without colour."""

    label: str
    colour: str
    marker: str
    dash: str = "-"


_COLOURS = (_SKY, _ORANGE, _BLUE, _GREEN, _PURPLE, _VERMILION)
_MARKERS = "v^oDPX<>dph*"
_DASHES = ("-", "-.", ":")


def style(method: str) -> Style:
    """The style of a method: by its place in the registry, or of a user's own method by its name alone."""
    if method == DENSE:
        return Style("Dense", _BLACK, "s", "--")
    method = method.removesuffix("_")  # rx.set_ bears the underscore for Python's sake only
    known = method in METHODS
    number = list(METHODS).index(method) if known else 3 + zlib.crc32(method.encode(errors="surrogatepass")) % 33
    turn, place = divmod(number, len(_COLOURS))
    name = METHODS[method].label if known else own.label(method)
    return Style(name, _COLOURS[place], _MARKERS[number % len(_MARKERS)], _DASHES[turn % len(_DASHES)])


def label(method: str) -> str:
    """The name in print: `"rigl"` -> `"RigL"`, `"own.py:mine"` -> `"mine"`."""
    return style(method).label


def rank(method: str) -> tuple[int, str]:
    """Sorts methods: dense, those of the registry in its order, then the others by name."""
    known, name = [DENSE, *METHODS], method.removesuffix("_")
    return (known.index(name) if name in known else len(known), name)


def distribution_label(name: str) -> str:
    """The name of a distribution in print: `"erk"` -> `"ERK"`."""
    return {"erk": "ERK", "erdos_renyi": "Erdős-Rényi"}.get(name, name)
