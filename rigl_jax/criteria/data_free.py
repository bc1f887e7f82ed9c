"""Criteria that need no data."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from rigl_jax import checks, scores
from rigl_jax.base import Array, Criterion, PyTree, Signals
from rigl_jax.criteria.losses import of_inputs, signals


def magnitude(params: PyTree, batch: Any = None) -> PyTree:
    """|w|, the criterion that every other is compared with (Han et al. 2015). It is a criterion itself.

    >>> magnitude({"w": jnp.array([1.0, -2.0])})["w"].tolist()
    [1.0, 2.0]
    """
    del batch
    return scores.magnitude(signals(params, None))


def random(key: Array) -> Criterion:
    """Independent uniform scores in [0, 1): the control. The same for the same key and leaf name, in every round.

    Args:
      key: PRNG key.

    >>> scores = random(jax.random.key(0))({"w": jnp.ones((2, 3))}, None)
    >>> scores["w"].shape
    (2, 3)
    """
    key = checks.key("random", key)
    return lambda params, batch: scores.random(Signals(params, None, 0, key))


def least_moved_negative(start: PyTree) -> Criterion:
    """|w - start| of negative weights, infinite for others: the rule of AP, which a pruner adds (Liu et al. 2023).

    Fewer negative weights raise what enters a ReLU, so that fewer units are silent. In each round the authors remove
    18 % of the weights by magnitude, then 2 % (of those before the round) by this rule, over all layers, and rewind:

        by_magnitude = rx.prune(plan_82, params, masks=masks, scope="global")
        pruned = rx.prune(plan_80, by_magnitude.params, least_moved_negative(start), masks=by_magnitude.masks,
                          scope="global")

    In their code scales of normalisation layers may go too, one weight more than that share goes, and weights are drawn
    anew by default; here the plan says what may go, and how much.

    Args:
      start: the weights at the start of the round, parallel to params.

    >>> score = least_moved_negative({"w": jnp.array([0.5, -0.25, 0.5])})
    >>> score({"w": jnp.array([0.75, -0.5, -1.0])}, None)["w"].tolist()
    [inf, 0.25, 1.5]
    """

    def criterion(params: PyTree, batch: Any) -> PyTree:
        del batch
        return jax.tree.map(lambda w, s: jnp.where(w < 0, jnp.abs(w - s), jnp.inf), params, start)

    return criterion


def synflow(apply: Callable[[PyTree, Any], PyTree]) -> Criterion:
    """|w dR/dw|, a weight's share of the synaptic flow R (Tanaka et al. 2020, eq. 1 and section 5).

    R is the sum of the network's outputs for an input of ones when every weight is replaced by its magnitude. Prune in
    rounds, `rx.prune(..., rounds=100)`: pruning at once cuts off whole layers, in rounds the scores that go to a layer
    grow as it thins out. The authors compute in float64; in float32 the flow of a deep network may overflow. A factor
    changes no ranking, so give smaller weights or return smaller outputs then.

    Args:
      apply: `(params, inputs) -> outputs`, any tree of arrays; with normalisation layers in inference mode. The inputs
        are those of the batch that `rx.prune` is given, without labels, of which only shape and type are read: arrays
        of ones, of one example (the first axis is 1). Without a batch they are None.

    >>> params = {"a": jnp.array([[1.0, -2.0]]), "b": jnp.array([[3.0], [1.0]])}  # flow: 1 * 3 + 2 * 1
    >>> scores = synflow(lambda p, x: x @ p["a"] @ p["b"])(params, jnp.zeros((8, 1)))
    >>> scores["a"].tolist()
    [[3.0, 2.0]]
    """
    checks.functions("synflow", apply=apply)
    model = of_inputs("synflow", apply)

    def criterion(params: PyTree, batch: Any) -> PyTree:
        ones = jax.tree.map(lambda x: jnp.ones((1, *jnp.shape(x)[1:]), jnp.result_type(x)), batch)

        def flow(params: PyTree) -> Array:
            return functools.reduce(jnp.add, map(jnp.sum, jax.tree.leaves(model(params, ones))))

        magnitudes = jax.tree.map(jnp.abs, params)
        return scores.snip(signals(magnitudes, scores.gradient_of(flow, magnitudes)))

    return criterion
