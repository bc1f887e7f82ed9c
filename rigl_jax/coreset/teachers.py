"""Examples without sure labels: pseudo labels of several teachers, and pairs that an ensemble believes in."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from rigl_jax import arguments as rules
from rigl_jax import checks, contents
from rigl_jax.arguments import arguments
from rigl_jax.base import Array
from rigl_jax.messages import kind, shown

Predict = Callable[[Array], Array]
"""`inputs [n, ...] -> probabilities float[n, classes]`."""
Fit = Callable[[Any, Any, Array], Predict]
"""`(inputs, labels int[n], key) -> predict`: trains one network."""


class Pseudo(NamedTuple):
    """Labels that networks gave.

    Attributes:
      labels: int32[n], the class of the largest mean probability; ties go to the lower class.
      confidence: float[n], that probability.
      accepted: bool[n], whether it reaches the threshold.
    """

    labels: Array
    confidence: Array
    accepted: Array


@arguments(probs=rules.probabilities(3), threshold=rules.scalar)
def pseudo_labels(probs: Array, threshold: float) -> Pseudo:
    """Labels by the mean prediction of several teachers, accepted where it is confident (after Ghosh et al. 2021).

    Args:
      probs: float[teachers, n, classes], probabilities.
      threshold: the least mean probability, from 0 to 1.

    Raises:
      ValueError: probs are no probabilities (seen outside of jit only), empty, or of one class; threshold is out of
        range.

    >>> found = pseudo_labels(jnp.array([[[0.9, 0.1], [0.9, 0.1]], [[0.8, 0.2], [0.3, 0.7]]]), 0.8)
    >>> found.labels.tolist(), found.accepted.tolist()
    ([0, 0], [True, False])
    """
    _unit("pseudo_labels", threshold)
    mean = jnp.mean(probs, axis=0)
    confidence = jnp.max(mean, axis=1)
    return Pseudo(jnp.argmax(mean, axis=1).astype(jnp.int32), confidence, confidence >= threshold)


def _unit(who: str, threshold: Any) -> None:
    if not isinstance(threshold, jax.core.Tracer):
        checks.number(who, "threshold", threshold, "must be from 0 to 1", lambda value: 0 <= value <= 1)


@arguments(scores=rules.finite(2), threshold=rules.scalar)
def confident(scores: Array, threshold: float) -> Array:
    """The examples whose score, averaged over an ensemble, reaches a threshold (after Wang et al. 2021, EfficientCLIP).

    The paper scores pairs of image and text by their similarity under several checkpoints, to leave out pairs that
    do not belong together. In the style of it: its code is not public. For a count in place of a threshold, take
    `top(scores.mean(axis=0), k)`.

    Args:
      scores: float[members, n], high for pairs that fit.
      threshold: the least mean score.

    Returns:
      bool[n].

    Raises:
      ValueError: scores are empty, or not finite (seen outside of jit only).

    >>> confident(jnp.array([[0.75, 0.25], [0.5, 0.5]]), 0.5).tolist()
    [True, False]
    """
    return jnp.mean(scores, axis=0) >= threshold


class SelfTrained(NamedTuple):
    """What `self_training` found.

    Attributes:
      student: predicts probabilities.
      teachers: the networks that gave the labels.
      pseudo: those labels, on the host.
    """

    student: Predict
    teachers: tuple[Predict, ...]
    pseudo: Pseudo


@arguments(
    fit=rules.function, inputs=rules.host_array(), labels=rules.host_array(1), unlabelled=rules.host_array(),
    key=rules.key, teachers=rules.whole(1), threshold=rules.scalar,
)  # fmt: skip
def self_training(
    fit: Fit, inputs: Any, labels: Any, unlabelled: Any, key: Array, *, teachers: int = 5, threshold: float = 0.9
) -> SelfTrained:
    """Self-training with an ensemble of teachers (in the style of Ghosh et al. 2021; only its abstract was read).

    Teachers are trained on labelled examples from different keys. Unlabelled examples on which their mean prediction
    is confident get its label. The student is trained on both. `rx.diagnostics.ece` measures how calibrated it is.

    Args:
      fit: `(inputs, labels, key) -> predict`; called once for each teacher, then for the student.
      inputs: [n, ...].
      labels: int[n], from 0.
      unlabelled: [m, ...], of the shape of inputs but for m.
      key: PRNG key.
      teachers: how many.
      threshold: of `pseudo_labels`.

    Raises:
      ValueError: shapes that do not fit; a `fit` that does not give a function to probabilities; a label that is none
        of its classes.

    >>> def fit(x, y, key):  # the class of the nearest example
    ...     return lambda new: jax.nn.one_hot(y, 2)[jnp.argmin(abs(jnp.asarray(new) - x.T), axis=1)]
    >>> x, more = np.array([[0.0], [9.0]]), np.array([[2.0], [8.0]])
    >>> found = self_training(fit, x, np.array([0, 1]), more, jax.random.key(0), teachers=1)
    >>> found.pseudo.labels.tolist(), found.student(np.array([[3.0]])).tolist()
    ([0, 1], [[1.0, 0.0]])
    """
    if not inputs.ndim or not len(inputs):
        raise ValueError(f"self_training: inputs must be [n, ...], at least one, got {shown(inputs)}")
    contents.labels("self_training", labels, len(inputs))
    if unlabelled.ndim != inputs.ndim or unlabelled.shape[1:] != inputs.shape[1:] or not len(unlabelled):
        raise ValueError(
            f"self_training: unlabelled must be like inputs, {shown(inputs)}, at least one, got {shown(unlabelled)}"
        )
    _unit("self_training", threshold)
    last, *first = jax.random.split(key, teachers + 1)
    trained = tuple(_trained(fit, inputs, labels, each) for each in first)
    probs = jnp.stack([_predicted(predict, unlabelled) for predict in trained])
    contents.labels("self_training", labels, len(inputs), probs.shape[-1])
    found = pseudo_labels(probs, threshold)
    pseudo = jax.device_get(found)
    both = np.concatenate([inputs, unlabelled[pseudo.accepted]])
    given = np.concatenate([labels, pseudo.labels[pseudo.accepted].astype(labels.dtype)])
    return SelfTrained(_trained(fit, both, given, last), trained, pseudo)


def _predicted(predict: Predict, inputs: Any) -> Array:
    probs = predict(inputs)
    if jnp.ndim(probs) != 2 or len(probs) != len(inputs):
        raise ValueError(
            f"self_training: fit must return a function to [{len(inputs)}, classes] here, got {shown(probs)}"
        )
    return jnp.asarray(contents.probabilities("self_training", "what the function of fit returns", probs))


def _trained(fit: Fit, inputs: Any, labels: Any, key: Array) -> Predict:
    predict = fit(inputs, labels, key)
    if not callable(predict):
        raise ValueError(f"self_training: fit must return a function of inputs, got {kind(predict)}")
    return predict
