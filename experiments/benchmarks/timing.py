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
Call = Callable[[], Any]
"""A call without arguments that is timed; what it returns is waited for."""


def contender(step: Callable[..., Any], state: Any, *arguments: Any) -> Call:
    """A call of `step(state, *arguments)` that feeds the state, which may be donated, back in."""
    held = [state]

    def call() -> Any:
        held[0] = step(held[0], *arguments)
        return held[0]

    return call


def interleave(
    contenders: Mapping[str, Call],
    *,
    rounds: int = 30,
    warmup: int = 2,
    before: Callable[[Call], Any] | None = None,
    clock: Callable[[], float] = time.perf_counter,
) -> dict[str, list[float]]:
    """Seconds of each call, in turns, so that a slow moment of the machine hits all alike.

    Args:
      contenders: by name.
      rounds: timed calls of each.
      warmup: untimed calls of each at the start.
      before: is given each call just before it is timed.
      clock: in seconds; `time.process_time` is that of the processor, which tells more beside other work.
    """
    seconds: dict[str, list[float]] = {name: [] for name in contenders}
    for turn in range(warmup + rounds):
        for name, call in contenders.items():
            if before is not None:
                jax.block_until_ready(before(call))
            start = clock()
            jax.block_until_ready(call())
            if turn >= warmup:
                seconds[name].append(clock() - start)
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


def about(name: str) -> dict[str, Any]:
    """The environment of the record `name.json`."""
    return json.loads((RECORDS / f"{name}.json").read_text())["environment"]


def write(name: str, rows: list[dict[str, Any]], **about: Any) -> Path:
    """Writes the record `name.json`: environment, what was measured, one row a line."""
    RECORDS.mkdir(parents=True, exist_ok=True)
    path = RECORDS / f"{name}.json"
    write_rows(path, {"environment": environment(), **about}, rows)
    return path


def write_rows(path: Path, head: Mapping[str, Any], rows: list[dict[str, Any]]) -> None:
    """Writes a record, one row a line."""
    body = ",\n  ".join(json.dumps(row) for row in rows)
    path.write_text(f'{json.dumps(head, indent=1)[:-2]},\n "rows": [\n  {body}\n ]\n}}\n')
