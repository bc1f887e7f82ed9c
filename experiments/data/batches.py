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


class Iterators(NamedTuple):
    """How a source is read.

    Attributes:
      train: `(start_step, order) -> iterator` of batches without end.
      test: `() -> iterator` over the test split, once and in order.
      ordered: the same over the training split, with the index of each example, that of none where one is filled up.
      image_shape: of one example.
    """

    train: Callable[[int, Order], Iterator[Batch]]
    test: Callable[[], Iterator[Batch]]
    ordered: Callable[[], Iterator[Batch]]
    image_shape: tuple[int, ...]


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
def _permutation(seed: tuple[int, ...], epoch: int, size: int) -> np.ndarray:
    order = np.random.default_rng([*seed, epoch]).permutation(size)
    order.flags.writeable = False
    return order


def indices(seed: int | tuple[int, ...], size: int, batch_size: int, positions: np.ndarray) -> np.ndarray:
    """Which example stands at each place of the shuffled, endless stream.

    An epoch holds `size // batch_size` whole batches of its own permutation. NumPy's permutation costs 1 ms for
    60,000 examples, once an epoch; grain's index_shuffle costs 0.6 ms for each batch of 128, and its seed 1 gives
    the epochs of seed 0 shifted by one.

    Args:
      seed: of the run, or several numbers.
      size: examples of the split, at least `batch_size`.
      batch_size: of the global batch.
      positions: int[n], all in one epoch.

    Returns:
      int[n] in 0 .. size - 1.
    """
    length = size // batch_size * batch_size
    epoch, start = divmod(int(positions[0]), length)
    seed = seed if isinstance(seed, tuple) else (seed,)
    return _permutation(seed, epoch, size)[start + positions - positions[0]]


class Order(NamedTuple):
    """The order of training examples: epoch after epoch of all of them, or of a part.

    Attributes:
      seed: of the run.
      batch_size: of the global batch.
      size: examples in use, at least `batch_size`.
      rows: int64[size], which of the split they are; None: all.
      since: the step with which their first epoch begins; a part that is chosen at another step has another order.
    """

    seed: int
    batch_size: int
    size: int
    rows: np.ndarray | None
    since: int = 0

    def of(self, positions: np.ndarray) -> np.ndarray:
        """int[n]: the examples, by their index in the split, at places of the endless stream, all of one epoch."""
        seed = (self.seed, self.since) if self.since else self.seed
        found = indices(seed, self.size, self.batch_size, positions - self.since * self.batch_size)
        return found if self.rows is None else self.rows[found]


def order(split: Split, seed: int, batch_size: int, part: np.ndarray | None = None, since: int = 0) -> Order:
    """The order of a split, or of a part of its examples, `int[n]`."""
    if part is None:
        return Order(seed, batch_size, split.size, split.rows)
    rows = np.asarray(part, np.int64)
    return Order(seed, batch_size, len(rows), rows if split.rows is None else split.rows[rows], since)


def in_memory(source: Source, shard: Shard, seed: int, chosen: str) -> Iterators:
    """Batches of arrays: each is one vectorised gather."""
    images, labels = source.train.images, source.train.labels
    prepare = augment.standardise_image if source.per_image else _by_channels(images)
    if images.dtype != np.uint8:
        prepare = np.asarray  # as it is

    def train(start_step: int, order: Order) -> Iterator[Batch]:
        step = start_step
        while True:
            positions = shard.positions(step)
            chosen_ones = order.of(positions)
            if chosen == "crop_flip":
                pixels = augment.crop_flip(images, chosen_ones, augment.uniforms(seed, positions, 3))
            else:
                pixels = np.take(images, chosen_ones, axis=0)
            yield {"image": prepare(pixels), "label": labels[chosen_ones], "index": chosen_ones.astype(np.int32)}
            step += 1

    def once(split: Split) -> Iterator[Batch]:
        for places, weight in _test_places(split.size, shard):
            rows = places if split.rows is None else split.rows[places]
            batch = _weighted(prepare(np.take(split.images, rows, axis=0)), split.labels[rows], weight)
            yield batch | {"index": _index(rows, weight)}

    return Iterators(train, lambda: once(source.test), lambda: once(source.train), images.shape[1:])


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


def _index(rows: np.ndarray, weight: np.ndarray) -> np.ndarray:
    """int32[n]; what fills a batch up has an index that no example has, and that JAX leaves out when it scatters."""
    return np.where(weight > 0, rows, np.iinfo(np.int32).max).astype(np.int32)


def streamed(source: Source, shard: Shard, seed: int, chosen: str, size: int, workers: int) -> Iterators:
    """Batches of records on disk: grain reads, decodes and crops ahead of the training step."""
    mean, std = augment.IMAGENET_MEAN * 255, augment.IMAGENET_STD * 255
    prepare: Callable[..., Any] = functools.partial(augment.standardise_channels, mean=mean, std=std)
    shape: tuple[int, ...] = (size, size, 3)
    if not _is_encoded(source):
        prepare, shape = np.asarray, np.shape(source.train.images[0]["image"])

    def train(start_step: int, order: Order) -> Iterator[Batch]:
        read = functools.partial(_training_example, source.train, order, shard, seed, chosen, size)
        first = start_step * shard.local
        for batch in _ahead(read, first, _ENDLESS, shard.local, workers):
            yield {**batch, "image": prepare(batch["image"])}

    def once(split: Split) -> Iterator[Batch]:
        length = -(-split.size // shard.batch_size) * shard.local
        read = functools.partial(_test_example, split, shard, shape)
        for batch in _ahead(read, 0, length, shard.local, workers):
            whole = _weighted(prepare(batch["image"]), batch["label"], batch["weight"])
            yield whole | {"index": _index(batch["index"], batch["weight"])}

    return Iterators(train, lambda: once(source.test), lambda: once(source.train), shape)


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


def _training_example(
    split: Split, order: Order, shard: Shard, seed: int, chosen: str, size: int, number: int
) -> _Example:
    position = np.array([_place(shard, number)])
    index = int(order.of(position)[0])
    record = split.images[index]
    if chosen == "inception":
        random = augment.uniforms(seed, position, augment.INCEPTION_RANDOM)[0]
        image = augment.inception_crop(record["image"], size, random)
    else:
        image = _image(record, size)
    return {"image": image, "label": np.int32(record["label"]), "index": np.int32(index)}


def _test_example(split: Split, shard: Shard, shape: tuple[int, ...], number: int) -> _Example:
    place = _place(shard, number)
    fills = place >= split.size
    index = 0 if fills else place if split.rows is None else int(split.rows[place])
    record = split.images[index]
    image = _image(record, shape[0] if shape else 0)
    if fills:
        return {"image": np.zeros_like(image), "label": np.int32(-1), "weight": np.float32(0), "index": np.int32(0)}
    label = np.int32(record["label"])
    return {"image": image, "label": label, "weight": np.float32(1), "index": np.int32(index)}


def _image(record: _Example, size: int) -> np.ndarray:
    """Encoded bytes as a picture of that side; an array as it is, in float32."""
    image = record["image"]
    return augment.centre_crop(image, size) if isinstance(image, bytes) else np.asarray(image, np.float32)
