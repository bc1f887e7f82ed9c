"""The patterns of masks that have changed: with the kernels of those before and, where possible, with their sizes.

A step is compiled for the sizes of its patterns. A method that prunes during training has other counts after each
pruning; then the arrays keep their sizes while the values fit, and hold padding (`kernels.make_pattern`). Sizes are
chosen anew, those of all leaves at once, when too much of what is stored is padding. So their number grows with the
logarithm of the sparsity, and not with the number of prunings.
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np

from rigl_jax import trees
from rigl_jax.base import Masks
from rigl_jax.execution import kernels
from rigl_jax.execution.packed import Choose, Packed, Whole, leaf_patterns

MOST_STORED = 4 / 3
"""What may be stored, in units of what must be: above it sizes are chosen anew."""
ROOM = 1.25
"""The size of a leaf that has outgrown its own, in units of what it must hold."""


def same_kernels(like: Packed, masks: Masks, otherwise: Choose, *, padded: bool = False) -> Choose:
    """A `choose` with the kernels of `like`, so that a step compiled for it can be used again.

    Args:
      like: the weights before.
      masks: the masks that are to be packed, of the leaves of `like`.
      otherwise: chooses for a leaf that was stored dense and whose count changes (a method that prunes during
        training), for one whose mask no longer fits its kernel (if it had runs by chance), and where sizes are chosen
        anew.
      padded: whether sizes stay where counts change. Else each size is the count, and only equal counts serve.
    """
    old = dict(zip(trees.named_leaves(like.values), leaf_patterns(like), strict=True))
    given = {name: np.asarray(mask) for name, mask in trees.named_leaves(masks).items()}
    was_dense = {
        name: otherwise(name, mask)
        for name, mask in given.items()
        if isinstance(old[name], Whole) and int(old[name].mask.sum()) != mask.sum()
    }
    anew = padded and _stored(old, given) > MOST_STORED * sum(
        _needed(was_dense.get(name, old[name]), mask) for name, mask in given.items()
    )

    def choose(name: str, mask: np.ndarray) -> Any:
        before = old[name]
        if isinstance(before, Whole):
            return was_dense.get(name) if anew or not padded else None
        grown = padded and kernels.least(before, mask) > before.nnz
        if anew or grown:
            after = otherwise(name, mask)
            return _with_room(after, mask) if grown and not anew else after
        try:
            return kernels.rebuild(before, mask, capacity=kernels.capacity(before) if padded else None)
        except ValueError:
            return otherwise(name, mask)

    return choose


def _stored(patterns: dict[str, Any], masks: dict[str, np.ndarray]) -> int:
    return sum(mask.size if isinstance(patterns[name], Whole) else patterns[name].nnz for name, mask in masks.items())


def _needed(pattern: Any, mask: np.ndarray) -> int:
    """How many values a leaf has that is stored in the best way."""
    return mask.size if pattern is None or isinstance(pattern, Whole) else kernels.least(pattern, mask)


def _with_room(pattern: Any, mask: np.ndarray) -> Any:
    if pattern is None:
        return None
    capacity = kernels.capacity(pattern)
    most = capacity * mask.size // pattern.nnz
    return kernels.rebuild(pattern, mask, capacity=max(capacity, min(math.ceil(ROOM * capacity), most)))
