"""Which keys of a config may change when a run is resumed."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from experiments.config import completed, flat

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
"""Keys that may change when a run is resumed. They decide what is written and checked, where data are read, and
which kernels and devices a step uses, but not what is learned (up to rounding). A run that stopped at a non-finite
number can be resumed with `on_nonfinite="skip"`."""


def differences(before: Mapping[str, Any], now: Mapping[str, Any]) -> list[str]:
    """`"key: old -> new"` for each key that differs and may not change.

    >>> differences({"seed": 0, "keep": 1}, {"seed": 1, "keep": 2})
    ['seed: 0 -> 1']
    """
    old, new = flat(completed(before)), flat(completed(now))
    keys = [key for key in {**old, **new} if not harmless(key) and old.get(key) != new.get(key)]
    return [f"{key}: {old.get(key, 'absent')} -> {new.get(key, 'absent')}" for key in keys]


def harmless(key: str) -> bool:
    """Whether a key such as "method.period", or its section, may change."""
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
