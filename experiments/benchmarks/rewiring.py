"""What one rewiring costs: time for RigL, SET, blocks and N:M, and memory beyond the dense step.

    python -m experiments.benchmarks.rewiring [--quick] [--memory]

Timed is `Algorithm.update` alone, the part that a dense step does not have, with the old masks donated. Memory (with
`--memory`, that alone) is what XLA's own plan for the compiled training step has: bytes of temporary buffers and of the
state. It is a record of its own, because it does not depend on what else the machine does.
"""

from __future__ import annotations

import argparse
import functools
import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax

import rigl_jax as rx
from experiments.benchmarks import timing
from experiments.models import MODELS
from rigl_jax.base import Algorithm, Plan, PyTree, Signals

METHODS: dict[str, tuple[Callable[[Plan], Algorithm], Any]] = {
    "rigl": (lambda plan: rx.rigl(plan, period=1), None),
    "set": (lambda plan: rx.set_(plan, period=1), None),
    "rigl, blocks 4x1": (lambda plan: rx.rigl(plan, period=1), rx.block(4, 1)),
    "rigl, 2:4": (lambda plan: rx.rigl(plan, period=1), rx.n_of_m(2, 4)),
}


def mlp() -> PyTree:
    """Four weights of 1024 x 1024."""
    return {f"layer_{i}": {"kernel": jax.ShapeDtypeStruct((1024, 1024), jnp.float32)} for i in range(4)}


def resnet50() -> PyTree:
    """The weights of ResNet-50 for ImageNet."""
    model = MODELS["resnet50"](1000)
    image = jax.ShapeDtypeStruct((1, 224, 224, 3), jnp.float32)
    return jax.eval_shape(functools.partial(model.init, train=False), jax.random.key(0), image)["params"]


def planned(params: PyTree, structure: Any) -> Plan:
    """90 % sparse, or as sparse as the structure makes it; leaves that it does not divide are dense."""
    if structure is None:
        return rx.make_plan(params, 0.9)
    sparsity = 0.9 if structure.sparsity is None else structure.sparsity
    fits = []
    for name, p in rx.trees.named_leaves(params).items():
        try:
            structure.units(tuple(p.shape))
            fits.append((name.replace(".", r"\."), structure if p.ndim > 1 else None))
        except ValueError:
            fits.append((name.replace(".", r"\."), None))
    return rx.make_plan(params, sparsity, distribution=rx.uniform, rules=tuple(fits))


def time_of(method: str, params: PyTree, rounds: int) -> dict[str, Any]:
    """One row: milliseconds of a rewiring."""
    make, structure = METHODS[method]
    plan = planned(params, structure)
    algorithm = make(plan)
    names = iter(range(1 << 20))
    draw = lambda p: jax.random.normal(jax.random.key(next(names)), p.shape)  # noqa: E731
    weights, grads = jax.tree.map(draw, params), jax.tree.map(draw, params)

    @functools.partial(jax.jit, donate_argnums=0)
    def update(state: Any, weights: PyTree, grads: PyTree, step: Any) -> Any:
        return algorithm.update(state, Signals(weights, grads, step, jax.random.fold_in(jax.random.key(1), step))).state

    call = timing.contender(update, algorithm.init(jax.random.key(0), weights), weights, grads, jnp.int32(1))
    seconds = timing.interleave({"rewire": call}, rounds=rounds)["rewire"]
    n = sum(math.prod(leaf.shape) for leaf in plan.values())
    milliseconds = timing.milliseconds(seconds)
    return {
        "method": method,
        "sparse_weights": n,
        "ms": milliseconds,
        "seconds_per_25M": round(milliseconds * 1e-3 * 25e6 / n, 3),
    }


SCHEDULERS = {"default": {}, "memory": {"xla_cpu_scheduler_type": "CPU_SCHEDULER_TYPE_MEMORY_OPTIMIZED"}}
"""Compiler options: XLA's CPU backend orders operations for concurrency unless it is set to save memory."""


def memory_of(params: PyTree, batch: int, method: str, options: dict[str, Any]) -> dict[str, Any]:
    """Bytes that XLA plans for a training step of an MLP of these weights: dense, masked, with a rewiring."""
    inner, (make, structure) = optax.adam(1e-3), METHODS[method]
    tx = rx.sparsify(inner, make(planned(params, structure)), key=jax.random.key(0))

    def loss(weights: PyTree, x: jax.Array) -> jax.Array:
        for name in sorted(weights):
            x = jax.nn.relu(x @ weights[name]["kernel"])
        return jnp.mean(x**2)

    def step(tx: Any, weights: PyTree, state: Any, x: jax.Array, **static: Any) -> Any:
        updates, state = tx.update(jax.grad(loss)(weights, x), state, weights, **static)
        return optax.apply_updates(weights, updates), state

    x = jax.ShapeDtypeStruct((batch, 1024), jnp.float32)
    found = {}
    steps: dict[str, tuple[Any, dict[str, Any]]] = {
        "dense": (optax.with_extra_args_support(inner), {}),
        "static": (tx, {"rewire": False}),
        "rewiring": (tx, {"rewire": True}),
        "cond": (tx, {}),
    }
    for name, (of, static) in steps.items():
        jitted = jax.jit(functools.partial(step, of, **static), donate_argnums=(0, 1), compiler_options=options)
        plan: Any = jitted.lower(params, jax.eval_shape(of.init, params), x).compile().memory_analysis()
        found[name] = {"state": plan.argument_size_in_bytes, "temporary": plan.temp_size_in_bytes}
    weights = sum(math.prod(p.shape) for p in jax.tree.leaves(params))
    largest = max(math.prod(p.shape) for p in jax.tree.leaves(params))
    dense = found["dense"]
    extra = {name: (f["temporary"] - dense["temporary"]) / (4 * largest) for name, f in found.items()}
    return {
        "weights": weights,
        "batch": batch,
        "bytes": found,
        "state_bytes_per_weight_beyond_dense": round((found["static"]["state"] - dense["state"]) / weights, 3),
        "temporary_beyond_dense_in_copies_of_the_largest_leaf": {n: round(e, 2) for n, e in extra.items()},
    }


def main() -> None:
    """Measures, prints and writes the record, row by row; a second start continues where the first stopped."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--quick", action="store_true", help="few rounds, no record")
    parser.add_argument("--memory", action="store_true", help="the memory alone, from XLA's plan; nothing is timed")
    arguments = parser.parse_args()
    if arguments.memory:
        plans = [
            {"method": method, "order": name, **memory_of(mlp(), 128, method, options)}
            for method in ("rigl", "set")
            for name, options in SCHEDULERS.items()
        ]
        what = "XLA's plan for an Adam step of a 4 x 1024 x 1024 MLP, by each of its orders of operations"
        timing.write("rewiring_memory", plans, what=what)
        return
    rounds = 3 if arguments.quick else 9
    rows: list[dict[str, Any]] = [] if arguments.quick else timing.rows("rewiring")
    done = {(row["weights"], row["method"]) for row in rows}
    what = "one call of Algorithm.update, median"
    for name, params in {"4 x 1024 x 1024": mlp(), "ResNet-50": resnet50()}.items():
        for method in METHODS:
            if (name, method) in done:
                continue
            rows.append({"weights": name, **time_of(method, params, rounds)})
            print("  ".join(f"{key}={value}" for key, value in rows[-1].items()), flush=True)
            if not arguments.quick:  # after each row: a run may be cut off
                timing.write("rewiring", rows, what=what, rounds=rounds)


if __name__ == "__main__":
    main()
