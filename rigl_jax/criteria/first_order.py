"""Criteria from the gradient of a loss."""

from __future__ import annotations

from typing import Any

from rigl_jax import checks, scores
from rigl_jax.base import Criterion, PyTree
from rigl_jax.criteria.losses import Loss, at, signals


def snip(loss: Loss) -> Criterion:
    """|g w|: how fast the loss changes as a weight is scaled away (Lee et al. 2019, eq. 6, without normalisation).

    The paper divides by the sum over all weights, which changes no ranking.

    Args:
      loss: `(params, batch) -> scalar`.

    >>> import jax.numpy as jnp
    >>> snip(lambda p, batch: (p["w"] ** 2).sum())({"w": jnp.array([1.0, -3.0])}, None)["w"].tolist()
    [2.0, 18.0]
    """
    checks.functions("snip", loss=loss)
    value = at("snip", loss)

    def criterion(params: PyTree, batch: Any) -> PyTree:
        return scores.snip(signals(params, scores.gradient_of(lambda p: value(p, batch), params)))

    return criterion
