"""Criteria that need no data."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from rigl_jax import checks, scores
from rigl_jax.base import Array, Criterion, PyTree, Signals
from rigl_jax.criteria.losses import signals


def magnitude(params: PyTree, batch: Any = None) -> PyTree:
    """|w|, the criterion that every other is compared with (Han et al. 2015). It is a criterion itself.

    >>> magnitude({"w": jnp.array([1.0, -2.0])})["w"].tolist()
    [1.0, 2.0]
    """
    del batch
    return jax.tree.map(jnp.abs, params)


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


def synflow(apply: Callable[[PyTree, Any], PyTree]) -> Criterion:
    """|w dR/dw|, a weight's share of the synaptic flow R (Tanaka et al. 2020, eq. 1 and section 5).

    R is the sum of the network's outputs for an input of ones when every weight is replaced by its magnitude. Prune in
    rounds, `rx.prune(..., rounds=100)`: pruning at once cuts off whole layers, in rounds the scores that go to a layer
    grow as it thins out. The authors compute in float64; in float32 the flow of a deep network may overflow. A factor
    changes no ranking, so give smaller weights or return smaller outputs then.

    Args:
      apply: `(params, inputs) -> outputs`, any tree of arrays; with normalisation layers in inference mode. The inputs
        are those of the batch that `rx.prune` is given, of which only shape and type are read: arrays of ones, of one
        example (the first axis is 1). Without a batch they are None.

    >>> params = {"a": jnp.array([[1.0, -2.0]]), "b": jnp.array([[3.0], [1.0]])}  # flow: 1 * 3 + 2 * 1
    >>> scores = synflow(lambda p, x: x @ p["a"] @ p["b"])(params, jnp.zeros((8, 1)))
    >>> scores["a"].tolist()
    [[3.0, 2.0]]
    """
    checks.functions("synflow", apply=apply)

    def criterion(params: PyTree, batch: Any) -> PyTree:
        ones = jax.tree.map(lambda x: jnp.ones((1, *jnp.shape(x)[1:]), jnp.result_type(x)), batch)

        def flow(params: PyTree) -> Array:
            return functools.reduce(jnp.add, map(jnp.sum, jax.tree.leaves(apply(params, ones))))

        magnitudes = jax.tree.map(jnp.abs, params)
        return scores.snip(signals(magnitudes, scores.gradient_of(flow, magnitudes)))

    return criterion
