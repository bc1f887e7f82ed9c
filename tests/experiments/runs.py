"""Short runs on digits, and how two of them are compared."""

import jax

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
