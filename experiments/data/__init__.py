"""Deterministic, resumable batches of labelled images: `load(dataset, batch_size, seed=...) -> Data`."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import NamedTuple

from experiments.data import batches, sources
from experiments.data.augment import AUGMENTATIONS
from experiments.data.batches import Batch, Shard

__all__ = ["Batch", "Data", "load"]


class Data(NamedTuple):
    """A training and a test split as batches, on the host.

    Attributes:
      train: `start_step -> endless iterator of {"image": float32[b, H, W, C], "label": int32[b]}`. The batch of a step
        depends on the seed and the step alone, so `train(k)` continues a run at step k bit for bit, at once.
        Every epoch is a fresh permutation; what does not fill its last batch is left out of that epoch.
      test: `() -> iterator` over the test split once, in order, with one more entry, `"weight": float32[b]`. The
        last batch is filled up with examples of weight 0 and label -1, so that one shape is compiled and
        sums of `weight * value` count every example exactly once.
      num_train: training examples.
      num_test: test examples.
      num_classes: labels are 0 .. num_classes - 1.
      image_shape: (H, W, C).
      steps_per_epoch: `num_train // batch_size`, at least 1.
    """

    train: Callable[[int], Iterator[Batch]]
    test: Callable[[], Iterator[Batch]]
    num_train: int
    num_test: int
    num_classes: int
    image_shape: tuple[int, int, int]
    steps_per_epoch: int


def load(
    dataset: str,
    batch_size: int,
    *,
    seed: int,
    data_dir: str | None = None,
    augment: str = "default",
    image_size: int = 224,
    workers: int = 0,
    process_index: int = 0,
    process_count: int = 1,
) -> Data:
    """Opens a data set for training.

    `"digits"` (scikit-learn's 8x8 digits, 1437 + 360) needs no download. Every other name is a TFDS name whose
    features include an `image` and a `label`, prepared in the array_record format; reading it needs no TensorFlow.
    Sets of one image size and under 2 GB are decoded once (the result is kept beside the set, where that
    folder can be written) and gathered by index; the others are streamed, cropped and resized to `image_size`.

    Images are standardised: cifar10 and cifar100 image by image, streamed sets by ImageNet's usual mean and
    deviation of each channel, all others by the mean and deviation of their training images, channel by channel.

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
      process_index: which slice of each global batch to give, 0 .. process_count - 1.
      process_count: hosts that share the global batch; the slices are equal and disjoint.

    Returns:
      A `Data`; its batches hold `batch_size / process_count` examples.

    Raises:
      ValueError: an unknown data set or augmentation, one that is not prepared (the message says what to type),
        sizes that do not fit.

    Example:
      >>> data = load("digits", 128, seed=0)
      >>> batch = next(data.train(0))
      >>> batch["image"].shape, data.steps_per_epoch
      ((128, 8, 8, 1), 11)
    """
    _check(dataset, batch_size, seed, augment, image_size, process_index, process_count)
    source = sources.open_set(dataset, data_dir)
    num_train, num_test = source.train.size, source.test.size
    if batch_size > num_train:
        raise ValueError(f"load: batch_size {batch_size} is larger than the {num_train} examples of {dataset!r}")
    allowed = ("crop_flip", "none") if source.in_memory else ("inception", "none")
    chosen = source.augment if augment == "default" else augment
    if chosen not in allowed:
        raise ValueError(f"load: augment for {dataset!r} must be one of {', '.join(allowed)}, given {chosen!r}")
    shard = Shard(batch_size, process_index, process_count)
    if source.in_memory:
        train, test, shape = batches.in_memory(source, shard, seed, chosen)
    else:
        train, test, shape = batches.streamed(source, shard, seed, chosen, image_size, workers)

    def train_from(start_step: int = 0) -> Iterator[Batch]:
        if start_step < 0:
            raise ValueError(f"train: start_step must be at least 0, given {start_step}")
        return train(int(start_step))

    return Data(train_from, test, num_train, num_test, source.num_classes, shape, num_train // batch_size)


def _check(dataset, batch_size, seed, augment, image_size, process_index, process_count):
    """Refuses numbers that no data set could serve."""
    if not isinstance(dataset, str) or not dataset:
        raise ValueError(f"load: dataset must be a name such as 'digits', given {dataset!r}")
    if augment not in AUGMENTATIONS:
        raise ValueError(f"load: augment must be one of {', '.join(AUGMENTATIONS)}, given {augment!r}")
    for name, value, least in (("batch_size", batch_size, 1), ("seed", seed, 0), ("image_size", image_size, 1)):
        if not isinstance(value, int) or value < least:
            raise ValueError(f"load: {name} must be an integer of at least {least}, given {value!r}")
    if process_count < 1 or not 0 <= process_index < process_count:
        raise ValueError(
            f"load: process_index must be in 0 .. process_count - 1, given {process_index} of {process_count}"
        )
    if batch_size % process_count:
        raise ValueError(f"load: batch_size {batch_size} does not divide among process_count {process_count}")
