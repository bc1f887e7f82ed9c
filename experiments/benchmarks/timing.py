"""Comparing things on a noisy machine: interleaved in one run, as ratios, by the median."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import jax
import numpy as np

from experiments.io.environment import environment

RECORDS = Path(__file__).parents[1] / "records" / "benchmarks"


def interleave(
    contenders: Mapping[str, Callable[[], Any]], *, rounds: int = 30, warmup: int = 2
) -> dict[str, list[float]]:
    """Seconds of each call, in turns, so that a slow moment of the machine hits all alike.

    Args:
      contenders: name -> a call without arguments; what it returns is waited for.
      rounds: timed calls of each.
      warmup: untimed calls of each before.
    """
    seconds: dict[str, list[float]] = {name: [] for name in contenders}
    for turn in range(warmup + rounds):
        for name, call in contenders.items():
            start = time.perf_counter()
            jax.block_until_ready(call())
            if turn >= warmup:
                seconds[name].append(time.perf_counter() - start)
    return seconds


def ratio(of: list[float], to: list[float]) -> float:
    """Median over rounds of the quotient of the two times of a round."""
    return float(np.median(np.asarray(of) / np.asarray(to)))


def milliseconds(seconds: list[float]) -> float:
    """Median, in milliseconds."""
    return round(1e3 * float(np.median(seconds)), 3)


def rows(name: str) -> list[dict[str, Any]]:
    """The rows of the record `name.json`, none where there is no such record."""
    path = RECORDS / f"{name}.json"
    return json.loads(path.read_text())["rows"] if path.exists() else []


def write(name: str, rows: list[dict[str, Any]], **about: Any) -> Path:
    """Writes the record `name.json`: environment, what was measured, one row a line."""
    RECORDS.mkdir(parents=True, exist_ok=True)
    path = RECORDS / f"{name}.json"
    head = json.dumps({"environment": environment(), **about}, indent=1)[:-2]
    body = ",\n  ".join(json.dumps(row) for row in rows)
    path.write_text(f'{head},\n "rows": [\n  {body}\n ]\n}}\n')
    return path
