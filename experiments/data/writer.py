"""Writes examples that are already encoded as a TFDS data set, without TensorFlow."""

from __future__ import annotations

import contextlib
import io
import os
import tempfile
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import tensorflow_datasets as tfds

Example = tuple[int, dict[str, Any]]


class _Builder(tfds.core.GeneratorBasedBuilder, skip_registration=True):
    """The class that TFDS wants for writing; inheritance is its interface."""

    def __init__(
        self, *, name: str, version: str, about: dict[str, Any], splits: Mapping[str, Iterable], data_dir: str
    ):
        self.name = name
        self.VERSION = tfds.core.Version(version)
        self._about = about
        self._splits = splits
        super().__init__(data_dir=data_dir, file_format="array_record")

    def _info(self) -> tfds.core.DatasetInfo:
        return tfds.core.DatasetInfo(builder=self, **self._about)

    def _split_generators(self, dl_manager):
        del dl_manager
        return dict(self._splits)

    def _generate_examples(self, **unused):
        raise NotImplementedError  # never called: the splits are iterables, but the base class is abstract


def data_root(data_dir: str | None) -> Path:
    """The folder of TFDS's sets; the default if None."""
    # os.path also takes ~; TFDS itself resolves the default from $TFDS_DATA_DIR.
    return Path(os.path.expanduser(data_dir or os.fspath(tfds.core.constants.DATA_DIR)))


def written(name: str, data_dir: str) -> Path | None:
    """Where a set of that name is, None if it is not there."""
    return next((path.parent for path in (Path(data_dir) / name).glob("*/dataset_info.json")), None)


def official(name: str, data_dir: str) -> tfds.core.DatasetInfo | None:
    """Features, version and texts of TFDS's own class of that name; None for a name of your own."""
    try:
        return tfds.builder_cls(name)(data_dir=data_dir).info
    except tfds.core.DatasetNotFoundError:
        return None


def write(
    name: str,
    splits: Mapping[str, Iterable[Example]],
    data_dir: str,
    *,
    features: tfds.features.FeaturesDict | None = None,
    version: str = "1.0.0",
    in_order: bool = False,
) -> Path:
    """Writes a data set that `tfds.builder(name, data_dir=data_dir)` then finds.

    A set that TFDS knows gets the version, features and order of examples of the official one: both are shuffled
    by a hash of their keys, so a run gives the same result on either. Nothing is there until all of it is: TFDS
    writes into a temporary folder beside and renames it. TFDS needs TensorFlow to encode an array of pixels,
    but not if it is given the bytes of a PNG or JPEG file.

    Args:
      name: lower-case letters, digits and underscores.
      splits: for each split (key, example) pairs, keys counting from 0; an example is a dict that fits the features,
        images as encoded bytes.
      data_dir: parent of the folder `name/version`.
      features: of a set that TFDS does not know.
      version: of a set that TFDS does not know.
      in_order: of a set that TFDS does not know: examples keep their order.

    Returns:
      The folder of the set.

    Raises:
      ValueError: no features for an unknown name.
    """
    known = official(name, data_dir)
    if known is not None:
        about = {"features": known.features, "description": known.description, "homepage": known.homepage}
        about |= {"citation": known.citation, "supervised_keys": known.supervised_keys}
        version = str(known.version)
    elif features is None:
        raise ValueError(f"write: {name!r} is not a TFDS data set, so its features must be given")
    else:
        keys = ("image", "label") if "image" in features else None
        about = {"features": features, "description": f"{name}.", "supervised_keys": keys}
        about |= {"disable_shuffling": in_order}
    builder = _Builder(name=name, version=version, about=about, splits=splits, data_dir=data_dir)
    # TFDS prints the sizes of downloads that do not take place, and wants a folder for them.
    with tempfile.TemporaryDirectory() as empty, contextlib.redirect_stdout(io.StringIO()):
        builder.download_and_prepare(download_dir=empty)
    return Path(os.fspath(builder.data_dir))
