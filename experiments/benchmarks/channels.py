"""How much faster half of the channels are, and how long it takes to find channels.

    python -m experiments.benchmarks.channels [--rounds 15]

Timed in turns, one run: a forward and backward pass of ResNet-18, dense and with half of the channels of every layer
(`rx.channels.shrink`). And `rx.channels.groups` from shapes alone, for ResNet-50 and a transformer of 12 layers.
"""

from __future__ import annotations

import argparse
import functools
import time
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn

import rigl_jax as rx
from experiments.benchmarks import timing
from experiments.models import MODELS

BATCH, SIDE = 4, 128
norm = functools.partial(nn.BatchNorm, use_running_average=True)


class Basic(nn.Module):
    """Two 3x3 convolutions and a sum (He et al. 2016)."""

    features: int
    stride: int

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """Float `[batch, height, width, channels]` to `[batch, height / stride, width / stride, features]`."""
        conv = functools.partial(nn.Conv, self.features, use_bias=False)
        y = nn.relu(norm()(conv((3, 3), self.stride, padding=1)(x)))
        y = norm()(conv((3, 3), padding=1)(y))
        if x.shape != y.shape:
            x = norm()(conv((1, 1), self.stride, padding=0)(x))
        return nn.relu(x + y)


class ResNet18(nn.Module):
    """11,689,512 weights; the statistics of the normalisations stand still."""

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """Float `[batch, height, width, 3]` to logits `[batch, 1000]`."""
        x = nn.relu(norm()(nn.Conv(64, (7, 7), 2, padding=3, use_bias=False)(x)))
        x = nn.max_pool(x, (3, 3), (2, 2), ((1, 1), (1, 1)))
        for stage in range(4):
            for block in range(2):
                x = Basic(64 * 2**stage, 2 if stage and not block else 1)(x)
        return nn.Dense(1000)(x.mean((1, 2)))


class Layer(nn.Module):
    """A layer of a transformer, normalised first."""

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """Float `[batch, time, features]` to the same."""
        attention: Any = nn.MultiHeadDotProductAttention(num_heads=12)
        x = x + attention(nn.LayerNorm()(x))
        return x + nn.Dense(x.shape[-1])(nn.gelu(nn.Dense(4 * x.shape[-1])(nn.LayerNorm()(x))))


class Transformer(nn.Module):
    """The sizes of GPT-2 small and BERT base: 12 layers of 768 features, 12 heads."""

    @nn.compact
    def __call__(self, tokens: jax.Array) -> jax.Array:
        """Integer `[batch, time]` to logits `[batch, time, 30522]`."""
        embed = nn.Embed(30522, 768)
        x = embed(tokens)
        for _ in range(12):
            x = Layer()(x)
        return embed.attend(nn.LayerNorm()(x))


def passes(apply: Callable[..., Any], params: Any, x: jax.Array) -> timing.Call:
    """A forward and backward pass."""
    step = jax.jit(jax.grad(lambda params, x: jnp.square(apply(params, x)).mean()))
    return lambda: step(params, x)


def resnet18(rounds: int) -> dict[str, Any]:
    """ResNet-18 with half of its channels against dense."""
    x = jax.random.normal(jax.random.key(0), (BATCH, SIDE, SIDE, 3))
    apply = ResNet18().apply
    params = jax.jit(ResNet18().init)(jax.random.key(1), x)
    groups = rx.channels.groups(apply, params, x)
    keep = rx.channels.select(groups, rx.channels.scores(groups, params), remove=0.5, scope="layer")
    small = rx.channels.shrink(apply, params, keep, x)
    contenders = {"dense": passes(apply, params, x), "half": passes(small.apply, small.params, x)}
    seconds = timing.interleave(contenders, rounds=rounds)
    busy = {name: _processor_seconds(call) for name, call in contenders.items()}
    quotients = np.asarray(seconds["dense"]) / np.asarray(seconds["half"])
    return {
        "model": "resnet18",
        "images": [BATCH, SIDE, SIDE],
        "rounds": rounds,
        "macs": small.macs,
        "dense_ms": timing.milliseconds(seconds["dense"]),
        "half_ms": timing.milliseconds(seconds["half"]),
        "ratio": round(timing.ratio(seconds["dense"], seconds["half"]), 2),
        "processor_ratio": round(busy["dense"] / busy["half"], 2),
        "ratio_quartiles": [round(float(q), 2) for q in np.quantile(quotients, (0.25, 0.75))],
    }


def _processor_seconds(call: timing.Call, repeats: int = 5) -> float:
    """Seconds of the processor, over all threads: what other work on the machine disturbs least. The least of some."""
    found = []
    for _ in range(repeats):
        busy = time.process_time()
        jax.block_until_ready(call())
        found.append(time.process_time() - busy)
    return min(found)


def grouped(name: str, repeats: int = 3) -> dict[str, Any]:
    """Seconds of tracing and grouping, elapsed and of the processor, the medians; arrays are shapes."""
    if name == "resnet50":
        apply = functools.partial(MODELS[name](1000).apply, train=False)
        init = functools.partial(MODELS[name](1000).init, train=False)
        x = jax.ShapeDtypeStruct((1, 224, 224, 3), jnp.float32)
    else:
        apply, init, x = Transformer().apply, Transformer().init, jax.ShapeDtypeStruct((1, 128), jnp.int32)
    params = jax.eval_shape(init, jax.random.key(0), x)
    times, found = [], []
    for _ in range(repeats):
        jax.clear_caches()
        start, busy = time.perf_counter(), time.process_time()
        found = rx.channels.groups(apply, params, x)
        times.append((time.perf_counter() - start, time.process_time() - busy))
    elapsed, processor = np.median(times, axis=0).round(2).tolist()
    return {
        "model": name,
        "leaves": len(jax.tree.leaves(params)),
        "groups": len(found),
        "seconds": elapsed,
        "processor_seconds": processor,
    }


def main() -> None:
    """Measures and writes the record."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=15)
    rounds = parser.parse_args().rounds
    rows = [grouped("resnet50"), grouped("transformer"), resnet18(rounds)]
    for row in rows:
        print(row)
    print(timing.write("channels", rows))


if __name__ == "__main__":
    main()
