"""Measures of sparse networks: pure functions that read and change nothing.

`size` says how small and how cheap a network is, `predictions` how good, how calibrated and how diverse its predictions
are, `corruptions` how it does on corrupted images. Blalock et al. (2020, ShrinkBench) ask that methods be compared by
compression or speed-up of the whole model, at five sparsities at least, over several seeds: `curve`.
"""

from rigl_jax.diagnostics.corruptions import CORRUPTIONS, corrupt, corrupted_accuracy
from rigl_jax.diagnostics.curves import Curve, curve
from rigl_jax.diagnostics.predictions import brier, disagreement, ece, nll
from rigl_jax.diagnostics.size import compression, density_for, mask_overlap, speedup

__all__ = [
    "CORRUPTIONS",
    "Curve",
    "brier",
    "compression",
    "corrupt",
    "corrupted_accuracy",
    "curve",
    "density_for",
    "disagreement",
    "ece",
    "mask_overlap",
    "nll",
    "speedup",
]
