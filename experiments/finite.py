"""Losses, gradients and weights that are not finite: found on the device; such a batch is skipped where asked for.

Skipping selects the state before the step in place of the one after it. There is no branch, and the host learns of it
when the next line is written.
"""

from __future__ import annotations

import math
from typing import Any

import jax
import jax.numpy as jnp

from rigl_jax.base import Array, PyTree
from rigl_jax.transform import SparseState

STOP, SKIP = "stop", "skip"
CHOICES = (STOP, SKIP)
"""Values of `config.on_nonfinite`: stop the run with a diagnosis, or skip the batch and count it."""


def finite(tree: PyTree) -> Array:
    """Whether every number of the tree is finite, a bool scalar.

    >>> bool(finite({"a": jnp.ones(3), "b": jnp.array([jnp.nan])}))
    False
    """
    leaves = [x for x in jax.tree.leaves(tree) if jnp.issubdtype(x.dtype, jnp.inexact)]
    found = jnp.bool_(True)
    for leaf in leaves:
        found &= jnp.all(jnp.isfinite(leaf))
    return found


@jax.jit
def finite_state(state: Any) -> Array:
    """Whether weights, statistics, optimizer and totals of a `TrainState` are finite; a method's scores need not be."""
    opt_state = state.opt_state
    inner = opt_state.inner if isinstance(opt_state, SparseState) else opt_state
    return finite((state.params, state.batch_stats, inner, state.totals))


def check_finite(loss: float, step: int) -> None:
    """Checks a loss.

    Raises:
      FloatingPointError: it is NaN or infinite.
    """
    if not math.isfinite(loss):
        raise FloatingPointError(f"the loss is {loss} at step {step}")


def skip_nonfinite(good: Array, after: Any, before: Any, *, updates: bool) -> Any:
    """The state after a step if the step was good, else the one before it.

    Weights, running statistics, masks, optimizer state and what is known of examples then stay bit for bit as they
    were. Steps are counted, so that rewirings, random keys and data continue as after any other batch.

    Args:
      good: bool scalar, from `finite` of loss and gradients.
      after: the `TrainState` or `PackedState` after the step.
      before: the one before it.
      updates: whether the step updates weights; after a rewiring that does not, no update counts as missed.
    """

    def chosen(new: PyTree, old: PyTree) -> PyTree:
        return jax.tree.map(lambda a, b: jnp.where(good, a, b), new, old)

    opt_state = chosen(after.opt_state, before.opt_state)
    if isinstance(opt_state, SparseState):
        opt_state = opt_state._replace(step=after.opt_state.step)
    bad = jnp.where(good, jnp.float32(0), jnp.float32(1))
    totals = chosen(after.totals, before.totals)
    totals = totals | {"skipped": totals["skipped"] + bad, "missed": totals["missed"] + bad * updates}
    return after._replace(
        params=chosen(after.params, before.params),
        batch_stats=chosen(after.batch_stats, before.batch_stats),
        opt_state=opt_state,
        totals=totals,
        examples=chosen(after.examples, before.examples),
    )
