"""What the cells of the data study share: two data sets, small networks, and training that all seeds share."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax import Array, lax

import rigl_jax as rx
from experiments.data import idx, sources
from experiments.studies.method_training import optimizer, segments

SEEDS = (0, 1, 2, 3, 4)
TRAIN = 10_000
"""Images of Fashion-MNIST that the study trains on: the first ones."""
Params = dict[str, dict[str, Array]]


class Images(NamedTuple):
    """Images as vectors, `float32[n, pixels]`, and labels, `int32[n]`."""

    x: Array
    y: Array


class Problem(NamedTuple):
    """A data set and how it is trained on.

    Attributes:
      train, test: standardised by mean and deviation of all training pixels.
      raw: the pixels of the training images as they are, float64[n, pixels], on the host.
      sizes: of the layers of the network, from pixels to classes.
      batch: examples of a step.
      epochs: of the whole training; the learning rate falls by a cosine.
      rate: its peak.
    """

    train: Images
    test: Images
    raw: np.ndarray
    sizes: tuple[int, ...]
    batch: int
    epochs: int
    rate: float

    @property
    def epoch(self) -> int:
        """Steps of an epoch of all training images."""
        return len(self.train.y) // self.batch

    @property
    def steps(self) -> int:
        """Steps of the whole training."""
        return self.epochs * self.epoch


def digits() -> Problem:
    """scikit-learn's digits: 1437 and 360 images of 8 x 8 pixels."""
    found = sources.digits()
    parts = [(split.images.reshape(split.size, -1), split.labels) for split in (found.train, found.test)]
    return _problem(*parts, hidden=(64, 32), batch=64, epochs=30, rate=0.1)


def fashion(source: str) -> Problem:
    """The first 10,000 training images of Fashion-MNIST, and all its test images.

    Raises:
      ValueError: the folder does not hold the four IDX files.
    """
    found = idx.read_folder(source)
    parts = [(x[:TRAIN].reshape(TRAIN, -1), y[:TRAIN]) for x, y in (found["train"], found["test"])]
    return _problem(*parts, hidden=(128, 64), batch=128, epochs=20, rate=0.05)


def _problem(train: Any, test: Any, *, hidden: tuple[int, ...], batch: int, epochs: int, rate: float) -> Problem:
    raw = np.asarray(train[0], np.float64)
    mean, std = raw.mean(), raw.std()
    parts = [Images(jnp.asarray((x - mean) / std, jnp.float32), jnp.asarray(y, jnp.int32)) for x, y in (train, test)]
    return Problem(parts[0], parts[1], raw, (raw.shape[1], *hidden, 10), batch, epochs, rate)


# --- the network ---------------------------------------------------------------------------------------------------


def init(key: Array, sizes: Sequence[int]) -> Params:
    """A network of dense layers with ReLU, He's normal initial weights."""
    keys = jax.random.split(key, len(sizes) - 1)
    return {
        f"dense_{i}": {
            "kernel": jax.random.normal(k, (n_in, n_out)) * jnp.sqrt(2 / n_in),
            "bias": jnp.zeros(n_out),
        }
        for i, (k, n_in, n_out) in enumerate(zip(keys, sizes[:-1], sizes[1:], strict=True))
    }


def apply(params: Params, x: Array) -> tuple[Array, Array]:
    """`(logits, inputs of the last layer)`."""
    *hidden, last = (params[name] for name in sorted(params))
    for layer in hidden:
        x = jax.nn.relu(x @ layer["kernel"] + layer["bias"][None])
    return x @ last["kernel"] + last["bias"][None], x


def losses(params: Params, x: Array, y: Array) -> Array:
    """Cross-entropy of each example, float32[n], in nats."""
    return optax.softmax_cross_entropy_with_integer_labels(apply(params, x)[0], y)


def accuracy(params: Params, images: Images) -> Array:
    """Share of right answers, float32 scalar."""
    return jnp.mean(jnp.argmax(apply(params, images.x)[0], -1) == images.y)


def keys(use: int, seeds: Sequence[int] = SEEDS) -> Array:
    """A key for each seed; `use` tells apart what is drawn."""
    return jax.vmap(lambda seed: jax.random.fold_in(jax.random.key(seed), use))(jnp.asarray(seeds))


# --- training on minibatches ---------------------------------------------------------------------------------------


class State(NamedTuple):
    """The state of a training. Of the seeds of a study all arrays have one axis more, the first.

    Attributes:
      params: the weights.
      opt_state: of the optimizer, or of `rx.sparsify`.
      stats: moving averages of the losses of all training examples.
      forgetting: of their predictions.
    """

    params: Params
    opt_state: Any
    stats: rx.coreset.SampleStats
    forgetting: rx.coreset.ForgettingState


class Trainer(NamedTuple):
    """The compiled functions of a training of several seeds.

    Attributes:
      algorithm: the sparse-training method, None for dense networks.
      init: `keys -> State`.
      train: `(state, labels int32[seeds, n], batches int32[seeds, steps, batch], weight float32[seeds, n], first, stop)
        -> state`: the steps from `first` up to `stop`; `batches[:, 0]` is that of step `first`. The loss of an example
        counts by its weight.
    """

    algorithm: rx.Algorithm | None
    init: Callable[[Array], State]
    train: Callable[..., State]


def make_trainer(problem: Problem, steps: int, make: Callable[[Params], rx.Algorithm] | None = None) -> Trainer:
    """Training by SGD with a cosine over so many steps; `make(shapes)` gives the sparse-training method."""
    n, x = len(problem.train.y), problem.train.x
    algorithm = None if make is None else make(jax.eval_shape(lambda: init(jax.random.key(0), problem.sizes)))
    rate = optax.cosine_decay_schedule(problem.rate, steps)
    dynamic, forgetting = rx.coreset.dynamic_pruning(n, 1), rx.coreset.forgetting(n)

    def transform(key: Array) -> optax.GradientTransformationExtraArgs:
        inner = optimizer(rate)
        return optax.with_extra_args_support(inner) if algorithm is None else rx.sparsify(inner, algorithm, key=key)

    def first(key: Array) -> State:
        weights, masks = jax.random.split(key)
        params = init(weights, problem.sizes)
        opt_state: Any = transform(masks).init(params)
        if algorithm is not None:
            params = rx.apply_masks(params, opt_state.masks)
        return State(params, opt_state, dynamic.init(), forgetting.init())

    def step(state: State, y: Array, rows: Array, weight: Array, rewire: bool) -> State:
        def loss(params: Params) -> Any:
            logits, _ = apply(params, x[rows])
            each = optax.softmax_cross_entropy_with_integer_labels(logits, y[rows])
            return jnp.mean(each * weight[rows]), (each, jnp.argmax(logits, -1) == y[rows])

        grads, (each, right) = jax.grad(loss, has_aux=True)(state.params)
        extra = {} if algorithm is None else {"rewire": rewire}
        updates, opt_state = transform(jax.random.key(0)).update(grads, state.opt_state, state.params, **extra)
        params: Any = optax.apply_updates(state.params, updates)
        return State(
            params,
            opt_state,
            dynamic.update(state.stats, rows, each),
            forgetting.update(state.forgetting, rows, right),
        )

    @functools.partial(jax.jit, static_argnames="rewire")
    def advance(state: State, y: Array, batches: Array, weight: Array, first: Any, stop: Any, *, rewire: bool) -> State:
        every = jax.vmap(functools.partial(step, rewire=rewire))
        return lax.fori_loop(first, stop, lambda i, now: every(now, y, batches[:, i], weight), state)

    def train(state: State, y: Array, batches: Array, weight: Array, start: int, stop: int) -> State:
        for rewire, begin, end in segments(algorithm, stop):
            if end > start:
                state = advance(state, y, batches, weight, max(begin, start) - start, end - start, rewire=rewire)
        return state

    return Trainer(algorithm, jax.jit(jax.vmap(first)), train)


@functools.partial(jax.jit, static_argnames=("steps", "batch"))
def shuffled(keys: Array, index: Array, *, steps: int, batch: int) -> Array:
    """int32[seeds, steps, batch] of the examples `index`, int[seeds, kept]: a new permutation for each pass over them.

    What does not fill the last batch of a pass is left out of it.
    """
    whole = index.shape[1] // batch * batch

    def one(key: Array, index: Array) -> Array:
        passes = jax.random.split(key, -(-steps * batch // whole))
        rows = jax.vmap(lambda k: jax.random.permutation(k, index)[:whole])(passes)
        return rows.reshape(-1, batch)[:steps].astype(jnp.int32)

    return jax.vmap(one)(keys, index)


def everything(problem: Problem, seeds: int) -> tuple[Array, Array]:
    """`(index, weight)` of all training examples for so many seeds."""
    n = len(problem.train.y)
    return jnp.tile(jnp.arange(n)[None], (seeds, 1)), jnp.ones((seeds, n))


def labels_of(problem: Problem, seeds: int) -> Array:
    """int32[seeds, n]: the labels as they are, once a seed."""
    return jnp.tile(problem.train.y[None], (seeds, 1))


def take(tree: Any, seed: int) -> Any:
    """What one of the seeds has of a tree of all of them."""
    return jax.tree.map(lambda leaf: leaf[seed], tree)


def rounded(values: Any, digits: int = 5) -> list[float]:
    """A fact of each seed as a record holds it."""
    return [round(float(value), digits) for value in np.asarray(values)]
