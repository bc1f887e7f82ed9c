"""Ternary weights by coordinate descent, in the style of CoNNTrA, beside the float network and its rounded weights."""

from __future__ import annotations

import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array
from jax.flatten_util import ravel_pytree

from experiments.coordinates import coordinate_sweep, ternary
from experiments.studies import data_training as training
from experiments.studies import diagnostics_training as fitting
from experiments.studies.data_training import SEEDS, Params, Problem, rounded

HIDDEN = (16,)
SWEEPS = 3
VALUES = (-1.0, 0.0, 1.0)
STARTS = ("rounded", "random")
"""From the rounded weights of the float network, with its biases; or from random signs and zeros, with biases of 0."""


def small(problem: Problem) -> Problem:
    """The problem with the network of this study."""
    return problem._replace(sizes=(problem.sizes[0], *HIDDEN, problem.sizes[-1]))


def floats(problem: Problem) -> dict[str, Any]:
    """The float networks, and the same with rounded weights."""
    params = fitting.train(fitting.make_fit(problem)).params
    return {name: _measured(problem, p) for name, p in (("float", params), ("rounded", jax.vmap(ternary)(params)))}


def sweeps(problem: Problem, start: str) -> dict[str, Any]:
    """Networks of all seeds after each sweep over all weights, in a random order."""
    if start == "rounded":
        params = jax.vmap(ternary)(fitting.train(fitting.make_fit(problem)).params)
    else:
        params = jax.vmap(functools.partial(_random, problem))(training.keys(57))
    sweep = jax.jit(functools.partial(_sweep, problem))
    found, now = [_measured(problem, params)], [training.take(params, i) for i in range(len(SEEDS))]
    for number in range(SWEEPS):
        now = [sweep(p, key) for p, key in zip(now, training.keys(58 + number), strict=True)]
        found.append(_measured(problem, jax.tree.map(lambda *leaves: jnp.stack(leaves), *now)))
    return {"sweeps": found}


def _random(problem: Problem, key: Array) -> Params:
    """Signs and zeros, each for a third of the weights, times the scale that keeps variance as He's start does."""

    def drawn(path: Any, p: Array) -> Array:
        if p.ndim < 2:
            return p
        signs = jax.random.randint(jax.random.fold_in(key, int(path[0].key[-1])), p.shape, -1, 2)
        return signs * jnp.sqrt(3 / p.shape[0])

    return jax.tree_util.tree_map_with_path(drawn, training.init(key, problem.sizes))


def _sweep(problem: Problem, params: Params, key: Array) -> Params:
    """One sweep on the cross-entropy of all training examples; each kernel keeps its scale, biases stay."""
    kernels = {name: layer["kernel"] for name, layer in params.items()}
    scales = jax.tree.map(lambda kernel: jnp.max(jnp.abs(kernel)), kernels)
    w, restore = ravel_pytree(jax.tree.map(lambda kernel, scale: jnp.round(kernel / scale), kernels, scales))

    def network(w: Array) -> Params:
        return {name: {**params[name], "kernel": k * scales[name]} for name, k in restore(w).items()}

    loss = lambda w: jnp.mean(training.losses(network(w), *problem.train))  # noqa: E731
    order = jax.random.permutation(key, len(w))
    return network(coordinate_sweep(loss, w, jnp.asarray(VALUES), order)[0])


def _measured(problem: Problem, params: Any) -> dict[str, list[float]]:
    found = _facts(params, problem.train, problem.test)
    return {name: rounded(values) for name, values in found.items()}


@jax.jit
@functools.partial(jax.vmap, in_axes=(0, None, None))
def _facts(params: Params, train: training.Images, test: training.Images) -> dict[str, Array]:
    kernels = [layer["kernel"] for layer in params.values()]
    return {
        "loss": jnp.mean(training.losses(params, *train)),
        "train": training.accuracy(params, train),
        "test": training.accuracy(params, test),
        "zeros": jnp.mean(jnp.concatenate([kernel.ravel() == 0 for kernel in kernels])),
    }
