"""Flow of a protected attribute through small networks, and weights that are cut by it.

People are drawn: a protected bit z, a merit that does not depend on it, and a label that favours z = 1. Networks see
merit with noise, a proxy of z, and a mixture of both.
"""

from __future__ import annotations

import functools
import itertools
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax import Array
from scipy import stats

import rigl_jax as rx
from experiments.studies import data_training as training
from experiments.studies.data_training import SEEDS, Params, rounded
from rigl_jax import diagnostics

TRAIN, TEST = 4000, 4000
KNOWN, JUDGED = 500, 2000
"""Examples that a classifier of the flow learns from, and is judged on."""
HIDDEN = (4, 3)
STEPS, RATE = 1000, 0.02
"""Of Adam on all training examples at once."""
CUT = 2
"""Weights that are cut at once, as Venkatesh et al. do."""
FACTORS = (0.75, 0.5, 0.25, 0.0)
"""What these weights are scaled by."""
DRAWS = 30
"""Pairs of weights that "random" is the mean of."""
RULES = {
    "flow": "flow of z over flow of the label, times the weight",
    "bias": "flow of z, times the weight",
    "magnitude": "the weight",
    "random": "random",
}
Layers = list[tuple[np.ndarray, np.ndarray]]
Edge = tuple[int, tuple[int, ...]]
"""Layer, and the place in its kernel."""


def people(seed: int, n: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """`(x float32[n, 3], label int32[n], z int32[n])`."""
    draw = np.random.default_rng([seed, 52])
    z, merit = draw.integers(0, 2, n), draw.normal(size=n)
    favour = 2 * z - 1
    label = merit + 0.5 * favour + 0.3 * draw.normal(size=n) > 0
    noise = draw.normal(size=(3, n))
    x = np.stack([merit + 0.3 * noise[0], favour + 0.7 * noise[1], merit + favour + 0.5 * noise[2]], axis=1)
    return x.astype(np.float32), label.astype(np.int32), z.astype(np.int32)


def fit(key: Array, x: Array, y: Array, masks: Any, start: Any, *, sizes: tuple[int, ...]) -> Params:
    """A network of two classes after training by Adam, with its weights masked; `start` None: a new one."""
    params = training.init(key, sizes) if start is None else start
    adam = optax.adam(RATE)

    def step(_: Array, now: Any) -> Any:
        params, state = now
        loss = lambda params: jnp.mean(training.losses(rx.apply_masks(params, masks), x, y))  # noqa: E731
        updates, state = adam.update(jax.grad(loss)(params), state)
        return optax.apply_updates(params, updates), state

    return rx.apply_masks(jax.lax.fori_loop(0, STEPS, step, (params, adam.init(params)))[0], masks)


def dense_masks(sizes: Sequence[int]) -> Any:
    """Masks of a dense network."""
    return {
        f"dense_{i}": {"kernel": jnp.ones(shape, bool), "bias": None}
        for i, shape in enumerate(itertools.pairwise(sizes))
    }


def layers(params: Any) -> Layers:
    """Kernels and biases in float64, on the host."""
    of = lambda name, part: np.asarray(params[name][part], np.float64)  # noqa: E731
    return [(of(name, "kernel"), of(name, "bias")) for name in sorted(params)]


def outputs(net: Layers, x: np.ndarray) -> list[np.ndarray]:
    """The inputs, the outputs of each hidden layer, the logits."""
    found = [np.asarray(x, np.float64)]
    for i, (kernel, bias) in enumerate(net):
        y = found[-1] @ kernel + bias
        found.append(y if i == len(net) - 1 else np.maximum(y, 0))
    return found


# --- flow ------------------------------------------------------------------------------------------------------------


def information(nodes: np.ndarray, message: np.ndarray) -> float:
    """Bits on a binary message that a support vector machine gets from nodes, on examples that it did not see."""
    from sklearn.pipeline import make_pipeline
    from sklearn.preprocessing import StandardScaler
    from sklearn.svm import SVC

    machine = make_pipeline(StandardScaler(), SVC()).fit(nodes[:KNOWN], message[:KNOWN])
    judged = slice(KNOWN, KNOWN + JUDGED)
    accuracy = float(machine.score(nodes[judged], message[judged]))
    return diagnostics.accuracy_information(accuracy, float(message[judged].mean()))


def flows(nodes: np.ndarray, message: np.ndarray) -> np.ndarray:
    """M-information flow of a message through each node of a layer, float64[nodes], in bits."""
    n = nodes.shape[1]
    subsets = [s for size in range(1, n + 1) for s in itertools.combinations(range(n), size)]
    return diagnostics.m_flow({s: information(nodes[:, s], message) for s in subsets}, n)


def edges(net: Layers) -> list[Edge]:
    """All weights but those of the last layer."""
    return [(i, at) for i, (kernel, _) in enumerate(net[:-1]) for at in np.ndindex(*kernel.shape)]


def scaled(net: Layers, which: Sequence[Edge], factor: float) -> Layers:
    """The network with some of its weights scaled."""
    new = [(kernel.copy(), bias) for kernel, bias in net]
    for layer, at in which:
        new[layer][0][at] *= factor
    return new


def measured(net: Layers, x: np.ndarray, label: np.ndarray, z: np.ndarray) -> dict[str, float]:
    """Accuracy, and how the decision depends on z: the gap of the shares that are favoured, and bits."""
    decided = outputs(net, x)[-1].argmax(axis=1)
    gap = abs(decided[z == 1].mean() - decided[z == 0].mean())
    nats = diagnostics.mutual_information(decided, z, bins=2)
    return {"accuracy": float((decided == label).mean()), "gap": float(gap), "bits": float(nats / np.log(2))}


def flow() -> dict[str, Any]:
    """Networks of all seeds: what cutting weights changes, by how they are chosen."""
    sizes = (3, *HIDDEN, 2)
    data = [people(seed, TRAIN + TEST) for seed in SEEDS]
    x, y = (jnp.asarray([part[i][:TRAIN] for part in data]) for i in (0, 1))
    train = jax.jit(jax.vmap(functools.partial(fit, masks=dense_masks(sizes), start=None, sizes=sizes)))
    params = train(training.keys(52), x, y)
    found = [
        _cut(layers(training.take(params, i)), x[TRAIN:], y[TRAIN:], z[TRAIN:], np.random.default_rng([seed, 53]))
        for i, (seed, (x, y, z)) in enumerate(zip(SEEDS, data, strict=True))
    ]
    return jax.tree.map(lambda *values: rounded(values), *found)


def _cut(net: Layers, x: np.ndarray, label: np.ndarray, z: np.ndarray, draw: np.random.Generator) -> dict[str, Any]:
    """The facts of one network. Flows are estimated on the first half of the test people, the rest is for measures."""
    half = len(x) // 2
    nodes = outputs(net, x[:half])[: len(net) - 1]
    of_z, of_label = ([flows(layer, message[:half]) for layer in nodes] for message in (z, label))
    every = edges(net)
    weights = [np.abs(kernel) for kernel, _ in net]
    ratios = [diagnostics.biased_edges(k, b, a) for (k, _), b, a in zip(net[:-1], of_z, of_label, strict=True)]
    scores = {
        "flow": np.array([ratios[layer][at] for layer, at in every]),
        "bias": np.array([weights[layer][at] * of_z[layer][at[0]] for layer, at in every]),
        "magnitude": np.array([weights[layer][at] for layer, at in every]),
    }
    judge = functools.partial(measured, x=x[half:], label=label[half:], z=z[half:])
    ways: dict[str, Any] = {}
    for name, score in scores.items():
        first = [every[i] for i in np.argsort(-score, kind="stable")[:CUT]]
        ways[name] = {f"{factor:g}": judge(scaled(net, first, factor)) for factor in FACTORS}
    pairs = [[every[i] for i in draw.choice(len(every), CUT, replace=False)] for _ in range(DRAWS)]
    ways["random"] = {f"{f:g}": mean([judge(scaled(net, pair, f)) for pair in pairs]) for f in FACTORS}
    whole = judge(net)
    less = [whole["gap"] - judge(scaled(net, [edge], 0.0))["gap"] for edge in every]
    ranks = {name: float(stats.spearmanr(score, less).statistic) for name, score in scores.items()}
    by_layer = {"z": of_z, "label": of_label}
    return {"whole": whole, "ways": ways, "ranks": ranks, "flows": {n: [*map(list, f)] for n, f in by_layer.items()}}


def mean(facts: Sequence[Mapping[str, float]]) -> dict[str, float]:
    """Each fact's mean."""
    return {name: float(np.mean([each[name] for each in facts])) for name in facts[0]}
