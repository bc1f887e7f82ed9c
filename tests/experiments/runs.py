"""Short runs on digits, and how two of them are compared."""

import jax
import pytest
from jax.experimental.compilation_cache import compilation_cache

from configs import digits_mlp
from experiments.io import files

ONE = jax.devices()[:1]
UNTIMED = ("examples_per_s", "seconds")


def configured(**values):
    config = digits_mlp.get_config("smoke")
    config.update(values)
    return config


def lines(run):
    found = files.read_lines(run / "metrics.jsonl")
    return [{k: v for k, v in line.items() if k not in UNTIMED} for line in found]


@pytest.fixture(scope="module", autouse=True)
def compiled_once(tmp_path_factory):
    """The tests train the same few programs over and over; compiling is what costs."""
    jax.config.update("jax_compilation_cache_dir", str(tmp_path_factory.mktemp("cache")))
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)
    compilation_cache.reset_cache()
    yield
    jax.config.update("jax_compilation_cache_dir", None)
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 1.0)
    compilation_cache.reset_cache()
