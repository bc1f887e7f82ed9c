"""Short runs on digits, how two of them are compared, and tasks that are compiled once."""

import functools
import json
import pathlib

import jax

from configs import digits_mlp
from experiments import build, task
from experiments.io import files

ONE = jax.devices()[:1]
UNTIMED = ("examples_per_s", "seconds")
EVERY = ("log_every", "eval_every", "checkpoint_every", "check_every")
UNCOMPILED = ("stop_at", *EVERY, "keep", "progress", "tensorboard")
"""Keys of a config that no compiled function depends on."""


def configured(**values):
    config = digits_mlp.get_config("smoke")
    config.update(values)
    return config


def lines(run):
    found = files.read_lines(run / "metrics.jsonl")
    return [{k: v for k, v in line.items() if k not in UNTIMED} for line in found]


def prepare(config, devices=None, *, subset=None):
    """`task.prepare`, which traces and compiles the same functions once in a process. Batches are always new."""
    config = build.check(config)
    if subset is not None:
        return task.prepare(config, devices, subset=subset)
    text = json.dumps(config | {key: configured()[key] for key in UNCOMPILED}, sort_keys=True)
    # Code of one's own is named by its file in this folder.
    found = _prepared(text, None if devices is None else tuple(devices), pathlib.Path.cwd())
    return found._replace(config=config, data=build.data(config, None))


@functools.cache
def _prepared(text, devices, folder):
    return task.prepare(json.loads(text), devices)
