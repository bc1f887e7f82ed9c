"""What criteria that differentiate a loss share."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from rigl_jax.base import Array, PyTree, Signals
from rigl_jax.messages import kind

Loss = Callable[[PyTree, Any], Array]
"""`(params, batch) -> scalar`, a real number."""


def at(who: str, loss: Loss) -> Loss:
    """The loss, which refuses to return anything but one real number."""

    def value(params: PyTree, batch: Any) -> Array:
        out = loss(params, batch)
        one = jax.tree.structure(out) == jax.tree.structure(0) and jnp.shape(out) == ()
        if not one or not jnp.issubdtype(jnp.result_type(out), jnp.floating):
            raise ValueError(f"{who}: loss must return one real number, got {kind(out)}")
        return out

    return value


def signals(params: PyTree, grads: PyTree) -> Signals:
    """What a score may read of a network and a gradient, outside of training: there is no step and no key."""
    return Signals(params, grads, 0, None)  # pyrefly: ignore[bad-argument-type]
