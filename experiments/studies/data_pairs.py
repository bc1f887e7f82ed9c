"""Pairs of an image and a name, of which some do not belong together, and ensembles that find these.

In the style of EfficientCLIP (Wang et al. 2021): a tower for images and one for names, trained so that pairs are alike;
pairs with a low mean similarity under several networks are left out. The names are those of ten classes.
"""

from __future__ import annotations

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax import Array, lax

import rigl_jax as rx
from experiments.studies import data_training as training
from experiments.studies.data_noise import detection, noisy
from experiments.studies.data_training import SEEDS, Images, Problem, rounded
from experiments.studies.method_training import optimizer

SHARE = 0.2
"""Of the pairs, whose name is that of another class."""
MEMBERS, EARLY = 5, 4
"""Networks that score, and how many epochs they are trained."""
WIDTH, TEMPERATURE = 16, 0.1
THRESHOLD = 0.5
"""The least mean probability of a name, given the image, with which a pair stays."""
PARTS = {
    "all": "all pairs",
    "one": "pairs that one network accepts",
    "ensemble": f"pairs that {MEMBERS} networks accept",
    "right": "all pairs that belong together",
}
"""What is trained on in the end."""


def similarity(params: Any, x: Array) -> Array:
    """Cosines of images and names, float32[n, classes]."""
    image, name = training.apply(params["images"], x)[0], params["names"]
    unit = lambda v: v * lax.rsqrt(jnp.sum(v**2, axis=-1, keepdims=True) + 1e-8)  # noqa: E731
    return unit(image) @ unit(name).T


def train(problem: Problem, keys: Array, y: Array, weight: Array, *, epochs: int) -> Any:
    """Networks of all seeds, each on its names int32[seeds, n]; a pair counts by its weight float32[seeds, n]."""
    steps = epochs * problem.epoch
    index, _ = training.everything(problem, len(SEEDS))
    order = jax.vmap(jax.random.fold_in, in_axes=(0, None))(keys, 1)
    batches = training.shuffled(order, index, steps=steps, batch=problem.batch)
    return _trained(problem.train.x, keys, y, weight, batches, sizes=problem.sizes, rate=problem.rate)


@functools.partial(jax.jit, static_argnames=("sizes", "rate"))
def _trained(
    x: Array, keys: Array, y: Array, weight: Array, batches: Array, *, sizes: tuple[int, ...], rate: float
) -> Any:
    *widths, classes = sizes
    tx = optimizer(optax.cosine_decay_schedule(rate, batches.shape[1]))

    def one(key: Array, y: Array, weight: Array, batches: Array) -> Any:
        def loss(params: Any, rows: Array) -> Array:
            logits = similarity(params, x[rows]) / TEMPERATURE
            return jnp.mean(optax.softmax_cross_entropy_with_integer_labels(logits, y[rows]) * weight[rows])

        def step(now: Any, rows: Array) -> Any:
            params, state = now
            updates, state = tx.update(jax.grad(loss)(params, rows), state, params)
            return (optax.apply_updates(params, updates), state), None

        images, names = jax.random.split(key)
        table = jax.random.normal(names, (classes, WIDTH))
        params = {"images": training.init(images, (*widths, WIDTH)), "names": table}
        return lax.scan(step, (params, tx.init(params)), batches)[0][0]

    return jax.vmap(one)(keys, y, weight, batches)


@jax.jit
@functools.partial(jax.vmap, in_axes=(0, None, 0))
def _scores(params: Any, x: Array, y: Array) -> Array:
    probs = jax.nn.softmax(similarity(params, x) / TEMPERATURE)
    return jnp.take_along_axis(probs, y[:, None], axis=1)[:, 0]


@jax.jit
@functools.partial(jax.vmap, in_axes=(0, None))
def _accuracy(params: Any, images: Images) -> Array:
    return jnp.mean(jnp.argmax(similarity(params, images.x), axis=1) == images.y)


def pairs(problem: Problem) -> dict[str, Any]:
    """How well one network and the ensemble find wrong pairs, which they accept, and what training on these gives."""
    y, wrong = noisy(problem, SHARE)
    everywhere = jnp.ones(y.shape, jnp.float32)
    members = [train(problem, training.keys(300 + i), y, everywhere, epochs=EARLY) for i in range(MEMBERS)]
    each = np.stack([_scores(params, problem.train.x, y) for params in members], axis=1)  # [seeds, members, n]
    kept = {
        "all": np.ones_like(wrong),
        "one": np.stack([rx.coreset.confident(scores[:1], THRESHOLD) for scores in each]),
        "ensemble": np.stack([rx.coreset.confident(scores, THRESHOLD) for scores in each]),
        "right": ~wrong,
    }
    found: dict[str, Any] = {"scores": {}, "parts": {}}
    for name, scores in (("one", each[:, 0]), ("ensemble", each.mean(axis=1))):
        both = [detection(-s, w) for s, w in zip(scores, wrong, strict=True)]
        found["scores"][name] = {"precision": rounded([p for p, _ in both]), "auroc": rounded([a for _, a in both])}
    for name, part in kept.items():
        count = np.maximum(part.sum(axis=1), 1)
        weight = part * part.shape[1] / count[:, None]  # steps as large as on all pairs
        params = train(problem, training.keys(400), y, jnp.asarray(weight, jnp.float32), epochs=problem.epochs)
        found["parts"][name] = {
            "kept": rounded(part.mean(axis=1)),
            "wrong": rounded((wrong & (part > 0)).sum(axis=1) / count),
            "test": rounded(_accuracy(params, problem.test)),
        }
    return found
