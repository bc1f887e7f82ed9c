"""Criteria from the gradient of a loss."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from rigl_jax import checks, scores
from rigl_jax.base import Array, Criterion, PyTree
from rigl_jax.criteria.losses import Loss, at, one_leaf, signals
from rigl_jax.messages import shown


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


def singe(loss: Loss, steps: int = 20, mu: float | None = 0.95, *, signed: bool = False) -> Criterion:
    """The gradient along the path on which a leaf is scaled to 0 (after SInGE, Yvinec et al. 2022).

    With the factors a_s = mu^s, s = 0..steps, and the leaf W scaled by a, a weight w of it scores

        sum_s (a_s - a_{s+1}) |w g(a)|, a = (a_s + a_{s+1}) / 2, with a_{steps+1} = 0.

    One leaf is scaled at a time, so that a call takes steps + 1 gradients for each leaf. `taylor` and `snip` see the
    loss only next to the trained weights; here it is followed until the leaf is gone.

    The text of the paper and its code were not at hand: this is in its style. Its grid, number of steps and norm are
    not known; the widths of the intervals, the midpoints and the last interval are ours. They make the signed sum over
    a leaf exact for a quadratic loss.

    Args:
      loss: `(params, batch) -> scalar`.
      steps: how many intervals there are before the last one, which ends at 0.
      mu: ratio of the grid, in (0, 1). None: a uniform grid, a_s = 1 - s / (steps + 1).
      signed: True: -w g in place of |w g|. The sum over a leaf is then the rise of the loss if all of it is removed, up
        to O(1 / steps^2) on a uniform grid, and no single weight is worth its own score alone.

    >>> import jax.numpy as jnp
    >>> scores = singe(lambda p, batch: (p["w"] ** 2).sum(), signed=True)({"w": jnp.array([1.0, -3.0])}, None)
    >>> [round(x, 4) for x in scores["w"].tolist()]  # the loss falls by w^2
    [-1.0, -9.0]
    """
    checks.functions("singe", loss=loss)
    if not checks.is_whole(steps):
        raise ValueError(f"singe: steps must be a whole number, at least 0, got {shown(steps)}")
    if mu is not None:
        mu = checks.number("singe", "mu", mu, "must be between 0 and 1", lambda x: 0 < x < 1)
    value = at("singe", loss)
    edges = np.arange(1, -1, -1 / (steps + 1))[: steps + 1] if mu is None else mu ** np.arange(steps + 1)
    edges = np.append(edges, 0.0)
    sign = (lambda x: -x) if signed else jnp.abs

    def along(value: Any, w: Array) -> Array:
        def step(total: Array, path: tuple[Array, Array]) -> tuple[Array, None]:
            at, width = path
            return total + width * sign(w * jax.grad(value)(at * w)), None

        middles, widths = (edges[:-1] + edges[1:]) / 2, edges[:-1] - edges[1:]
        path = jnp.asarray(middles, w.dtype), jnp.asarray(widths, w.dtype)
        return lax.scan(step, jnp.zeros_like(w), path)[0]

    return one_leaf(value, along)
