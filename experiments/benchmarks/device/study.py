"""Accuracy of WRN-16-2, dense and sparse, several seeds at once by `vmap`: short runs, to see methods in order."""

from __future__ import annotations

import gzip
import os
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

import rigl_jax as rx
from experiments.models import MODELS

Array = jax.Array
Data = tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]


def fashion_mnist(folder: Path) -> Data:
    """Train images, train labels, test images, test labels from the four files of the data set."""

    def read(name: str) -> np.ndarray:
        raw = gzip.decompress((folder / f"{name}-ubyte.gz").read_bytes())
        sizes = np.frombuffer(raw, ">i4", raw[3], 4)
        return np.frombuffer(raw, np.uint8, offset=4 + 4 * raw[3]).reshape(sizes)

    parts = [read(f"{part}-{what}") for part in ("train", "t10k") for what in ("images-idx3", "labels-idx1")]
    return tuple(p[..., None] / np.float32(255) if p.ndim == 3 else p.astype(np.int32) for p in parts)  # type: ignore


def digits() -> Data:
    """The digits of scikit-learn, which need no file: 8 x 8 pixels."""
    from sklearn.datasets import load_digits

    found: Any = load_digits()
    order = np.random.default_rng(0).permutation(len(found.target))
    x, y = (found.images[order] / 16).astype(np.float32)[..., None], found.target[order].astype(np.int32)
    return x[:1400], y[:1400], x[1400:], y[1400:]


METHODS: dict[str, Callable[..., Any]] = {
    "static": lambda plan, period, stop: rx.static(plan),
    "SET": lambda plan, period, stop: rx.set_(plan, period=period, stop=stop),
    "RigL": lambda plan, period, stop: rx.rigl(plan, period=period, stop=stop),
}


def study(toy: bool) -> Iterator[dict[str, Any]]:
    """One row for each method and sparsity."""
    folder = os.environ.get("FASHION_MNIST")
    data = digits() if folder is None or toy else fashion_mnist(Path(folder))
    name = "digits" if folder is None or toy else "Fashion-MNIST"
    steps, seeds, batch = (3, 2, 16) if toy else (1500, 4, 128)
    for sparsity, method in [(0.0, "dense"), *((s, m) for s in (0.95, 0.98) for m in METHODS)][: 2 if toy else None]:
        start = time.monotonic()
        accuracy = trained(data, method, sparsity, steps=steps, seeds=seeds, batch=batch)
        row = {"data": name, "method": method, "sparsity": sparsity, "steps": steps, "seeds": seeds}
        took = round(time.monotonic() - start, 1)
        spread = {"accuracy": round(float(accuracy.mean()), 4), "deviation": round(float(accuracy.std(ddof=1)), 4)}
        yield {**row, **spread, "took_s": took}


def trained(data: Data, method: str, sparsity: float, *, steps: int, seeds: int, batch: int) -> np.ndarray:
    """Test accuracies, one a seed."""
    images, labels, test_images, test_labels = data
    model = MODELS["wide_resnet"](10, depth=16, width=2, dropout=0.0)
    keys = jax.random.split(jax.random.key(0), seeds)
    variables = jax.jit(jax.vmap(lambda key: model.init(key, images[:1], train=False)))(keys)
    params, stats = variables["params"], variables["batch_stats"]
    inner = optax.sgd(optax.cosine_decay_schedule(0.1, steps), momentum=0.9, nesterov=True)
    optimizer = lambda key: optax.with_extra_args_support(inner)  # noqa: E731
    if method != "dense":
        shapes = jax.tree.map(lambda p: jax.ShapeDtypeStruct(p.shape[1:], p.dtype), params)
        algorithm = METHODS[method](rx.make_plan(shapes, sparsity), 100, 3 * steps // 4)
        optimizer = lambda key: rx.sparsify(inner, algorithm, key=key)  # noqa: E731
    state = jax.jit(jax.vmap(lambda key, params: optimizer(key).init(params)))(keys, params)
    if method != "dense":
        params = jax.vmap(rx.apply_masks)(params, state.masks)

    def loss(params: Any, stats: Any, x: Array, y: Array) -> tuple[Array, Any]:
        variables = {"params": params, "batch_stats": stats}
        logits, new = model.apply(variables, x, train=True, mutable=["batch_stats"])
        return optax.softmax_cross_entropy_with_integer_labels(logits, y).mean(), new["batch_stats"]

    def step(params: Any, stats: Any, state: Any, x: Array, y: Array) -> Any:
        grads, stats = jax.grad(loss, has_aux=True)(params, stats, x, y)
        updates, state = optimizer(keys[0]).update(grads, state, params)
        return optax.apply_updates(params, updates), stats, state

    # All seeds see the same batches: they differ in weights and masks.
    train = jax.jit(jax.vmap(step, in_axes=(0, 0, 0, None, None)), donate_argnums=(0, 1, 2))
    order = np.random.default_rng(0)
    on_device = jnp.asarray(images), jnp.asarray(labels)
    carry = params, stats, state
    for _ in range(steps):
        chosen = order.integers(0, len(labels), batch)
        carry = train(*carry, *(part[chosen] for part in on_device))
    params, stats, _ = carry

    @jax.jit
    @jax.vmap
    def right(params: Any, stats: Any) -> Array:
        logits = jax.lax.map(
            lambda x: model.apply({"params": params, "batch_stats": stats}, x[None], train=False)[0],
            jnp.asarray(test_images),
            batch_size=500,
        )
        return jnp.mean(jnp.argmax(logits, -1) == test_labels)

    return np.asarray(right(params, stats))
