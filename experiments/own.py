"""A user's own code, which a config names as `PLACE:ATTRIBUTE`; the one place that imports it.

`"my_package.models:Net"` is an attribute of a module that Python can import, `"path/to/models.py:Net"` one of a file,
whose path is relative to the working directory. A file is run once, and again when it changed. Naming code in a config
or on the command line runs it: name only what you trust. Names in `config.json`, in checkpoints and in records are
compared and shown, never imported.
"""

from __future__ import annotations

import contextlib
import functools
import importlib
import importlib.util
import os
import re
import sys
import traceback
import zlib
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

from rigl_jax import trees

_NAME = re.compile(r"(?P<place>.+):(?P<attribute>[A-Za-z_]\w*)", re.DOTALL)


def is_own(name: Any) -> bool:
    """Whether a name is that of a user's own code, rather than one of a table.

    >>> is_own("nets.py:Net"), is_own("rigl"), is_own("cifar10:3.0.2")
    (True, False, False)
    """
    return isinstance(name, str) and _NAME.fullmatch(name) is not None


def label(name: str) -> str:
    """A name as tables and legends show it: the attribute alone.

    >>> label("path/to/nets.py:Net"), label("path/to/digits.npz"), label("rigl")
    ('Net', 'digits', 'rigl')
    """
    if name.endswith(".npz"):
        return Path(name).stem
    return name.rsplit(":", 1)[1] if is_own(name) else name


def load(name: str) -> Any:
    """The object of a name.

    Raises:
      ValueError: there is no such file, module or attribute, or running it fails; with the line.
    """
    place, _, attribute = name.rpartition(":")
    module = file(place) if place.endswith(".py") else _module(place)
    if not hasattr(module, attribute):
        there = [key for key, value in vars(module).items() if callable(value) and not key.startswith("_")]
        raise ValueError(f"{place} has no {attribute!r}, it has {', '.join(there)}{trees.hint(attribute, there)}")
    return getattr(module, attribute)


def file(path: str | Path) -> ModuleType:
    """The module that a Python file is.

    Raises:
      ValueError: there is no such file, or running it fails; names file and line.
    """
    found = Path(os.path.abspath(path))
    if not found.is_file():
        raise ValueError(f"there is no file {path}")
    changed = found.stat()
    return _run(found, changed.st_mtime_ns, changed.st_size)


@functools.cache  # a class that is made twice is two classes
def _run(path: Path, mtime: int, size: int) -> ModuleType:
    name = f"own_{path.stem}_{zlib.crc32(os.fsencode(path)):08x}"
    spec = importlib.util.spec_from_file_location(name, path)
    if spec is None or spec.loader is None:
        raise ValueError(f"{path} is no Python file")
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module  # dataclasses, which Flax modules are, look their module up
    with located(path):
        spec.loader.exec_module(module)
    return module


def _module(name: str) -> ModuleType:
    try:
        return importlib.import_module(name)
    except ImportError as error:
        raise ValueError(f"cannot import {name}: {error}; is its folder in PYTHONPATH?") from error


@contextlib.contextmanager
def located(path: Path) -> Iterator[None]:
    """Turns whatever a file raises into a ValueError that says where.

    Raises:
      ValueError: names file, line and error.
    """
    try:
        yield
    except (Exception, SystemExit) as error:
        if isinstance(error, SyntaxError):
            place = f"{error.filename or path}, line {error.lineno}"
        else:
            frames = [f for f in traceback.extract_tb(error.__traceback__) if os.path.abspath(f.filename) == str(path)]
            place = f"{path}, line {frames[-1].lineno}" if frames else str(path)
        raise ValueError(f"{place}: {type(error).__name__}: {' '.join(str(error).split())}") from error
