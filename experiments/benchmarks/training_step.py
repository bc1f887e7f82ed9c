"""Whole training steps, packed against dense: time with rewirings included, and bytes of the train state.

    python -m experiments.benchmarks.training_step [--models mlp] [--quick]

Dense is the plain optax step of the same model with its state donated. Packed is RigL with a rewiring every 100 steps:
a hundredth of a rewiring (gradient, selection, new patterns, all of it) is charged to each step.
"""

from __future__ import annotations

import argparse
import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

import rigl_jax as rx
from experiments.benchmarks import timing
from experiments.models import MODELS
from rigl_jax.execution import backends, nbytes

PERIOD = 100
TASKS: dict[str, tuple[str, dict[str, Any], tuple[int, ...], int, Callable[[], Any]]] = {
    "mlp": ("mlp", {"features": (2048, 2048)}, (28, 28, 1), 256, lambda: optax.adam(1e-3)),
    "wrn": ("wide_resnet", {"depth": 22, "width": 2, "dropout": 0.0}, (32, 32, 3), 64, lambda: optax.sgd(0.1, 0.9)),
}
STRUCTURES = {"unstructured": rx.unstructured(), "16x1": rx.block(1, 16)}
SPARSITIES = (0.8, 0.9, 0.95, 0.98)


def rules_of(params: Any, structure: Any) -> Any:
    """The structure on every matrix whose outputs it divides; other kernels unstructured."""
    names = {name: p.shape for name, p in rx.trees.named_leaves(params).items() if len(p.shape) > 1}
    divides = {name: len(shape) == 2 and shape[1] % 16 == 0 for name, shape in names.items()}
    rules = [(name, structure if fits else rx.unstructured()) for name, fits in divides.items()]
    return (*rules, (".*(bias|scale)", None))


def programs(apply: Any, inner: Any, training: Any, loss: Callable[..., jax.Array]) -> tuple[Callable[[Any], Any], ...]:
    """The dense step, the packed step and a rewiring, each from what it changes to the same."""

    @functools.partial(jax.jit, donate_argnums=0)
    def dense_step(carry: Any) -> Any:
        params, state = carry
        updates, state = inner.update(jax.grad(functools.partial(loss, apply))(params), state, params)
        return optax.apply_updates(params, updates), state

    @functools.partial(jax.jit, donate_argnums=0)
    def packed_step(carry: Any) -> Any:
        packed, state = carry
        run = rx.run_packed(apply)
        grads = jax.grad(lambda values: loss(run, packed._replace(values=values)))(packed.values)
        return training.update(grads, state, packed)

    dense_grads = jax.jit(jax.grad(functools.partial(loss, apply)))

    def rewire(carry: Any) -> Any:
        packed, state = carry
        return training.rewire(dense_grads(rx.unpack(packed)), state, packed)

    return dense_step, packed_step, rewire


def measure(task: str, structure: str, sparsity: float, rounds: int) -> dict[str, Any]:
    """One row."""
    name, options, shape, batch, optimizer = TASKS[task]
    model, inner = MODELS[name](10, **options), optimizer()
    image = jax.random.normal(jax.random.key(0), (batch, *shape))
    label = jnp.arange(batch) % 10
    variables = model.init(jax.random.key(1), image[:1], train=False)
    params, stats = variables["params"], variables.get("batch_stats", {})
    rules = None if structure == "unstructured" else rules_of(params, STRUCTURES[structure])
    algorithm = rx.rigl(rx.make_plan(params, sparsity, rules=rules), period=PERIOD)
    training = rx.packed_training(inner, algorithm, key=jax.random.key(2))

    def loss(apply: Any, params: Any) -> jax.Array:
        logits, _ = apply({"params": params, "batch_stats": stats}, image, train=True, mutable=["batch_stats"])
        return optax.softmax_cross_entropy_with_integer_labels(logits, label).mean()

    dense_step, packed_step, rewire = programs(model.apply, inner, training, loss)
    held = {"dense": jax.tree.map(jnp.copy, (params, inner.init(params))), "packed": training.init(params)}
    sizes = {name: nbytes(carry) for name, carry in held.items()}

    def take(which: str, step: Callable[[Any], Any]) -> Any:
        held[which] = step(held[which])
        return held[which]

    seconds = timing.interleave(
        {"dense": lambda: take("dense", dense_step), "packed": lambda: take("packed", packed_step)}, rounds=rounds
    )
    rewirings = timing.interleave({"rewire": lambda: take("packed", rewire)}, rounds=3, warmup=2)["rewire"]
    identity = {"model": task, "batch": batch, "structure": structure, "sparsity": sparsity}
    return {**identity, **row(seconds, rewirings, sizes)}


def row(seconds: dict[str, list[float]], rewirings: list[float], sizes: dict[str, int]) -> dict[str, Any]:
    """The measured part of a row.

    Args:
      seconds: of the ordinary steps, "dense" and "packed".
      rewirings: seconds of each.
      sizes: bytes of the two states.
    """
    dense, packed, once = (float(np.median(s)) for s in (seconds["dense"], seconds["packed"], rewirings))
    mean = (packed * (PERIOD - 1) + once) / PERIOD
    return {
        "dense_ms": round(1e3 * dense, 2),
        "packed_ms": round(1e3 * packed, 2),
        "rewiring_ms": round(1e3 * once, 1),
        "ratio_without_rewirings": round(timing.ratio(seconds["dense"], seconds["packed"]), 2),
        "ratio": round(timing.ratio(seconds["dense"], seconds["packed"]) * packed / mean, 2),
        "state_bytes_dense": sizes["dense"],
        "state_bytes_packed": sizes["packed"],
        "state_ratio": round(sizes["packed"] / sizes["dense"], 4),
        "kernels": backends()["native"].detail,
    }


def main() -> None:
    """Measures, prints and writes the record, a row at a time; a second start continues where the first stopped."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--models", nargs="+", default=list(TASKS), choices=list(TASKS))
    parser.add_argument("--quick", action="store_true", help="few rounds, no record")
    arguments = parser.parse_args()
    rows = [] if arguments.quick else timing.rows("training_step")
    done = {(row["model"], row["structure"], row["sparsity"]) for row in rows}
    for task in arguments.models:
        for structure in STRUCTURES if task == "mlp" else ["unstructured"]:
            for sparsity in SPARSITIES:
                if (task, structure, sparsity) in done:
                    continue
                rows.append(measure(task, structure, sparsity, 5 if arguments.quick or task == "wrn" else 20))
                print("  ".join(f"{name}={value}" for name, value in rows[-1].items()), flush=True)
                if not arguments.quick:
                    timing.write("training_step", rows, what="dense step / packed RigL step, rewirings included")


if __name__ == "__main__":
    main()
