"""Slow NumPy versions of what the library computes, written from the definitions."""

import math

import numpy as np


def top(scores, k, among=None):
    """k best of a flat array: NaN last, ties to the lower index."""
    x = np.asarray(scores, np.float64).ravel() + 0.0
    candidates = range(x.size) if among is None else np.flatnonzero(np.asarray(among).ravel())
    order = sorted(candidates, key=lambda i: (np.isnan(x[i]), 0.0 if np.isnan(x[i]) else -x[i], i))
    out = np.zeros(x.size, bool)
    out[order[: max(0, k)]] = True
    return out.reshape(np.shape(scores))


def drop_and_grow(mask, drop, grow, n_drop, regrow_dropped=True):
    """Algorithm 1 of Evci et al. (2020) for one unstructured leaf."""
    mask = np.asarray(mask)
    n = int(mask.sum())
    kept = top(drop, n - n_drop, among=mask)
    if regrow_dropped:
        return kept | top(grow, n - int(kept.sum()), among=~kept)
    grown = top(grow, n - int(kept.sum()), among=~mask)
    missing = n - int(kept.sum()) - int(grown.sum())
    return kept | grown | top(np.zeros(mask.shape), missing, among=mask & ~kept)


def cosine_fraction(fraction, step, stop):
    return fraction / 2 * (1 + math.cos(math.pi * step / stop))


def dense_adam(p, grads, lr, b1=0.9, b2=0.999, eps=1e-8):
    """Adam on a flat array for a list of gradients."""
    mu, nu = np.zeros_like(p), np.zeros_like(p)
    for t, g in enumerate(grads, 1):
        mu, nu = b1 * mu + (1 - b1) * g, b2 * nu + (1 - b2) * g * g
        p = p - lr * (mu / (1 - b1**t)) / (np.sqrt(nu / (1 - b2**t)) + eps)
    return p
