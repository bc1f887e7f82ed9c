"""Pruning and rewiring: the only code that makes a mask.

Everything is exact and in integers. The masks are the same for every number and shape of devices. For that each device
should hold whole units, and for N:M whole groups: otherwise XLA exchanges tiles that straddle two devices, or gathers
them.

`leaf` prunes and rewires one weight, `tree` all weights of a plan; `topk` selects the k best of n, `apportion` shares
integers among leaves.

Where a score is NaN or +inf, `select`, `prune` and `rewire` rank it. A training step does not act on it: the functions
over trees that rewire leave the masks of such a leaf as they are (`sound`, `hold`).
"""

from rigl_jax.topology.apportion import redistribute
from rigl_jax.topology.leaf import Rewiring, count, prune, rewire
from rigl_jax.topology.topk import select, select_jointly
from rigl_jax.topology.tree import (
    check_fit,
    drop_and_grow,
    hold,
    prune_jointly,
    prune_tree,
    random_masks,
    rewire_tree,
    settle,
    sound,
)

__all__ = [
    "Rewiring",
    "check_fit",
    "count",
    "drop_and_grow",
    "hold",
    "prune",
    "prune_jointly",
    "prune_tree",
    "random_masks",
    "redistribute",
    "rewire",
    "rewire_tree",
    "select",
    "select_jointly",
    "settle",
    "sound",
]
