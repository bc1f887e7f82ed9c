"""Measures of sparse networks: pure functions that read and change nothing.

`size` says how small and how cheap a network is, `predictions` how good, how calibrated and how diverse its predictions
are, `corruptions` how it does on corrupted images. Blalock et al. (2020, ShrinkBench) ask that methods be compared by
compression or speed-up of the whole model, at five sparsities at least, over several seeds: `curve`.
"""

from rigl_jax.diagnostics.certified import Bounds, certified_accuracy, dead_units, interval_bounds, nrs, nrs_scores
from rigl_jax.diagnostics.corruptions import CORRUPTIONS, corrupt, corrupted_accuracy
from rigl_jax.diagnostics.curves import Curve, curve
from rigl_jax.diagnostics.information import (
    copula_normalise,
    effective_rank,
    m_flow,
    mutual_information,
    o_information,
)
from rigl_jax.diagnostics.predictions import brier, disagreement, ece, nll
from rigl_jax.diagnostics.size import compression, density_for, mask_overlap, speedup

__all__ = [
    "CORRUPTIONS",
    "Bounds",
    "Curve",
    "brier",
    "certified_accuracy",
    "compression",
    "copula_normalise",
    "corrupt",
    "corrupted_accuracy",
    "curve",
    "dead_units",
    "density_for",
    "disagreement",
    "ece",
    "effective_rank",
    "interval_bounds",
    "m_flow",
    "mask_overlap",
    "mutual_information",
    "nll",
    "nrs",
    "nrs_scores",
    "o_information",
    "speedup",
]
