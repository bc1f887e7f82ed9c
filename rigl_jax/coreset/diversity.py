"""Examples that cover the data: sets chosen by the distances of embeddings."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from rigl_jax import arguments as rules
from rigl_jax import checks
from rigl_jax.arguments import arguments
from rigl_jax.base import Array
from rigl_jax.coreset.scores import fits
from rigl_jax.linear_algebra import unit
from rigl_jax.messages import shown

Far = Callable[[Array], Array]
"""`index of an example -> float[n]`, the squared distance of every example to it."""


@arguments(embeddings=rules.finite(2), k=rules.whole(1))
def k_center(embeddings: Array, k: int, *, labelled: Array | None = None) -> Array:
    """CoreSet (Sener & Savarese 2018), greedy: the example farthest from all that are labelled or chosen, k times.

    The largest distance to a chosen example is at most twice the least possible one (Gonzalez 1985).

    Args:
      embeddings: float[n, features], of any scale; NumPy's float64 is converted to float32.
      k: how many.
      labelled: bool[n], examples that have labels already. They are not chosen. None: there are none, and the first
        choice is example 0. (DISTIL's code fails there.)

    Returns:
      int32[k], in the order of choice. Ties go to the lower index.

    Raises:
      ValueError: fewer than k examples are left; embeddings are not finite (seen outside of jit only).

    >>> k_center(jnp.array([[0.0], [1.0], [9.0], [5.0]]), 3).tolist()
    [0, 2, 3]
    """
    n = embeddings.shape[0]
    if labelled is None:
        fits("k_center", k, n)
    else:
        checks.same_shape("k_center", (n,), labelled=labelled)
        if labelled.dtype != bool:
            raise ValueError(f"k_center: labelled must be bool[{n}], got {shown(labelled)}")
        if not isinstance(labelled, jax.core.Tracer):
            left = n - int(labelled.sum())
            if k > left:
                raise ValueError(f"k_center: k must be at most {left}, as many of {n} have no label, got {k}")
    return _k_center(embeddings, k, labelled)


@functools.partial(jax.jit, static_argnames="k")
def _k_center(embeddings: Array, k: int, labelled: Array | None) -> Array:
    n, far = embeddings.shape[0], _euclidean(embeddings)
    free, near = jnp.ones(n, bool), jnp.full(n, jnp.inf, jnp.float32)
    if labelled is not None:
        free = ~labelled
        measured = lambda i, d: jax.lax.cond(free[i], lambda: d, lambda: jnp.minimum(d, far(i)))  # noqa: E731
        near = jax.lax.fori_loop(0, n, measured, near)
    pick = lambda near, free, key: jnp.argmax(jnp.where(free, near, -1.0))  # noqa: E731
    return _chosen(far, pick, near, free, jnp.zeros((k, 0)))


def _euclidean(embeddings: Array) -> Far:
    x = _scaled(embeddings)
    return lambda i: jnp.sum((x - x[i][None]) ** 2, axis=1)


def _scaled(embeddings: Array) -> Array:
    """In units in which no square of a distance overflows; which examples are far or near stays."""
    x = jnp.asarray(embeddings, jnp.float32)
    return x / unit([x])


def _chosen(far: Far, pick: Callable[..., Array], near: Array, free: Array, keys: Array) -> Array:
    """One example after the other by `pick(near, free, key)`, near being squared distances to those chosen."""

    def step(carry: Any, key: Array) -> Any:
        near, free = carry
        i = pick(near, free, key)
        return (jnp.minimum(near, far(i)), free.at[i].set(False)), i.astype(jnp.int32)

    return jax.lax.scan(step, (near, free), keys)[1]


def _in_proportion(near: Array, free: Array, key: Array) -> Array:
    """Drawn in proportion to the squared distance; the lowest free index where all distances are 0."""
    drawn = jax.random.categorical(key, jnp.where(free, jnp.log(near), -jnp.inf))
    return jnp.where(jnp.any(free & (near > 0)), drawn, jnp.argmax(free))


def _plus_plus(key: Array, far: Far, n: int, first: Array, k: int) -> Array:
    free = jnp.ones(n, bool).at[first].set(False)
    rest = _chosen(far, _in_proportion, far(first), free, jax.random.split(key, k)[1:])
    return jnp.concatenate([first[None].astype(jnp.int32), rest])


@arguments(key=rules.key, embeddings=rules.finite(2), k=rules.whole(1))
def kmeans_pp(key: Array, embeddings: Array, k: int) -> Array:
    """k-means++ seeding (Arthur & Vassilvitskii 2007): each next example is drawn in proportion to its squared
    distance to the chosen ones, the first one uniformly.

    Args:
      key: PRNG key.
      embeddings: float[n, features], of any scale; NumPy's float64 is converted to float32.
      k: how many.

    Returns:
      int32[k], in the order of choice. Where only copies of chosen examples are left, the lowest index is next.

    Raises:
      ValueError: k is more than n; embeddings are not finite (seen outside of jit only).

    >>> sorted(kmeans_pp(jax.random.key(0), jnp.array([[0.0], [0.0], [9.0]]), 3).tolist())
    [0, 1, 2]
    """
    fits("kmeans_pp", k, embeddings.shape[0])
    return _kmeans_pp(key, embeddings, k)


@functools.partial(jax.jit, static_argnames="k")
def _kmeans_pp(key: Array, embeddings: Array, k: int) -> Array:
    n = embeddings.shape[0]
    key, first = jax.random.split(key)
    return _plus_plus(key, _euclidean(embeddings), n, jax.random.randint(first, (), 0, n), k)


@arguments(key=rules.key, probs=rules.probabilities(2), embeddings=rules.finite(2), k=rules.whole(1))
def badge(key: Array, probs: Array, embeddings: Array, k: int) -> Array:
    """BADGE (Ash et al. 2020): k-means++ on the gradients of the last layer for the predicted label.

    Such a gradient is `(p - onehot(argmax p))` times the embedding, an outer product of classes x features numbers. It
    is not built: `|a b' - c d'|^2 = |a|^2 |b|^2 + |c|^2 |d|^2 - 2 (a.c) (b.d)`. As in the authors' code the first
    example is that with the longest gradient.

    Args:
      key: PRNG key.
      probs: float[n, classes], probabilities.
      embeddings: float[n, features], the inputs of the last layer; computed in float32.
      k: how many.

    Returns:
      int32[k], in the order of choice, as `kmeans_pp`.

    Raises:
      ValueError: k is more than n; probs and embeddings of different numbers of examples; probs that are no
        probabilities, or embeddings that are not finite (seen outside of jit only).

    >>> probs, inputs = jnp.array([[1.0, 0.0], [0.6, 0.4], [0.9, 0.1]]), jnp.ones((3, 2))
    >>> badge(jax.random.key(0), probs, inputs, 1).tolist()
    [1]
    """
    n = embeddings.shape[0]
    fits("badge", k, n)
    if probs.shape[0] != n:
        raise ValueError(f"badge: probs must have a row for each of {n} embeddings, got {shown(probs)}")
    return _badge(key, probs, embeddings, k)


@functools.partial(jax.jit, static_argnames="k")
def _badge(key: Array, probs: Array, embeddings: Array, k: int) -> Array:
    p, h = jnp.asarray(probs, jnp.float32), _scaled(embeddings)
    a = p - jax.nn.one_hot(jnp.argmax(p, axis=1), p.shape[1], dtype=p.dtype)
    norms = jnp.sum(a**2, axis=1) * jnp.sum(h**2, axis=1)

    def far(i: Array) -> Array:
        return jnp.maximum(norms + norms[i] - 2 * (a @ a[i]) * (h @ h[i]), 0).at[i].set(0)

    return _plus_plus(key, far, p.shape[0], jnp.argmax(norms), k)


@arguments(key=rules.key, embeddings=rules.finite(2), k=rules.whole(1), iterations=rules.whole(1))
def k_means(key: Array, embeddings: Array, k: int, *, iterations: int = 10) -> Array:
    """The examples nearest to the centres of k clusters (Lloyd's algorithm after `kmeans_pp`), big clusters first.

    Representatives for a first set of labels (Roy & Etemad 2022 label those of self-supervised embeddings). Any first
    part of the result stands for most of the data, so labels can be given gradually; the paper found that this does
    not matter. In the style of the paper: which clustering its authors run is not known to us.

    Args:
      key: PRNG key.
      embeddings: float[n, features], of any scale; NumPy's float64 is converted to float32.
      k: how many.
      iterations: of Lloyd's algorithm. An empty cluster keeps its centre.

    Returns:
      int32[k], without repeats: each centre takes the nearest example that is free. Ties go to the lower index.

    Raises:
      ValueError: k is more than n; embeddings are not finite (seen outside of jit only).

    >>> k_means(jax.random.key(0), jnp.array([[0.0], [1.0], [2.0], [8.0], [9.0]]), 2).tolist()
    [1, 3]
    """
    fits("k_means", k, embeddings.shape[0])
    return _k_means(key, embeddings, k, iterations)


@functools.partial(jax.jit, static_argnames=("k", "iterations"))
def _k_means(key: Array, embeddings: Array, k: int, iterations: int) -> Array:
    x = _scaled(embeddings)

    def distances(centres: Array) -> Array:
        # One centre after the other: all differences at once are n x k x features numbers.
        return jax.lax.map(lambda centre: jnp.sum((x - centre[None]) ** 2, axis=1), centres).T

    def moved(_: Any, centres: Array) -> Array:
        mine = jax.nn.one_hot(jnp.argmin(distances(centres), axis=1), k, dtype=x.dtype)
        size = jnp.sum(mine, axis=0)[:, None]
        return jnp.where(size > 0, mine.T @ x / jnp.maximum(size, 1), centres)

    centres = jax.lax.fori_loop(0, iterations, moved, x[_kmeans_pp(key, x, k)])
    far = distances(centres)
    sizes = jnp.bincount(jnp.argmin(far, axis=1), length=k)

    def nearest(free: Array, centre: Array) -> Any:
        i = jnp.argmin(jnp.where(free, far[:, centre], jnp.inf))
        return free.at[i].set(False), i.astype(jnp.int32)

    return jax.lax.scan(nearest, jnp.ones(x.shape[0], bool), jnp.argsort(-sizes, stable=True))[1]
