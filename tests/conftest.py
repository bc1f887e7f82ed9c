"""Strict settings for every test: 8 host devices, no silent rank promotion, quick compiles."""

import gc
import os
import pathlib

from tests import xla

# Before JAX starts: the device count is fixed at import.
os.environ["XLA_FLAGS"] = f"{os.environ.get('XLA_FLAGS', '')} {xla.flags(devices=8)}"
os.environ.setdefault("JAX_PLATFORMS", "cpu")

import hypothesis
import jax
import matplotlib

matplotlib.use("Agg")
jax.config.update("jax_numpy_rank_promotion", "raise")
# Compiling is most of the time of the suite: what one process has compiled, the other and the next run read.
jax.config.update("jax_compilation_cache_dir", str(pathlib.Path(__file__).parent.parent / ".jax_cache"))
jax.config.update("jax_persistent_cache_min_compile_time_secs", 0)
jax.config.update("jax_persistent_cache_min_entry_size_bytes", -1)
hypothesis.settings.register_profile("default", deadline=None, max_examples=40, derandomize=True)
hypothesis.settings.load_profile("default")
# Modules live as long as the process: collections need not walk them each time.
gc.freeze()
gc.set_threshold(50_000, 20, 20)
