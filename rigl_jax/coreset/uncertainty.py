"""How unsure predicted probabilities are: scores for active learning. High means unsure, to be labelled first.

Formulas are those of DISTIL (Beck et al. 2021) and DeepAL+ (Zhan et al. 2022). A probability of 0 adds 0 to an entropy;
in both of their codes it gives NaN.

All take probabilities, not logits. Outside of jit rows that do not add up to 1, negative numbers and NaN are refused;
an empty array and fewer than two classes are always.
"""

from __future__ import annotations

import jax.numpy as jnp
from jax.scipy.special import xlogy

from rigl_jax import arguments as rules
from rigl_jax.arguments import arguments
from rigl_jax.base import Array


def _entropy(probs: Array) -> Array:
    return -jnp.sum(xlogy(probs, probs), axis=-1)


@arguments(probs=rules.probabilities(2))
def entropy(probs: Array) -> Array:
    """Entropy of the prediction, in nats (Shannon 1948).

    Args:
      probs: float[n, classes], probabilities.

    Returns:
      float[n], from 0 to log(classes).

    Raises:
      ValueError: probs are no probabilities (seen outside of jit only), empty, or of one class.

    >>> [round(float(x), 4) for x in entropy(jnp.array([[1.0, 0.0], [0.5, 0.5]]))]
    [0.0, 0.6931]
    """
    return jnp.abs(_entropy(probs))  # not -0


@arguments(probs=rules.probabilities(2))
def margin(probs: Array) -> Array:
    """Minus the distance of the two largest probabilities (Scheffer et al. 2001); 0 where two classes tie.

    Args:
      probs: float[n, classes], probabilities.

    Returns:
      float[n], from -1 to 0.

    Raises:
      ValueError: probs are no probabilities (seen outside of jit only), empty, or of one class.

    >>> margin(jnp.array([[0.75, 0.25, 0.0], [0.4, 0.4, 0.2]])).tolist()
    [-0.5, 0.0]
    """
    ordered = jnp.sort(probs, axis=1)
    return ordered[:, -2] - ordered[:, -1]


@arguments(probs=rules.probabilities(2))
def least_confidence(probs: Array) -> Array:
    """One minus the largest probability (Lewis & Gale 1994). DeepAL+ calls it VarRatio.

    Args:
      probs: float[n, classes], probabilities.

    Returns:
      float[n], from 0 to 1 - 1 / classes.

    Raises:
      ValueError: probs are no probabilities (seen outside of jit only), empty, or of one class.

    >>> least_confidence(jnp.array([[0.75, 0.25], [0.5, 0.5]])).tolist()
    [0.25, 0.5]
    """
    return 1 - jnp.max(probs, axis=1)


@arguments(probs=rules.probabilities(3))
def bald(probs: Array) -> Array:
    """BALD (Houlsby et al. 2011): the mutual information of prediction and model, `H(mean p) - mean H(p)`, in nats.

    Args:
      probs: float[members, n, classes], probabilities of several networks, or of one with several draws of dropout
        (DISTIL: 10).

    Returns:
      float[n], 0 where all members agree.

    Raises:
      ValueError: probs are no probabilities (seen outside of jit only), empty, or of one class.

    >>> [round(float(x), 4) for x in bald(jnp.array([[[1.0, 0.0], [0.5, 0.5]], [[0.0, 1.0], [0.5, 0.5]]]))]
    [0.6931, 0.0]
    """
    return jnp.maximum(_entropy(jnp.mean(probs, axis=0)) - jnp.mean(_entropy(probs), axis=0), 0)


@arguments(probs=rules.probabilities(3))
def mean_std(probs: Array) -> Array:
    """The standard deviation over members, averaged over classes (Kampffmeyer et al. 2016).

    Args:
      probs: float[members, n, classes], probabilities.

    Returns:
      float[n].

    Raises:
      ValueError: probs are no probabilities (seen outside of jit only), empty, or of one class.

    >>> mean_std(jnp.array([[[1.0, 0.0], [0.5, 0.5]], [[0.0, 1.0], [0.5, 0.5]]])).tolist()
    [0.5, 0.0]
    """
    return jnp.mean(jnp.std(probs, axis=0), axis=1)


@arguments(probs=rules.probabilities(3))
def variation_ratio(probs: Array) -> Array:
    """The share of members that do not predict the most frequent class (Freeman 1965; Gal et al. 2017).

    DeepAL+ gives this name to `least_confidence`, which needs one member only.

    Args:
      probs: float[members, n, classes], probabilities. A member predicts the first of equal maxima.

    Returns:
      f32[n], from 0 to 1 - 1 / classes.

    Raises:
      ValueError: probs are no probabilities (seen outside of jit only), empty, or of one class.

    >>> variation_ratio(jnp.array([[[0.9, 0.1]], [[0.2, 0.8]], [[0.6, 0.4]], [[0.7, 0.3]]])).tolist()
    [0.25]
    """
    voted = jnp.argmax(probs, axis=2)[..., None] == jnp.arange(probs.shape[2])[None, None]
    return 1 - jnp.max(jnp.mean(voted, axis=0, dtype=jnp.float32), axis=1)
