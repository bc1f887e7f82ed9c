"""Scores: how much each weight is worth. `Signals -> tree`, higher is more worth keeping or growing.

A score sees weights one by one; the structure pools it over units. A NaN score ranks below every number (see
`topology.select`).
"""

from __future__ import annotations

import jax
import jax.numpy as jnp

from rigl_jax import trees
from rigl_jax.base import PyTree, Score, Signals


def magnitude(signals: Signals) -> PyTree:
    """|w|: the drop criterion of SET, RigL and gradual pruning."""
    return jax.tree.map(jnp.abs, signals.params)


def gradient(signals: Signals) -> PyTree:
    """|g| of the dense gradient: the growth criterion of RigL (Evci et al. 2020, section 3)."""
    return jax.tree.map(jnp.abs, signals.grads)


def random(signals: Signals) -> PyTree:
    """Independent uniform scores, one key for each leaf: the growth criterion of SET."""
    return jax.tree.map(
        lambda name, p: jax.random.uniform(trees.leaf_key(signals.key, name), p.shape),
        trees.names(signals.params),
        signals.params,
    )


def noisy(score: Score, scale: float) -> Score:
    """`score` plus normal noise of standard deviation `scale`: the tie-breaker of the authors' code (1e-5)."""

    def noised(signals: Signals) -> PyTree:
        return jax.tree.map(
            lambda name, s: (
                s + scale * jax.random.normal(trees.leaf_key(signals.key, f"noise:{name}"), s.shape, s.dtype)
            ),
            trees.names(signals.params),
            score(signals),
        )

    return noised
