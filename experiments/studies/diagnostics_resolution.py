"""Training with some batches at half the resolution, in the style of Poulos et al. (2019): images and filters pooled.

Small convolutional networks that end in a mean over the image, so that they take images of both sizes. All are judged
on whole images.
"""

from __future__ import annotations

import functools
import time
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax import Array, lax

import rigl_jax as rx
from experiments.models.downsampling import downsampled, pool_filters, pool_input
from experiments.studies import data_training as training
from experiments.studies.data_training import SEEDS, Images, Problem, rounded
from experiments.studies.method_training import optimizer

K = 2
"""Pixels, and taps of a filter, that are pooled, in both directions."""
SIDE = 5
"""Of a filter, whose taps pooled by 2 still lie on the pooled pixels."""
FEATURES = {8: (16, 32), 28: (8, 16)}
"""Channels of the two convolutions by the side of an image."""
STRIDE = {8: 1, 28: 2}
"""Of the first convolution."""
EPOCHS = {8: 30, 28: 6}
SHARES = (0.25, 0.5, 0.75)
"""Of the steps that are small."""
HALF = 0.5
WAYS = {
    "whole": "none",
    "random": "{} of the steps, drawn",
    "first": "the first {} of the steps",
    "images": "{} of the steps, drawn; whole filters",
    "short": "none, but fewer steps: the FLOPs of {} small ones",
}
"""Which steps are small."""
REPEATS, TIMED = 5, 20
"""How often, and how many steps at a time, both kinds of steps are timed in turn."""
Apply = Callable[[Any, Array], Array]


def cells() -> list[tuple[str, float]]:
    """`(way, share of small steps)` of every cell, and the one that times steps."""
    return [
        ("whole", 0.0),
        *(("random", share) for share in SHARES),
        *((way, HALF) for way in ("first", "images", "short")),
        ("seconds", 0.0),
    ]


class Bench(NamedTuple):
    """What all cells of a model share.

    Attributes:
      problem: images and labels, steps and learning rate.
      init: `key -> params`.
      train: `(params, batches int32[steps, batch], small bool[steps], steps, pooled=bool) -> params`; `pooled`: small
        steps pool filters too.
      accuracy: `params -> float32 scalar` on whole test images.
      ratio: multiplications of a small step by those of a whole one, with pooled filters and with whole ones.
    """

    problem: Problem
    init: Callable[[Array], Any]
    train: Callable[..., Any]
    accuracy: Callable[[Any], Array]
    ratio: dict[str, float]


def init(key: Array, inputs: int, classes: int) -> Any:
    """Two convolutions and a dense layer, He's normal initial weights; inputs are the pixels of a square image."""
    first, second = FEATURES[round(inputs**0.5)]
    shapes = {"conv_0": (SIDE, SIDE, 1, first), "conv_1": (SIDE, SIDE, first, second), "dense": (second, classes)}
    keys = jax.random.split(key, len(shapes))

    def layer(key: Array, shape: tuple[int, ...]) -> Any:
        fan_in = int(np.prod(shape[:-1]))
        return {"kernel": jax.random.normal(key, shape) * jnp.sqrt(2 / fan_in), "bias": jnp.zeros(shape[-1])}

    return {name: layer(k, shape) for k, (name, shape) in zip(keys, shapes.items(), strict=True)}


def apply(params: Any, x: Array, *, stride: int) -> Array:
    """Logits of images [batch, side, side, 1] of any size."""
    x = x.transpose(3, 1, 2, 0)  # channels first, images last, so that every loop is long
    x = jax.nn.relu(_convolved(params["conv_0"], x, stride))
    channels, side, _, n = x.shape
    whole = side // 2 * 2
    x = x[:, :whole, :whole].reshape(channels, side // 2, 2, side // 2, 2, n).max((2, 4))
    x = jax.nn.relu(_convolved(params["conv_1"], x, 1)).mean((1, 2))
    return (params["dense"]["kernel"].T @ x + params["dense"]["bias"][:, None]).T


def _convolved(layer: Any, x: Array, stride: int) -> Array:
    """A convolution of [channels, side, side, images] with the zeros at the edges that keep its size, as one product.

    In a loop, XLA on CPU takes about five times as long for a small convolution as for the product of its patches.
    """
    kernel = layer["kernel"]
    taps, side, n = len(kernel), -(-x.shape[1] // stride), x.shape[-1]
    x = jnp.pad(x, ((0, 0), (taps // 2, taps // 2), (taps // 2, taps // 2), (0, 0)))
    ends = stride * (side - 1) + 1
    patches = jnp.stack([x[:, i : i + ends : stride, j : j + ends : stride] for i in range(taps) for j in range(taps)])
    flat = kernel.reshape(-1, kernel.shape[-1]).T @ patches.reshape(-1, side * side * n)
    return (flat + layer["bias"][:, None]).reshape(-1, side, side, n)


def make_bench(problem: Problem) -> Bench:
    """Compiles the training of a problem, whose images are squares."""
    inputs, classes = problem.sizes[0], problem.sizes[-1]
    side = round(inputs**0.5)
    problem = problem._replace(epochs=EPOCHS[side])
    net = functools.partial(apply, stride=STRIDE[side])
    pixels = lambda x: x.reshape(-1, side, side, 1)  # noqa: E731
    tx = lambda progress: optimizer(problem.rate * (1 + jnp.cos(jnp.pi * progress)) / 2)  # noqa: E731

    def logits(params: Any, x: Array, small: Array, pooled: bool) -> Array:
        if pooled:
            return downsampled(net, small, K)(params, x)
        return lax.cond(small, lambda params, x: net(params, pool_input(x, K)), net, params, x)

    @functools.partial(jax.jit, static_argnames="pooled")
    def train(images: Images, params: Any, batches: Array, small: Array, steps: Any, *, pooled: bool) -> Any:
        def step(i: Array, now: Any) -> Any:
            def loss(params: Any) -> Array:
                out = logits(params, pixels(images.x[batches[i]]), small[i], pooled)
                return optax.softmax_cross_entropy_with_integer_labels(out, images.y[batches[i]]).mean()

            params, state = now
            updates, state = tx(i / steps).update(jax.grad(loss)(params), state, params)
            return optax.apply_updates(params, updates), state

        return lax.fori_loop(0, steps, step, (params, tx(0.0).init(params)))[0]

    @jax.jit
    def accuracy(images: Images, params: Any) -> Array:
        return jnp.mean(jnp.argmax(net(params, pixels(images.x)), -1) == images.y)

    make = functools.partial(init, inputs=inputs, classes=classes)
    params, x = jax.eval_shape(make, jax.random.key(0)), jax.ShapeDtypeStruct((1, side, side, 1), jnp.float32)
    tiny = jax.eval_shape(lambda x: pool_input(x, K), x)
    whole = rx.flops(net, params, x).total
    ratio = {
        "random": rx.flops(net, jax.eval_shape(lambda p: pool_filters(p, K), params), tiny).total / whole,
        "images": rx.flops(net, params, tiny).total / whole,
    }
    parts = functools.partial(train, problem.train), functools.partial(accuracy, problem.test)
    return Bench(problem, jax.jit(make), *parts, ratio)


def small_steps(way: str, share: float, steps: int, seed: int) -> np.ndarray:
    """Which steps are small, bool[steps]."""
    if way in ("random", "images"):
        return np.random.default_rng([56, seed]).random(steps) < share
    return np.arange(steps) < round(share * steps) if way == "first" else np.zeros(steps, bool)


def run(bench: Bench, way: str, share: float) -> dict[str, Any]:
    """Networks of all seeds: test accuracy, share of small steps, multiplications of training, those of `whole` = 1."""
    n, total = len(bench.problem.train.y), bench.problem.steps
    index = jnp.tile(jnp.arange(n)[None], (len(SEEDS), 1))
    batches = training.shuffled(training.keys(56), index, steps=total, batch=bench.problem.batch)
    found: dict[str, list[float]] = {"test": [], "small": [], "cost": []}
    for seed, key, rows in zip(SEEDS, training.keys(57), batches, strict=True):
        saved = share * (1 - bench.ratio["random"])
        steps = round((1 - saved) * total) if way == "short" else total
        small = small_steps(way, share, total, seed)
        params = bench.train(bench.init(key), rows, small, steps, pooled=way != "images")
        few = float(small[:steps].sum())
        cost = (steps - few + few * bench.ratio["images" if way == "images" else "random"]) / total
        for name, value in (("test", float(bench.accuracy(params))), ("small", few / steps), ("cost", cost)):
            found[name].append(value)
    return {name: rounded(values) for name, values in found.items()}


def seconds(bench: Bench) -> dict[str, list[float]]:
    """CPU seconds of small steps by those of whole ones, timed in turn."""
    params = bench.init(jax.random.key(0))
    batches = jnp.tile(jnp.arange(bench.problem.batch, dtype=jnp.int32)[None], (bench.problem.steps, 1))

    def timed(small: bool, pooled: bool) -> float:
        kinds, started = np.full(bench.problem.steps, small), time.process_time()
        jax.block_until_ready(bench.train(params, batches, kinds, TIMED, pooled=pooled))
        return time.process_time() - started

    found: dict[str, list[float]] = {"random": [], "images": []}
    for i in range(-1, REPEATS):
        for way, ratios in found.items():
            small, whole = (timed(kind, way == "random") for kind in (True, False))
            if i >= 0:  # the first compiles
                ratios.append(small / whole)
    return {way: rounded(ratios) for way, ratios in found.items()}
