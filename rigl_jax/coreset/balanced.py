"""BASE (Emam et al. 2021): examples close to the decision boundary, the same number for each class."""

from __future__ import annotations

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from rigl_jax import arguments as rules
from rigl_jax import contents, topology
from rigl_jax.arguments import arguments
from rigl_jax.base import Array
from rigl_jax.coreset.scores import fits
from rigl_jax.linear_algebra import unit
from rigl_jax.messages import shown


@arguments(embeddings=rules.finite(2), kernel=rules.finite(2), bias=rules.finite(1))
def boundary_distance(embeddings: Array, kernel: Array, bias: Array) -> Array:
    """How far an embedding is from the boundary between its predicted class and every other one.

    `(z_p - z_c) / |w_p - w_c|`, p being the predicted class and z the logits. For the predicted class itself it is the
    smallest of the others, as in the authors' code.

    Args:
      embeddings: float[n, features], inputs of the last layer.
      kernel: float[features, classes].
      bias: float[classes].

    Returns:
      f32[n, classes]; inf for another class with the same weights.

    Raises:
      ValueError: shapes do not fit, or there is one class only; an array is empty, or not finite (seen outside of jit
        only).

    >>> boundary_distance(jnp.array([[3.0, 1.0]]), jnp.array([[0.0, 1.0], [0.0, 0.0]]), jnp.zeros(2)).tolist()
    [[3.0, 3.0]]
    """
    if kernel.shape[0] != embeddings.shape[1] or kernel.shape[1] < 2:
        raise ValueError(f"boundary_distance: kernel must be [{embeddings.shape[1]}, 2 or more], got {shown(kernel)}")
    if bias.shape != kernel.shape[1:]:
        raise ValueError(f"boundary_distance: bias must be [{kernel.shape[1]}], got {shown(bias)}")
    return _boundary_distance(embeddings, kernel, bias)


@jax.jit
def _boundary_distance(embeddings: Array, kernel: Array, bias: Array) -> Array:
    w, bias = kernel.astype(jnp.float32), bias.astype(jnp.float32)
    scale = unit([w, bias])  # distances stay as they are
    w, bias = w / scale, bias / scale
    logits = embeddings.astype(jnp.float32) @ w + bias[None]
    predicted = jnp.argmax(logits, axis=1)
    apart = jnp.sqrt(jnp.sum((w[:, :, None] - w[:, None]) ** 2, axis=0))[predicted]
    gap = jnp.max(logits, axis=1, keepdims=True) - logits
    distance = jnp.where(apart > 0, gap / jnp.where(apart > 0, apart, 1), jnp.inf)
    own = predicted[:, None] == jnp.arange(w.shape[1])[None]
    return jnp.where(own, jnp.min(distance, axis=1, keepdims=True), distance)


@arguments(distance=rules.array(2), k=rules.whole(1))
def balanced(distance: Array, k: int) -> Array:
    """The examples closest to each class, `k // classes` for each and one more for the first `k % classes`.

    Class 0 chooses first, then class 1 and so on; none chooses what was chosen before, so the result depends on the
    order of classes, as in the authors' code.

    Args:
      distance: float[n, classes], as of `boundary_distance`; NaN is farthest.
      k: how many.

    Returns:
      int32[k], class by class, ascending within a class. Ties go to the lower index.

    Raises:
      ValueError: k is more than n, or there is no class.

    >>> balanced(jnp.array([[0.1, 0.3], [0.2, 0.1], [0.9, 0.8], [0.5, 0.4]]), 3).tolist()
    [0, 1, 3]
    """
    contents.filled("balanced", "distance", distance)
    fits("balanced", k, distance.shape[0])
    return _balanced(distance, k)


@functools.partial(jax.jit, static_argnames="k")
def _balanced(distance: Array, k: int) -> Array:
    n, classes = distance.shape
    quota = jnp.asarray(k // classes + (np.arange(classes) < k % classes), jnp.int32)

    def choose(owner: Array, each: Any) -> Any:
        c, column, count = each
        return jnp.where(topology.select(-column, count, among=owner == classes), c, owner), None

    each = jnp.arange(classes, dtype=jnp.int32), distance.T.astype(jnp.float32), quota
    owner, _ = jax.lax.scan(choose, jnp.full(n, classes, jnp.int32), each)
    return jnp.argsort(owner, stable=True)[:k].astype(jnp.int32)
