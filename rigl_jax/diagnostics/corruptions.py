"""Accuracy on corrupted images, as the robustness benchmarks of Hendrycks & Dietterich (2019) measure it."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from rigl_jax import arguments as rules
from rigl_jax import checks, contents
from rigl_jax.arguments import arguments
from rigl_jax.base import Array
from rigl_jax.messages import shown

SEVERITIES = (1, 2, 3, 4, 5)
ROUNDING = 1e-3
"""How far a pixel may be from [0, 1], as after resizing."""


def _gaussian_noise(key: Array, x: Array, std: float) -> Array:
    return x + std * jax.random.normal(key, x.shape, x.dtype)


def _shot_noise(key: Array, x: Array, photons: float) -> Array:
    return jax.random.poisson(key, x * photons).astype(x.dtype) / photons


def _impulse_noise(key: Array, x: Array, share: float) -> Array:
    u = jax.random.uniform(key, x.shape, x.dtype)
    return jnp.where(u < share / 2, 0, jnp.where(u < share, 1, x))


def _speckle_noise(key: Array, x: Array, std: float) -> Array:
    return x + x * std * jax.random.normal(key, x.shape, x.dtype)


def _gaussian_blur(key: Array, x: Array, sigma: float) -> Array:
    del key
    radius = int(4 * sigma + 0.5)
    taps = np.exp(-0.5 * (np.arange(-radius, radius + 1) / sigma) ** 2)

    def along(x: Array, axis: int) -> Array:
        n = x.shape[axis]
        matrix = np.zeros((n, n))
        at = np.clip(np.arange(n)[:, None] + np.arange(-radius, radius + 1), 0, n - 1)
        np.add.at(matrix, (np.arange(n)[:, None], at), taps / taps.sum())
        return _mixed(x, matrix, axis)

    return along(along(x, 1), 2)


def _brightness(key: Array, x: Array, more: float) -> Array:
    del key
    value = jnp.max(x, axis=-1, keepdims=True)
    brighter = jnp.clip(value + more, 0, 1)
    return jnp.where(value > 0, x * brighter / jnp.where(value > 0, value, 1), brighter)


def _contrast(key: Array, x: Array, share: float) -> Array:
    del key
    means = jnp.mean(x, axis=(1, 2), keepdims=True)
    return (x - means) * share + means


def _pixelate(key: Array, x: Array, share: float) -> Array:
    del key
    for axis in (1, 2):
        n = x.shape[axis]
        m = max(1, int(n * share))
        x = _mixed(_mixed(x, _boxes(m, n), axis), _boxes(n, m), axis)
    return x


def _boxes(n: int, before: int) -> np.ndarray:
    """Resizing `before` pixels to n: the mean of those whose middle lies in the box of the new one (Pillow's BOX)."""
    scale = before / n
    away = (np.arange(before) + 0.5 - (np.arange(n)[:, None] + 0.5) * scale) / max(scale, 1)
    inside = ((away > -0.5) & (away <= 0.5)).astype(np.float64)
    return inside / inside.sum(axis=1, keepdims=True)


def _mixed(x: Array, matrix: np.ndarray, axis: int) -> Array:
    mixed = jnp.tensordot(x, jnp.asarray(matrix, x.dtype), axes=(axis, 1), precision=jax.lax.Precision.HIGHEST)
    return jnp.moveaxis(mixed, -1, axis)


CORRUPTIONS: dict[str, tuple[Callable[[Array, Array, float], Array], tuple[float, ...]]] = {
    "gaussian_noise": (_gaussian_noise, (0.04, 0.06, 0.08, 0.09, 0.10)),
    "shot_noise": (_shot_noise, (500, 250, 100, 75, 50)),
    "impulse_noise": (_impulse_noise, (0.01, 0.02, 0.03, 0.05, 0.07)),
    "speckle_noise": (_speckle_noise, (0.06, 0.1, 0.12, 0.16, 0.2)),
    "gaussian_blur": (_gaussian_blur, (0.4, 0.6, 0.7, 0.8, 1.0)),
    "brightness": (_brightness, (0.05, 0.1, 0.15, 0.2, 0.3)),
    "contrast": (_contrast, (0.75, 0.5, 0.4, 0.3, 0.15)),
    "pixelate": (_pixelate, (0.95, 0.9, 0.85, 0.75, 0.65)),
}
"""`{name: (function, strength at each of five severities)}`; the strengths are those of CIFAR-10-C."""

_named = rules.rule(f"one of {', '.join(CORRUPTIONS)}", lambda name: isinstance(name, str) and name in CORRUPTIONS)
_severity = rules.rule("a whole number from 1 to 5", lambda n: checks.is_whole(n, 1) and n <= len(SEVERITIES))


@arguments(key=rules.key, images=rules.array(4, host=True), name=_named, severity=_severity)
def corrupt(key: Any, images: Any, name: str, severity: int = 3) -> Array:
    """Images with one of eight corruptions, as CIFAR-10-C has them (Hendrycks & Dietterich 2019).

    `gaussian_noise`, `shot_noise` (Poisson), `impulse_noise` (salt and pepper), `speckle_noise`, `gaussian_blur`,
    `brightness`, `contrast`, `pixelate`: those of their twenty that need no image library. Strengths are theirs, for 32
    x 32 pixels. They then round to 8 bits; here nothing is rounded.

    Args:
      key: PRNG key, of the noises.
      images: float[n, height, width, channels], in [0, 1]; undo a normalisation before, and apply it again afterwards.
      name: which one.
      severity: from 1 to 5.

    Returns:
      float[n, height, width, channels], clipped to [0, 1].

    Raises:
      ValueError: images are no floats, or not in [0, 1] (seen outside of jit only; 0.001 more counts as rounding).

    >>> corrupt(jax.random.key(0), jnp.array([[[[0.25], [0.75]]]]), "contrast", 2).ravel().tolist()
    [0.375, 0.625]
    """
    x = _images("corrupt", images)
    function, strengths = CORRUPTIONS[name]
    return jnp.clip(function(key, x, strengths[int(severity) - 1]), 0, 1)


def _images(who: str, images: Any) -> Array:
    x = jnp.asarray(contents.filled(who, "images", images))
    if not jnp.issubdtype(x.dtype, jnp.floating):
        raise ValueError(f"{who}: images must be floats in [0, 1], got {shown(images)}")
    expected = "in [0, 1], without a normalisation"
    return contents.every(who, "images", expected, x, lambda x: (x >= -ROUNDING) & (x <= 1 + ROUNDING))


@arguments(
    apply=rules.function,
    images=rules.array(4, host=True),
    labels=rules.array(1, host=True),
    key=rules.key,
    names=rules.sequence,
    severities=rules.sequence,
)
def corrupted_accuracy(
    apply: Callable[[Array], Array],
    images: Any,
    labels: Any,
    key: Any,
    *,
    names: Sequence[str] = tuple(CORRUPTIONS),
    severities: Sequence[int] = SEVERITIES,
) -> dict[str, np.ndarray]:
    """The accuracy under each corruption and severity; its mean over all of them is the usual single number.

    Args:
      apply: `images -> float[n, classes]`, logits or probabilities, in inference mode; called with all images at once.
      images: float[n, height, width, channels], in [0, 1]; see `corrupt`.
      labels: int[n].
      key: PRNG key. Two networks are given the same corrupted images with the same key.
      names: of corruptions.
      severities: from 1 to 5.

    Returns:
      `{name: float64[severities]}`.

    Raises:
      ValueError: as `corrupt`; labels do not fit, or one is no class; apply gives no logits of two classes or more, or
        NaN.

    >>> images, labels = jnp.array([[[[0.2]]], [[[0.9]]]]), jnp.array([0, 1])
    >>> bright = lambda x: jnp.stack([x.mean((1, 2, 3)), jnp.full(len(x), 0.45)], 1)[:, ::-1]  # above 0.45 or not
    >>> found = corrupted_accuracy(bright, images, labels, jax.random.key(0), names=["brightness"])
    >>> found["brightness"].tolist()
    [1.0, 1.0, 1.0, 1.0, 0.5]
    """
    images, labels = _images("corrupted_accuracy", images), jnp.asarray(labels)
    contents.labels("corrupted_accuracy", labels, len(images))
    return {
        _named("corrupted_accuracy", "names", name): np.array(
            [
                _right(apply, images, labels, key, name, _severity("corrupted_accuracy", "severities", s))
                for s in severities
            ]
        )
        for name in names
    }


def _right(apply: Callable[[Array], Array], images: Any, labels: Array, key: Array, name: str, severity: int) -> float:
    own = jax.random.fold_in(jax.random.fold_in(key, list(CORRUPTIONS).index(name)), severity)
    logits = contents.logits("corrupted_accuracy", "apply", apply(_jitted(own, images, name, severity)), len(labels))
    contents.labels("corrupted_accuracy", labels, *logits.shape)
    return float(jnp.mean(jnp.argmax(logits, axis=-1) == labels))


@functools.partial(jax.jit, static_argnums=(2, 3))
def _jitted(key: Array, images: Array, name: str, severity: int) -> Array:
    return corrupt(key, images, name, severity)
