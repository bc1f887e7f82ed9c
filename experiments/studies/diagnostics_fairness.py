"""Individual fairness of small networks that see the protected bit, proven or refuted box by box by the solver z3."""

from __future__ import annotations

import functools
import itertools
import time
from collections import Counter
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

import rigl_jax as rx
from experiments.studies import data_training as training
from experiments.studies import diagnostics_flow as people
from experiments.studies.data_training import SEEDS, rounded
from rigl_jax import diagnostics

SIZES = (4, 5, 3, 2)
"""The three features of `diagnostics_flow.people`, and the bit."""
LIMIT = 2.0
"""Features are between minus and plus this; the bit is 0 or 1."""
PARTS = (1, 2)
"""Each feature's range is divided into so many parts."""
SECONDS = 2.0
"""The time limit of the solver for a box."""
SPARSITIES = (0.0, 0.5, 0.75)
"""Of the networks: magnitude over all layers, then trained again for as long."""
VERDICTS = ("fair", "unfair", "unknown")


def boxes(parts: int) -> list[tuple[np.ndarray, np.ndarray]]:
    """`(low, high)` of all boxes."""
    ends = np.linspace(-LIMIT, LIMIT, parts + 1)
    sides = itertools.product(itertools.pairwise(ends), repeat=3)
    return [(np.array([a for a, _ in side] + [0.0]), np.array([b for _, b in side] + [1.0])) for side in sides]


def fairness(sparsity: float) -> dict[str, Any]:
    """Test accuracy, and for each number of parts: boxes by verdict, settled ReLUs, seconds a box; a number a seed."""
    data = [people.people(seed, people.TRAIN + people.TEST) for seed in SEEDS]
    seen = [np.column_stack([x, z]).astype(np.float32) for x, _, z in data]
    params = networks(jnp.asarray([x[: people.TRAIN] for x in seen]), jnp.asarray([y for _, y, _ in data]), sparsity)
    found = []
    for i, x in enumerate(seen):
        own = training.take(params, i)
        test = training.Images(jnp.asarray(x[people.TRAIN :]), jnp.asarray(data[i][1][people.TRAIN :]))
        counts = {str(parts): verified(own, boxes(parts)) for parts in PARTS}
        found.append({"test": training.accuracy(own, test), "parts": counts})
    return jax.tree.map(lambda *values: rounded(values), *found)


def networks(x: Any, y: Any, sparsity: float) -> Any:
    """Networks of all seeds, pruned by magnitude and trained again if the sparsity is not 0."""
    y, keys = y[:, : people.TRAIN], training.keys(54)
    every = functools.partial(people.fit, sizes=SIZES)
    params = jax.jit(jax.vmap(functools.partial(every, masks=people.dense_masks(SIZES), start=None)))(keys, x, y)
    if not sparsity:
        return params
    rules = [(".*kernel", rx.unstructured()), (".*", None)]
    plan = rx.make_plan(training.take(params, 0), sparsity, rx.erk, rules=rules)
    pruned = [rx.prune(plan, training.take(params, i), scope="global") for i in range(len(SEEDS))]
    start, masks = jax.tree.map(lambda *leaves: jnp.stack(leaves), *[(p.params, p.masks) for p in pruned])
    return jax.jit(jax.vmap(every))(keys, x, y, masks, start)


def verified(params: Any, parts: Sequence[tuple[np.ndarray, np.ndarray]]) -> dict[str, float]:
    """Shares of the boxes by verdict, of ReLUs that intervals settle, and the mean seconds of the solver."""
    low, high = (jnp.asarray(np.stack(side), jnp.float32) for side in zip(*parts, strict=True))
    relus = diagnostics.interval_bounds(lambda params, x: training.apply(params, x)[0], params, low, high).relus
    settled = np.concatenate([np.asarray((r.high <= 0) | (r.low >= 0)).ravel() for r in relus])
    started, net = time.process_time(), people.layers(params)
    found = [diagnostics.individual_fairness(net, *box, [3], whole=[3], seconds=SECONDS) for box in parts]
    spent, counts = time.process_time() - started, Counter(each.verdict for each in found)
    shares = {verdict: counts[verdict] / len(parts) for verdict in VERDICTS}
    return {**shares, "settled": float(settled.mean()), "seconds": spent / len(parts)}
