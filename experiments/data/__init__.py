"""Deterministic, resumable batches of labelled images: `load(dataset, batch_size, seed=...) -> Data`."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from experiments import own
from experiments.data import batches, given, sources
from experiments.data.augment import AUGMENTATIONS
from experiments.data.batches import Batch, Shard
from experiments.data.sources import Source
from experiments.rules import choice, seed
from rigl_jax.arguments import Rule, arguments, optional, rule, whole, word

__all__ = ["Batch", "Data", "check", "load"]

BUILT_IN: dict[str, Callable[[], Source]] = {"digits": sources.digits}
"""Sets that need no download, by name."""

RULES: dict[str, Rule] = {
    "dataset": rule("a name such as 'digits'", lambda value: isinstance(value, str) and value != ""),
    "batch_size": whole(1),
    "seed": seed,
    "data_dir": optional(word),
    "augment": choice(AUGMENTATIONS),
    "image_size": whole(1),
    "workers": whole(0),
    "process_index": whole(0),
    "process_count": whole(1),
}
"""What `load` takes."""


class Data(NamedTuple):
    """A training and a test split as batches, on the host.

    Attributes:
      train: `start_step -> endless iterator of {"image": float32[b, H, W, C], "label": int32[b], "index": int32[b]}`,
        the index being that of each example in the training split. The batch of a step depends on the seed and the
        step alone, so `train(k)` continues a run at step k bit for bit, at once.
        Every epoch is a fresh permutation; what does not fill its last batch is left out of that epoch.
        `train(k, part, since)` is the same of a part of the training examples, `int[n]`, whose first epoch begins with
        step `since`.
      test: `() -> iterator` over the test split once, in order, with one more entry, `"weight": float32[b]`. The
        last batch is filled up with examples of weight 0 and label -1, so that one shape is compiled and
        sums of `weight * value` count every example exactly once.
      ordered: as `test`, over the training split without augmentation, with the index of each example.
      num_train: training examples.
      num_test: test examples.
      num_classes: labels are 0 .. num_classes - 1.
      image_shape: (H, W, C); of a user's own data any shape.
      steps_per_epoch: `num_train // batch_size`, at least 1.
    """

    train: Callable[..., Iterator[Batch]]
    test: Callable[[], Iterator[Batch]]
    ordered: Callable[[], Iterator[Batch]]
    num_train: int
    num_test: int
    num_classes: int
    image_shape: tuple[int, ...]
    steps_per_epoch: int


def check(**given: Any) -> None:
    """Checks arguments of `load` without opening anything.

    Raises:
      ValueError: names the argument, what was expected and what was given; or `batch_size` is not given.
    """
    for name, value in given.items():
        RULES[name]("load", name, value)
    if "batch_size" not in given:
        raise ValueError("load: batch_size is missing")


@arguments(**RULES)
def load(
    dataset: str,
    batch_size: int,
    *,
    seed: int,
    data_dir: str | None = None,
    augment: str = "default",
    image_size: int = 224,
    workers: int = 0,
    subset: Sequence[int] | np.ndarray | None = None,
    options: Mapping[str, Any] | None = None,
    process_index: int = 0,
    process_count: int = 1,
) -> Data:
    """Opens a data set for training.

    `"digits"` (scikit-learn's 8x8 digits, 1437 + 360) needs no download. `"FILE.npz"` is a file of arrays and
    `"PLACE:FUNCTION"` a user's own function, see `experiments.data.given`. Every other name is a TFDS name whose
    features include an `image` and a `label`, prepared in the array_record format; reading it needs no TensorFlow.
    Sets of one image size and under 2 GB are decoded once (the result is kept beside the set, where that
    folder can be written) and gathered by index; the others are streamed, cropped and resized to `image_size`.

    Images are standardised: cifar10 and cifar100 image by image, streamed sets by ImageNet's usual mean and
    deviation of each channel, all others by the mean and deviation of their training images, channel by channel. A
    user's own numbers that are not uint8 are taken as they are.

    Args:
      dataset: "digits", "fashion_mnist", "cifar10", "imagenet2012", ...
      batch_size: examples of one global batch, over all processes.
      seed: non-negative; decides order and augmentation.
      data_dir: where TFDS keeps prepared sets; None: $TFDS_DATA_DIR or ~/tensorflow_datasets.
      augment: "default", "none", "crop_flip" (pad 4 by reflection, random crop, random mirror; sets in memory),
        "inception" (random area and aspect ratio, random mirror; streamed sets). The default is crop_flip for
        cifar10 and cifar100, inception for streamed sets, none for the others.
      image_size: side of streamed images, in pixels.
      workers: processes that decode streamed images; 0: threads of this one. It does not change the batches.
      subset: the training examples to use, by index, each once; None: all. Standardisation stays that of all.
      options: arguments of a user's own function.
      process_index: which slice of each global batch to give, 0 .. process_count - 1.
      process_count: hosts that share the global batch; the slices are equal and disjoint.

    Returns:
      A `Data`; its batches hold `batch_size / process_count` examples.

    Raises:
      ValueError: an unknown data set or augmentation, one that is not prepared (the message has the command),
        sizes that do not fit.

    Example:
      >>> data = load("digits", 128, seed=0)
      >>> batch = next(data.train(0))
      >>> batch["image"].shape, data.steps_per_epoch
      ((128, 8, 8, 1), 11)
    """
    if process_index >= process_count:
        raise ValueError(f"load: process_index must be below process_count={process_count}, got {process_index}")
    if batch_size % process_count:
        raise ValueError(f"load: batch_size {batch_size} does not divide among process_count {process_count}")
    source = _part(_open(dataset, data_dir, options or {}), subset)
    num_train, num_test = source.train.size, source.test.size
    if batch_size > num_train:
        raise ValueError(f"load: batch_size {batch_size} is larger than the {num_train} examples of {dataset!r}")
    allowed = batches.augmentations(source)
    chosen = source.augment if augment == "default" else augment
    if chosen not in allowed:
        raise ValueError(f"load: augment for {dataset!r} must be one of {', '.join(allowed)}, given {chosen!r}")
    shard = Shard(batch_size, process_index, process_count)
    if source.in_memory:
        read = batches.in_memory(source, shard, seed, chosen)
    else:
        read = batches.streamed(source, shard, seed, chosen, image_size, workers)

    def train(start_step: int = 0, part: np.ndarray | None = None, since: int = 0) -> Iterator[Batch]:
        if start_step < since or since < 0:
            raise ValueError(f"train: start_step must be at least {max(since, 0)}, given {start_step}")
        return read.train(int(start_step), batches.order(source.train, seed, batch_size, part, since))

    facts = num_train, num_test, source.num_classes, read.image_shape, num_train // batch_size
    return Data(train, read.test, read.ordered, *facts)


def _open(dataset: str, data_dir: str | None, options: Mapping[str, Any]) -> Source:
    if dataset in BUILT_IN:
        return BUILT_IN[dataset]()
    if own.is_own(dataset):
        return given.open_own(dataset, options)
    return given.open_npz(dataset) if dataset.endswith(".npz") else sources.prepared(dataset, data_dir)


def _part(source: Source, subset: Any) -> Source:
    """The source with a part of its training examples.

    Raises:
      ValueError: the subset is not of indices that there are, each once.
    """
    if subset is None:
        return source
    rows = np.asarray(subset)
    size = source.train.size
    whole = rows.ndim == 1 and rows.size and np.issubdtype(rows.dtype, np.integer)
    if not whole or rows.min() < 0 or rows.max() >= size or len(np.unique(rows)) < len(rows):
        raise ValueError(f"load: subset must be indices below {size}, each once, got {rows.dtype}{list(rows.shape)}")
    return source._replace(train=source.train._replace(size=len(rows), rows=rows.astype(np.int64)))
