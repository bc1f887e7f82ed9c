"""Either of two functions, in a compiled program on a CPU without a copy of what they change."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from rigl_jax import trees
from rigl_jax.base import Array, PyTree


def either(
    which: Any, one: Callable[..., PyTree], other: Callable[..., PyTree], changed: PyTree, read: PyTree
) -> PyTree:
    """`one(changed, read)` where `which`, else `other(changed, read)`.

    On a CPU this is two loops of at most one round each, because XLA changes in place what a loop carries: so a donated
    array is never copied, while the branches of `lax.cond` write to arrays of their own. Elsewhere it is `lax.cond`,
    and so are derivatives, for a loop has none in reverse.

    Args:
      which: bool scalar, may be traced.
      one: a pure function; it gives what replaces `changed`, of the same types.
      other: the same.
      changed: tree of arrays.
      read: tree of arrays that neither function changes.

    >>> double = jax.jit(lambda which, x: either(which, lambda x, by: x * by, lambda x, by: x, x, 2.0))
    >>> double(True, 3.0).item(), double(False, 3.0).item()
    (6.0, 3.0)
    """
    which = jnp.asarray(which).astype(bool)
    conditional = functools.partial(lax.cond, which, one, other)
    explicit = [x for x in jax.tree.leaves(changed) if trees.explicit_sharding(x) is not None]
    if jax.default_backend() != "cpu" or explicit:  # a sharding is then part of a type, and may change
        return conditional(changed, read)

    @jax.custom_jvp
    def loops(changed: PyTree, read: PyTree) -> PyTree:
        return _once(~which, other, _once(which, one, changed, read), read)

    loops.defjvp(lambda given, tangents: jax.jvp(conditional, given, tangents))
    return loops(changed, read)


def _once(which: Array, function: Callable[..., PyTree], changed: PyTree, read: PyTree) -> PyTree:
    """`function(changed, read)` where `which`, else `changed`."""

    def body(carried: tuple[Array, PyTree]) -> tuple[Array, PyTree]:
        # Nothing in the round may be known before it: XLA would compute that in front of the loop, on every step.
        _, changed, known = lax.optimization_barrier((*carried, read))
        return jnp.zeros_like(which), function(changed, known)

    return lax.while_loop(lambda carried: carried[0], body, (which, changed))[1]
