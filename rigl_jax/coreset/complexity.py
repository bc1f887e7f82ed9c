"""Complexity-gap scores (Ki et al. 2023): what one example adds to the complexity of the labels, before training."""

from __future__ import annotations

from typing import Any

import jax
import numpy as np

from rigl_jax import arguments as rules
from rigl_jax import checks, contents
from rigl_jax.arguments import arguments
from rigl_jax.base import Array
from rigl_jax.messages import shown


@arguments(x=rules.host_array(), y=rules.host_array(1))
def complexity_gap(x: Any, y: Any, *, jitter: float = 1e-6) -> np.ndarray:
    """How much `y' H^-1 y` falls if an example is left out. High for atypical or wrongly labelled examples.

    H is the kernel of a wide ReLU layer on inputs of unit length, `H_ij = t (pi - arccos t) / (2 pi)`, t being the
    product of two inputs, and `H_ii = 1/2`. The authors invert H once more for each example; in closed form the gap is
    `(H^-1 y)_i^2 / (H^-1)_ii`, one inversion for all, O(n^3). Computed by NumPy in float64, as float32 does not
    suffice for the inverse.

    Args:
      x: float[n, ...], raw inputs; flattened and scaled to unit length. Of length 0: refused.
      y: [n] of -1 and 1.
      jitter: added to the diagonal, above 0, so that equal inputs have an inverse; the authors add none.

    Returns:
      float64[n], at least 0.

    Raises:
      ValueError: shapes or labels that do not fit, an input that is 0 or not finite.

    >>> x = np.array([[1.0, 0.0], [0.9, 0.1], [0.9, -0.1], [0.0, 1.0]])
    >>> int(complexity_gap(x, np.array([1, -1, 1, -1])).argmax())  # the second lies among inputs of the other label
    1
    """
    if x.ndim < 2 or not x.size:
        raise ValueError(f"complexity_gap: x must be [n, ...], got {shown(x)}")
    if y.shape != x.shape[:1]:
        raise ValueError(f"complexity_gap: y must be -1 or 1 for each of {x.shape[0]} examples, got {shown(y)}")
    contents.every("complexity_gap", "y", "-1 or 1", y, lambda y: np.isin(y, (-1, 1)))
    jitter = checks.number("complexity_gap", "jitter", jitter, "must be above 0", lambda value: value > 0)
    flat = np.asarray(x, np.float64).reshape(len(x), -1)
    largest = np.abs(flat).max(axis=1, keepdims=True, initial=0)
    flat = flat / np.where((largest > 0) & np.isfinite(largest), largest, 1)  # no square over- or underflows
    length = np.linalg.norm(flat, axis=1, keepdims=True)
    contents.every(
        "complexity_gap", "the length of x", "finite and above 0", length[:, 0], lambda a: (a > 0) & (a < np.inf)
    )
    t = np.clip((flat / length) @ (flat / length).T, -1, 1)
    kernel = t * (np.pi - np.arccos(t)) / (2 * np.pi)
    np.fill_diagonal(kernel, 0.5 + jitter)
    inverse = np.linalg.inv(kernel)
    return (inverse @ np.asarray(y, np.float64)) ** 2 / np.diagonal(inverse)


@arguments(x=rules.host_array(), labels=rules.host_array(1), key=rules.key, repeats=rules.whole(1))
def complexity_gap_per_class(x: Any, labels: Any, key: Array, *, repeats: int = 1, jitter: float = 1e-6) -> np.ndarray:
    """`complexity_gap` for several classes: each class against as many examples drawn from all others, averaged.

    The scores of different classes are not comparable: the authors prune each class alone. They keep the number of
    steps, so their pruning saves no training time.

    Args:
      x: float[n, ...].
      labels: int[n], of two classes or more.
      key: PRNG key for the examples of other classes, drawn without repeats; all of them where they are fewer.
      repeats: draws to average over.
      jitter: of `complexity_gap`.

    Returns:
      float64[n].

    Raises:
      ValueError: labels that do not fit, or of one class.

    >>> x = np.random.default_rng(0).normal(size=(8, 3))
    >>> complexity_gap_per_class(x, np.arange(8) % 2, jax.random.key(0)).shape
    (8,)
    """
    if x.ndim < 2:
        raise ValueError(f"complexity_gap_per_class: x must be [n, ...], got {shown(x)}")
    contents.labels("complexity_gap_per_class", labels, len(x))
    if len(found := np.unique(labels)) < 2:
        raise ValueError(
            f"complexity_gap_per_class: labels must be of two classes or more, got {shown(found.tolist())}"
        )
    random = np.random.default_rng(np.asarray(jax.random.key_data(key)).ravel())
    scores = np.zeros(len(x))
    for own in np.unique(labels):
        mine, others = np.flatnonzero(labels == own), np.flatnonzero(labels != own)
        for _ in range(repeats):
            drawn = random.choice(others, min(len(mine), len(others)), replace=False)
            y = np.concatenate([np.ones(len(mine)), -np.ones(len(drawn))])
            both = x[np.concatenate([mine, drawn])]
            scores[mine] += complexity_gap(both, y, jitter=jitter)[: len(mine)] / repeats
    return scores
