"""Labels for digits: active learning from 20 labels to 200, and labels by networks where 40 are given."""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax import Array, lax

import rigl_jax as rx
from experiments.studies import data_training as training
from experiments.studies.data_training import Images, Params, Problem, rounded

MEMBERS, STEPS, RATE = 5, 150, 3e-3
"""Networks after each round, and their training: Adam on all labelled images at once."""
FIRST, ADDED, LAST = 20, 20, 200
RARE, LAST_RARE = (5, 6, 7, 8, 9), 100
"""Classes of which the imbalanced pool keeps a tenth, and how many labels are given there."""
SCORES: dict[str, Callable[[Array], Array]] = {
    "entropy": lambda p: rx.coreset.entropy(p[0]),
    "margin": lambda p: rx.coreset.margin(p[0]),
    "least_confidence": lambda p: rx.coreset.least_confidence(p[0]),
    "margin_ensemble": lambda p: rx.coreset.margin(p.mean(axis=0)),
    "bald": rx.coreset.bald,
    "mean_std": rx.coreset.mean_std,
    "variation_ratio": rx.coreset.variation_ratio,
}
"""Of probabilities `[members, n, classes]`; all but four of them read those of the first network only."""
SELECTORS = {
    "random": "random",
    "entropy": "entropy",
    "margin": "margin",
    "least_confidence": "least confidence",
    "margin_ensemble": f"margin of {MEMBERS} networks",
    "bald": f"BALD of {MEMBERS} networks",
    "mean_std": f"mean-std of {MEMBERS} networks",
    "variation_ratio": f"variation ratio of {MEMBERS} networks",
    "k_center": "k-center (CoreSet)",
    "kmeans_pp": "k-means++",
    "k_means": "k-means",
    "badge": "BADGE",
    "balanced": "balanced (BASE)",
}
IMBALANCED = ("random", "margin", "badge", "balanced")


class Pool(NamedTuple):
    """What active learning draws from.

    Attributes:
      images: with labels that are looked at only once they are asked for.
      candidates: how many images without label a selector sees in a round, drawn anew each time.
      last: labels at the end.
    """

    images: Images
    candidates: int
    last: int


def pools(problem: Problem) -> dict[str, Pool]:
    """All digits, and with a tenth of five classes."""
    y = np.asarray(problem.train.y)
    keep = ~np.isin(y, RARE)
    for each in RARE:
        keep[np.flatnonzero(y == each)[::10]] = True
    some = Images(problem.train.x[keep], problem.train.y[keep])
    return {"active": Pool(problem.train, 1000, LAST), "imbalanced": Pool(some, 500, LAST_RARE)}


# --- networks on few labels ------------------------------------------------------------------------------------------


def fit(key: Array, sizes: tuple[int, ...], x: Array, y: Array, weight: Array) -> Params:
    """A network trained on examples by their weights; 0 leaves one out."""
    tx = optax.adam(optax.cosine_decay_schedule(RATE, STEPS))
    params = training.init(key, sizes)

    def step(_: Any, now: Any) -> Any:
        params, state = now
        loss = lambda params: jnp.sum(training.losses(params, x, y) * weight) / jnp.sum(weight)  # noqa: E731
        updates, state = tx.update(jax.grad(loss)(params), state, params)
        return optax.apply_updates(params, updates), state

    return lax.fori_loop(0, STEPS, step, (params, tx.init(params)))[0]


@functools.partial(jax.jit, static_argnames="sizes")
def _fitted(key: Array, pool: Images, labelled: Array, count: Array, sizes: tuple[int, ...]) -> Params:
    """The networks of all seeds: `labelled` is int32[seeds, most], of which the first `count` are labelled."""

    def one(key: Array, rows: Array) -> Params:
        weight = (jnp.arange(len(rows)) < count).astype(jnp.float32)
        members = jax.vmap(lambda k: fit(k, sizes, pool.x[rows], pool.y[rows], weight))
        return members(jax.random.split(key, MEMBERS))

    return jax.vmap(one)(key, labelled)


@jax.jit
def _measured(params: Params, test: Images) -> Array:
    """float32[seeds]: test accuracy, mean over members."""
    return jax.vmap(jax.vmap(training.accuracy, in_axes=(0, None)), in_axes=(0, None))(params, test).mean(axis=1)


# --- active learning -------------------------------------------------------------------------------------------------


def active(problem: Problem, pool: Pool, name: str) -> dict[str, Any]:
    """Test accuracy after each round, and the entropy of the classes that were labelled, in nats, at the end."""
    most = pool.last
    labelled = jnp.stack([
        jnp.zeros(most, jnp.int32).at[:FIRST].set(jax.random.permutation(key, len(pool.images.y))[:FIRST])
        for key in training.keys(50)
    ])  # fmt: skip
    select = jax.jit(jax.vmap(functools.partial(_select, name, pool), in_axes=(0, 0, 0, None)))
    curve = []
    for count in range(FIRST, most + 1, ADDED):
        params = _fitted(training.keys(51), pool.images, labelled, jnp.asarray(count), problem.sizes)
        curve.append(rounded(_measured(params, problem.test)))
        if count < most:
            more = select(training.keys(60 + count), params, labelled, count)
            labelled = lax.dynamic_update_slice(labelled, more, (0, count))
    shares = [np.bincount(np.asarray(pool.images.y[rows]), minlength=10) / most for rows in labelled]
    entropy = [float(-(p[p > 0] * np.log(p[p > 0])).sum()) for p in shares]
    return {"test": np.transpose(curve).tolist(), "entropy": rounded(entropy)}


def _select(name: str, pool: Pool, key: Array, params: Params, labelled: Array, count: Any) -> Array:
    """int32[ADDED]: what is labelled next, of candidates that have no label."""
    draw, choose = jax.random.split(key)
    n = len(pool.images.y)
    known = jnp.zeros(n, bool).at[jnp.where(jnp.arange(len(labelled)) < count, labelled, n)].set(True)
    free = jnp.argsort(jnp.where(known, 2.0, jax.random.uniform(draw, (n,))))[: pool.candidates]
    x, first = pool.images.x[free], jax.tree.map(lambda p: p[0], params)
    logits, inputs = jax.vmap(training.apply, in_axes=(0, None))(params, x)
    probs = jax.nn.softmax(logits)
    if name in SCORES:
        found = rx.coreset.top(SCORES[name](probs), ADDED)
    elif name == "random":
        found = jnp.arange(ADDED)  # candidates are in random order
    elif name == "k_center":
        old = training.apply(first, pool.images.x[jnp.where(jnp.arange(len(labelled)) < count, labelled, labelled[0])])
        both = jnp.concatenate([inputs[0], old[1]])
        found = rx.coreset.k_center(both, ADDED, labelled=jnp.arange(len(both)) >= len(free))
    elif name == "balanced":
        last = first[max(first)]
        found = rx.coreset.balanced(rx.coreset.boundary_distance(inputs[0], last["kernel"], last["bias"]), ADDED)
    elif name == "badge":
        found = rx.coreset.badge(choose, probs[0], inputs[0], ADDED)
    else:
        found = getattr(rx.coreset, name)(choose, inputs[0], ADDED)
    return free[found].astype(jnp.int32)


# --- a first set of labels, and labels by networks -------------------------------------------------------------------

GIVEN = 40
THRESHOLD = 0.9
STARTS: Mapping[str, Callable[[Array, Array], Array]] = {
    "random": lambda key, x: jax.random.permutation(key, len(x))[:GIVEN],
    "k_means": lambda key, x: rx.coreset.k_means(key, x, GIVEN),
    "kmeans_pp": lambda key, x: rx.coreset.kmeans_pp(key, x, GIVEN),
    "k_center": lambda key, x: rx.coreset.k_center(x, GIVEN),
}
"""First sets of labels, chosen by the pixels alone."""
TEACHERS = (0, 1, 5)
"""How many give labels to the rest; 0: the network is trained on the given labels alone."""


def self_trained(problem: Problem, start: str, teachers: int) -> dict[str, list[float]]:
    """Accuracy and ECE of the student on the test images; how many images teachers labelled, and how many rightly."""
    x, y = np.asarray(problem.train.x), np.asarray(problem.train.y)
    rows: dict[str, list[float]] = {"test": [], "ece": [], "accepted": [], "right": []}
    for key in training.keys(80):
        chosen = np.asarray(jax.jit(STARTS[start])(jax.random.fold_in(key, 1), problem.train.x))
        rest = np.setdiff1d(np.arange(len(y)), chosen)
        if teachers:
            found = rx.coreset.self_training(
                functools.partial(_fit, problem.sizes, len(y)), x[chosen], y[chosen], x[rest], key,
                teachers=teachers, threshold=THRESHOLD,
            )  # fmt: skip
            student, pseudo = found.student, found.pseudo
            right = (pseudo.labels == y[rest])[pseudo.accepted].mean() if pseudo.accepted.any() else 1.0
            rows["accepted"].append(float(pseudo.accepted.mean()))
            rows["right"].append(float(right))
        else:
            student = _fit(problem.sizes, len(y), x[chosen], y[chosen], key)
        probs = student(problem.test.x)
        rows["test"].append(float((jnp.argmax(probs, 1) == problem.test.y).mean()))
        rows["ece"].append(float(rx.diagnostics.ece(probs, problem.test.y)))
    return {name: rounded(values) for name, values in rows.items() if values}


def _fit(sizes: tuple[int, ...], most: int, x: Any, labels: Any, key: Array) -> Callable[[Any], Array]:
    """Trains on examples that are filled up to `most`, so that one program serves all numbers of them."""
    wide, of = np.zeros((most, x.shape[1]), np.float32), np.zeros(most, np.int32)
    wide[: len(x)], of[: len(x)] = x, labels
    params = _compiled_fit(key, wide, of, (np.arange(most) < len(x)).astype(np.float32), sizes)
    return lambda new: _probs(params, new)


@functools.partial(jax.jit, static_argnames="sizes")
def _compiled_fit(key: Array, x: Array, y: Array, weight: Array, sizes: tuple[int, ...]) -> Params:
    return fit(key, sizes, x, y, weight)


@jax.jit
def _probs(params: Params, x: Array) -> Array:
    return jax.nn.softmax(training.apply(params, x)[0])
