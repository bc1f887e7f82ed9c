"""A config as data."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any


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
