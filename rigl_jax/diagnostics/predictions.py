"""How good and how calibrated predicted probabilities are.

Logits are refused where probabilities are meant, and so are labels that are no class: outside of jit, where values are
known.
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp

from rigl_jax import arguments as rules
from rigl_jax import contents
from rigl_jax.arguments import arguments
from rigl_jax.base import Array
from rigl_jax.messages import shown


@arguments(probs=rules.probabilities(2, host=True), labels=rules.array(1, host=True))
def nll(probs: Any, labels: Any) -> Array:
    """Negative log-likelihood, `mean(-log probs[i, labels[i]])`, in nats; inf where a true class got probability 0.

    Args:
      probs: float[n, classes], probabilities, not logits.
      labels: int[n].

    Raises:
      ValueError: probs are no probabilities, or a label is no class (seen outside of jit only); shapes do not fit;
        there is no example, or one class only.

    >>> round(float(nll([[0.5, 0.5], [0.25, 0.75]], [0, 1])), 6)
    0.490415
    """
    probs, labels = _checked("nll", probs, labels)
    return -jnp.mean(jnp.log(_of_labels(probs, labels)))


@arguments(probs=rules.probabilities(2, host=True), labels=rules.array(1, host=True))
def brier(probs: Any, labels: Any) -> Array:
    """Brier score (1950): the mean squared distance of the probabilities to the one-hot label, from 0 to 2.

    Args:
      probs: float[n, classes], probabilities, not logits.
      labels: int[n].

    Raises:
      ValueError: probs are no probabilities, or a label is no class (seen outside of jit only); shapes do not fit;
        there is no example, or one class only.

    >>> float(brier([[0.5, 0.5], [0.0, 1.0]], [0, 1]))
    0.25
    """
    probs, labels = _checked("brier", probs, labels)
    return jnp.mean(jnp.sum((probs - jax.nn.one_hot(labels, probs.shape[1], dtype=probs.dtype)) ** 2, axis=1))


@arguments(probs=rules.probabilities(2, host=True), labels=rules.array(1, host=True), bins=rules.whole(1))
def ece(probs: Any, labels: Any, *, bins: int = 15) -> Array:
    """Expected calibration error (Guo et al. 2017): how far confidence and accuracy lie apart, bin by bin.

    The confidence of an example is its largest probability; bins `((b - 1) / bins, b / bins]` have equal width. Each
    bin counts by its examples; empty ones do not.

    Args:
      probs: float[n, classes], probabilities, not logits. The prediction is the first of equal maxima.
      labels: int[n].
      bins: how many.

    Raises:
      ValueError: probs are no probabilities, or a label is no class (seen outside of jit only); shapes do not fit;
        there is no example, or one class only.

    >>> round(float(ece([[0.9, 0.1], [0.9, 0.1], [0.4, 0.6]], [0, 1, 1])), 6)  # (|1 - 1.8| + |1 - 0.6|) / 3
    0.4
    """
    probs, labels = _checked("ece", probs, labels)
    confidence, right = jnp.max(probs, axis=1), jnp.argmax(probs, axis=1) == labels
    place = jnp.clip(jnp.ceil(confidence * bins).astype(jnp.int32) - 1, 0, bins - 1)
    gaps = jnp.zeros(bins, probs.dtype).at[place].add(right.astype(probs.dtype) - confidence)
    return jnp.sum(jnp.abs(gaps)) / probs.shape[0]


@arguments(a=rules.logits(2, host=True), b=rules.logits(2, host=True))
def disagreement(a: Any, b: Any) -> Array:
    """The share of examples for which two networks predict different classes (Fort et al. 2019).

    Args:
      a: float[n, classes], probabilities or logits of one network.
      b: float[n, classes], of the other on the same examples.

    Raises:
      ValueError: shapes do not fit; there is no example, or one class only; NaN (seen outside of jit only).

    >>> float(disagreement([[0.9, 0.1], [0.2, 0.8]], [[0.6, 0.4], [0.7, 0.3]]))
    0.5
    """
    a, b = jnp.asarray(a), jnp.asarray(b)
    if a.shape != b.shape:
        raise ValueError(f"disagreement: b must have the shape of a, {a.shape}, got {shown(b)}")
    return jnp.mean(jnp.argmax(a, axis=1) != jnp.argmax(b, axis=1), dtype=jnp.float32)


def _of_labels(probs: Array, labels: Array) -> Array:
    """NaN for a label that is no class, which is not seen under jit; -1 would be the last one."""
    at = jnp.where(labels >= 0, labels, probs.shape[1])
    return jnp.take_along_axis(probs, at[:, None], axis=1, mode="fill")[:, 0]


def _checked(who: str, probs: Any, labels: Any) -> tuple[Array, Array]:
    probs, labels = jnp.asarray(probs), jnp.asarray(labels)
    contents.labels(who, labels, *probs.shape)
    return probs.astype(jnp.promote_types(probs.dtype, jnp.float32)), labels
