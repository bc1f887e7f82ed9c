"""Checks of single values: keys of a config, and arguments of the constructors that a config names.

A rule is `(who, name, value) -> value`, as in `rigl_jax.arguments`, whose own are used here too.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from rigl_jax import checks, trees
from rigl_jax.arguments import Rule, rule


def is_number(value: Any) -> bool:
    """Whether it is a finite real number, far from the largest of float32."""
    return isinstance(value, (int, float)) and not isinstance(value, bool) and abs(value) < 1e30


def _is_list(value: Any) -> bool:
    return isinstance(value, (list, tuple))


number = rule("a number, at least 0", lambda value: is_number(value) and value >= 0)
share = rule("a number in [0, 1)", lambda value: is_number(value) and 0 <= value < 1)
seed = rule(
    "a whole number from 0 to below 2**32",
    lambda value: isinstance(value, int) and not isinstance(value, bool) and 0 <= value < 2**32,
)
section = rule("a section", lambda value: isinstance(value, Mapping))
sizes = rule(
    "a list of whole numbers, each at least 1",
    lambda value: _is_list(value) and all(checks.is_whole(each, 1) for each in value),
)


def unknown(where: str, what: str, given: Any, known: Iterable[str]) -> ValueError:
    """The error for a word that is not in the list, with the nearest one that is."""
    known = list(known)
    expected = f"{', '.join(known)}{trees.hint(str(given), known)}"
    return ValueError(f"{where}: unknown {what} {given!r:.80}, expected one of {expected}")


def choice(known: Iterable[str]) -> Rule:
    """One of some words."""
    known = list(known)

    def check(who: str, name: str, value: Any) -> str:
        if not isinstance(value, str) or value not in known:
            raise unknown(who, name, value, known)
        return value

    return check


dtype = choice(("float32", "bfloat16", "float16"))


def check_fields(of: Any, **rules: Rule) -> None:
    """Checks the fields of an object by their rules."""
    for name, check in rules.items():
        check(type(of).__name__, name, getattr(of, name))
