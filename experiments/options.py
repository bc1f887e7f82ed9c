"""The options of a config's sections: which there are, and which values they take, read off the constructors."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Iterable, Mapping
from typing import Any, NamedTuple

from rigl_jax import checks, trees


def unknown(where: str, what: str, given: str, known: Iterable[str]) -> ValueError:
    """The error for a word that is not in the list, with the nearest one that is."""
    known = list(known)
    expected = f"{', '.join(known)}{trees.hint(given, known)}"
    return ValueError(f"{where}: unknown {what} {given!r}, expected one of {expected}")


class Options(NamedTuple):
    """The options of a constructor.

    Attributes:
      named: `{name: parameter}`.
      required: those without a default.
      open_ended: whether it hands others on.
    """

    named: dict[str, inspect.Parameter]
    required: set[str]
    open_ended: bool


def options(constructor: Callable[..., Any], fixed: int) -> Options:
    """What a constructor takes beyond its `fixed` leading arguments."""
    parameters = list(inspect.signature(constructor).parameters.values())[fixed:]
    named = [p for p in parameters if p.kind in (p.KEYWORD_ONLY, p.POSITIONAL_OR_KEYWORD)]
    named = [p for p in named if p.name not in ("parent", "name")]  # what linen adds to every module
    required = {p.name for p in named if p.default is p.empty}
    return Options({p.name: p for p in named}, required, any(p.kind is p.VAR_KEYWORD for p in parameters))


def choose(
    where: str, table: Mapping[str, Callable[..., Any]], section: Mapping[str, Any], fixed: int = 0
) -> Callable[..., Any]:
    """The entry that `section["name"]` asks for, with its options bound.

    Args:
      where: the section's name, for errors.
      table: `{name: constructor}`.
      section: the name and the options.
      fixed: how many leading arguments the caller will give.

    Raises:
      ValueError: no name, an unknown name, an option that no entry of the table takes, a required one missing, or one
        of the wrong kind.
    """
    given = dict(section)
    name = given.pop("name", None)
    if not isinstance(name, str) or name not in table:
        raise unknown(f"config.{where}.name", "name", str(name), table)
    own = options(table[name], fixed)
    known = set().union(*(options(entry, fixed).named for entry in table.values()))
    for option in given:
        if option not in known:
            raise unknown(f"config.{where}", "option", option, sorted(known))
    missing = sorted(own.required - given.keys())
    if missing:
        raise ValueError(f"config.{where}: {name} needs the option {missing[0]!r}, which is not given")
    for option in own.named.keys() & given.keys():
        check_kind(f"config.{where}.{option}", own.named[option], given[option], least=int(where == "model"))
    bound = {k: tuple(v) if isinstance(v, list) else v for k, v in given.items() if own.open_ended or k in own.named}
    return functools.partial(table[name], **bound)


def check_kind(where: str, parameter: inspect.Parameter, value: Any, *, least: int = 0) -> None:
    """Checks a value by a parameter's annotation.

    Args:
      where: the option's full name, for the error.
      parameter: of the constructor. An annotation that is not known here leaves the value to the constructor.
      value: from the config.
      least: the smallest whole number; numbers with a fraction are at least 0 anyway.

    Raises:
      ValueError: says what was expected.
    """
    kind = kind_of(parameter)
    kind = "Sequence[int]" if kind == "Sequence" else kind
    if value is None and (parameter.default is None or "None" in kind):
        return
    kind = "share" if parameter.name in _SHARES else "dtype" if parameter.name == "dtype" else kind.split(" | ")[0]
    if kind in _FUNCTIONS:
        raise ValueError(f"{where}: takes a function, which a config cannot name, got {value!r}; leave it out")
    expected, fits = _KINDS.get(kind, ("", lambda value, least: True))
    if not fits(value, least):
        raise ValueError(f"{where}: expected {expected.format(least=least)}, got {value!r}")


def kind_of(parameter: inspect.Parameter) -> str:
    """A parameter's annotation as it is written."""
    annotation = parameter.annotation
    return annotation if isinstance(annotation, str) else getattr(annotation, "__name__", str(annotation))


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and abs(value) < 1e30


def _wholes(value: Any, least: int) -> bool:
    return isinstance(value, (list, tuple)) and all(checks.is_whole(each, least) for each in value)


_SHARES = ("dropout", "momentum", "b1", "b2")
_FUNCTIONS = ("Score", "Signal", "Callable")
_DTYPES = ("float32", "bfloat16", "float16")
_KINDS: dict[str, tuple[str, Callable[[Any, int], bool]]] = {
    "bool": ("True or False", lambda value, least: isinstance(value, bool)),
    "int": ("a whole number from {least} to below 2**31", checks.is_whole),
    "float": ("a number from 0 to below 1e30", lambda value, least: _is_number(value) and value >= 0),
    "share": ("a number in [0, 1)", lambda value, least: _is_number(value) and 0 <= value < 1),
    "str": ("a word", lambda value, least: isinstance(value, str)),
    "tuple[int, ...]": ("whole numbers, each from {least} to below 2**31", _wholes),
    "Sequence[int]": ("whole numbers, each from {least} to below 2**31", _wholes),
    "dtype": (f"one of {', '.join(_DTYPES)}", lambda value, least: value in _DTYPES),
}
