"""JSON files: read with one-line errors, written atomically, never through a symbolic link."""

from __future__ import annotations

import contextlib
import json
import math
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any, BinaryIO

Line = dict[str, Any]

DEPTH = 50
"""The deepest nesting that is read; our own files have 4 levels."""

_NO_LINKS = getattr(os, "O_NOFOLLOW", 0)  # Windows has no such links


def read_json(path: Path) -> dict[str, Any] | None:
    """The object in a JSON file, None where there is no file.

    Raises:
      ValueError: the file holds no JSON object, or numbers that are not finite; names the file.
      OSError: the file exists but cannot be read.
    """
    try:
        return _parse(path.read_bytes())
    except FileNotFoundError:
        return None
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from None


def read_lines(path: Path, *, growing: bool = True) -> list[Line]:
    """The lines of a metrics file.

    Args:
      path: the file.
      growing: whether it may still be written; an incomplete last line is then left out.

    Raises:
      ValueError: a line that is no JSON object with a whole "step" and a "kind"; names file and line.
      OSError: the file cannot be read.
    """
    *whole, rest = path.read_bytes().split(b"\n")
    found = []
    for number, text in enumerate([*whole, rest] if rest else whole, 1):
        try:
            line = _parse(text)
            step, kind = line.get("step"), line.get("kind")
            if not isinstance(step, int) or isinstance(step, bool) or abs(step) >= 2**53 or not isinstance(kind, str):
                raise ValueError('expected an object with "step" (int) and "kind"')
        except ValueError as error:
            if growing and number > len(whole):  # no end of line
                break
            raise ValueError(f"{path} line {number}: {error}") from None
        found.append(line)
    return found


def _parse(text: bytes) -> dict[str, Any]:
    try:
        value = json.loads(text.decode(), parse_constant=_refused, parse_float=_finite, parse_int=_whole)
    except RecursionError:
        raise ValueError(f"nested deeper than {DEPTH} levels") from None
    except ValueError as error:  # also where it is no UTF-8
        raise ValueError(f"not JSON: {error}") from None
    if not isinstance(value, dict):
        raise ValueError(f"expected a JSON object, got {type(value).__name__}")
    _check_depth(value, DEPTH)
    return value


def _refused(text: str) -> float:
    raise ValueError(f"expected a finite number, got {text}")


def _finite(text: str) -> float:
    return value if math.isfinite(value := float(text)) else _refused(text[:30])


def _whole(text: str) -> int:
    return int(text) if len(text) <= 30 else int(_refused(text[:30] + "..."))


def _check_depth(value: Any, left: int) -> None:
    if not left:
        raise ValueError(f"nested deeper than {DEPTH} levels")
    for each in value.values() if isinstance(value, dict) else value if isinstance(value, list) else ():
        _check_depth(each, left - 1)


def write_json(path: Path, value: Any) -> None:
    """Writes a small JSON file, indented, atomically."""
    write_atomically(path, json.dumps(value, indent=2, allow_nan=False) + "\n")


def write_atomically(path: Path, content: str | bytes) -> None:
    """Writes a file atomically. A symbolic link of that name is replaced, not followed.

    Raises:
      OSError: one line that names the file.
    """
    part = path.with_name(path.name + ".part")
    with one_line_errors(path):
        with create(part) as file:
            file.write(content.encode() if isinstance(content, str) else content)
            file.flush()
            os.fsync(file.fileno())  # otherwise a power failure could leave an empty file
        part.replace(path)


def create(path: Path) -> BinaryIO:
    """Opens a new file to write. A file or link of that name, which a killed write may leave, is removed."""
    path.unlink(missing_ok=True)
    return open(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | _NO_LINKS, 0o666), "wb")


def open_to_append(path: Path) -> BinaryIO:
    """Opens a file to write at its end, unbuffered, so that no failed write is repeated when it is closed.

    Raises:
      OSError: one line that names the file; also where the name is a link.
    """
    with one_line_errors(path):
        return open(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND | _NO_LINKS, 0o666), "ab", buffering=0)


@contextlib.contextmanager
def one_line_errors(path: Path) -> Iterator[None]:
    """Turns an error of writing into one line that names the file.

    Raises:
      OSError: in place of the original error.
    """
    try:
        yield
    except OSError as error:
        raise OSError(
            f"records: cannot write {path}: {error.strerror or error}; checkpoints written before are intact"
        ) from error
