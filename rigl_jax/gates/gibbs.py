"""Gibbs pruning (Labach & Valaee 2020): masks drawn in every step, from a distribution that cools to the largest."""

from __future__ import annotations

import itertools
import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from rigl_jax import checks
from rigl_jax.arguments import flag
from rigl_jax.base import Array
from rigl_jax.messages import shown

MOST_SPINS = 12  # their 2^12 states are enumerated for each kernel


def gibbs(key: Array, weights: Array, sparsity: float, beta: Any) -> Array:
    """Single weights stay independently, with probability sigmoid(beta (w^2 - Q)); Q is a quantile of w^2.

    Draw new masks in every step, `kernel * lax.stop_gradient(gibbs(...))`, and raise beta: the authors go from 1 to
    10,000 on a logarithmic scale over 128 of 200 epochs. At beta = 0 half of the weights stay, whatever the sparsity;
    for large beta it is magnitude pruning to the sparsity. After training prune to exact counts by `rx.prune`.

    Args:
      key: PRNG key.
      weights: float[...].
      sparsity: the quantile, in [0, 1], with linear interpolation.
      beta: the inverse temperature, at least 0; may be traced.

    Returns:
      bool[...]. No gradient goes through it.

    >>> gibbs(jax.random.key(0), jnp.array([0.1, 1.0, 2.0, 3.0]), 0.5, 1e6).tolist()
    [False, False, True, True]
    """
    key, sparsity = _checked("gibbs", key, sparsity)
    squares = _squares(weights)
    chance = jax.nn.sigmoid(beta * (squares - jnp.quantile(squares, sparsity)))
    return jax.random.uniform(key, squares.shape, squares.dtype) < chance


def gibbs_kernels(
    key: Array, weights: Array, sparsity: float, beta: Any, window: tuple[int, ...], coupling: float = 0.01
) -> Array:
    """The weights of a kernel of a convolution draw each other: they tend to stay or go together.

    For spins x of +1 (stays) and -1, p(x) ~ exp(-beta H), H = sum_i (Q - w_i^2) x_i - coupling sum_{i != j} x_i x_j,
    with Q a quantile of the kernels' mean w^2. All states of a kernel are enumerated. Without coupling a weight stays
    with probability sigmoid(2 beta (w^2 - Q)): twice the slope of `gibbs`.

    Args:
      key: PRNG key.
      weights: float[...], of a convolution.
      sparsity: the quantile, in [0, 1].
      beta: see `gibbs`; the authors raise it from 1 to 10,000.
      window: the spatial axes, of at most 12 weights in all.
      coupling: at least 0; the authors' 0.01.

    >>> weights = jnp.stack([jnp.full((3, 3), 0.1), jnp.full((3, 3), 1.0)], -1)
    >>> gibbs_kernels(jax.random.key(0), weights, 0.5, 1e4, (0, 1)).sum((0, 1)).tolist()
    [0, 9]
    """
    key, sparsity = _checked("gibbs_kernels", key, sparsity)
    squares = _squares(weights)
    last = tuple(range(-len(window), 0))
    moved = jnp.moveaxis(squares, window, last)
    n = math.prod(moved.shape[axis] for axis in last)
    if n > MOST_SPINS:
        raise ValueError(f"gibbs_kernels: window must be of at most {MOST_SPINS} weights, got {n}")
    kernels = moved.reshape(-1, n)
    threshold = jnp.quantile(jnp.mean(kernels, -1), sparsity)
    states = np.array(list(itertools.product((1, -1), repeat=n)))
    pairs = coupling * (states.sum(-1) ** 2 - n)
    logits = -beta * ((threshold - kernels) @ states.T.astype(squares.dtype) - jnp.asarray(pairs, squares.dtype)[None])
    drawn = jax.random.categorical(key, logits, axis=-1)
    return jnp.moveaxis(jnp.asarray(states > 0)[drawn].reshape(moved.shape), last, window)


def gibbs_units(
    key: Array,
    weights: Array,
    sparsity: float,
    beta: Any,
    axis: int = -1,
    coupling: float = 1.0,
    sweeps: int = 50,
    *,
    reference: bool = False,
) -> Array:
    """Whole channels draw each other, with the energy of `gibbs_kernels` on the mean w^2 of a channel.

    Drawn by Gibbs sampling: from a random start, in each sweep every channel in turn from its distribution given all
    others, sigmoid(2 beta (w^2 - Q + 2 coupling sum of the others)). The authors' code draws two halves of the channels
    in turn, each by sigmoid(beta (w^2 - Q + coupling sum of the other half)). That leaves out the channels of the same
    half and factors of 2, so its samples are not of this distribution; `reference=True` draws them. They raise beta
    from 10^-2.5 to 1 for channels.

    Args:
      key: PRNG key.
      weights: float[...].
      sparsity: the quantile of the channels' mean w^2, in [0, 1].
      beta: see `gibbs`.
      axis: along which the channels lie.
      coupling: the authors' 1.
      sweeps: how often every channel is drawn, at least 1; the authors' 50.
      reference: draw as the authors' code does.

    Returns:
      bool, of the shape of the weights with all other axes 1: multiply by it.

    >>> gibbs_units(jax.random.key(0), jnp.array([[0.1, 1.0, 2.0]]), 0.3, 1e4, coupling=0.0).tolist()
    [[False, True, True]]
    """
    key, sparsity = _checked("gibbs_units", key, sparsity)
    if not checks.is_whole(sweeps, 1):
        raise ValueError(f"gibbs_units: sweeps must be a whole number, at least 1, got {shown(sweeps)}")
    squares = _squares(weights)
    kept = axis % squares.ndim
    mean = jnp.mean(squares, tuple(a for a in range(squares.ndim) if a != kept))
    field = jnp.quantile(mean, sparsity) - mean
    start, draws = jax.random.split(key)
    spins = jnp.where(jax.random.bernoulli(start, np.float32(0.5), mean.shape), 1, -1).astype(mean.dtype)
    uniform = jax.random.uniform(draws, (sweeps, mean.size), mean.dtype)
    draw = _by_halves if flag("gibbs_units", "reference", reference) else _one_by_one
    spins = draw(spins, uniform, beta, field, coupling)
    return jnp.expand_dims(spins > 0, tuple(a for a in range(squares.ndim) if a != kept))


def _one_by_one(spins: Array, uniform: Array, beta: Any, field: Array, coupling: float) -> Array:
    """Each spin from its distribution given all others, `uniform` [sweeps, spins]."""
    n = spins.size

    def one(k: Array, spins: Array) -> Array:
        i = k % n
        others = jnp.sum(spins) - spins[i]
        stays = uniform.reshape(-1)[k] < jax.nn.sigmoid(-2 * beta * (field[i] - 2 * coupling * others))
        return spins.at[i].set(jnp.where(stays, 1, -1).astype(spins.dtype))

    return lax.fori_loop(0, uniform.size, one, spins)


def _by_halves(spins: Array, uniform: Array, beta: Any, field: Array, coupling: float) -> Array:
    """The authors' sampler: the first half given the sum of the second, then the second given that of the first."""
    first = jnp.arange(spins.size) < spins.size // 2

    def sweep(k: Array, spins: Array) -> Array:
        for half in (first, ~first):
            chance = jax.nn.sigmoid(-beta * (field - coupling * jnp.sum(jnp.where(half, 0, spins))))
            spins = jnp.where(half, jnp.where(uniform[k] < chance, 1, -1).astype(spins.dtype), spins)
        return spins

    return lax.fori_loop(0, len(uniform), sweep, spins)


def _checked(who: str, key: Array, sparsity: float) -> tuple[Array, float]:
    sparsity = checks.number(who, "sparsity", sparsity, "must be from 0 to 1", lambda x: 0 <= x <= 1)
    return checks.key(who, key), sparsity


def _squares(weights: Array) -> Array:
    """w^2 in at least float32, without a gradient."""
    wide = jnp.asarray(weights).astype(jnp.promote_types(jnp.result_type(weights), jnp.float32))
    return lax.stop_gradient(jnp.square(wide))
