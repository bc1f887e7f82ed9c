"""Weights of a few values, trained without gradients, in the style of CoNNTrA (Date et al. 2020).

Only the abstract of the paper was at hand: coordinate descent over ternary weights. The order of the visits, the rule
of acceptance and the start are not known; what is here is ours.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array, lax

from rigl_jax import arguments as rules
from rigl_jax.arguments import arguments


@arguments(loss=rules.function, w=rules.array(1), values=rules.array(1), order=rules.array(1))
def coordinate_sweep(loss: Callable[[Array], Array], w: Array, values: Array, order: Array) -> tuple[Array, Array]:
    """Visits weights one by one and gives each the value with the least loss, the others being held.

    A weight keeps its value unless another is strictly better, so that the loss never rises, and once a sweep over all
    weights changes nothing no change of a single weight can lower it. Of values that are equally good the first is
    taken. Each visit costs as many evaluations of the loss as there are values.

    Args:
      loss: `w -> scalar`, traced; for a tree of weights use `jax.flatten_util.ravel_pytree`.
      w: float[n], each one of `values`.
      values: float[k], such as (-1, 0, 1).
      order: int[m], the positions to visit.

    Returns:
      w and its loss.

    >>> loss = lambda w: jnp.sum((w - jnp.array([0.9, -0.2])) ** 2)
    >>> w, least = coordinate_sweep(loss, jnp.zeros(2), jnp.array([-1.0, 0.0, 1.0]), jnp.arange(2))
    >>> w.tolist(), round(float(least), 2)
    ([1.0, 0.0], 0.05)
    """

    def visit(i: Array, state: tuple[Array, Array]) -> tuple[Array, Array]:
        w, now = state
        losses = lax.map(lambda value: loss(w.at[order[i]].set(value)), values)
        best = jnp.argmin(losses)
        better = losses[best] < now
        return w.at[order[i]].set(jnp.where(better, values[best], w[order[i]])), jnp.where(better, losses[best], now)

    return lax.fori_loop(0, len(order), visit, (w, loss(w)))


def ternary(params: Any) -> Any:
    """Each weight as the nearest of (-s, 0, s) with s the mean magnitude of its array; arrays of 1 axis as they are.

    >>> ternary({"kernel": jnp.array([[1.0, -0.1], [0.9, -2.0]])})["kernel"].tolist()
    [[1.0, 0.0], [1.0, -1.0]]
    """

    def rounded(p: Array) -> Array:
        scale = jnp.mean(jnp.abs(p))
        return p if jnp.ndim(p) < 2 else jnp.sign(p) * scale * (jnp.abs(p) > scale / 2)

    return jax.tree.map(rounded, params)
