"""Growth scores from more than one batch."""

from __future__ import annotations

import functools
import operator
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from rigl_jax import checks
from rigl_jax.base import Algorithm, Array, Masks, PyTree, Rewired, Signals
from rigl_jax.messages import shown


class AccumulatedState(NamedTuple):
    """The state of an algorithm that decides by a mean gradient.

    Attributes:
      algorithm: the inner algorithm's state.
      total: sum of the gradients seen in the window, float32, for sparse leaves; None elsewhere.
      seen: int32 scalar, how many gradients that is.
    """

    algorithm: Any
    total: PyTree
    seen: Array

    @property
    def masks(self) -> Masks:
        """The inner algorithm's masks."""
        return self.algorithm.masks


def accumulate_growth(algorithm: Algorithm, n: int) -> Algorithm:
    """The algorithm, deciding by the mean dense gradient of the last `n` steps instead of that of one.

    On a step that is due, `signals.grads` of sparse leaves is the mean of the dense gradients of that step and of the
    n - 1 before it, or of those since the last rewiring or the beginning where they are fewer. |mean| decides, not the
    mean of |.| as in rigl-torch and SRigL: that is another criterion, and differs between one device and many.
    Gradients are those passed to `update`; each was computed at the weights of its own step.

    This is how an algorithm meets `optax.MultiSteps`, whose `k` calls make one weight update. `sparsify` counts calls,
    so to rewire after every 100th weight update by the gradient that this update was made of::

        inner = optax.MultiSteps(optimizer, k)
        algorithm = accumulate_growth(rigl(plan, period=100 * k, start=k - 1, skip_step=False), k)
        tx = sparsify(inner, algorithm, key=key)

    With `skip_step=True` the call that rewires gives its gradient to growth alone, and the weight update comes a call
    later.

    Costs one more float32 array of the size of the sparse weights, and (n - 1) more dense gradients a rewiring.

    Args:
      algorithm: one that reads gradients when it is due, such as `rigl` or `snip`.
      n: how many steps, at least 1. More than the period: all since the last rewiring.

    >>> import rigl_jax as rx
    >>> plan = rx.make_plan({"w": jnp.zeros((4, 4))}, 0.5)
    >>> algorithm = accumulate_growth(rx.rigl(plan, period=100), 3)
    >>> [step for step in range(150) if algorithm.dense_grads(step)]
    [0, 98, 99, 100]
    """
    checks.algorithm("accumulate_growth", algorithm)
    if not checks.is_whole(n, 1):
        raise ValueError(f"accumulate_growth: n must be a whole number of steps, at least 1, got {shown(n)}")
    n = int(n)

    def window(step: Any) -> Any:
        return functools.reduce(operator.or_, [algorithm.due(step + i) for i in range(n)])

    def init(key: Array, params: PyTree) -> AccumulatedState:
        return _empty(algorithm.init(key, params))

    def observe(state: AccumulatedState, signals: Signals) -> AccumulatedState:
        checks.algorithm_state("accumulate_growth", algorithm, state.algorithm)
        in_window = window(signals.step)

        def add(g: Array, total: Array | None) -> Array | None:
            return None if total is None else jnp.where(in_window, total + g.astype(jnp.float32), 0.0)

        total = jax.tree.map(add, signals.grads, state.total)
        seen = jnp.where(in_window, state.seen + 1, 0)
        return AccumulatedState(algorithm.observe(state.algorithm, signals), total, seen)

    def update(state: AccumulatedState, signals: Signals) -> Rewired:
        def mean(g: Array, total: Array | None) -> Array:  # a rewiring that is forced outside of a window has seen none
            return (
                g
                if total is None
                else jnp.where(state.seen > 0, total / jnp.maximum(state.seen, 1).astype(jnp.float32), g)
            )

        averaged = signals._replace(grads=jax.tree.map(mean, signals.grads, state.total))
        result = algorithm.update(state.algorithm, averaged)
        return result._replace(state=_empty(result.state))

    return algorithm._replace(
        init=init,
        update=update,
        observe=observe,
        state=AccumulatedState,
        dense_grads=lambda step: algorithm.dense_grads(step) | window(step),
        stored=lambda state: algorithm.stored(state.algorithm),
        trained=lambda state: algorithm.trained(state.algorithm),
        active_only=False,  # it looks at dense gradients before a rewiring is due
    )


def _empty(state: Any) -> AccumulatedState:
    zeros = jax.tree.map(lambda mask: jnp.zeros(mask.shape, jnp.float32), state.masks)
    return AccumulatedState(state, zeros, jnp.zeros((), jnp.int32))
