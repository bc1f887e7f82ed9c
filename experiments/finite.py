"""Batches whose loss or gradient is not finite: seen on the device, and left out where the config says so.

Leaving one out is a select between the state before and after the step, without a branch: the program is the same, and
the host learns of it at the next line.
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
"""What `config.on_nonfinite` may be: stop the run with a diagnosis, or leave the batch out and count it."""


def finite(tree: PyTree) -> Array:
    """Whether every number in the tree is finite, a bool scalar.

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
    """Stops a run whose loss is lost.

    Raises:
      FloatingPointError: the mean loss since the last line is nan or infinite.
    """
    if not math.isfinite(loss):
        raise FloatingPointError(f"the loss is {loss} at step {step}")


def left_out(good: Array, after: Any, before: Any, *, updates: bool) -> Any:
    """The state after a step, or, unless the step was good, that before it.

    Weights, running statistics, masks and the optimizer stay bit for bit as they were; only steps are counted, so that
    rewirings, random keys and data go on as if the batch had been an ordinary one.

    Args:
      good: bool scalar, from `finite` of loss and gradients.
      after: the `TrainState` after the step, masked or packed.
      before: that before it.
      updates: whether the step updates weights at all; a rewiring may not, and then no update was missed.
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
    )
