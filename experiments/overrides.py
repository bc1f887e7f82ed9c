"""Values of a config that the command line sets: those that the config file has, and the options that it may have.

A config file names an optimizer, a method and so on, with some of their options. ml_collections sets what is there.
Here the others are set, whatever the order in which they are given: options of what a section's name can choose, axes
of the mesh, and None where an option takes it.
"""

from __future__ import annotations

import ast
from collections.abc import Mapping, Sequence
from typing import Any

from ml_collections import ConfigDict

from experiments.config import flat
from experiments.options import kind_of
from rigl_jax import trees

PREFIX = "config."


def split(argv: Sequence[str], config: Any) -> tuple[list[str], dict[str, str]]:
    """Parts a command line.

    Args:
      argv: the command line.
      config: what the config file gives.

    Returns:
      The command line without what is to be set here, and `{"optimizer.b2": text}`, what is.
    """
    rest, ours = list(argv), {}
    if not (given := _given(argv)) or not isinstance(config, ConfigDict):
        return rest, ours
    there = flat(config)
    for start, end, key, text in reversed(given):  # from the end, so that places stay as they are
        section = key.partition(".")[0]
        own = key not in there and key in _possible(section, key)
        if own or (key in there and text == "None" and _value(key, text) is None):
            ours.setdefault(key, text)  # the last one counts
            del rest[start:end]
    return rest, ours


def apply(config: Any, ours: Mapping[str, str]) -> None:
    """Sets them, in place."""
    if not ours:
        return
    config.unlock()
    for key, text in ours.items():
        section, _, option = key.partition(".")
        if option in config[section]:
            del config[section][option]  # it has a type, which None is not of
        config[section][option] = _value(key, text)
    config.lock()


def unknown(flag: str, known: Sequence[str]) -> ValueError:
    """The error for a flag that is none, with the nearest one that is."""
    near = trees.nearest(flag, known)
    return ValueError(f"main: unknown flag --{flag}" + (f"; did you mean --{near}?" if near else ""))


def refuse_unknown(argv: Sequence[str], config: Any) -> ValueError:
    """The error for the first --config.KEY that neither the config has nor one of its sections may have."""
    there, given = flat(config), [key for _, _, key, _ in _given(argv)]
    strange = next((key for key in given if key not in there), None)
    if strange is None:
        return ValueError(f"main: cannot set one of {', '.join(PREFIX + key for key in given)}")
    possible = _possible(strange.partition(".")[0], "")
    return unknown(PREFIX + strange, [PREFIX + key for key in [*there, *possible]])


def _given(argv: Sequence[str]) -> list[tuple[int, int, str, str]]:
    """`(start, end, key, text)` of each `--config.KEY=TEXT` or `--config.KEY TEXT`."""
    found = []
    for i, argument in enumerate(argv[1:], 1):
        flag, equals, text = argument.lstrip("-").partition("=")
        if argument.startswith("-") and flag.startswith(PREFIX):
            apart = not equals and i + 1 < len(argv) and not argv[i + 1].startswith("--")
            found.append((i, i + 1 + apart, flag.removeprefix(PREFIX), argv[i + 1] if apart else text))
    return found


def _possible(section: str, key: str) -> list[str]:
    """What a section may hold; any axis in a mesh."""
    from experiments import build  # here, because it takes seconds that a command without such options need not pay

    mesh = [key] if section == "mesh" and key.removeprefix("mesh.").isidentifier() else []
    return [f"{section}.{option}" for option in build.section_options(section)] + mesh


def _value(key: str, text: str) -> Any:
    """What a text stands for, by the kinds of the parameters that have the option's name."""
    from experiments import build

    section, _, option = key.partition(".")
    kinds = [kind_of(parameter) for parameter in build.section_options(section).get(option, ())]
    if text == "None" and any("None" in kind for kind in kinds):
        return None
    if kinds and all(kind.startswith("str") for kind in kinds):
        return text
    if text.lower() in ("true", "false"):
        return text.lower() == "true"
    try:
        return ast.literal_eval(text)
    except (ValueError, SyntaxError, RecursionError, MemoryError):
        return text
