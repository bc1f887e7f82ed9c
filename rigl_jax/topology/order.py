"""The order in which XLA computes, where it decides how much memory a program takes."""

from __future__ import annotations

import jax
import jax.numpy as jnp

from rigl_jax import trees
from rigl_jax.base import Array, PyTree
from rigl_jax.topology.topk import one_cpu


def after(done: Array | None, *given: PyTree) -> tuple[PyTree, ...]:
    """What is given, as it is; but XLA can compute what follows from it only when `done` is known.

    XLA on a CPU orders operations for concurrency: all leaves of a network at once, with the memory of all. It removes
    an `optimization_barrier` before it does so. A condition that is always True, which it does not know, holds. Nothing
    is done elsewhere: outside of jit, on other backends, and on several devices, which would exchange the condition.

    >>> [x.tolist() for x in after(jnp.ones(3), jnp.arange(2))]
    [[0, 1]]
    """
    if not one_cpu() or not isinstance(done, jax.core.Tracer) or done.size == 0 or trees.explicit_sharding(done):
        return given
    one = done[(slice(0, 1),) * done.ndim]
    known = jnp.sum(one, dtype=jnp.int32) >= 0

    def held(x: Array) -> Array:
        if jnp.issubdtype(x.dtype, jax.dtypes.prng_key):
            return jax.random.wrap_key_data(held(jax.random.key_data(x)), impl=jax.random.key_impl(x))
        return jnp.where(known, x, jnp.zeros((), x.dtype))

    return jax.tree.map(held, given)
