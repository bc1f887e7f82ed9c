"""Label noise: scores that are to find flipped labels, and coresets of noisy data."""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from scipy import stats

import rigl_jax as rx
from experiments.studies import data_training as training
from experiments.studies.data_training import SEEDS, Problem, Trainer, rounded

EARLY = 2
"""Epochs before EL2N and GraNd are measured: a tenth of training, as Paul et al. (2021) do."""
MEMBERS = 10
"""Networks over which they average."""
SCORES = {
    "complexity_gap": "complexity gap",
    "el2n": f"EL2N after {EARLY} epochs",
    "el2n_mean": f"EL2N after {EARLY} epochs, mean of {MEMBERS} networks",
    "grand": f"GraNd after {EARLY} epochs",
    "el2n_last": "EL2N at the end",
    "loss_last": "loss at the end",
    "loss_moving": "loss during training, moving average",
    "forgetting": "forgetting events",
}
KEPT = {"all": 1.0, "clean": 1.0, "random": 0.5, "el2n": 0.5, "el2n_offset": 0.5, "easiest": 0.5, "complexity_gap": 0.5}
"""Parts of noisy data to train on: the hardest half by EL2N, the same after the hardest tenth is left out, ..."""
OFFSET = 0.1


def flip(problem: Problem, share: float, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """`(labels, flipped)`: this share of the labels, rounded down, replaced by another class, drawn uniformly."""
    random, y = np.random.default_rng([seed, 17]), np.asarray(problem.train.y)
    flipped = np.zeros(len(y), bool)
    flipped[random.choice(len(y), int(share * len(y)), replace=False)] = True
    return np.where(flipped, (y + random.integers(1, 10, len(y))) % 10, y).astype(np.int32), flipped


def detection(scores: np.ndarray, flipped: np.ndarray) -> tuple[float, float]:
    """`(precision, auroc)`: the share of flipped labels among as many highest scores, and the chance that a flipped
    label scores higher than a right one. Ties count half.
    """
    k, n = int(flipped.sum()), len(flipped)
    ranks = stats.rankdata(scores)  # inf of forgetting events included
    auroc = (ranks[flipped].sum() - k * (k + 1) / 2) / (k * (n - k))
    limit = np.sort(scores)[n - k]
    above, tied = scores > limit, scores == limit
    share = (k - above.sum()) / tied.sum()  # of those that tie, the chance to be taken
    return float(((flipped & above).sum() + share * (flipped & tied).sum()) / k), float(auroc)


def noisy(problem: Problem, share: float) -> tuple[Array, np.ndarray]:
    """`(labels int32[seeds, n], flipped bool[seeds, n])` of all seeds."""
    found = [flip(problem, share, seed) for seed in SEEDS]
    return jnp.asarray([labels for labels, _ in found]), np.asarray([flipped for _, flipped in found])


def scores(problem: Problem, trainer: Trainer, share: float) -> dict[str, dict[str, list[float]]]:
    """Precision and AUROC of every score, a number a seed."""
    y, flipped = noisy(problem, share)
    found = {"complexity_gap": gaps(problem, y), **_of_networks(problem, trainer, y)}
    table = {name: [detection(s, f) for s, f in zip(found[name], flipped, strict=True)] for name in SCORES}
    return {
        name: {"precision": rounded([p for p, _ in pairs]), "auroc": rounded([a for _, a in pairs])}
        for name, pairs in table.items()
    }


def gaps(problem: Problem, y: Array) -> np.ndarray:
    """float64[seeds, n]: the complexity gap by class, from raw pixels and labels."""
    return np.asarray([
        rx.coreset.complexity_gap_per_class(problem.raw, np.asarray(labels), jax.random.key(seed))
        for seed, labels in zip(SEEDS, y, strict=True)
    ])  # fmt: skip


def _of_networks(problem: Problem, trainer: Trainer, y: Array) -> dict[str, np.ndarray]:
    """The scores that need networks: one a seed is trained to its end, the other members for the first epochs only."""
    early, last = EARLY * problem.epoch, problem.steps
    batches, weight = _batches(problem, 1, problem.steps)
    state = trainer.train(trainer.init(training.keys(0)), y, batches, weight, 0, early)
    one = early_el2n(problem, state.params, y)
    grand = jax.jit(functools.partial(_grand, problem))
    found = {
        "el2n": one,
        "grand": np.asarray([grand(training.take(state.params, i), y[i]) for i in range(len(SEEDS))]),
        "el2n_mean": (one + (MEMBERS - 1) * ensemble_el2n(problem, trainer, y, range(1, MEMBERS))) / MEMBERS,
    }
    state = trainer.train(state, y, batches[:, early:], weight, early, last)
    x = problem.train.x
    each = jax.jit(jax.vmap(lambda params, y: training.losses(params, x, y)))(state.params, y)
    return found | {
        "el2n_last": early_el2n(problem, state.params, y),
        "loss_last": np.asarray(each),
        "loss_moving": np.asarray(state.stats.mean),
        "forgetting": np.asarray(jax.vmap(rx.coreset.forgetting(len(x)).scores)(state.forgetting)),
    }


def _batches(problem: Problem, use: int, steps: int) -> tuple[Array, Array]:
    index, weight = training.everything(problem, len(SEEDS))
    return training.shuffled(training.keys(use), index, steps=steps, batch=problem.batch), weight


def early_el2n(problem: Problem, params: Any, y: Array) -> np.ndarray:
    """float32[seeds, n]: EL2N of every training example under the networks as they are."""
    return np.asarray(_el2n(params, problem.train.x, y))


@functools.partial(jax.jit)
@functools.partial(jax.vmap, in_axes=(0, None, 0))
def _el2n(params: Any, x: Array, y: Array) -> Array:
    return rx.coreset.el2n(training.apply(params, x)[0], y)


def _grand(problem: Problem, params: Any, y: Array) -> Array:
    loss = lambda params, batch: jnp.mean(training.losses(params, *batch))  # noqa: E731
    return rx.coreset.grand(loss, params, (problem.train.x, y))


def ensemble_el2n(problem: Problem, trainer: Trainer, y: Array, members: range) -> np.ndarray:
    """The mean EL2N of other networks after `EARLY` epochs, float32[seeds, n]."""
    steps, total = EARLY * problem.epoch, np.zeros(y.shape)
    for member in members:
        batches, weight = _batches(problem, 100 + member, steps)
        state = trainer.train(trainer.init(training.keys(200 + member)), y, batches, weight, 0, steps)
        total += early_el2n(problem, state.params, y) / len(members)
    return total


# --- training on a part of noisy data --------------------------------------------------------------------------------


def coresets(problem: Problem, trainer: Trainer, share: float) -> Mapping[str, Callable[[], dict[str, list[float]]]]:
    """`{part: () -> test accuracy and share of flipped labels in it}`, each trained for as many steps as all data."""
    y, flipped = noisy(problem, share)
    n = len(problem.train.y)

    @functools.cache
    def hard() -> np.ndarray:
        return ensemble_el2n(problem, trainer, y, range(MEMBERS))

    def chosen(name: str) -> np.ndarray:
        k, offset = int(KEPT[name] * n), int(OFFSET * n)
        random = [np.random.default_rng([seed, 5]).random(n) for seed in SEEDS]
        found = {
            "all": lambda: random,
            "clean": lambda: random,
            "random": lambda: random,
            "el2n": hard,
            "el2n_offset": hard,
            "easiest": lambda: -hard(),
            "complexity_gap": lambda: -gaps(problem, y),
        }[name]()
        at = offset if name == "el2n_offset" else 0
        return np.asarray([np.asarray(rx.coreset.top(jnp.asarray(s, jnp.float32), k, offset=at)) for s in found])

    def run(name: str) -> dict[str, list[float]]:
        index = jnp.asarray(chosen(name))
        labels = training.labels_of(problem, len(SEEDS)) if name == "clean" else y
        batches = training.shuffled(training.keys(1), index, steps=problem.steps, batch=problem.batch)
        weight = jnp.ones(y.shape)
        state = trainer.train(trainer.init(training.keys(0)), labels, batches, weight, 0, problem.steps)
        test = jax.jit(jax.vmap(training.accuracy, in_axes=(0, None)))(state.params, problem.test)
        noise = [0.0] * len(SEEDS) if name == "clean" else [f[i].mean() for f, i in zip(flipped, index, strict=True)]
        return {"test": rounded(test), "flipped": rounded(noise)}

    return {name: functools.partial(run, name) for name in KEPT}
