"""MNIST-1D (Greydanus and Kobak, 2020-2024): ten digits as signals of 40 numbers, generated, not downloaded.

Numbers are those of `mnist1d.data.make_dataset` of the PyPI package mnist1d 0.0.2 (Apache-2.0) with its default
arguments and seed 42, up to rounding: the same templates, and the same order of random numbers.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
from scipy.ndimage import gaussian_filter

TEMPLATES = (
    (5, 6, 6.5, 6.75, 7, 7, 7, 7, 6.75, 6.5, 6, 5),
    (5, 3, 3, 3.4, 3.8, 4.2, 4.6, 5, 5.4, 5.8, 5, 5),
    (5, 6, 6.5, 6.5, 6, 5.25, 4.75, 4, 3.5, 3.5, 4, 5),
    (5, 6, 6.5, 6.5, 6, 5, 5, 6, 6.5, 6.5, 6, 5),
    (5, 4.4, 3.8, 3.2, 2.6, 2.6, 5, 5, 5, 5, 5, 5),
    (5, 3, 3, 3, 3, 5, 6, 6.5, 6.5, 6, 4.5, 5),
    (5, 4, 3.5, 3.25, 3, 3, 3, 3, 3.25, 3.5, 4, 5),
    (5, 7, 7, 6.6, 6.2, 5.8, 5.4, 5, 4.6, 4.2, 5, 5),
    (5, 4, 3.5, 3.5, 4, 5, 5, 4, 3.5, 3.5, 4, 5),
    (5, 4, 3.5, 3.5, 4, 5, 5, 5, 5, 4.7, 4.3, 5),
)
PADDING, TRANSLATION, LENGTH = (36, 60), 48, 40
SCALE, CORRELATED, WHITE, SHEAR = 0.4, 0.25, 0.02, 0.75


class Signals(NamedTuple):
    """Signals `float64[N, 40]`, of mean 0 and deviation 1 over all, and labels `int64[N]`."""

    x: np.ndarray
    y: np.ndarray


def generate(n: int = 5000, seed: int = 42) -> tuple[Signals, Signals]:
    """The training part, four fifths of `n` signals, and the test part; classes are as frequent as each other."""
    rng = np.random.RandomState(seed)  # the generator of the package
    templates = np.array(TEMPLATES, float)
    templates = (templates - templates.mean(1, keepdims=True)) / np.std(templates, 1, keepdims=True)
    templates = (templates - templates[:, :1]) / 6
    labels = np.repeat(np.arange(10), n // 10)
    signals = np.stack([_signal(templates[label], rng) for label in labels])
    order = rng.permutation(len(labels))
    signals, labels = signals[order], labels[order]
    signals = (signals - signals.mean()) / signals.std()
    split = len(labels) * 4 // 5
    return Signals(signals[:split], labels[:split]), Signals(signals[split:], labels[split:])


def _signal(template: np.ndarray, rng: np.random.RandomState) -> np.ndarray:
    """A template padded, stretched, scaled, moved around, with noise, sheared, and read at 40 places."""
    low, high = PADDING
    x = np.concatenate([template + 1e-8, np.zeros(low + int(rng.rand() * (high - low + 1)))])
    x = _resample(x, len(template) + high)
    x = x * (1 + SCALE * (rng.rand() - 0.5))
    k = rng.choice(TRANSLATION)
    x = np.concatenate([x[-k:], x[:-k]])
    there = x != 0
    x = there * x + (1 - there) * gaussian_filter(CORRELATED * rng.randn(len(x)), 2)
    x = x + WHITE * rng.randn(len(x))
    x = x - SHEAR * (rng.rand() - 0.5) * np.linspace(-0.5, 0.5, len(x))
    return _resample(x, LENGTH)


def _resample(x: np.ndarray, n: int) -> np.ndarray:
    return np.interp(np.linspace(0, 1, n), np.linspace(0, 1, len(x)), x)
