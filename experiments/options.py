"""From a section of a config, a name and its options, to the object of that name."""

from __future__ import annotations

import contextlib
import functools
import inspect
from collections.abc import Callable, Iterator, Mapping
from typing import Any, NamedTuple

from experiments import own
from experiments.rules import unknown


class Options(NamedTuple):
    """The options of a constructor.

    Attributes:
      named: their names, and the defaults.
      required: those without a default.
      open_ended: whether it hands others on.
    """

    named: dict[str, Any]
    required: set[str]
    open_ended: bool


def parameters(constructor: Callable[..., Any]) -> list[inspect.Parameter]:
    """What a function, or the constructor of a class, takes."""
    found = inspect.unwrap(constructor)
    if not inspect.isclass(found):
        return list(inspect.signature(found).parameters.values())
    return list(inspect.signature(found.__init__).parameters.values())[1:]  # NNX hides it behind a metaclass


def options(constructor: Callable[..., Any], fixed: int) -> Options:
    """What a constructor takes beyond its `fixed` leading arguments."""
    given = parameters(constructor)[fixed:]
    named = [p for p in given if p.kind in (p.KEYWORD_ONLY, p.POSITIONAL_OR_KEYWORD)]
    named = [p for p in named if p.name not in ("parent", "name", "rngs")]  # what Flax adds, and is given
    required = {p.name for p in named if p.default is p.empty}
    return Options({p.name: p.default for p in named}, required, any(p.kind is p.VAR_KEYWORD for p in given))


@contextlib.contextmanager
def key(where: str) -> Iterator[None]:
    """Adds a key of the config to the errors of a constructor.

    Raises:
      ValueError: in place of a ValueError or TypeError.
    """
    try:
        yield
    except (ValueError, TypeError) as error:
        raise ValueError(f"config.{where}: {str(error).removeprefix(f'config.{where}: ')}") from error


def find(where: str, table: Mapping[str, Callable[..., Any]], name: Any) -> Callable[..., Any]:
    """The object of a name: an entry of a table, or a user's own code.

    Raises:
      ValueError: neither.
    """
    if own.is_own(name):
        with key(f"{where}.name"):
            found = own.load(name)
            if not callable(found):
                raise ValueError(f"{name} must be a function or a class, got {type(found).__name__}")
            return found
    if not isinstance(name, str) or name not in table:
        raise unknown(f"config.{where}.name", "name", name, [*table, "your own FILE.py:NAME"])
    return table[name]


def known_options(where: str, table: Mapping[str, Callable[..., Any]], name: Any, fixed: int = 0) -> Options:
    """What a section may hold beside a name: the options of its entry, and those of all entries of the table.

    Raises:
      ValueError: an unknown name.
    """
    taken = options(find(where, table, name), fixed)
    others = {option: None for entry in table.values() for option in options(entry, fixed).named}
    return Options({**others, **taken.named}, taken.required, taken.open_ended and own.is_own(name))


def choose(
    where: str, table: Mapping[str, Callable[..., Any]], section: Mapping[str, Any], fixed: int = 0
) -> Callable[..., Any]:
    """The object of `section["name"]`, with its options bound.

    Args:
      where: the section's name, for errors.
      table: `{name: constructor}`.
      section: the name and the options.
      fixed: how many leading arguments the caller will give.

    Returns:
      A function of these arguments. What it raises for a wrong value begins with the section's key.

    Raises:
      ValueError: no name, an unknown name, an option that neither it nor an entry of the table takes, or a required one
        missing.
    """
    given = dict(section)
    name = given.pop("name", None)
    constructor, known = find(where, table, name), known_options(where, table, name, fixed)
    taken = options(constructor, fixed)
    for option in given:
        if option not in known.named and not known.open_ended:
            raise unknown(f"config.{where}", "option", option, ["name", *sorted(known.named)])
    if missing := sorted(taken.required - given.keys()):
        raise ValueError(f"config.{where}: {section['name']} needs the option {missing[0]!r}, which is not given")
    for option in given.keys() & taken.named.keys():
        if isinstance(taken.named[option], bool) and not isinstance(given[option], bool):  # a word would be true
            raise ValueError(f"config.{where}: {option} must be True or False, got {given[option]!r:.80}")
    bound = {
        k: tuple(v) if isinstance(v, list) else v for k, v in given.items() if taken.open_ended or k in taken.named
    }

    @functools.wraps(constructor, updated=())
    def made(*arguments: Any, **others: Any) -> Any:
        with key(where):
            return constructor(*arguments, **bound, **others)

    return made
