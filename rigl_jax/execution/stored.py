"""The leaves of a safetensors file of packed weights, checked before anything is made of them.

`export` describes the format. For any invalid file `read` raises an error of one line, and it takes no more memory than
the size of the file.
"""

from __future__ import annotations

import json
import math
import os
import zlib
from collections.abc import Mapping
from typing import Any, NamedTuple

import numpy as np

from rigl_jax import checks
from rigl_jax.base import Shape
from rigl_jax.messages import LONGEST, line, printable, shown

FORMAT, VERSION = "rigl_jax.packed", 2


class Stored(NamedTuple):
    """A leaf of a file.

    Attributes:
      values: those at `places`; the whole array where `places` is None.
      places: int64[active], ascending, in the raveled dense weight.
      shape: of the dense weight.
    """

    values: np.ndarray
    places: np.ndarray | None
    shape: Shape


def crc(array: np.ndarray) -> int:
    """CRC-32 of an array's bytes."""
    return zlib.crc32(np.ascontiguousarray(array).reshape(-1).view(np.uint8).data)


def described(leaves: Mapping[str, Any]) -> str:
    """The metadata of leaves `{name: {"shape", "dtype", "crc32"}}` as JSON, with their checksum."""
    about: dict[str, Any] = {"version": VERSION, "leaves": leaves}
    return json.dumps({**about, "crc32": _crc_of(about)})


def _crc_of(about: Mapping[str, Any]) -> int:
    return zlib.crc32(json.dumps(about, sort_keys=True).encode())


def shown_path(path: str | os.PathLike[str]) -> str:
    """A path for messages."""
    return printable(os.fspath(path))


def read(path: str | os.PathLike[str], safetensors: Any) -> dict[str, Stored]:
    """All leaves of a file; `safetensors` is the package.

    Raises:
      ValueError: the file is not a safetensors file, is damaged, or was not written by `save_safetensors`.
    """
    named = shown_path(path)
    try:
        with safetensors.safe_open(os.fspath(path), framework="numpy") as file:
            about = file.metadata() or {}
            tensors = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118
    except safetensors.SafetensorError as error:
        raise ValueError(f"load_safetensors: {named} is damaged, or no safetensors file: {line(str(error))}") from error
    if FORMAT not in about:
        found = f"metadata {shown(sorted(about))}" if about else "no metadata"
        raise ValueError(
            f"load_safetensors: {named} must be written by save_safetensors, with metadata {FORMAT!r}, got {found}"
        )
    try:
        return _leaves(json.loads(about[FORMAT]), tensors)
    except (KeyError, TypeError, ValueError, AttributeError, RecursionError) as error:
        what = line(str(error), 2 * LONGEST)
        raise ValueError(f"load_safetensors: {named} is damaged, or not of this version: {what}") from error


def _leaves(written: Any, tensors: Mapping[str, np.ndarray]) -> dict[str, Stored]:
    version = written["version"]
    if not checks.is_whole(version, 1) or version > VERSION:
        raise ValueError(f"versions 1 to {VERSION} can be read, it is of version {shown(version)}")
    if version > 1 and written["crc32"] != _crc_of({key: part for key, part in written.items() if key != "crc32"}):
        raise ValueError("the metadata are not those that were written")
    found = {name: _leaf(name, leaf, tensors) for name, leaf in written["leaves"].items()}
    if version > 1:
        _check_dtypes(written["leaves"], found)
    owned = [key for leaf in written["leaves"].values() for key in leaf["crc32"]]
    if len(set(owned)) < len(owned) or set(owned) != set(tensors):
        raise ValueError("every tensor must belong to one leaf")
    return found


def _check_dtypes(leaves: Mapping[str, Any], found: Mapping[str, Stored]) -> None:
    for name, leaf in leaves.items():
        if str(found[name].values.dtype) != leaf["dtype"]:
            raise ValueError(f"leaf {name!r} must be {shown(leaf['dtype'])}, got {found[name].values.dtype}")


def _leaf(name: str, leaf: Mapping[str, Any], tensors: Mapping[str, np.ndarray]) -> Stored:
    shape, sums = tuple(leaf["shape"]), leaf["crc32"]
    if not all(checks.is_whole(n) for n in shape):
        raise ValueError(f"leaf {name!r} has no shape {shown(leaf['shape'])}")
    for key, expected in sums.items():
        if key not in tensors:
            raise ValueError(f"tensor {key!r} is missing")
        if crc(tensors[key]) != expected:
            raise ValueError(f"the bytes of tensor {key!r} are not those that were written")
    values, positions, mask = (f"{name}:{part}" for part in ("values", "positions", "mask"))
    if set(sums) == {name} and tensors[name].shape == shape:
        return Stored(tensors[name], None, shape)
    size, places = math.prod(shape), None
    if set(sums) == {values, positions}:
        places = _ascending(tensors[positions], size)
    elif set(sums) == {values, mask}:
        places = _of_bits(tensors[mask], size)
    if places is None or tensors[values].shape != places.shape:
        raise ValueError(f"the tensors of leaf {name!r} do not fit its shape {shape}")
    return Stored(tensors[values], places, shape)


def _ascending(positions: np.ndarray, size: int) -> np.ndarray | None:
    """int64[active]; None if these are not ascending positions below size."""
    if positions.ndim != 1 or positions.dtype not in (np.int32, np.int64):
        return None
    places = positions.astype(np.int64)
    inside = not len(places) or 0 <= places[0] <= places[-1] < size
    return places if inside and (places[1:] > places[:-1]).all() else None


def _of_bits(mask: np.ndarray, size: int) -> np.ndarray | None:
    if mask.dtype != np.uint8 or mask.shape != (-(-size // 8),):
        return None
    bits = np.unpackbits(mask)
    return None if bits[size:].any() else np.flatnonzero(bits)
