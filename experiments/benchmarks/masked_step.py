"""What masks cost: a masked optax step beside the plain one, and one rewiring.

    python -m experiments.benchmarks.masked_step [--quick]

The whole training step is timed (gradient, update, apply), with the state donated, dense and sparse in turns.
`static` is the step that a trainer takes when it decides outside (`rewire=False`); `cond` decides in the graph, inside
`tx.update`; `around` too, but with one `lax.cond` around the whole training step.
"""

from __future__ import annotations

import argparse
import functools
import json
import os
import time
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

import rigl_jax as rx
from experiments.benchmarks import timing
from experiments.models import MODELS

OPTIMIZERS = {"sgdm": lambda: optax.sgd(0.01, momentum=0.9), "adam": lambda: optax.adam(1e-3)}
TASKS: list[tuple[str, dict[str, Any], tuple[int, ...], int]] = [
    *(
        ("mlp", {"features": (width, width, width)}, (28, 28, 1), batch)
        for width in (512, 1024, 2048)
        for batch in (128, 512)
    ),
    ("lenet5", {}, (28, 28, 1), 128),
    ("wide_resnet", {"depth": 22, "width": 2, "dropout": 0.0}, (32, 32, 3), 64),
]


def training_step(model: Any, tx: Any, batch_stats: Any, due: Any = None, **static: Any) -> Callable[..., Any]:
    """The jitted step with a donated state; with `due`, two steps behind one conditional."""

    def loss(params: Any, image: jax.Array, label: jax.Array) -> jax.Array:
        variables = {"params": params, "batch_stats": batch_stats}
        logits, _ = model.apply(variables, image, train=True, mutable=["batch_stats"])
        return optax.softmax_cross_entropy_with_integer_labels(logits, label).mean()

    def step(carry: Any, image: jax.Array, label: jax.Array, **static: Any) -> Any:
        params, state = carry
        grads = jax.grad(loss)(params, image, label)
        updates, state = tx.update(grads, state, params, **static)
        return optax.apply_updates(params, updates), state

    def either(carry: Any, image: jax.Array, label: jax.Array) -> Any:
        rewiring, ordinary = functools.partial(step, rewire=True), functools.partial(step, rewire=False)
        return jax.lax.cond(due(carry[1].step), rewiring, ordinary, carry, image, label)

    chosen = functools.partial(step, **static) if due is None else either
    return jax.jit(chosen, donate_argnums=0)


def steps(
    name: str, options: dict[str, Any], shape: tuple[int, ...], batch: int, optimizer: str, rounds: int
) -> dict[str, Any]:
    """One row: the ratios of the masked steps to the plain one."""
    model = MODELS[name](10, **options)
    image = jax.random.normal(jax.random.key(0), (batch, *shape))
    label = jnp.arange(batch) % 10
    variables = model.init(jax.random.key(1), image[:1], train=False)
    params, stats = variables["params"], variables.get("batch_stats", {})
    inner = OPTIMIZERS[optimizer]()
    algorithm = rx.rigl(rx.make_plan(params, 0.9), period=1_000_000, start=1)
    tx = rx.sparsify(inner, algorithm, key=jax.random.key(2))
    state: Any = tx.init(params)

    def fresh() -> Any:
        return jax.tree.map(jnp.copy, (rx.apply_masks(params, state.masks), state))

    plain = optax.with_extra_args_support(inner)
    calls = {
        "dense": timing.contender(
            training_step(model, plain, stats), jax.tree.map(jnp.copy, (params, inner.init(params))), image, label
        ),
        "static": timing.contender(training_step(model, tx, stats, rewire=False), fresh(), image, label),
        "cond": timing.contender(training_step(model, tx, stats), fresh(), image, label),
    }
    if name == "lenet5":  # where it matters most: XLA on CPU runs convolutions inside a conditional on one thread
        calls["around"] = timing.contender(training_step(model, tx, stats, algorithm.due), fresh(), image, label)
    spent: dict[str, list[float]] = {of: [] for of in calls}
    seconds = timing.interleave({of: metered(call, spent[of]) for of, call in calls.items()}, rounds=rounds)
    cpu = {of: float(np.median(found[-rounds:])) for of, found in spent.items()}
    return {
        "model": name,
        "options": options,
        "batch": batch,
        "optimizer": optimizer,
        "dense_ms": timing.milliseconds(seconds["dense"]),
        **{f"{of}_ratio": round(timing.ratio(seconds[of], seconds["dense"]), 3) for of in list(calls)[1:]},
        **{f"{of}_cpu_ratio": round(cpu[of] / cpu["dense"], 3) for of in list(calls)[1:]},
        "load": round(os.getloadavg()[0], 1),
    }


def metered(call: timing.Call, spent: list[float]) -> timing.Call:
    """The call, which also notes the CPU seconds of all its threads: they hardly depend on what else runs."""

    def measured() -> Any:
        start = time.process_time()
        result = jax.block_until_ready(call())
        spent.append(time.process_time() - start)
        return result

    return measured


def main() -> None:
    """Measures, prints and writes the record, row by row; a second start continues where the first stopped."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--quick", action="store_true", help="few rounds, no record")
    arguments = parser.parse_args()
    rounds = 8 if arguments.quick else 13
    rows = [] if arguments.quick else timing.rows("masked_step")
    done = {json.dumps([row["model"], row["options"], row["batch"], row["optimizer"]]) for row in rows}
    what = (
        "masked step / plain optax step, state donated: median of the ratios of the times, ratio of the medians of the "
        "CPU seconds; with each row the load of the machine, that is the processes that run or want to"
    )
    for task in TASKS:
        for optimizer in OPTIMIZERS:
            name, options, _, batch = task
            if json.dumps([name, options, batch, optimizer]) in done:
                continue
            rows.append(steps(*task, optimizer, 7 if name == "wide_resnet" else rounds))
            print("  ".join(f"{name}={value}" for name, value in rows[-1].items()), flush=True)
            if not arguments.quick:  # after each row: a run may be cut off
                timing.write("masked_step", rows, what=what, rounds=rounds)


if __name__ == "__main__":
    main()
