"""From a source to batches: which example stands where in the endless stream, and how a batch is made of them."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import numpy as np

from experiments.data import augment
from experiments.data.sources import Source, Split

Batch = dict[str, np.ndarray]
_Example = dict[str, Any]
_Iterators = tuple[Callable[[int], Iterator[Batch]], Callable[[], Iterator[Batch]], tuple[int, ...]]
_ENDLESS = 2**40  # examples; grain wants a length
_THREADS = 8


class Shard(NamedTuple):
    """The part of each global batch that one process reads: rows `index * local` up to `(index + 1) * local`.

    Attributes:
      batch_size: examples of a global batch, a multiple of `count`.
      index: of this process, 0 .. count - 1.
      count: processes.
    """

    batch_size: int
    index: int
    count: int

    @property
    def local(self) -> int:
        """Examples of a batch in this process."""
        return self.batch_size // self.count

    def positions(self, step: int) -> np.ndarray:
        """int64[local]: places in the endless stream of the examples of a step."""
        return step * self.batch_size + self.index * self.local + np.arange(self.local)


@functools.lru_cache(maxsize=4)  # a pure function: kept because neighbouring steps ask for the same epoch
def _permutation(seed: int, epoch: int, size: int) -> np.ndarray:
    order = np.random.default_rng([seed, epoch]).permutation(size)
    order.flags.writeable = False
    return order


def indices(seed: int, size: int, batch_size: int, positions: np.ndarray) -> np.ndarray:
    """Which example stands at each place of the shuffled, endless stream.

    An epoch holds `size // batch_size` whole batches of its own permutation. NumPy's permutation costs 1 ms for
    60,000 examples, once an epoch; grain's index_shuffle costs 0.6 ms for each batch of 128, and its seed 1 gives
    the epochs of seed 0 shifted by one.

    Args:
      seed: of the run.
      size: examples of the split, at least `batch_size`.
      batch_size: of the global batch.
      positions: int[n], all in one epoch.

    Returns:
      int[n] in 0 .. size - 1.
    """
    length = size // batch_size * batch_size
    epoch, start = divmod(int(positions[0]), length)
    return _permutation(seed, epoch, size)[start + positions - positions[0]]


def in_memory(source: Source, shard: Shard, seed: int, chosen: str) -> _Iterators:
    """`(train, test, image_shape)` of arrays: every batch is one vectorised gather."""
    count, images, labels, rows = source.train
    prepare = augment.standardise_image if source.per_image else _by_channels(images)
    if images.dtype != np.uint8:
        prepare = np.asarray  # as it is

    def train(start_step: int) -> Iterator[Batch]:
        step = start_step
        while True:
            positions = shard.positions(step)
            chosen_ones = indices(seed, count, shard.batch_size, positions)
            chosen_ones = chosen_ones if rows is None else rows[chosen_ones]
            if chosen == "crop_flip":
                pixels = augment.crop_flip(images, chosen_ones, augment.uniforms(seed, positions, 3))
            else:
                pixels = np.take(images, chosen_ones, axis=0)
            yield {"image": prepare(pixels), "label": labels[chosen_ones], "index": chosen_ones.astype(np.int32)}
            step += 1

    def test() -> Iterator[Batch]:
        for places, weight in _test_places(source.test.size, shard):
            pixels = prepare(np.take(source.test.images, places, axis=0))
            yield _weighted(pixels, source.test.labels[places], weight)

    return train, test, images.shape[1:]


def augmentations(source: Source) -> tuple[str, ...]:
    """The augmentations that the images of a source can take."""
    if source.in_memory:
        return ("crop_flip", "none") if source.train.images.ndim == 4 else ("none",)
    return ("inception", "none") if _is_encoded(source) else ("none",)


def _is_encoded(source: Source) -> bool:
    return isinstance(source.train.images[0]["image"], bytes)


def _by_channels(images: np.ndarray) -> Callable[[np.ndarray], np.ndarray]:
    """Standardisation by the mean and deviation of the training images, channel by channel."""
    channels = images.shape[-1]
    total, squares = np.zeros(channels), np.zeros(channels)
    for start in range(0, len(images), 4096):  # in pieces: float64 of all of them would be eight times the set
        part = images[start : start + 4096].reshape(-1, channels).astype(np.float64)
        total += part.sum(axis=0)
        squares += np.einsum("ij,ij->j", part, part)
    count = images.size / channels
    mean = total / count
    std = np.sqrt(np.maximum(squares / count - mean**2, 0.0))
    # A channel without any variation: keep its zeros, rather than divide by 0.
    return functools.partial(augment.standardise_channels, mean=mean, std=np.where(std > 0, std, 1.0))


def _test_places(size: int, shard: Shard) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """(indices, weight) of each batch of one pass; past the end the index is 0 and the weight 0."""
    for step in range(-(-size // shard.batch_size)):
        places = shard.positions(step)
        weight = (places < size).astype(np.float32)
        yield np.where(weight > 0, places, 0), weight


def _weighted(pixels: np.ndarray, labels: np.ndarray, weight: np.ndarray) -> Batch:
    label = np.where(weight > 0, labels, -1).astype(np.int32)
    return {"image": pixels, "label": label, "weight": weight}


def streamed(source: Source, shard: Shard, seed: int, chosen: str, size: int, workers: int) -> _Iterators:
    """`(train, test, image_shape)` of records on disk: grain reads, decodes and crops ahead of the training step."""
    mean, std = augment.IMAGENET_MEAN * 255, augment.IMAGENET_STD * 255
    prepare: Callable[..., Any] = functools.partial(augment.standardise_channels, mean=mean, std=std)
    shape: tuple[int, ...] = (size, size, 3)
    if not _is_encoded(source):
        prepare, shape = np.asarray, np.shape(source.train.images[0]["image"])

    def train(start_step: int) -> Iterator[Batch]:
        read = functools.partial(_training_example, source.train, shard, seed, chosen, size)
        first = start_step * shard.local
        for batch in _ahead(read, first, _ENDLESS, shard.local, workers):
            yield {**batch, "image": prepare(batch["image"])}

    def test() -> Iterator[Batch]:
        length = -(-source.test.size // shard.batch_size) * shard.local
        read = functools.partial(_test_example, source.test, shard, shape)
        for batch in _ahead(read, 0, length, shard.local, workers):
            yield _weighted(prepare(batch["image"]), batch["label"], batch["weight"])

    return train, test, shape


def _ahead(read: Callable[[int], _Example], first: int, last: int, batch_size: int, workers: int) -> Iterator[Batch]:
    """Batches of `read(first), read(first + 1), ...`, read ahead by threads of this process or of `workers`."""
    import grain
    from absl import flags

    if workers and not flags.FLAGS.is_parsed():
        flags.FLAGS.mark_as_parsed()  # grain's workers read its flags, which only programs run by absl have parsed
    options = grain.ReadOptions(num_threads=_THREADS, prefetch_buffer_size=max(_THREADS, 2 * batch_size))
    examples = grain.MapDataset.range(first, last).map(read).to_iter_dataset(options)
    if workers:
        examples = examples.mp_prefetch(grain.MultiprocessingOptions(num_workers=workers))
    # Batched here, after the workers' examples were put back in order: any number of them gives the same batches.
    yield from examples.batch(batch_size)


def _place(shard: Shard, number: int) -> int:
    """Place in the global stream of this process's `number`-th example."""
    step, row = divmod(number, shard.local)
    return step * shard.batch_size + shard.index * shard.local + row


def _training_example(split: Split, shard: Shard, seed: int, chosen: str, size: int, number: int) -> _Example:
    position = np.array([_place(shard, number)])
    index = int(indices(seed, split.size, shard.batch_size, position)[0])
    index = index if split.rows is None else int(split.rows[index])
    record = split.images[index]
    if chosen == "inception":
        random = augment.uniforms(seed, position, augment.INCEPTION_RANDOM)[0]
        image = augment.inception_crop(record["image"], size, random)
    else:
        image = _image(record, size)
    return {"image": image, "label": np.int32(record["label"]), "index": np.int32(index)}


def _test_example(split: Split, shard: Shard, shape: tuple[int, ...], number: int) -> _Example:
    place = _place(shard, number)
    record = split.images[place if place < split.size else 0]
    image = _image(record, shape[0] if shape else 0)
    if place >= split.size:
        return {"image": np.zeros_like(image), "label": np.int32(-1), "weight": np.float32(0)}
    return {"image": image, "label": np.int32(record["label"]), "weight": np.float32(1)}


def _image(record: _Example, size: int) -> np.ndarray:
    """Encoded bytes as a picture of that side; an array as it is, in float32."""
    image = record["image"]
    return augment.centre_crop(image, size) if isinstance(image, bytes) else np.asarray(image, np.float32)
