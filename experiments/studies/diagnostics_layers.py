"""Sparsity of layers by what was measured of each, against uniform and ERK; and what groups of units tell together."""

from __future__ import annotations

import functools
import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

import rigl_jax as rx
from experiments.studies import data_training as training
from experiments.studies import diagnostics_training as fitting
from experiments.studies.data_training import SEEDS, Problem, rounded
from experiments.studies.diagnostics_training import Trained
from rigl_jax import diagnostics

HIDDEN = {64: (64, 64, 64, 32), 784: (128, 64, 64, 32)}
"""Hidden layers by number of inputs."""
SPARSITIES = (0.9, 0.95, 0.98)
DISTRIBUTIONS = {
    "uniform": "uniform",
    "erk": "ERK",
    "ranks": "effective rank of the gradients",
    "noise": "inverse of the noise tolerance",
}
EXAMPLES = 512
"""Training images that ranks and tolerances are measured on."""
ALONE = 0.9
"""The sparsity at which one layer alone is pruned, to see what it costs."""
TRIPLETS = 200
"""Of units of a layer, drawn at random, whose O-information is averaged."""


def deep(problem: Problem) -> Problem:
    """The problem with the network of this study."""
    inputs, *_, classes = problem.sizes
    return problem._replace(sizes=(inputs, *HIDDEN[inputs], classes), epochs=problem.epochs * 2 // 3)


class Bench:
    """Dense networks, and numbers of each layer that are measured on them, at their first use."""

    def __init__(self, problem: Problem) -> None:
        self.problem = problem
        self.names = [f"dense_{i}/kernel" for i in range(len(problem.sizes) - 1)]
        self.fit = functools.cache(lambda: fitting.make_fit(problem))
        self.dense = functools.cache(lambda: fitting.train(self.fit()))
        self.numbers = functools.cache(self._numbers)

    def untrained(self) -> Any:
        """The weights that training begins with, of all seeds."""
        return self.fit().init(jax.random.key_data(training.keys(0)))[0]

    def _numbers(self) -> dict[str, np.ndarray]:
        """Ranks, as shares of the outputs, and tolerances; each float64[seeds, layers]."""
        batch = (self.problem.train.x[:EXAMPLES], self.problem.train.y[:EXAMPLES])
        loss = lambda params, batch: jnp.mean(training.losses(params, *batch))  # noqa: E731
        ranks, noise = [], []
        for i, key in enumerate(training.keys(58)):
            params = training.take(self.dense().params, i)
            found = diagnostics.gradient_ranks(loss, params, batch)
            ranks.append([found[name] for name in self.names])
            sigmas = diagnostics.noise_tolerance(loss, params, batch, key)
            noise.append([sigmas[name] for name in self.names])
        return {"ranks": np.array(ranks), "noise": np.array(noise)}

    def distribution(self, name: str) -> rx.base.Distribution:
        """By its name; what is measured is the mean over the dense networks of all seeds."""
        if name in ("uniform", "erk"):
            return {"uniform": rx.uniform, "erk": rx.erk}[name]
        measured = self.numbers()[name]
        each = measured if name == "ranks" else 1 / np.maximum(measured, 1e-3)
        return rx.proportional(dict(zip(self.names, map(float, each.mean(0)), strict=True)))


def measured(bench: Bench) -> dict[str, Any]:
    """Of the dense networks: accuracy; of each layer its rank, its tolerance, and the accuracy lost if it alone is
    pruned; of each hidden layer the O-information of triplets, at the start and at the end. A list of seeds each.
    """
    problem, params = bench.problem, bench.dense().params
    whole = np.asarray(fitting.accuracy(problem, params))
    lost = [whole - fitting.accuracy(problem, _without(params, name)) for name in sorted(params)]
    by_layer = {name: [rounded(column) for column in found.T] for name, found in bench.numbers().items()}
    together = {
        when: [rounded(layer) for layer in np.array([_redundancy(problem, nets, i) for i in range(len(SEEDS))]).T]
        for when, nets in (("start", bench.untrained()), ("end", params))
    }
    return {"test": rounded(whole), **by_layer, "lost": [rounded(each) for each in lost], "o_information": together}


def sparse(bench: Bench, how: str, name: str, sparsity: float) -> dict[str, Any]:
    """RigL, or static random masks, with a distribution: test accuracy of each seed, and the density of each layer."""
    problem = bench.problem
    plan = fitting.plan_of(problem, sparsity, bench.distribution(name))
    if how == "static":
        params = fitting.train(bench.fit(), _random(bench, plan)).params
    else:
        algorithm = fitting.rigl(plan, problem.steps)
        params = fitting.train(fitting.make_fit(problem, algorithm=algorithm)).params
    density = [plan[leaf].active_weights / math.prod(plan[leaf].shape) for leaf in bench.names]
    return {"test": rounded(fitting.accuracy(problem, params)), "density": rounded(density)}


def _random(bench: Bench, plan: rx.base.Plan) -> Trained:
    """New networks of all seeds with random masks."""
    draw = jax.jit(jax.vmap(lambda key, params: rx.topology.random_masks(plan, key, params)))
    params = bench.untrained()
    masks = draw(training.keys(59), params)
    return Trained(jax.vmap(rx.apply_masks)(params, masks), masks)


def _without(params: Any, name: str) -> Any:
    """The networks without the smallest weights of one layer."""
    kernel = params[name]["kernel"]
    limit = jnp.quantile(jnp.abs(kernel), ALONE, axis=(1, 2), keepdims=True)
    return {**params, name: {**params[name], "kernel": jnp.where(jnp.abs(kernel) > limit, kernel, 0)}}


def _redundancy(problem: Problem, params: Any, seed: int) -> list[float]:
    """The mean O-information of random triplets of what ReLUs read, in nats, for each hidden layer."""
    draw, x = np.random.default_rng([seed, 53]), np.asarray(problem.test.x[:2000], np.float64)
    own, found = training.take(params, seed), []
    for name in sorted(own)[:-1]:
        read = x @ np.asarray(own[name]["kernel"]) + np.asarray(own[name]["bias"])
        cov, x = np.cov(diagnostics.copula_normalise(read), rowvar=False), np.maximum(read, 0)
        triplets = [draw.choice(len(cov), 3, replace=False) for _ in range(TRIPLETS)]
        each = [diagnostics.o_information(cov[np.ix_(three, three)], len(x)) for three in triplets]
        found.append(float(np.mean(each)))
    return found
