"""The IDX format of MNIST and its relatives: a careful reader, and the way from a folder of IDX files to a TFDS set."""

from __future__ import annotations

import gzip
import io
import math
import re
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple

import numpy as np
from PIL import Image

_UNSIGNED_BYTE = 0x08
_SPLITS = {"train": ("train",), "test": ("t10k", "test")}


class Labelled(NamedTuple):
    """One split of an IDX set: `images` uint8[N, H, W, C], `labels` uint8[N]."""

    images: np.ndarray
    labels: np.ndarray


def read(path: str | Path) -> np.ndarray:
    """Reads one IDX file of unsigned bytes, gzipped or not (its content decides, not its name).

    The format: two zero bytes, the element type (8: unsigned byte), the number of axes, the size of each axis as
    a big-endian 32-bit integer, the elements, the last axis fastest.

    Args:
      path: the file.

    Returns:
      uint8 array, read-only.

    Raises:
      ValueError: not an IDX file of bytes, or the header and the length do not agree; the file is named.

    Example:
      >>> read("train-images-idx3-ubyte.gz").shape  # doctest: +SKIP
      (60000, 28, 28)
    """
    path = Path(path)
    with path.open("rb") as file:
        zipped = file.read(2) == b"\x1f\x8b"
    try:
        with gzip.open(path) if zipped else path.open("rb") as file:
            return _parse(file, path)
    except (gzip.BadGzipFile, zlib.error, EOFError) as error:
        raise ValueError(f"read: {path} must be a whole gzip file, {error}") from error


def _parse(file, path: Path) -> np.ndarray:
    magic = file.read(4)
    if len(magic) < 4 or magic[:2] != b"\0\0":
        raise ValueError(
            f"read: {path} must start with the IDX magic 00 00 TYPE AXES, given {magic.hex(' ') or 'nothing'}"
        )
    kind, axes = magic[2], magic[3]
    if kind != _UNSIGNED_BYTE:
        raise ValueError(f"read: {path} must hold unsigned bytes (IDX type 0x08), given type 0x{kind:02x}")
    if not 1 <= axes <= 4:
        raise ValueError(f"read: {path} must have 1 to 4 axes, given {axes}")
    header = file.read(4 * axes)
    if len(header) < 4 * axes:
        raise ValueError(
            f"read: {path} is truncated: a header of {axes} axes takes {4 * axes} bytes, given {len(header)}"
        )
    shape = tuple(int(n) for n in np.frombuffer(header, ">u4"))
    size = math.prod(shape)
    # In pieces: a damaged header can promise more bytes than there is memory.
    data = bytearray()
    while len(data) <= size and (piece := file.read(min(1 << 24, size + 1 - len(data)))):
        data += piece
    if len(data) != size:
        given = f"{len(data)}, truncated" if len(data) < size else "more"
        raise ValueError(f"read: {path} must hold {size} bytes for its shape {shape}, given {given}")
    return np.frombuffer(bytes(data), np.uint8).reshape(shape)


def find(folder: str | Path) -> dict[str, tuple[Path, Path]]:
    """The image and label files of a folder: `{"train": (images, labels), "test": (images, labels)}`.

    Names are those of MNIST: `train-images-idx3-ubyte`, `t10k-labels-idx1-ubyte.gz`; `test` may replace `t10k`, a
    prefix may come before, and dots may replace hyphens.

    Raises:
      ValueError: no such folder; a file that is missing, or that is there twice.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise ValueError(f"find: the source of IDX files must be a folder, given {folder}")
    names = sorted(path.name for path in folder.iterdir() if path.is_file())

    def one(starts: tuple[str, ...], what: str) -> Path:
        pattern = re.compile(rf"(^|.*[-_.])({'|'.join(starts)})[-_.]{what}[-_.]idx\d[-_.]ubyte(\.gz)?")
        found = [name for name in names if pattern.fullmatch(name)]
        if len(found) != 1:
            wanted = f"{starts[0]}-{what}-idx{3 if what == 'images' else 1}-ubyte[.gz]"
            raise ValueError(f"find: {folder} must hold one file {wanted}, given {', '.join(found) or 'none'}")
        return folder / found[0]

    return {split: (one(starts, "images"), one(starts, "labels")) for split, starts in _SPLITS.items()}


def read_folder(folder: str | Path) -> dict[str, Labelled]:
    """Reads and checks both splits of a folder of IDX files.

    Returns:
      `{"train": Labelled, "test": Labelled}`.

    Raises:
      ValueError: as `read` and `find`; images without pixels, of other than 1 or 3 channels, or not of one shape in
        both splits; not one label for each image.
    """
    result = {}
    for split, (image_path, label_path) in find(folder).items():
        images, labels = read(image_path), read(label_path)
        images = images[..., None] if images.ndim == 3 else images
        if images.ndim != 4 or images.shape[-1] not in (1, 3) or 0 in images.shape:
            raise ValueError(f"read_folder: {image_path} must be [N, H, W] or [N, H, W, 1 or 3], given {images.shape}")
        if labels.ndim != 1 or len(labels) != len(images):
            raise ValueError(
                f"read_folder: {label_path} must be [{len(images)}], a label for each image, given {labels.shape}"
            )
        result[split] = Labelled(images, labels)
    shapes = {split: part.images.shape[1:] for split, part in result.items()}
    if len(set(shapes.values())) > 1:
        raise ValueError(f"read_folder: images in {folder} must have one shape, given {shapes}")
    return result


def _encode(pixels: np.ndarray) -> bytes:
    """uint8[H, W, 1 or 3] as PNG: lossless, and what the official sets hold."""
    file = io.BytesIO()
    Image.fromarray(pixels[..., 0] if pixels.shape[-1] == 1 else pixels).save(file, "PNG")
    return file.getvalue()


def _examples(part: Labelled, advance: Callable[[], None]) -> Iterator[tuple[int, dict]]:
    for key, (pixels, label) in enumerate(zip(part.images, part.labels, strict=True)):
        advance()
        yield key, {"image": _encode(pixels), "label": int(label)}


def _features(name: str, parts: dict[str, Labelled], data_dir: str):
    """Checks the data against the official features of a known name; makes features for any other."""
    import tensorflow_datasets as tfds

    from experiments.data import writer

    shape = parts["train"].images.shape[1:]
    classes = 1 + max(int(part.labels.max()) for part in parts.values())
    info = writer.official(name, data_dir)
    if info is None:
        label = tfds.features.ClassLabel(num_classes=classes)
        return tfds.features.FeaturesDict({"image": tfds.features.Image(shape=shape), "label": label})
    features = dict(info.features) if isinstance(info.features, tfds.features.FeaturesDict) else {}
    image, label = features.get("image"), features.get("label")
    if (
        set(features) != {"image", "label"}
        or not isinstance(image, tfds.features.Image)
        or not isinstance(label, tfds.features.ClassLabel)
    ):
        raise ValueError(
            f"import_idx: TFDS has another {name!r}, with features {sorted(features)}; choose another name"
        )
    if image.shape != shape or (label.num_classes or 0) < classes:
        raise ValueError(
            f"import_idx: {name!r} must have images {image.shape} and {label.num_classes} classes, "
            f"given {shape} and {classes}; choose another name"
        )
    return None


def import_folder(
    name: str, folder: str | Path, data_dir: str, advance: Callable[[], None] = lambda: None
) -> tuple[Path, dict[str, Labelled]]:
    """Writes a folder of IDX files as the TFDS data set `name`.

    Args:
      name: of the set; one that TFDS knows (fashion_mnist, mnist, kmnist) gets its version and features.
      folder: of the four files, see `find`.
      data_dir: of TFDS.
      advance: called once for each example.

    Returns:
      (folder of the set, what was read).

    Raises:
      ValueError: as `read_folder`; a name that is not lower_case; data that does not fit the set of that name.
    """
    from experiments.data import writer

    if not re.fullmatch(r"[a-z][a-z0-9_]*", name):
        raise ValueError(f"import_idx: name must be lower-case letters, digits and underscores, given {name!r}")
    parts = read_folder(folder)
    features = _features(name, parts, data_dir)
    splits = {split: _examples(part, advance) for split, part in parts.items()}
    return writer.write(name, splits, data_dir, features=features), parts
