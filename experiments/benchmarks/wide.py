"""A network whose dense training does not fit: two hidden layers of 32,768 units, 99 % sparse, on Fashion-MNIST.

    python -m experiments.benchmarks.wide [--width 32768] [--steps 400]

Over a billion dense weights, 13 GB with Adam's moments and gradients before a single activation. Packed, with RigL's
growth by streamed gradients, the whole process stays below 3 GB, and it learns. Nothing of the size of the hidden
weight is ever allocated, not even its mask.
"""

from __future__ import annotations

import argparse
import functools
import math
import resource
import time
from typing import Any

import jax
import jax.numpy as jnp
import optax
from rich.progress import track

from experiments import data
from experiments.benchmarks import timing
from rigl_jax import schedules
from rigl_jax.algorithms.static import MaskState
from rigl_jax.base import InPatterns
from rigl_jax.execution import Packed, gradient_factors, nbytes, random_pattern, rewire_streamed, run_packed
from rigl_jax.transform import SparseState

CLASSES = 10


def apply(params: Any, image: jax.Array) -> jax.Array:
    """A plain MLP, written for dense weights."""
    x = image.reshape(image.shape[0], -1)
    x = jax.nn.relu(x @ params["first"] + params["first_bias"])
    x = jax.nn.relu(x @ params["hidden"] + params["hidden_bias"])
    return x @ params["last"] + params["last_bias"]


def loss(params: Any, image: jax.Array, label: jax.Array) -> jax.Array:
    """Mean cross-entropy."""
    return optax.softmax_cross_entropy_with_integer_labels(apply(params, image), label).mean()


def draw(key: jax.Array, inputs: int, width: int, sparsity: float) -> Packed:
    """Random sparse weights, scaled by the number of inputs that a unit really has."""
    patterns: dict[str, Any] = dict.fromkeys(("first_bias", "hidden_bias", "last", "last_bias"))
    values: dict[str, Any] = {"first_bias": jnp.zeros(width), "hidden_bias": jnp.zeros(width)}
    for i, (name, shape) in enumerate({"first": (inputs, width), "hidden": (width, width)}.items()):
        where, what = jax.random.split(jax.random.fold_in(key, i))
        n = round((1 - sparsity) * math.prod(shape))
        patterns[name] = random_pattern(where, shape, n)
        values[name] = jax.random.normal(what, (n,)) * math.sqrt(2 / (n / width))
    values["last"] = jax.random.normal(jax.random.fold_in(key, 2), (width, CLASSES)) * math.sqrt(1 / width)
    values["last_bias"] = jnp.zeros(CLASSES)
    return Packed(values, patterns)


def train(width: int, sparsity: float, steps: int, period: int, batch_size: int, seed: int) -> dict[str, Any]:
    """The run, and its record."""
    started = time.monotonic()
    images = data.load("fashion_mnist", batch_size, seed=seed)
    packed = draw(jax.random.key(seed), math.prod(images.image_shape), width, sparsity)
    inner = optax.adam(optax.cosine_decay_schedule(3e-4, steps))
    state = SparseState(
        jnp.zeros((), jnp.int32), jax.random.key(seed), MaskState(InPatterns()), inner.init(packed.values)
    )
    share, due = schedules.cosine(0.3, 3 * steps // 4), schedules.every(period, start=period, stop=3 * steps // 4)

    @functools.partial(jax.jit, donate_argnums=(0, 1))
    def step(packed: Packed, state: SparseState, image: jax.Array, label: jax.Array) -> Any:
        run = run_packed(loss)
        of = jax.value_and_grad(lambda values: run(packed._replace(values=values), image, label))
        value, grads = of(packed.values)
        updates, optimizer = inner.update(grads, state.inner, packed.values)
        values: Any = optax.apply_updates(packed.values, updates)
        return packed._replace(values=values), state._replace(step=state.step + 1, inner=optimizer), value

    factors, right = jax.jit(gradient_factors(loss)), jax.jit(functools.partial(_right, run_packed(apply)))
    losses, rewirings, ordinary, batches = [], [], [], images.train(0)
    for i in track(range(steps), "training"):
        batch, before = next(batches), time.monotonic()
        image, label = jnp.asarray(batch["image"], jnp.float32), jnp.asarray(batch["label"])
        if due(i):
            moved = float(jnp.asarray(share(i)))
            packed, state = rewire_streamed(inner, factors(packed, image, label), state, packed, moved)
            jax.block_until_ready(packed)
            rewirings.append(time.monotonic() - before)
        else:
            packed, state, value = step(packed, state, image, label)
            losses.append(float(value))
            ordinary.append(time.monotonic() - before)
    seen = [right(packed, batch["image"], batch["label"]) for batch in images.test()]
    tested = sum(int(jnp.sum(batch["weight"])) for batch in images.test())
    n = sum(math.prod(p.shape) for p in packed.patterns.values() if p is not None)
    return {
        "width": width,
        "sparsity": sparsity,
        "batch": batch_size,
        "steps": steps,
        "rewirings": len(rewirings),
        "dense_weights": n,
        "dense_bytes_with_adam": 12 * n,
        "train_state_bytes": nbytes((packed, state)),
        "peak_resident_bytes": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024,
        "first_loss": round(losses[0], 4),
        "last_loss": round(sum(losses[-20:]) / len(losses[-20:]), 4),
        "test_accuracy": round(sum(int(s) for s in seen) / tested, 4),
        "median_step_s": round(sorted(ordinary)[len(ordinary) // 2], 3),
        "median_rewiring_s": round(sorted(rewirings)[len(rewirings) // 2], 2) if rewirings else None,
        "seconds": round(time.monotonic() - started, 1),
        "seed": seed,
    }


def _right(run: Any, packed: Packed, image: jax.Array, label: jax.Array) -> jax.Array:
    return jnp.sum(jnp.argmax(run(packed, image), -1) == label)  # padding has the label -1, which is never right


def main() -> None:
    """Trains and writes the record."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--width", type=int, default=32_768)
    parser.add_argument("--sparsity", type=float, default=0.99)
    parser.add_argument("--steps", type=int, default=400)
    parser.add_argument("--period", type=int, default=100)
    parser.add_argument("--batch-size", type=int, default=128)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--no-record", action="store_true")
    arguments = vars(parser.parse_args())
    record = not arguments.pop("no_record")
    row = train(**arguments)
    for name, value in row.items():
        print(f"{name:24} {value}")
    if record:
        timing.write("wide", [row], what="packed RigL with streamed growth, whole process, Fashion-MNIST")


if __name__ == "__main__":
    main()
