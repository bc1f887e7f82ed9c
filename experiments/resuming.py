"""With which configs a run may be resumed."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from experiments.config import flat

HARMLESS = (
    "stop_at",
    "log_every",
    "eval_every",
    "checkpoint_every",
    "keep",
    "check_every",
    "on_nonfinite",
    "progress",
    "tensorboard",
    "execution",
    "mesh",
    "sharding",
    "dataset.data_dir",
    "dataset.workers",
)
"""Config keys that may change when a run is resumed: they decide what is written and checked, where data lie and
on which kernels and devices a step runs, not what is learned. (Kernels and meshes differ in rounding.) A run that
stopped because a number was not finite may go on with `on_nonfinite` set to skip."""


def differences(before: Mapping[str, Any], now: Mapping[str, Any]) -> list[str]:
    """`"key: old -> new"` for each key in which two configs differ and that matters to what is learned.

    >>> differences({"seed": 0, "keep": 1}, {"seed": 1, "keep": 2})
    ['seed: 0 -> 1']
    """
    old, new = flat(before), flat(now)
    keys = [key for key in {**old, **new} if not harmless(key) and old.get(key) != new.get(key)]
    return [f"{key}: {old.get(key, 'absent')} -> {new.get(key, 'absent')}" for key in keys]


def harmless(key: str) -> bool:
    """Whether a key, with dots between the sections, or the section that it is in may change."""
    return key in HARMLESS or key.split(".")[0] in HARMLESS


def check_config(before: Mapping[str, Any], now: Mapping[str, Any]) -> None:
    """Checks that a run is resumed with its own config.

    Raises:
      ValueError: lists the keys that differ.
    """
    if found := differences(before, now):
        raise ValueError(
            f"train: this run was made with another config ({'; '.join(found)}); resume it with the same, "
            "or give another workdir"
        )
