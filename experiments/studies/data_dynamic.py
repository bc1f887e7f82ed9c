"""Dynamic against static pruning of the data at equal steps, under a sparse network that RigL trains."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

import rigl_jax as rx
from experiments.studies import data_training as training
from experiments.studies.data_noise import EARLY, ensemble_el2n
from experiments.studies.data_training import SEEDS, Images, Problem, Trainer, rounded

SPARSITY, REWIRE_EVERY = 0.9, 100
PASSES = 2
"""Passes over the chosen examples before others are chosen."""
RUNS = 10
"""Networks over which EL2N is averaged; their steps are not counted."""


class Way(NamedTuple):
    """A way to choose examples.

    Attributes:
      label: in tables.
      rule: of `rx.coreset.dynamic_pruning`; None: not by one of them.
      options: of the rule.
      weighted: by Horvitz and Thompson.
      again: whether other examples are chosen again.
    """

    label: str
    rule: str | None = None
    options: dict[str, Any] = {}  # noqa: RUF012
    weighted: bool = False
    again: bool = True


WAYS = {
    "random": Way(f"random, drawn again every {PASSES} passes", "random"),
    "epsilon_greedy": Way("epsilon-greedy, epsilon 0.1", "epsilon_greedy"),
    "epsilon_half": Way("epsilon-greedy, epsilon 0.5", "epsilon_greedy", {"epsilon": 0.5}),
    "epsilon_half_ht": Way("the same, weighted", "epsilon_greedy", {"epsilon": 0.5}, weighted=True),
    "ucb": Way("UCB, c = 1", "ucb"),
    "random_once": Way("random, once", "random", again=False),
    "el2n_hard": Way(f"EL2N of {RUNS} networks, hardest, once", again=False),
    "el2n_easy": Way(f"EL2N of {RUNS} networks, easiest, once", again=False),
    "forgetting": Way("forgetting events of a whole run, most, once", again=False),
}
KEEP = (0.3, 0.1)
FULL = "full"


def rigl(problem: Problem, steps: int) -> Callable[[Any], rx.Algorithm]:
    """RigL at 90 % with the Erdos-Renyi distribution."""

    def make(shapes: Any) -> rx.Algorithm:
        plan = rx.make_plan(shapes, SPARSITY, rx.erk, rules=[(".*kernel", rx.unstructured()), (".*", None)])
        return rx.rigl(plan, period=REWIRE_EVERY, stop=int(0.75 * steps), fraction=0.3)

    del problem
    return make


class Bench(NamedTuple):
    """What the cells share.

    Attributes:
      problem: data and network.
      trainer: RigL.
      hard: `() -> EL2N` of dense networks, float64[seeds, n], computed once.
      forgotten: `() -> forgetting events` of the run of RigL on all data, float32[seeds, n], computed once.
    """

    problem: Problem
    trainer: Trainer
    hard: Callable[[], np.ndarray]
    forgotten: Callable[[], np.ndarray]


def make_bench(problem: Problem) -> Bench:
    """All that is compiled or computed once."""
    trainer = training.make_trainer(problem, problem.steps, rigl(problem, problem.steps))
    dense = training.make_trainer(problem, problem.steps)
    y = training.labels_of(problem, len(SEEDS))

    @functools.cache
    def hard() -> np.ndarray:
        return ensemble_el2n(problem, dense, y, range(RUNS))

    @functools.cache
    def forgotten() -> np.ndarray:
        state = _on_all(problem, trainer, 2)
        found = jax.vmap(rx.coreset.forgetting(y.shape[1]).scores)(state.forgetting)
        ties = jax.vmap(lambda key: jax.random.uniform(key, y.shape[1:]))(training.keys(9))
        return np.asarray(jnp.minimum(found, 1e6) + ties)  # ties in random order

    return Bench(problem, trainer, hard, forgotten)


def _on_all(problem: Problem, trainer: Trainer, use: int) -> training.State:
    index, weight = training.everything(problem, len(SEEDS))
    batches = training.shuffled(training.keys(use), index, steps=problem.steps, batch=problem.batch)
    labels = training.labels_of(problem, len(SEEDS))
    return trainer.train(trainer.init(training.keys(0)), labels, batches, weight, 0, problem.steps)


def full(bench: Bench, steps_share: float = 1.0) -> dict[str, list[float]]:
    """RigL on all data; with a smaller share of the steps it has its own, shorter schedule."""
    problem, trainer = bench.problem, bench.trainer
    if steps_share < 1:
        steps = int(steps_share * problem.steps)
        trainer = training.make_trainer(problem, steps, rigl(problem, steps))
        index, weight = training.everything(problem, len(SEEDS))
        batches = training.shuffled(training.keys(1), index, steps=steps, batch=problem.batch)
        labels = training.labels_of(problem, len(SEEDS))
        state = trainer.train(trainer.init(training.keys(0)), labels, batches, weight, 0, steps)
    else:
        state = _on_all(problem, trainer, 1)
    return {"test": rounded(_test(state.params, problem.test)), "used": [1.0] * len(SEEDS)}


@functools.partial(jax.jit)
@functools.partial(jax.vmap, in_axes=(0, None))
def _test(params: Any, images: Images) -> Array:
    return training.accuracy(params, images)


def pruned(bench: Bench, name: str, keep: float) -> dict[str, list[float]]:
    """RigL on the examples that a way chooses: test accuracy, and the share of all examples that it ever used."""
    problem, trainer, way = bench.problem, bench.trainer, WAYS[name]
    n, steps = len(problem.train.y), problem.steps
    k = int(keep * n)
    period = PASSES * (k // problem.batch) if way.again else steps
    select = jax.jit(jax.vmap(functools.partial(_select, way, n, k)))
    labels, state = training.labels_of(problem, len(SEEDS)), trainer.init(training.keys(0))
    used = jnp.zeros((len(SEEDS), n), bool)
    for number, start in enumerate(range(0, steps, period)):
        if way.rule is None:
            index, weight = _fixed(bench, name, k), jnp.ones((len(SEEDS), n))
        else:
            index, weight = select(state.stats, training.keys(1000 + number))
        used = used.at[jnp.arange(len(SEEDS))[:, None], index].set(True)
        batches = training.shuffled(training.keys(2000 + number), index, steps=period, batch=problem.batch)
        state = trainer.train(state, labels, batches, weight, start, min(start + period, steps))
    return {"test": rounded(_test(state.params, problem.test)), "used": rounded(used.mean(axis=1))}


def _select(way: Way, n: int, k: int, stats: Any, key: Array) -> tuple[Array, Array]:
    chosen = rx.coreset.dynamic_pruning(n, k, str(way.rule), **way.options).select(stats, key)
    weight = jnp.zeros(n).at[chosen.index].set(chosen.weight if way.weighted else 1.0)
    return chosen.index, weight


def _fixed(bench: Bench, name: str, k: int) -> Array:
    scores = {"el2n_hard": bench.hard, "el2n_easy": lambda: -bench.hard(), "forgetting": bench.forgotten}[name]()
    return jnp.stack([rx.coreset.top(jnp.asarray(s, jnp.float32), k) for s in scores])


__all__ = ["EARLY", "FULL", "KEEP", "WAYS", "Bench", "full", "make_bench", "pruned"]
