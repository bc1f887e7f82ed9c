"""A config as data: its keys, and what each may hold."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

from experiments import finite
from experiments.rules import choice, section, seed, share, unknown
from rigl_jax.arguments import Rule, flag, rule, sequence, whole, word


def _is_mesh(value: Any) -> bool:
    numbers = isinstance(value, Mapping) and all(isinstance(size, int) for size in value.values())
    return numbers and all(axis.isidentifier() for axis in value)


KEYS: dict[str, Rule] = {
    "seed": seed,
    "steps": whole(1),
    "stop_at": whole(0),
    "dataset": section,
    "model": section,
    "optimizer": section,
    "schedule": section,
    "label_smoothing": share,
    "data_pruning": section,
    "method": section,
    "sparsity": share,
    "distribution": section,
    "rules": sequence,
    "execution": word,
    "mesh": rule("devices by axis", _is_mesh),
    "sharding": sequence,
    "log_every": whole(1),
    "eval_every": whole(1),
    "checkpoint_every": whole(0),
    "keep": whole(1),
    "check_every": whole(0),
    "on_nonfinite": choice(finite.CHOICES),
    "progress": flag,
    "tensorboard": flag,
}
"""The keys of a config, all required but `LATER`; `configs/common.py` has a value and an explanation for each."""

LATER: dict[str, Any] = {"data_pruning": {"name": "none"}}
"""Keys that configs of earlier versions lack, and the values that they have there."""

DENSE = "dense"
"""The method that is no algorithm: the inner optimizer alone, without masks."""

MASKS_ONLY = ("method", "sparsity", "distribution", "rules")
"""Keys that a dense run does not read."""


def plain(config: Mapping[str, Any]) -> dict[str, Any]:
    """The config as plain JSON data: dicts, lists, numbers, strings.

    Raises:
      ValueError: it holds something else.

    >>> plain({"rules": (("a", "b"),)})
    {'rules': [['a', 'b']]}
    """
    try:
        as_dict = config.to_dict() if hasattr(config, "to_dict") else dict(config)  # pyrefly: ignore[missing-attribute]
        return json.loads(json.dumps(as_dict))
    except (TypeError, ValueError) as error:
        kind = type(config).__name__
        raise ValueError(
            f"config: expected sections of numbers, words and lists by name, got {kind}: {error}"
        ) from None


def completed(config: Mapping[str, Any]) -> dict[str, Any]:
    """A config with the keys that an earlier version did not have."""
    return {**LATER, **config}


def flat(config: Any, prefix: str = "") -> dict[str, Any]:
    """The values of a nested config by their keys with dots; an empty section is a value.

    >>> flat({"seed": 0, "method": {"name": "rigl", "period": 10}})
    {'seed': 0, 'method.name': 'rigl', 'method.period': 10}
    """
    found: dict[str, Any] = {}
    for key, value in config.items():
        nested = hasattr(value, "items") and len(value) > 0  # a ConfigDict is no Mapping
        found |= flat(value, f"{prefix}{key}.") if nested else {f"{prefix}{key}": value}
    return found


def check_keys(config: Mapping[str, Any]) -> None:
    """Checks the keys of a plain config and their values, but for what sections hold.

    Raises:
      ValueError: names the first wrong key, what was expected and what was given.
    """
    for key in config:
        if key not in KEYS:
            raise unknown("config", "key", key, KEYS)
    for key, fits in KEYS.items():
        if key not in config:
            raise ValueError(f"config: the key {key!r} is missing; configs/common.py gives every key a value")
        fits("config", key, config[key])
    if config["checkpoint_every"] % config["eval_every"]:
        raise ValueError(
            f"config: checkpoint_every must be a multiple of eval_every={config['eval_every']} (checkpoints are ranked "
            f"by test accuracy), got {config['checkpoint_every']}"
        )
