"""Sparse connectivity learning: gates trained through a step function, in the style of Tang et al. (2022)."""

from __future__ import annotations

import functools
from typing import Any

import jax
import jax.numpy as jnp

from rigl_jax import checks
from rigl_jax.base import Array, PyTree
from rigl_jax.messages import shown


@jax.custom_jvp
def _step(tau: Array) -> Array:
    """1 where tau >= 0; as a derivative 1 everywhere, also where the gate is closed, so that it can open again."""
    return (tau >= 0).astype(tau.dtype)


_step.defjvp(lambda primals, tangents: (_step(*primals), tangents[0]))


def step_gate(tau: Array, weights: Array) -> Array:
    """`weights` where tau >= 0, else 0; the gradient of tau is that of the product times the weight (SCL).

    That is the straight-through estimator "identity". Weights get gradients where their gate is open. Train tau beside
    the weights, with `count_open` times a number in the loss.

    The text of the paper was not at hand: the start of tau (small and positive), the strength of the penalty and the
    rate of tau are yours to choose.

    Args:
      tau: float[...], the gates' parameter, of the shape of the weights.
      weights: float[...].

    >>> step_gate(jnp.array([0.1, -0.1]), jnp.array([2.0, 3.0])).tolist()
    [2.0, 0.0]
    >>> jax.grad(lambda tau: step_gate(tau, jnp.array([2.0, 3.0])).sum())(jnp.array([0.1, -0.1])).tolist()
    [2.0, 3.0]
    """
    checks.same_shape("step_gate", jnp.shape(weights), weights=weights, tau=tau)
    return weights * _step(jnp.asarray(tau)).astype(jnp.result_type(weights))


def count_open(taus: PyTree) -> Array:
    """The number of open gates of a tree, f32 scalar, with a gradient of 1 for each gate: the penalty of SCL.

    >>> float(count_open({"a": jnp.array([0.5, -0.5]), "b": jnp.zeros(3)}))
    4.0
    """
    counts = [jnp.sum(_step(jnp.asarray(tau)), dtype=jnp.float32) for tau in jax.tree.leaves(taus)]
    return functools.reduce(jnp.add, counts, jnp.zeros((), jnp.float32))


def normalise_units(grads: Array, axes: int | tuple[int, ...]) -> Array:
    """The gradients of gates, of each output divided by their norm, so that no layer needs a rate of its own (SCL).

    Args:
      grads: float[...], of the loss without the penalty.
      axes: those of the inputs, over which the norm is taken: 0 for a dense kernel `[in, out]`.

    Returns:
      float[...]; 0 where the norm is 0.

    >>> normalise_units(jnp.array([[0.0, 0.0], [4.0, 0.0]]), 0).tolist()
    [[0.0, 0.0], [1.0, 0.0]]
    """
    given: Any = axes if isinstance(axes, tuple) else (axes,)
    rank = jnp.ndim(grads)
    if not all(isinstance(axis, int) and -rank <= axis < rank for axis in given):
        raise ValueError(f"normalise_units: axes must be axes of an array of {rank}, got {shown(axes)}")
    norm = jnp.sqrt(jnp.sum(jnp.square(grads), axis=given, keepdims=True))
    return grads / jnp.where(norm > 0, norm, 1)
