"""Adaptive bin sampling: the loss on test images, estimated from few of their labels."""

from __future__ import annotations

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

import rigl_jax as rx
from experiments.studies import data_training as training
from experiments.studies.data_training import SEEDS, Problem, Trainer, rounded, take

LABELS, BINS, DRAWS = 200, 10, 500
"""Labels of a sample, bins, and samples of each seed, from which the error is computed."""
GREED = (0.0, 1.0, 3.0, 10.0, 30.0)
"""Values of alpha; at 0 all bins are sampled alike. Predictions are divided by their standard deviation."""


def sampling(problem: Problem, trainer: Trainer) -> dict[str, Any]:
    """For each seed: the true mean loss; for each way its bias, its root mean square error and the mean loss of a
    sample, as shares of the true mean.
    """
    index, weight = training.everything(problem, len(SEEDS))
    batches = training.shuffled(training.keys(1), index, steps=problem.steps, batch=problem.batch)
    labels = training.labels_of(problem, len(SEEDS))
    state = trainer.train(trainer.init(training.keys(0)), labels, batches, weight, 0, problem.steps)

    @jax.jit
    def of(params: Any, key: Array) -> Any:
        logits, _ = training.apply(params, problem.test.x)
        values = training.losses(params, *problem.test)
        unsure = rx.coreset.entropy(jax.nn.softmax(logits))
        predicted = unsure / jnp.std(unsure)
        mean = jnp.mean(values)

        def facts(draw: Any) -> Array:
            estimates, found = jax.lax.map(draw, jax.random.split(key, DRAWS))
            relative = estimates / mean - 1
            return jnp.stack([jnp.mean(relative), jnp.sqrt(jnp.mean(relative**2)), jnp.mean(found) / mean])

        ways = {f"{alpha:g}": functools.partial(_binned, values, predicted, alpha) for alpha in GREED}
        return mean, {
            name: facts(draw) for name, draw in {"uniform": functools.partial(_uniform, values), **ways}.items()
        }

    found = [of(take(state.params, i), key) for i, key in enumerate(training.keys(90))]
    names = found[0][1]
    return {
        "mean": rounded([mean for mean, _ in found]),
        "ways": {
            name: {
                fact: rounded([np.asarray(each[name])[i] for _, each in found])
                for i, fact in enumerate(("bias", "rmse", "reward"))
            }
            for name in names
        },
    }


def _binned(values: Array, predicted: Array, alpha: float, key: Array) -> tuple[Array, Array]:
    """The estimate of the mean, and the plain mean of the sample."""
    index, chance = rx.coreset.adaptive_bins(key, predicted, LABELS, bins=BINS, alpha=alpha)
    return rx.coreset.horvitz_thompson(values[index], chance, len(values)), jnp.mean(values[index])


def _uniform(values: Array, key: Array) -> tuple[Array, Array]:
    mean = jnp.mean(jax.random.choice(key, values, (LABELS,), replace=False))
    return mean, mean
