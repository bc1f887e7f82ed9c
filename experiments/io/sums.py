"""Sizes and checksums of the files of a checkpoint: written with it, and checked when it is read."""

from __future__ import annotations

import json
import os
import zlib
from pathlib import Path
from typing import Any

import jax
import tensorstore

from experiments.io import files

SUMS = "sums.json"
"""The list, a file of the checkpoint: `{"state/manifest.ocdbt": [bytes, CRC-32]}`."""


def write(path: Path, n_arrays: int) -> None:
    """Reads back a checkpoint that was just written, and writes the list of its files.

    Args:
      path: its folder.
      n_arrays: how many arrays it must hold.

    Raises:
      OSError: it holds fewer, so it must not count as saved.
    """
    if (found := _arrays(path / "state")) != n_arrays:
        raise OSError(f"read back, it holds {found} of {n_arrays} arrays")
    sums = {name: [file.stat().st_size, _crc(file)] for name, file in _files(path).items()}
    (path / SUMS).write_text(json.dumps(sums), encoding="utf-8")


def flaw(path: Path) -> str:
    """What is wrong with the files of a checkpoint; empty if they are unchanged.

    Every process compares all sizes and the contents of its share of the files.

    Raises:
      OSError: a file exists but cannot be read, which does not mean that it is damaged.
    """
    try:
        if (sums := files.read_json(path / SUMS)) is None:
            return f"{SUMS} is missing"
        listed = sorted((name, int(size), int(crc)) for name, (size, crc) in sums.items())
        there = _files(path)
        for i, (name, size, crc) in enumerate(listed):
            if name not in there:
                return f"{name} is missing"
            if (now := there[name].stat().st_size) != size:
                return f"{name} has {now} bytes, not {size}"
            if i % jax.process_count() == jax.process_index() and _crc(there[name]) != crc:
                return f"{name} has another content"
    except (ValueError, TypeError):  # no JSON, or JSON of something else
        return f"{SUMS} is not the list of its files"
    except (FileNotFoundError, IsADirectoryError, NotADirectoryError) as error:
        return f"{error.filename}: {error.strerror}"
    return "" if listed else f"{SUMS} lists nothing"


def _arrays(path: Path) -> int:
    """How many arrays the store in a folder holds; each has one key that describes its layout."""
    spec: dict[str, Any] = {"driver": "ocdbt", "base": {"driver": "file", "path": f"{path}/"}}
    keys = tensorstore.KvStore.open(spec).result().list().result()
    return sum(key.rsplit(b"/", 1)[-1] in (b".zarray", b"zarr.json") for key in keys)


def _files(path: Path) -> dict[str, Path]:
    """The files of a checkpoint without its metadata, which orbax changes later and which nothing depends on."""

    def refused(error: OSError) -> None:
        raise error  # os.walk, and Path.rglob always, would leave the folder out

    found = [Path(folder) / name for folder, _, names in os.walk(path, onerror=refused) for name in names]
    return {f.relative_to(path).as_posix(): f for f in found if f.name not in (SUMS, "_CHECKPOINT_METADATA")}


def _crc(file: Path) -> int:
    crc = 0
    with file.open("rb") as opened:
        while part := opened.read(2**20):
            crc = zlib.crc32(part, crc)
    return crc
