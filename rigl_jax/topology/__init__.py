"""Pruning and rewiring: the only code that makes a mask.

Counts are exact integers. The masks are the same for every number and shape of devices. For speed, each device should
hold whole units, and for N:M whole groups: otherwise XLA exchanges units that lie on two devices, or gathers them.

`leaf` prunes and rewires one weight, `tree` all weights of a plan, `joint` prunes them against each other; `topk`
selects the k best of n, `apportion` shares integers among leaves.

`select`, `prune` and `rewire` rank scores that are NaN or +inf. A training step does not: functions that rewire a tree
leave the masks of such a leaf unchanged (`sound`, `hold`).
"""

from rigl_jax.topology.apportion import redistribute
from rigl_jax.topology.joint import Ranking, count_groups, prune_jointly, prune_together, ranking
from rigl_jax.topology.leaf import Rewiring, count, prune, rewire, rewire_ablating
from rigl_jax.topology.topk import select, select_jointly
from rigl_jax.topology.tree import (
    check_fit,
    drop_and_grow,
    full_masks,
    hold,
    prune_tree,
    random_masks,
    rewire_in_turn,
    rewire_tree,
    sound,
)

__all__ = [
    "Ranking",
    "Rewiring",
    "check_fit",
    "count",
    "count_groups",
    "drop_and_grow",
    "full_masks",
    "hold",
    "prune",
    "prune_jointly",
    "prune_together",
    "prune_tree",
    "random_masks",
    "ranking",
    "redistribute",
    "rewire",
    "rewire_ablating",
    "rewire_in_turn",
    "rewire_tree",
    "select",
    "select_jointly",
    "sound",
]
