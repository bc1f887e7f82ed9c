"""Ensembles on digits: dense networks, sparse ones by RigL, and MIMO, each with what it costs."""

from __future__ import annotations

import functools
import itertools
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array

import rigl_jax as rx
from experiments.models.mimo import mimo, mimo_batch, mimo_loss, mimo_predict
from experiments.studies import data_training as training
from experiments.studies import diagnostics_training as fitting
from experiments.studies.data_training import Params, Problem
from experiments.studies.pruning_training import quality

MEMBERS = 3
RHO = (0.0, 0.6)
"""Shares of the rows of a batch that are the same for all members of MIMO."""
SPARSITY = 0.9
"""Of RigL, with ERK."""


def deep(problem: Problem, sparsity: float) -> dict[str, Any]:
    """Networks trained apart, dense if the sparsity is 0: the first alone, and all with their probabilities averaged.

    `single` and `test` have accuracy, NLL and ECE of each seed; `cost` is that of the whole ensemble.
    """
    algorithm, share, trained = None, 1.0, 1.0
    if sparsity:
        plan = fitting.plan_of(problem, sparsity)
        algorithm = fitting.rigl(plan, problem.steps)
        sizes = rx.trees.named_leaves(training.init(jax.random.key(0), problem.sizes))
        kernels = sum(leaf.size for leaf in sizes.values() if leaf.ndim > 1)
        share = sum(layer.active_weights for layer in plan.values()) / kernels
        trained = rx.training_cost(algorithm, share, 1.0, problem.steps) / 3
    fit = fitting.make_fit(problem, algorithm=algorithm)
    members = [fitting.train(fit, member=member).params for member in range(MEMBERS)]
    logits = jax.jit(jax.vmap(lambda params: training.apply(params, problem.test.x)[0]))
    logs = jnp.stack([jax.nn.log_softmax(logits(params)) for params in members])
    joined = jax.nn.logsumexp(logs, axis=0) - jnp.log(MEMBERS)
    single, test = (_measured(problem, each) for each in (logs[0], joined))
    return {"single": single, "test": test, "cost": _cost(MEMBERS * share, MEMBERS * trained)}


def mimo_networks(problem: Problem, rho: float) -> dict[str, Any]:
    """MIMO, trained for as many steps of as many images as a single network."""
    inputs, *hidden, classes = problem.sizes
    wide = problem._replace(sizes=(MEMBERS * inputs, *hidden, MEMBERS * classes))
    apply = mimo(lambda params, x: training.apply(params, x)[0], MEMBERS)
    params = fitting.train(fitting.make_fit(wide, functools.partial(_loss, apply, problem.steps, rho))).params
    predict = jax.jit(jax.vmap(lambda params: mimo_predict(apply, params, problem.test.x, MEMBERS)))
    work = [sum(a * b for a, b in itertools.pairwise(sizes)) for sizes in (wide.sizes, problem.sizes)]
    return {"test": _measured(problem, predict(params)), "cost": _cost(work[0] / work[1], work[0] / work[1])}


def _loss(
    apply: Any, steps: int, rho: float, params: Params, x: Array, y: Array, progress: Array, option: Any
) -> Array:
    """The members' cross-entropies; the shuffles are those of the step, the same in all seeds."""
    del option
    key = jax.random.fold_in(jax.random.key(55), jnp.round(progress * steps).astype(jnp.int32))
    x, y = mimo_batch(key, x, y, MEMBERS, rho)
    return mimo_loss(apply(params, x), y) / MEMBERS


def _measured(problem: Problem, logits: Array) -> list[list[float]]:
    found = [quality(each, problem.test.y) for each in logits]
    return [[round(float(value), 5) for value in each] for each in found]


def _cost(answer: float, trained: float) -> dict[str, float]:
    """Multiplications by weights, one dense network = 1."""
    return {"answer": round(float(answer), 4), "training": round(float(trained), 4)}
