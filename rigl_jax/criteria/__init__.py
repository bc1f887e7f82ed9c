"""Criteria: how much a weight is worth to a trained network, `(params, batch) -> scores`; `registry` is their table.

Higher is more worth keeping. `rx.prune` turns scores into masks of exact counts in any structure, and
`rx.algorithms.one_shot` prunes by a criterion before training. A criterion sees masked params: pruned weights are 0.
The batch is what the `loss` of a criterion takes, often (inputs, labels); for one made of an `apply`, the inputs alone.

Surgeons, `(plan, params, masks, batch) -> Pruned`, also move the weights that stay: `sparsegpt`, `m_fac`, `obs`.
docs/pruning.md has the table of both.
"""

from rigl_jax.criteria.activation import clean_up, keep_mass, mean_activation, nnrelief, wanda
from rigl_jax.criteria.ap import activating
from rigl_jax.criteria.data_free import least_moved_negative, magnitude, random, synflow
from rigl_jax.criteria.first_order import singe, snip
from rigl_jax.criteria.m_fac import m_fac
from rigl_jax.criteria.obs import obs
from rigl_jax.criteria.registry import CRITERIA, SURGEONS, Entry
from rigl_jax.criteria.second_order import fisher, grasp, obd, taylor
from rigl_jax.criteria.sparsegpt import sparsegpt

__all__ = [
    "CRITERIA",
    "SURGEONS",
    "Entry",
    "activating",
    "clean_up",
    "fisher",
    "grasp",
    "keep_mass",
    "least_moved_negative",
    "m_fac",
    "magnitude",
    "mean_activation",
    "nnrelief",
    "obd",
    "obs",
    "random",
    "singe",
    "snip",
    "sparsegpt",
    "synflow",
    "taylor",
    "wanda",
]
