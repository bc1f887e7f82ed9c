"""Criteria from the curvature of a loss."""

from __future__ import annotations

from typing import Any

from rigl_jax import checks, scores
from rigl_jax.base import Criterion, PyTree
from rigl_jax.criteria.losses import Loss, at, signals


def grasp(loss: Loss) -> Criterion:
    """W (H g): how much of the squared gradient norm would go with a weight (Wang et al. 2020, eq. 8).

    One product of the Hessian with the gradient, by forward over reverse, about the cost of two gradients. The score
    has a sign, and magnitudes play no part.

    Args:
      loss: `(params, batch) -> scalar`, twice differentiable. The authors divide the logits by T = 200.

    >>> import jax.numpy as jnp
    >>> grasp(lambda p, batch: (p["w"] ** 3).sum() / 3)({"w": jnp.array([2.0])}, None)["w"].tolist()  # 2 w^4
    [32.0]
    """
    checks.functions("grasp", loss=loss)
    value = at("grasp", loss)

    def criterion(params: PyTree, batch: Any) -> PyTree:
        return scores.gradient_flow(lambda p: value(p, batch))(signals(params, None))

    return criterion
