"""Short runs on digits, how two of them are compared, and tasks that are compiled once."""

import functools
import json
import pathlib

import jax
import jax.numpy as jnp
import numpy as np

from configs import digits_mlp
from experiments import build, task
from experiments.io import checkpoint, files

ONE = jax.devices()[:1]
UNTIMED = ("examples_per_s", "seconds")
EVERY = ("log_every", "eval_every", "checkpoint_every", "check_every")
UNCOMPILED = ("stop_at", *EVERY, "keep", "progress", "tensorboard")
"""Keys of a config that no compiled function depends on."""


def configured(**values):
    config = digits_mlp.get_config("smoke")
    with config.unlocked():  # a mesh may have other axes
        config.update(values)
    return config


def lines(run):
    found = files.read_lines(run / "metrics.jsonl")
    return [{k: v for k, v in line.items() if k not in UNTIMED} for line in found]


def restored(run):
    """`(state, facts)` of the newest checkpoint, the state on one device wherever it was made."""
    config = files.read_json(run / "config.json") | {"mesh": {}, "sharding": []}
    store = checkpoint.open_checkpoints(run / "checkpoints", keep=1)
    found = store.restore(prepare(config, ONE).execution.abstract())
    store.close()
    return found


def numbers(tree):
    """All arrays, keys as numbers."""
    keys = lambda x: jnp.issubdtype(x.dtype, jax.dtypes.prng_key)  # noqa: E731
    return [np.asarray(jax.random.key_data(x) if keys(x) else x) for x in jax.tree.leaves(tree)]


def assert_equal(left, right):
    """Trees of the same structure, types and bits."""
    assert jax.tree.structure(left) == jax.tree.structure(right)
    for a, b in zip(numbers(left), numbers(right), strict=True):
        np.testing.assert_array_equal(a, b, strict=True)


def assert_close(left, right):
    """States of which one was summed up in another order: masks are equal, numbers almost."""
    for a, b in zip(numbers(left), numbers(right), strict=True):
        np.testing.assert_allclose(a, b, **({} if a.dtype == bool else {"rtol": 1e-4, "atol": 1e-5}))


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
