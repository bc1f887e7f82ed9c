"""Dead neurons of networks that are pruned round by round: by magnitude, with AP, and AP without its sign.

As in the lottery ticket procedure each round starts again from the first weights. AP is the rule of Liu et al. (2023):
a tenth of what a round removes are the negative weights that moved least. Rounds are shorter than the whole training.
"""

from __future__ import annotations

import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array

import rigl_jax as rx
from experiments.studies import data_training as training
from experiments.studies import diagnostics_training as fitting
from experiments.studies.data_training import SEEDS, Params, Problem, rounded
from experiments.studies.diagnostics_training import Trained

METHODS = {
    "magnitude": "magnitude",
    "ap": "magnitude and AP",
    "moved": "magnitude and the least moved of any sign",
}
REMOVED, ROUNDS = 0.2, 14
"""Share of the weights left that a round removes, the same in each layer; 14 rounds leave 4 %."""
SHOWN = (0, 3, 7, 10, 14)
"""Rounds of the table; round 0 is the dense network."""
AP = 0.1
"""Share of what goes by the second rule: the authors' 2 % of the weights left beside 18 %."""
LENGTH = 0.5
"""Of the training, in each round."""


def sparsity(round_: int) -> float:
    """After so many rounds."""
    return 1 - (1 - REMOVED) ** round_


def rounds(problem: Problem, method: str) -> dict[str, list[list[float]]]:
    """Test accuracy and shares of dead hidden units on test images, each a list of rounds with a number a seed."""
    fit, steps = fitting.make_fit(problem), int(LENGTH * problem.steps)
    first = fit.init(jax.random.key_data(training.keys(0)))[0]
    masks = jax.tree.map(lambda p: jnp.ones(p.shape, bool) if p.ndim > 2 else None, first)
    found: dict[str, list[list[float]]] = {"test": [], "static": [], "dynamic": []}
    params = first
    for round_ in range(ROUNDS + 1):
        if round_:
            masks = _all_pruned(problem, method, round_, first, masks, params)
        start = Trained(rx.apply_masks(first, masks), masks)
        params = fitting.train(fit, start, steps=steps).params
        for name, values in _facts(params, problem.test).items():
            found[name].append(rounded(values))
    return found


def _all_pruned(problem: Problem, method: str, round_: int, first: Any, masks: Any, params: Any) -> Any:
    """The masks of the next round, of all seeds."""
    every = [
        pruned(problem, method, round_, *(training.take(tree, i) for tree in (first, masks, params)))
        for i in range(len(SEEDS))
    ]
    return jax.tree.map(lambda *leaves: jnp.stack(leaves), *every)


def pruned(problem: Problem, method: str, round_: int, start: Params, masks: Any, params: Params) -> Any:
    """The masks of one network after it is pruned for a round; `start` are its first weights."""
    now = sparsity(round_)
    plan = fitting.plan_of(problem, now, rx.uniform)
    if method == "magnitude":
        return rx.prune(plan, params, masks=masks).masks
    if method == "ap":
        return rx.prune(plan, params, rx.criteria.activating(rx.criteria.magnitude, start, AP), masks=masks).masks
    between = now - AP * (now - sparsity(round_ - 1))  # what magnitude leaves to the second rule
    most = rx.prune(fitting.plan_of(problem, between, rx.uniform), params, masks=masks)
    return rx.prune(plan, most.params, functools.partial(_moved, start), masks=most.masks).masks


def _moved(start: Params, params: Params, batch: Any) -> Any:
    """How far each weight is from where it began."""
    del batch
    return jax.tree.map(lambda p, s: jnp.abs(p - s), params, start)


@jax.jit
@functools.partial(jax.vmap, in_axes=(0, None))
def _facts(params: Params, test: training.Images) -> dict[str, Array]:
    dead = rx.diagnostics.dead_rate(hidden(params, test.x))
    return {"test": training.accuracy(params, test), "static": dead.static, "dynamic": dead.dynamic}


def hidden(params: Params, x: Array) -> Array:
    """What all hidden units put out, float32[n, units]."""
    found = []
    for name in sorted(params)[:-1]:
        x = jax.nn.relu(x @ params[name]["kernel"] + params[name]["bias"][None])
        found.append(x)
    return jnp.concatenate(found, axis=1)
