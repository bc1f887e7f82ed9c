"""A user's own data: an .npz file, or what a function returns."""

from __future__ import annotations

import zipfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from experiments import own
from experiments.data.sources import Source, Split
from rigl_jax.messages import listed

MOST_CLASSES = 2**24  # the last layer has as many outputs
_NAMES = (("train_images", "train_labels", "test_images", "test_labels"), ("x_train", "y_train", "x_test", "y_test"))


def open_npz(path: str) -> Source:
    """The arrays of a file: `train_images`, `train_labels`, `test_images`, `test_labels`, or `x_train`, `y_train`, ...

    Raises:
      ValueError: no such file, or not these arrays.
    """
    if not Path(path).is_file():
        raise ValueError(f"load: there is no file {path}")
    try:
        with open(path, "rb") as opened:
            file = np.load(opened)  # arrays of numbers only: NumPy refuses pickled objects
            if not isinstance(file, Mapping):
                raise ValueError("it must hold several arrays, as np.savez writes them")
            names = next((names for names in _NAMES if set(names) <= set(file)), None)
            if names is None:
                raise ValueError(f"it must hold {', '.join(_NAMES[0])}, it holds {', '.join(file)}")
            images, labels, test_images, test_labels = (file[name] for name in names)
    except (ValueError, OSError, EOFError, zipfile.BadZipFile) as error:
        raise ValueError(f"load: {path}: {error}") from error
    return source(path, {"train": (images, labels), "test": (test_images, test_labels)})


def open_own(name: str, options: Mapping[str, Any]) -> Source:
    """What a user's function returns, see `source`.

    Raises:
      ValueError: it returns something else, or the function refuses its arguments.
    """
    function: Callable[..., Any] = own.load(name)
    return source(name, function(**options))


def source(name: str, found: Any) -> Source:
    """A data set from its parts.

    Args:
      name: for errors.
      found: `{"train": split, "test": split}`, and `"num_classes"` where splits are not arrays. A split is
        `(images [N, ...], labels int[N])`, or what has a length and gives `{"image": array or encoded bytes,
        "label": int}` by index: a grain source or map data set, a TFDS data source, a list. Images of uint8 in memory
        are standardised by the training images, channel by channel; numbers of other types are taken as they are.

    Raises:
      ValueError: names the wrong part.
    """
    if not isinstance(found, Mapping) or not {"train", "test"} <= set(found):
        got = f"one of {listed(map(str, found))}" if isinstance(found, Mapping) else type(found).__name__
        raise ValueError(f"load: {name} must give a dict of train and test, got {got}")
    arrays = isinstance(found["train"], tuple)
    train, test = ((_arrays if arrays else _records)(f"{name}: {part}", found[part]) for part in ("train", "test"))
    if arrays and train.images.shape[1:] != test.images.shape[1:]:
        raise ValueError(
            f"load: {name}: train and test must have images of one shape, got {train.images.shape[1:]} and "
            f"{test.images.shape[1:]}"
        )
    if not arrays and not isinstance(found.get("num_classes"), int):
        raise ValueError(f"load: {name} must give num_classes where splits are not arrays")
    classes = found.get("num_classes") or 1 + max(int(split.labels.max()) for split in (train, test))
    if arrays and max(int(split.labels.max()) for split in (train, test)) >= classes:
        raise ValueError(f"load: {name}: labels must be below num_classes={classes}")
    return Source(train, test, int(classes), in_memory=arrays, per_image=False, augment="none")


def _arrays(name: str, split: Any) -> Split:
    try:
        images, labels = map(np.asarray, split)
    except ValueError as error:  # another number of parts, or rows of different lengths
        raise ValueError(f"load: {name} must be a pair of arrays, images and labels: {error}") from error
    numbers = images.dtype.kind in "biuf" or images.dtype.name == "bfloat16"
    if images.ndim < 2 or not len(images) or not numbers or labels.dtype.kind not in "iu" or not labels.size:
        raise ValueError(
            f"load: {name} must be images [N, ...], real numbers, and labels [N], whole numbers from 0, got "
            f"{images.dtype} {images.shape} and {labels.dtype} {labels.shape}"
        )
    if images.dtype != np.uint8:
        images = images.astype(np.float32)
    elif images.ndim == 3:
        images = images[..., None]  # grey, as MNIST is kept
    labels = labels.reshape(-1) if labels.shape == (len(images), 1) else labels
    if labels.min() < 0 or labels.max() >= MOST_CLASSES:
        raise ValueError(
            f"load: {name} must have labels from 0 to below {MOST_CLASSES}, got {labels.min()} to {labels.max()}"
        )
    if labels.shape != (len(images),):
        raise ValueError(f"load: {name} must have one label an image, got {labels.shape} for {images.shape}")
    return Split(len(images), images, labels.astype(np.int32))


def _records(name: str, split: Any) -> Split:
    if not (hasattr(split, "__len__") and hasattr(split, "__getitem__")) or not len(split):
        raise ValueError(f"load: {name} must be arrays, or records by index, got {type(split).__name__}")
    record = split[0]
    if not isinstance(record, Mapping) or not {"image", "label"} <= set(record):
        raise ValueError(f"load: {name} must give records with image and label, got {type(record).__name__}")
    return Split(len(split), split, None)
