"""Steps of M-FAC, SGD and Adam until 95 % of scikit-learn's training digits are right, and what a step costs.

    python -m experiments.benchmarks.optimizers

A dense network of 64 and 32 units, and the same at 90 % under RigL, at a batch of 64 and a constant learning rate. Each
optimizer has the same number of rates to choose from, and takes that with the fewest steps on average over five seeds:
the measure is of training, so nothing is held out for the choice. Test accuracy is that after all steps, at that rate.
"""

from __future__ import annotations

import functools
import time
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jax import Array, lax

import rigl_jax as rx
from experiments.benchmarks import timing
from experiments.studies import data_training as training

SEEDS, STEPS, ENOUGH, SPARSITY = (0, 1, 2, 3, 4), 400, 0.95, 0.9
M_FAC = functools.partial(rx.m_fac_optimizer, m=32)
OPTIMIZERS: dict[str, tuple[Callable[[float], optax.GradientTransformation], tuple[float, ...]]] = {
    "SGD, momentum 0.9": (functools.partial(optax.sgd, momentum=0.9), (0.01, 0.03, 0.1, 0.2, 0.3)),
    "Adam": (optax.adam, (0.001, 0.003, 0.01, 0.03, 0.1)),
    "M-FAC, m = 32": (M_FAC, (0.001, 0.003, 0.01, 0.03, 0.1)),
    "M-FAC, m = 32, damping 0.01": (functools.partial(M_FAC, damping=0.01), (0.003, 0.01, 0.03, 0.05, 0.1)),
}
"""What makes each, and its learning rates."""


def runs(problem: training.Problem, make: Callable[[float], optax.GradientTransformation], sparse: bool) -> Any:
    """`(step, state, train)`: one step of one seed, a state for it, and all steps of all seeds at a rate."""
    images, shapes = problem.train, jax.eval_shape(lambda: training.init(jax.random.key(0), problem.sizes))
    plan = rx.make_plan(shapes, SPARSITY)

    def transform(rate: Any, key: Array) -> optax.GradientTransformationExtraArgs:
        algorithm = rx.rigl(plan, period=25, stop=3 * STEPS // 4)
        return rx.sparsify(make(rate), algorithm, key=key) if sparse else optax.with_extra_args_support(make(rate))

    def start(rate: Any, key: Array) -> Any:
        weights, masks = jax.random.split(key)
        params = training.init(weights, problem.sizes)
        state: Any = transform(rate, masks).init(params)
        return (rx.apply_masks(params, state.masks) if sparse else params), state

    def step(now: Any, rate: Any, rows: Array) -> Any:
        params, state = now
        grads = jax.grad(lambda p: training.losses(p, images.x[rows], images.y[rows]).mean())(params)
        updates, state = transform(rate, jax.random.key(0)).update(grads, state, params)
        return optax.apply_updates(params, updates), state

    def one(key: Array, rate: Array) -> tuple[Array, Array]:
        def body(now: Any, key: Array) -> tuple[Any, Array]:
            now = step(now, rate, jax.random.randint(key, (problem.batch,), 0, len(images.y)))
            return now, training.accuracy(now[0], images)

        first, batches = jax.random.split(key)
        (params, _), right = lax.scan(body, start(rate, first), jax.random.split(batches, STEPS))
        reached = right >= ENOUGH
        return jnp.where(reached.any(), jnp.argmax(reached) + 1, STEPS), training.accuracy(params, problem.test)

    return step, start, jax.jit(jax.vmap(one, in_axes=(0, None)))


def main() -> None:
    """Trains, times, and writes the record."""
    problem, rows = training.digits(), []
    batch = jnp.arange(problem.batch)
    for sparse in (False, True):
        calls: dict[str, timing.Call] = {}
        for name, (make, rates) in OPTIMIZERS.items():
            step, start, train = runs(problem, make, sparse)
            found = {rate: jax.device_get(train(training.keys(0, SEEDS), rate)) for rate in rates}
            rate = min(found, key=lambda rate: (found[rate][0].mean(), rate))
            row: dict[str, Any] = {"optimizer": name, "sparsity": SPARSITY if sparse else 0.0, "rate": rate}
            row["rates"] = {str(rate): [int(n) for n in found[rate][0]] for rate in rates}
            rows.append(row | {"test_accuracy": [round(float(a), 4) for a in found[rate][1]]})
            once = jax.jit(functools.partial(step, rate=rate, rows=batch))
            calls[name] = timing.contender(once, jax.jit(start)(rate, jax.random.key(0)))
        seconds = timing.interleave(calls, rounds=400, warmup=20, clock=time.process_time)
        for row, times in zip(rows[-len(calls) :], seconds.values(), strict=True):
            row["step_ratio"] = round(timing.ratio(times, seconds["SGD, momentum 0.9"]), 2)
            print(row)
    what = "steps until 95 % of the training digits are right, or `at_most`, for each rate and seed"
    timing.write("optimizers", rows, what=what, at_most=STEPS, batch=problem.batch, seeds=SEEDS)


if __name__ == "__main__":
    main()
