"""Text as a TFDS data set, and as windows of bytes that a character model reads."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

PARTS = ("train", "validation", "test")
PIECE = 1 << 16
"""Bytes of one example of the set."""
_FILES = {"train": ("train",), "validation": ("valid", "validation"), "test": ("test",)}


class Windows(NamedTuple):
    """Inputs and what comes one byte after each of them, both uint8[N, length]."""

    inputs: np.ndarray
    targets: np.ndarray


def read_source(source: str | Path) -> dict[str, bytes]:
    """The three parts of a text.

    Args:
      source: a folder with one file for each part, whose names hold `train`, `valid` and `test` (WikiText's do); or one
        file, of which the last 10 % are for validation and test, in equal parts.

    Raises:
      ValueError: no such file; a part that is missing, that is there twice, or without text.
    """
    path = Path(source)
    if path.is_dir():
        parts = {part: _one(path, part).read_bytes() for part in PARTS}
    elif path.is_file():
        text = path.read_bytes()
        first, second = len(text) * 18 // 20, len(text) * 19 // 20
        parts = {"train": text[:first], "validation": text[first:second], "test": text[second:]}
    else:
        raise ValueError(f"read_source: the source must be a file or a folder, got {source}")
    for part, text in parts.items():
        if len(text) < 2:
            raise ValueError(f"read_source: {part} of {source} must hold at least 2 bytes, got {len(text)}")
    return parts


def _one(folder: Path, part: str) -> Path:
    found = sorted(p for p in folder.iterdir() if p.is_file() and any(word in p.name for word in _FILES[part]))
    if len(found) != 1:
        names = ", ".join(path.name for path in found) or "none"
        raise ValueError(f"read_source: {folder} must hold one file with {_FILES[part][0]!r} in its name, got {names}")
    return found[0]


def write(name: str, parts: Mapping[str, bytes], data_dir: str) -> Path:
    """Writes a TFDS data set with one feature, `text`: pieces of each part, in order; returns its folder."""
    import tensorflow_datasets as tfds

    from experiments.data import writer

    def pieces(text: bytes) -> Iterator[tuple[int, dict[str, bytes]]]:
        for key, start in enumerate(range(0, len(text), PIECE)):
            yield key, {"text": text[start : start + PIECE]}

    features = tfds.features.FeaturesDict({"text": tfds.features.Text()})
    return writer.write(name, {k: pieces(v) for k, v in parts.items()}, data_dir, features=features, in_order=True)


def prepared(name: str, data_dir: str | None = None) -> dict[str, bytes]:
    """The parts of a set that `write`, or TFDS, has written: all its `text`, piece after piece.

    Raises:
      ValueError: it is not there, or has no text or not these parts.
    """
    import tensorflow_datasets as tfds

    from experiments.data import writer

    root = os.fspath(writer.data_root(data_dir))
    if not (Path(root) / name.split(":")[0].split("/")[0]).is_dir():
        raise ValueError(
            f"load: the text {name!r} is not prepared in {root}; type: python -m experiments.import_text --name {name} "
            "--source FILE_OR_FOLDER"
        )
    builder: Any = tfds.builder(name, data_dir=root)
    if "text" not in (builder.info.features or {}) or not set(PARTS) <= set(builder.info.splits):
        raise ValueError(f"load: {name!r} must have the feature text and the splits {', '.join(PARTS)}")
    return {part: b"".join(piece["text"] for piece in builder.as_data_source(part)) for part in PARTS}


def windows(text: bytes, length: int) -> Windows:
    """Windows of `length` bytes that follow one another; what does not fill the last is left out.

    >>> windows(b"abcdefg", 3).targets.tobytes()
    b'bcdefg'
    """
    data = np.frombuffer(text, np.uint8)
    count = (len(data) - 1) // length
    if not count:
        raise ValueError(f"windows: expected more than {length} bytes of text, got {len(data)}")
    parts = (data[i : i + count * length].reshape(count, length) for i in (0, 1))
    return Windows(*parts)
