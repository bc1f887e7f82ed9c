"""Checkpoints: asynchronous, atomic, the latest few and the best, checked when read.

Orbax writes a checkpoint beside the run and renames it when it is whole, so a run that is killed leaves whole
checkpoints or none. What a disk does to a file later is found by a digest, computed on the devices over the bits of the
state and saved with it.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import orbax.checkpoint as ocp
from jax import lax
from orbax.checkpoint.checkpoint_managers import AnyPreservationPolicy, BestN, LatestN

from rigl_jax.base import Array, PyTree

HARMLESS = (
    "stop_at",
    "log_every",
    "eval_every",
    "checkpoint_every",
    "keep",
    "progress",
    "tensorboard",
    "execution",
    "dataset.data_dir",
    "dataset.workers",
)
"""Config keys that may change when a run is resumed: they decide what is written, where data lie and on which kernels
a step runs, not what is learned. (Kernels differ in rounding.)"""

Say = Callable[[str], None]


class Checkpoints(NamedTuple):
    """The checkpoints of one run.

    Attributes:
      save: `(step, state, facts, accuracy)` starts writing and returns; the state may be donated at once. `facts` is
        JSON data kept along, `accuracy` (None: unknown) ranks the checkpoint.
      restore: `abstract state -> (state, facts)` of the newest checkpoint that is whole, or None where there is none.
      close: waits until everything is on disk.
    """

    save: Callable[[int, PyTree, Mapping[str, Any], float | None], None]
    restore: Callable[[PyTree], tuple[PyTree, dict[str, Any]] | None]
    close: Callable[[], None]


def open_checkpoints(directory: Path, *, keep: int, say: Say = logging.warning) -> Checkpoints:
    """Opens (or makes) a run's checkpoint folder.

    Args:
      directory: where; made if missing.
      keep: how many of the latest are kept; the best by accuracy is kept besides.
      say: told when a checkpoint turns out to be damaged.
    """
    manager = _manager(directory, keep)

    def save(step: int, state: PyTree, facts: Mapping[str, Any], accuracy: float | None) -> None:
        if step in manager.all_steps():
            return
        args = ocp.args.Composite(
            state=ocp.args.StandardSave({"state": state, "digest": digest(state)}),
            facts=ocp.args.JsonSave(dict(facts)),
        )
        manager.save(step, args=args, metrics=None if accuracy is None else {"accuracy": accuracy})

    def restore(abstract: PyTree) -> tuple[PyTree, dict[str, Any]] | None:
        for step in sorted(manager.all_steps(), reverse=True):
            try:
                found = _read(manager, step, abstract)
            except Exception as error:  # whatever a damaged file makes orbax raise
                text = (str(error).splitlines() or [type(error).__name__])[0][:160]
                say(f"checkpoint {step} is damaged and set aside, the one before it is used ({text})")
                if jax.process_index() == 0:
                    (directory / str(step)).rename(_free(directory / f"damaged-{step}"))
                manager.reload()
            else:
                return found
        return None

    return Checkpoints(save, restore, manager.close)


def _manager(directory: Path, keep: int) -> ocp.CheckpointManager:
    def accuracy(metrics: Mapping[str, float]) -> float:
        return metrics["accuracy"]

    policy = AnyPreservationPolicy(
        [LatestN(keep), BestN(get_metric_fn=accuracy, n=1, keep_checkpoints_without_metrics=False)]
    )
    # best_fn besides the policy: without it orbax does not read the metrics of earlier checkpoints back.
    options = ocp.CheckpointManagerOptions(preservation_policy=policy, best_fn=accuracy, cleanup_tmp_directories=True)
    return ocp.CheckpointManager(directory.absolute(), options=options)


def _free(path: Path) -> Path:
    """The path, or with a number where it is taken."""
    names = [path, *(path.with_name(f"{path.name}-{i}") for i in range(2, 1000))]
    return next(name for name in names if not name.exists())


def _read(manager: ocp.CheckpointManager, step: int, abstract: PyTree) -> tuple[PyTree, dict[str, Any]]:
    sharding = jax.tree.leaves(abstract)[0].sharding
    wanted = {"state": abstract, "digest": jax.ShapeDtypeStruct((), jnp.uint32, sharding=sharding)}
    args = ocp.args.Composite(state=ocp.args.StandardRestore(wanted), facts=ocp.args.JsonRestore())
    found = manager.restore(step, args=args)
    state = found["state"]["state"]
    if int(found["state"]["digest"]) != int(digest(state)):
        raise ValueError("its digest does not fit its content")
    # Copies: what orbax restored may be memory that it owns, and the training step donates its state.
    return jax.tree.map(jnp.copy, state), found["facts"]


@jax.jit
def digest(tree: PyTree) -> Array:
    """A 32-bit checksum over the bits of every leaf and their places; any one changed value changes it."""
    total = jnp.uint32(0)
    for i, leaf in enumerate(jax.tree.leaves(tree)):
        bits = _bits(leaf).reshape(-1)
        place = lax.iota(jnp.uint32, bits.size) * jnp.uint32(2) + jnp.uint32(1)  # odd, so that no change is lost
        total = (total + jnp.uint32(i)) * jnp.uint32(0x9E3779B1) + jnp.sum(bits * place, dtype=jnp.uint32)
    return total


def _bits(leaf: Array) -> Array:
    if jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key):
        leaf = jax.random.key_data(leaf)
    if leaf.dtype == jnp.bool_:
        return leaf.astype(jnp.uint32)
    if leaf.dtype.itemsize == 8:
        return lax.bitcast_convert_type(leaf, jnp.uint32)
    unsigned = {1: jnp.uint8, 2: jnp.uint16, 4: jnp.uint32}[leaf.dtype.itemsize]
    return lax.bitcast_convert_type(leaf, unsigned).astype(jnp.uint32)


def differences(before: Mapping[str, Any], now: Mapping[str, Any]) -> list[str]:
    """`"key: old -> new"` for each key in which two configs differ and that matters to what is learned.

    >>> differences({"seed": 0, "keep": 1}, {"seed": 1, "keep": 2})
    ['seed: 0 -> 1']
    """
    old, new = _flat(before), _flat(now)
    keys = [key for key in {**old, **new} if key not in HARMLESS and old.get(key) != new.get(key)]
    return [f"{key}: {old.get(key, 'absent')} -> {new.get(key, 'absent')}" for key in keys]


def check_config(before: Mapping[str, Any], now: Mapping[str, Any]) -> None:
    """Refuses to go on with a run under another config.

    Raises:
      ValueError: lists the keys that differ.
    """
    if found := differences(before, now):
        raise ValueError(
            f"train: this run was made with another config ({'; '.join(found)}); resume it with the same, "
            "or give another workdir"
        )


def _flat(config: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for key, value in config.items():
        flat |= _flat(value, f"{prefix}{key}.") if isinstance(value, Mapping) else {prefix + key: value}
    return flat
