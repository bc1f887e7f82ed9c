"""The command line that `experiments.main` and `experiments.launch` share: a config file and what sets its keys.

    --config FILE.py[:VARIANT]    the config is what `get_config(VARIANT)` of the file gives
    --config.KEY=VALUE            sets a key of it, as --config.method.name=set; the last one counts

VALUE is a word, or a number, True, False, None or a tuple as Python writes it. A section takes every option of
the entry that it names, also one that the file does not set: --config.optimizer.name=adam --config.optimizer.b2=0.99.
Where the file names an entry of your own and the command line another one, options that only yours takes are left out.
A config file is Python and is run, and so is code that a config names: use files that you trust.
"""

from __future__ import annotations

import argparse
import ast
import sys
import traceback
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NoReturn

from ml_collections import ConfigDict

from experiments import own, texts
from rigl_jax import trees

ROOT = Path(__file__).resolve().parent.parent
PREFIX = "--config."
_ABOUT = (__doc__ or "").partition("\n")[2]
Values = list[tuple[str, str]]
"""Keys of a config and the texts that they are set to, in the order of the command line."""


class Parser(argparse.ArgumentParser):
    """Raises a ValueError where argparse would print its usage and leave the program."""

    def error(self, message: str) -> NoReturn:
        """Called by argparse for an error."""
        raise ValueError(f"{self.prog.rsplit('.', 1)[-1]}: {message}")


def parser(module: str, about: str) -> Parser:
    """The parser of a command, with the flags that all have.

    Args:
      module: `"experiments.main"`.
      about: shown by --help, before what the flags that set a config are.
    """
    made = Parser(
        f"python -m {module}",
        usage="%(prog)s [FLAGS] [--config.KEY=VALUE ...]",
        description=f"{about}\nThe config:\n{_ABOUT}",
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    made.add_argument("--config", metavar="FILE", help="config file, with :VARIANT if wanted")
    made.add_argument("--debug", action="store_true", help="show the traceback of an error")
    return made


def parse(made: Parser, arguments: Sequence[str]) -> tuple[argparse.Namespace, Values]:
    """The flags of a command, and the values to set in the config.

    Raises:
      ValueError: an unknown flag, or a value that is missing.
    """
    rest, values = [], []
    left = list(arguments)
    while left:
        flag, equals, text = left.pop(0).partition("=")
        if not flag.startswith(PREFIX):
            rest.append(flag + equals + text)
            continue
        if not equals and (not left or left[0].startswith("--")):
            made.error(f"{flag} needs a value, as {flag}=VALUE")
        values.append((flag.removeprefix(PREFIX), text if equals else left.pop(0)))
    options, strange = made.parse_known_args(rest)
    if strange:
        flag = strange[0].partition("=")[0]
        known = [name for action in made._actions for name in action.option_strings]
        if not flag.startswith("-"):
            made.error(f"expected only --flags, got {flag!r}")
        near = trees.nearest(flag, known)
        made.error(f"unknown flag {flag}" + (f"; did you mean {near}?" if near else ""))
    return options, values


def read(name: str, values: Values) -> Any:
    """The config of a file, with values set.

    Args:
      name: the file, with `:VARIANT` if wanted.
      values: what to set.

    Raises:
      ValueError: there is no such file, it fails, or a value is not of the type that the key has. What the keys may
        hold is for `build.check` to say.
    """
    path, _, variant = name.partition(":")
    if not Path(path).is_file():
        folder = Path("configs") if Path("configs").is_dir() else ROOT / "configs"
        there = ", ".join(sorted(str(found) for found in folder.glob("*.py") if found.stem != "common"))
        raise ValueError(f"there is no config file {path}" + (f"; there are {there}" if there else ""))
    module = own.file(path)
    if not callable(getattr(module, "get_config", None)):
        raise ValueError(f"the config file {path} must have a function get_config(variant)")
    with own.located(Path(str(module.__file__))):
        config = module.get_config(*([variant] if variant else []))
    if not isinstance(config, (ConfigDict, Mapping)):
        raise ValueError(f"get_config of {path} must return a config, got {type(config).__name__}")
    config = config if isinstance(config, ConfigDict) else ConfigDict(config)
    before = {key: section.get("name") for key, section in config.items() if isinstance(section, ConfigDict)}
    with config.unlocked():
        for key, text in values:
            _set(config, key, text)
        for section, first in before.items():
            if own.is_own(first) and config[section].get("name") != first:
                _leave_out(config[section], section, first, {key for key, _ in values})
    return config


def _leave_out(options: ConfigDict, section: str, name: Any, given: set[str]) -> None:
    """Removes the options of the file that only its own entry takes, for the command line names another one."""
    from experiments import build  # imports all models and methods

    for option in [option for option in options if option != "name" and f"{section}.{option}" not in given]:
        if build.takes(section, name, option) and not build.takes(section, options.get("name"), option):
            del options[option]


def _set(config: ConfigDict, key: str, text: str) -> None:
    *sections, option = key.split(".")
    at: Any = config
    for section in sections:
        if section not in at:
            at[section] = ConfigDict()  # for `build.check` to refuse
        at = at[section]
        if not isinstance(at, ConfigDict):
            raise ValueError(f"{PREFIX}{key}: {section} is a value and no section")
    kind = at.get_type(option) if option in at else object
    try:
        at[option] = text if kind is str and text != "None" else value(text)
    except TypeError:
        raise ValueError(f"{PREFIX}{key}={text}: expected a value of type {kind.__name__}") from None


def value(text: str) -> Any:
    """The value of a text: the text itself, unless it is a Python number, truth value, None, tuple or list.

    >>> value("0.5"), value("true"), value("(1, 2)"), value("adam")
    (0.5, True, (1, 2), 'adam')
    """
    if text.lower() in ("true", "false"):
        return text.lower() == "true"
    try:
        return ast.literal_eval(text)
    except (ValueError, SyntaxError, RecursionError, MemoryError):
        return text


def guarded(run: Callable[[], Any], *, debug: bool) -> int:
    """Runs it; returns 0, 2 after an error of the user (one line on stderr), or 130 after Ctrl-C."""
    try:
        run()
    except (ValueError, FloatingPointError, OSError) as error:
        if debug:
            traceback.print_exc()
        print(f"error: {texts.plain(' '.join(str(error).split()))}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        if debug:
            traceback.print_exc()
        print("\nstopped; the same command resumes from the last checkpoint", file=sys.stderr)
        return 130
    return 0
