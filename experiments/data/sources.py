"""Where images come from: scikit-learn's digits, or a set prepared by TFDS. Neither needs TensorFlow."""

from __future__ import annotations

import functools
import math
import os
import shlex
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from experiments.data import augment
from experiments.io import files
from rigl_jax import trees

IN_MEMORY_LIMIT = 2 * 2**30  # bytes of decoded pixels
_CHUNK = 1000


class Known(NamedTuple):
    """What is special about a set of TFDS.

    Attributes:
      augment: what the papers' authors do to it, where that is not the default for sets of its kind.
      per_image: whether they standardise every image by itself.
      test: the split to evaluate on; None: test, or else validation.
      idx: whether it is published as IDX files, which `experiments.import_idx` reads.
      package: of Debian, which holds these files.
      folder: where the package puts them.
      manual: what else `tfds build` needs.
    """

    augment: str | None = None
    per_image: bool = False
    test: str | None = None
    idx: bool = False
    package: str | None = None
    folder: str | None = None
    manual: str = ""


KNOWN = {
    "cifar10": Known(augment="crop_flip", per_image=True),
    "cifar100": Known(augment="crop_flip", per_image=True),
    # The labels of its "test" are not public.
    "imagenet2012": Known(test="validation", manual=", and the archives of image-net.org in downloads/manual"),
    "fashion_mnist": Known(idx=True, package="dataset-fashion-mnist", folder="/usr/share/datasets/fashion-mnist"),
    "mnist": Known(idx=True),
    "kmnist": Known(idx=True),
}


def known(dataset: str) -> Known:
    """What is special about a set, by its name with or without version."""
    return KNOWN.get(_base(dataset), Known())


class Split(NamedTuple):
    """One split, in memory (`images` is an array) or on disk (`images` is a TFDS data source).

    Attributes:
      size: N, number of examples.
      images: uint8[N, H, W, C] or float32[N, ...], or `images[i] -> {"image": encoded bytes or array, "label": int}`.
      labels: int32[N], or None for a split on disk.
      rows: int64[size], where only a part of the examples is used: which.
    """

    size: int
    images: Any
    labels: Any
    rows: Any = None


class Source(NamedTuple):
    """A data set that was found.

    Attributes:
      train: the training split.
      test: the split to evaluate on.
      num_classes: labels are 0 .. num_classes - 1.
      in_memory: whether the splits hold arrays.
      per_image: standardise every image by itself, rather than by the training set.
      augment: the default augmentation.
    """

    train: Split
    test: Split
    num_classes: int
    in_memory: bool
    per_image: bool
    augment: str


def prepared(dataset: str, data_dir: str | None = None) -> Source:
    """A set that TFDS, or `experiments.import_idx`, has written; see `experiments.data.load` for the errors."""
    import tensorflow_datasets as tfds

    builder = _builder(tfds, dataset, data_dir)
    shape, num_classes = _features(tfds, dataset, builder.info)
    special, splits = known(dataset), builder.info.splits
    names = ("train", special.test or ("test" if "test" in splits else "validation"))
    if absent := [name for name in names if name not in splits]:
        raise ValueError(f"load: {dataset!r} has no split {absent[0]!r}; it has {', '.join(splits)}")
    sizes = [splits[name].num_examples for name in names]
    in_memory = None not in shape and sum(sizes) * math.prod(n or 0 for n in shape) <= IN_MEMORY_LIMIT
    train, test = (_split(tfds, dataset, builder, name, shape, in_memory) for name in names)
    default = special.augment or ("none" if in_memory else "inception")
    return Source(train, test, num_classes, in_memory, special.per_image, default)


@functools.cache  # reading takes 0.1 s, and a sweep in one process trains many times
def digits() -> Source:
    """1437 + 360 images of 8x8 pixels, values 0 .. 16.

    The split needs no random numbers: sorted by class (stably), every fifth example, from the first on, is for
    testing, so that classes have the same shares in both.
    """
    from sklearn.datasets import load_digits

    pixels, labels = load_digits(return_X_y=True)
    images = np.asarray(pixels).reshape(-1, 8, 8, 1).astype(np.uint8)
    labels = np.asarray(labels).astype(np.int32)
    by_class = np.argsort(labels, kind="stable")
    held_out = np.zeros(len(labels), bool)
    held_out[by_class[::5]] = True
    train, test = (Split(int(sum(rows)), images[rows], labels[rows]) for rows in (~held_out, held_out))
    for array in (train.images, train.labels, test.images, test.labels):
        array.flags.writeable = False  # all callers share them
    return Source(train, test, 10, True, False, "none")


def _base(dataset: str) -> str:
    """`cifar10` of `cifar10:3.0.2`, `emnist` of `emnist/letters`."""
    return dataset.split(":")[0].split("/")[0]


def _builder(tfds, dataset: str, data_dir: str | None):
    """The TFDS builder of a set that is ready to be read, or an error with the command that prepares it."""
    from experiments.data import writer  # loads TFDS, as the caller has

    root = writer.data_root(data_dir)
    # Looking for the folder first spares TFDS a search on the network, and the user its log lines.
    if not (root / _base(dataset)).is_dir():
        raise ValueError(_absent(tfds, dataset, data_dir, root))
    try:
        builder = tfds.builder(dataset, data_dir=os.fspath(root))
    except (tfds.core.DatasetNotFoundError, ValueError, AssertionError) as error:
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise ValueError(f"load: TFDS cannot open {dataset!r} in {root}: {reason}") from error
    if not builder.is_prepared():
        raise ValueError(_absent(tfds, dataset, data_dir, root))
    return builder


def _absent(tfds, dataset: str, data_dir: str | None, root: Path) -> str:
    """The message for a set that is not there: what to type, or which names exist."""
    base, option = _base(dataset), f" --data_dir {shlex.quote(data_dir)}" if data_dir else ""
    start = f"load: data set {dataset!r} is not prepared in {root}; type: "
    build = f"tfds build {shlex.quote(dataset)} --file_format=array_record{option}"
    needs = "needs the network and `pip install tensorflow`"
    special = known(dataset)
    if special.idx:
        command = f"python -m experiments.import_idx --name {base}{option}"
        if special.package:
            return f"{start}apt-get install {special.package} && {command}; or: {build} ({needs})"
        return f"{start}{command} --source FOLDER_WITH_IDX_FILES; or: {build} ({needs})"
    listed = tfds.list_builders(with_community_datasets=False)
    if base in listed:
        return f"{start}{build} ({needs}{special.manual})"
    here = sorted(path.name for path in root.iterdir() if _is_set(path)) if root.is_dir() else []
    guess = trees.hint(base, ["digits", *here, *KNOWN, *listed])
    ready = f"{', '.join(here)} prepared in {root}" if here else f"nothing prepared in {root}"
    return f"load: unknown data set {dataset!r}{guess}; there is: digits built in; {ready}; any TFDS image set by name"


def _is_set(path: Path) -> bool:
    return path.is_dir() and any(path.glob("**/dataset_info.json"))


def _features(tfds, dataset: str, info) -> tuple[tuple[int | None, ...], int]:
    """(image shape, number of classes) from the features of a set."""
    features = dict(info.features) if isinstance(info.features, tfds.features.FeaturesDict) else {}
    image, label = features.get("image"), features.get("label")
    if not isinstance(image, tfds.features.Image) or not isinstance(label, tfds.features.ClassLabel):
        raise ValueError(
            f"load: {dataset!r} must have the features image (Image) and label (ClassLabel), "
            f"it has {', '.join(f'{k} ({type(v).__name__})' for k, v in features.items())}"
        )
    if image.np_dtype != np.uint8 or image.shape[-1] not in (1, 3):
        raise ValueError(
            f"load: the images of {dataset!r} must be uint8 with 1 or 3 channels, given {image.np_dtype} {image.shape}"
        )
    return image.shape, label.num_classes


def _split(tfds, dataset: str, builder, name: str, shape, in_memory: bool) -> Split:
    """A split as arrays, or as a data source of encoded images."""
    if in_memory and (cached := _read_cache(builder, name, shape)):
        return cached
    try:
        # TFDS would decode, but through a slower path, and with a log line about OpenCV.
        records = builder.as_data_source(name, decoders={"image": tfds.decode.SkipDecoding()})
    except NotImplementedError as error:
        raise ValueError(
            f"load: {dataset!r} in {builder.data_dir} must be in the array_record format, it is in "
            f"{builder.info.file_format.value}; type: tfds build {shlex.quote(dataset)} --file_format=array_record"
        ) from error
    if not in_memory:
        return Split(len(records), records, None)
    images = np.empty((len(records), *shape), np.uint8)
    labels = np.empty(len(records), np.int32)
    for start in range(0, len(records), _CHUNK):
        chunk = range(start, min(start + _CHUNK, len(records)))
        for i, record in zip(chunk, records.__getitems__(list(chunk)), strict=True):
            images[i], labels[i] = augment.decode(record["image"], shape[-1]), record["label"]
    _write_cache(builder, name, images, labels)
    return Split(len(images), images, labels)


def _cache(builder, name: str) -> tuple[Path, Path]:
    """The files of decoded images and labels: inside the set's folder, so that they go when it goes."""
    folder = Path(os.fspath(builder.data_dir)) / "decoded"
    return folder / f"{name}-images.npy", folder / f"{name}-labels.npy"


def _read_cache(builder, name: str, shape) -> Split | None:
    """The decoded split, mapped: the processes of a sweep share its pages. None where it is not there or not whole."""
    try:
        images, labels = (np.load(path, mmap_mode="r") for path in _cache(builder, name))
    except (OSError, ValueError, EOFError):
        return None
    count = builder.info.splits[name].num_examples
    whole = images.shape == (count, *shape) and images.dtype == np.uint8 and labels.shape == (count,)
    return Split(count, np.asarray(images), np.array(labels, np.int32)) if whole else None


def _write_cache(builder, name: str, images: np.ndarray, labels: np.ndarray) -> None:
    """Keeps the decoded split, if the folder can be written; renaming makes it appear whole or not at all."""
    for path, array in zip(_cache(builder, name), (images, labels), strict=True):
        part = path.with_name(f"{path.name}.{os.getpid()}")
        try:
            path.parent.mkdir(exist_ok=True)
            with files.create(part) as file:
                np.save(file, array)
            part.replace(path)
        except OSError:  # a read-only or full disk costs seconds at the next start, nothing else
            part.unlink(missing_ok=True)
            return
