"""Measures of sparse networks: pure functions that read and change nothing.

`size` says how small and how cheap a network is, `predictions` how good, how calibrated and how diverse its predictions
are, `corruptions` how it does on corrupted images, `certified` and `fairness` what holds on a whole box of inputs,
`sensitivity` how much of each layer is needed, `information` what its units know. Blalock et al. (2020, ShrinkBench)
ask that methods be compared by compression or speed-up of the whole model, at five sparsities at least, over several
seeds: `curve`.
"""

from rigl_jax.diagnostics.certified import Bounds, certified_accuracy, dead_units, interval_bounds, nrs, nrs_scores
from rigl_jax.diagnostics.corruptions import CORRUPTIONS, corrupt, corrupted_accuracy
from rigl_jax.diagnostics.curves import Curve, curve
from rigl_jax.diagnostics.fairness import Fairness, individual_fairness
from rigl_jax.diagnostics.information import (
    accuracy_information,
    biased_edges,
    copula_normalise,
    effective_rank,
    m_flow,
    mutual_information,
    o_information,
)
from rigl_jax.diagnostics.predictions import brier, disagreement, ece, nll
from rigl_jax.diagnostics.sensitivity import DeadRate, agn, dead_rate, error_std, gradient_ranks, noise_tolerance
from rigl_jax.diagnostics.size import compression, density_for, mask_overlap, speedup

__all__ = [
    "CORRUPTIONS",
    "Bounds",
    "Curve",
    "DeadRate",
    "Fairness",
    "accuracy_information",
    "agn",
    "biased_edges",
    "brier",
    "certified_accuracy",
    "compression",
    "copula_normalise",
    "corrupt",
    "corrupted_accuracy",
    "curve",
    "dead_rate",
    "dead_units",
    "density_for",
    "disagreement",
    "ece",
    "effective_rank",
    "error_std",
    "gradient_ranks",
    "individual_fairness",
    "interval_bounds",
    "m_flow",
    "mask_overlap",
    "mutual_information",
    "nll",
    "noise_tolerance",
    "nrs",
    "nrs_scores",
    "o_information",
    "speedup",
]
