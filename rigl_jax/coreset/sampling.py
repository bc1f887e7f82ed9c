"""Samples with known chances: what is drawn is weighted by one over its chance, so that a mean stays unbiased."""

from __future__ import annotations

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from rigl_jax import arguments as rules
from rigl_jax import checks, contents, topology
from rigl_jax.arguments import arguments
from rigl_jax.base import Array
from rigl_jax.coreset.scores import fits, indices
from rigl_jax.messages import shown


@arguments(values=rules.not_nan(1), inclusion=rules.array(1), n=rules.whole(1))
def horvitz_thompson(values: Array, inclusion: Array, n: int) -> Array:
    """An unbiased estimate of the mean over n examples, `sum(values / inclusion) / n` (Horvitz & Thompson 1952).

    Args:
      values: float[k], of the examples that were drawn.
      inclusion: float[k], the chance that each of them had to be drawn, above 0 and at most 1. Every one of the n
        examples must have had a chance; what never could be drawn is missing from the estimate.
      n: all examples.

    Raises:
      ValueError: the shapes differ, or n is less than k; inclusion is not above 0 and at most 1, or a value is NaN
        (seen outside of jit only).

    >>> float(horvitz_thompson(jnp.array([3.0, 1.0]), jnp.array([1.0, 0.25]), 4))
    1.75
    """
    if values.shape != inclusion.shape:
        raise ValueError(
            f"horvitz_thompson: inclusion must have the shape of values, {values.shape}, got {shown(inclusion)}"
        )
    if n < len(values):
        raise ValueError(f"horvitz_thompson: n must be at least the number of values, {len(values)}, got {n}")
    contents.every("horvitz_thompson", "inclusion", "above 0 and at most 1", inclusion, lambda p: (p > 0) & (p <= 1))
    return jnp.sum(values / inclusion) / n


class Sampled(NamedTuple):
    """A sample.

    Attributes:
      index: int32[k], the examples, in ascending order.
      inclusion: f32[k], the chance that each of them had, for `horvitz_thompson`.
    """

    index: Array
    inclusion: Array


@arguments(
    key=rules.key,
    predicted=rules.finite(1),
    k=rules.whole(1),
    bins=rules.whole(1),
    alpha=rules.scalar,
    floor=rules.scalar,
)
def adaptive_bins(
    key: Array, predicted: Array, k: int, *, bins: int, alpha: float = 1.0, floor: float = 0.0
) -> Sampled:
    """Adaptive bin sampling (Henderson et al. 2023): high predictions more often, each example with a known chance.

    Examples are sorted by their prediction into bins of equal size. `rho = sigmoid(alpha (predicted - t))`, t being
    the k-th largest prediction. A bin gets a part of the k draws in proportion to its mean rho, at least one draw;
    within a bin all examples have the same chance. `alpha=0` samples all bins alike; a large alpha draws the highest
    predictions, and the estimate of the mean gets a large variance.

    From the abstract and introduction of the paper; its code is not public. How bins share out whole numbers is ours.

    Args:
      key: PRNG key.
      predicted: float[n], what the value of each example is expected to be.
      k: how many, at least one for each bin.
      bins: how many; their sizes differ by one at most.
      alpha: how greedy, at least 0, in units of one over those of `predicted`.
      floor: the least mean rho of a bin, from 0 to 1.

    Raises:
      ValueError: k is more than n, or less than bins; alpha or floor out of range; predicted is not
        finite (seen outside of jit only).

    >>> found = adaptive_bins(jax.random.key(0), jnp.arange(8.0), 4, bins=2, alpha=100.0)
    >>> found.index.tolist()[1:], found.inclusion.tolist()
    ([4, 5, 6], [0.25, 0.75, 0.75, 0.75])
    """
    fits("adaptive_bins", k, predicted.shape[0])
    if k < bins:
        raise ValueError(f"adaptive_bins: k must be at least the number of bins, {bins}, got {k}")
    if not isinstance(alpha, jax.core.Tracer):
        checks.number("adaptive_bins", "alpha", alpha, "must be at least 0", lambda x: x >= 0)
    if not isinstance(floor, jax.core.Tracer):
        checks.number("adaptive_bins", "floor", floor, "must be from 0 to 1", lambda x: 0 <= x <= 1)
    return _adaptive_bins(key, predicted, k, bins, jnp.asarray(alpha, jnp.float32), jnp.asarray(floor, jnp.float32))


@functools.partial(jax.jit, static_argnames=("k", "bins"))
def _adaptive_bins(key: Array, predicted: Array, k: int, bins: int, alpha: Array, floor: Array) -> Sampled:
    n, predicted = predicted.shape[0], predicted.astype(jnp.float32)
    threshold = jnp.sort(predicted)[n - k]
    rho = jax.nn.sigmoid(alpha * (predicted - threshold))
    of_rank = (np.arange(n, dtype=np.int64) * bins // n).astype(np.int32)  # on the host: n * bins may pass 2**31
    mine = jnp.zeros(n, jnp.int32).at[jnp.argsort(predicted, stable=True)].set(of_rank)
    size = jnp.bincount(mine, length=bins)
    share = jnp.maximum(jnp.bincount(mine, rho, length=bins) / size, floor) * size
    draws = 1 + topology.redistribute(k - bins, share, size - 1)
    order = jnp.lexsort((jax.random.uniform(key, (n,)), mine))
    place = jnp.arange(n) - (jnp.cumsum(size) - size)[mine[order]]
    index = indices(jnp.zeros(n, bool).at[order].set(place < draws[mine[order]]), k)
    return Sampled(index, (draws / size).astype(jnp.float32)[mine[index]])
