"""Strict settings for every test: 8 host devices, no silent rank promotion, quick compiles."""

import os

from tests import xla

# Before JAX starts: the device count is fixed at import.
os.environ["XLA_FLAGS"] = f"{os.environ.get('XLA_FLAGS', '')} {xla.flags(devices=8)}"
os.environ.setdefault("JAX_PLATFORMS", "cpu")

import hypothesis
import jax
import matplotlib

matplotlib.use("Agg")
jax.config.update("jax_numpy_rank_promotion", "raise")
hypothesis.settings.register_profile("default", deadline=None, max_examples=40, derandomize=True)
hypothesis.settings.load_profile("default")
