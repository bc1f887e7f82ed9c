"""What a fresh weight starts from. Zero, the default, needs nothing here and was best in the paper (appendix).

Each is a function `Signals -> tree of values`, read at fresh positions only; pass it as `grow_values`. With a value
other than zero the network's output jumps at a rewiring. Formulas as in the authors' code (`get_grow_tensor`).
"""

from __future__ import annotations

from collections.abc import Callable

import jax
import jax.numpy as jnp

from rigl_jax import trees
from rigl_jax.base import Array, PyTree, Score, Signals


def scaled_gradient(scale: float) -> Score:
    """A multiple of g: a step up the gradient for a positive scale, down for a negative one."""
    return lambda signals: jax.tree.map(lambda g: scale * g, signals.grads)


def gradient_sign(scale: float) -> Score:
    """A multiple of sign(g)."""
    return lambda signals: jax.tree.map(lambda g: scale * jnp.sign(g), signals.grads)


def normal(scale: float) -> Score:
    """Normal with scale times the standard deviation of the leaf, zeros included."""

    def draw(key: Array, p: Array) -> Array:
        out = trees.explicit_sharding(p)
        return scale * jnp.std(p) * jax.random.normal(key, p.shape, p.dtype, out_sharding=out)

    return lambda signals: _drawn(draw, signals)


def uniform(scale: float) -> Score:
    """Uniform within plus and minus scale times the mean |w| of the leaf, zeros included."""

    def draw(key: Array, p: Array) -> Array:
        out = trees.explicit_sharding(p)
        return scale * jnp.mean(jnp.abs(p)) * jax.random.uniform(key, p.shape, p.dtype, -1, 1, out_sharding=out)

    return lambda signals: _drawn(draw, signals)


def shuffled(initial: PyTree, scale: float) -> Score:
    """The leaf's initial values in random order, times scale. `initial` is the tree of params before training.

    Any weight may go anywhere, so this alone in the library gathers a weight that is sharded over devices.
    """

    def values(signals: Signals) -> PyTree:
        return jax.tree.map(
            lambda name, p: scale * jax.random.permutation(_key(signals, name), p.reshape(-1)).reshape(p.shape),
            trees.names(initial),
            initial,
        )

    return values


def _drawn(draw: Callable[[Array, Array], Array], signals: Signals) -> PyTree:
    names = trees.names(signals.params)
    return jax.tree.map(lambda name, p: draw(_key(signals, name), p), names, signals.params)


def _key(signals: Signals, name: str) -> Array:
    return trees.leaf_key(signals.key, f"value:{name}")  # not the draw that random scores make of the same key
