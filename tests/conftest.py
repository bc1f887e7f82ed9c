"""Strict settings for every test: 8 host devices, no silent rank promotion, quick compiles."""

import gc
import os
import pathlib

from tests import xla

# Before JAX starts: the device count is fixed at import.
os.environ["XLA_FLAGS"] = f"{os.environ.get('XLA_FLAGS', '')} {xla.flags(devices=8)}"
os.environ.setdefault("JAX_PLATFORMS", "cpu")
os.environ["JAX_TRACEBACK_IN_LOCATIONS_LIMIT"] = "0"  # where each operation was written takes time to lower
# Compiling is most of the time of the suite: what one process has compiled, the others and the next run read. Processes
# that tests start inherit it, and the silence about an entry that another process is just writing.
os.environ["JAX_COMPILATION_CACHE_DIR"] = str(pathlib.Path(__file__).parent.parent / ".jax_cache")
os.environ["JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS"] = "0"
os.environ["JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES"] = "-1"
os.environ["PYTHONWARNINGS"] = ",".join(
    f"ignore:Error {what} persistent compilation cache entry" for what in ("reading", "writing")
)

import hypothesis
import jax
import matplotlib

matplotlib.use("Agg")
jax.config.update("jax_numpy_rank_promotion", "raise")
hypothesis.settings.register_profile("default", deadline=None, max_examples=40, derandomize=True)
hypothesis.settings.load_profile("default")
# Modules live as long as the process: collections need not walk them each time.
gc.freeze()
gc.set_threshold(50_000, 20, 20)
