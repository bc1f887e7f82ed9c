"""A sparse kernel against its dense contender: call by call in turns, and a record that a second start completes.

The record is one JSON file: the environment, the peak of the processor as measured in the same run, and a row for each
case with its roofline: operations and bytes a second, and the share of that peak.
"""

from __future__ import annotations

import argparse
import concurrent.futures
import ctypes
import json
import os
import pathlib
import statistics
import time
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import jax

from experiments.benchmarks import timing
from experiments.benchmarks.timing import Call
from experiments.io.environment import environment
from rigl_jax import native
from rigl_jax.execution import kernels

Cases = Iterator[tuple[dict[str, Any], Callable[[], dict[str, Any]]]]


class Paired(NamedTuple):
    """Seconds of two contenders that took turns, and the median of dense / sparse over neighbouring calls."""

    dense: float
    sparse: float
    ratio: float
    low: float
    high: float


def paired(dense: Call, sparse: Call, repeats: int, *, cold: bool = False) -> Paired:
    """Time two calls in turns. Each returns arrays to wait for.

    Args:
      dense: the baseline.
      sparse: the contender.
      repeats: timed calls of each.
      cold: instead of two untimed calls just before each timed one, a sleep of 1 ms: caches then hold the other's data,
        and worker threads have gone to sleep, as in the middle of a training step.

    Returns:
      Median seconds of each, the median ratio, and its quartiles.
    """

    def twice(call: Call) -> Any:
        jax.block_until_ready(call())
        return call()

    before = (lambda call: time.sleep(1e-3)) if cold else twice
    seconds = timing.interleave({"dense": dense, "sparse": sparse}, rounds=repeats, warmup=1, before=before)
    times = seconds["dense"], seconds["sparse"]
    ratios = [a / b for a, b in zip(*times, strict=True)]
    low, _, high = statistics.quantiles(ratios, n=4) if len(ratios) > 1 else ratios * 3
    return Paired(statistics.median(times[0]), statistics.median(times[1]), statistics.median(ratios), low, high)


def peak_gflops(threads: int) -> float | None:
    """Multiply-adds in registers on `threads` threads at once, the best of ten, in 1e9 operations a second."""
    library = native.library()
    if library is None:
        return None
    library.rigl_spin.restype, rounds, best = ctypes.c_int64, ctypes.c_int64(1_000_000), 0.0
    with concurrent.futures.ThreadPoolExecutor(threads) as pool:
        for _ in range(10):
            start = time.perf_counter()
            work = sum(pool.map(library.rigl_spin, [rounds] * threads))
            best = max(best, work / (time.perf_counter() - start) / 1e9)
    return best


def main(name: str, description: str, cases: Callable[[int], Cases], repeats: int) -> None:
    """The command line of a benchmark: fills the record `name`.json.

    Args:
      name: of the record.
      description: for `--help`.
      cases: `repeats -> cases`; see `fill`.
      repeats: timed calls of each contender, by default.
    """
    parser = argparse.ArgumentParser(description=description)
    parser.add_argument("--fresh", action="store_true", help="forget the record and measure every case")
    parser.add_argument("--repeats", type=int, default=repeats)
    arguments = parser.parse_args()
    fill(timing.RECORDS / f"{name}.json", cases(arguments.repeats), arguments.fresh)


def fill(path: pathlib.Path, cases: Cases, fresh: bool) -> None:
    """Measure the cases that the record at `path` lacks, writing it after each, and print a line a case.

    Args:
      path: the JSON record.
      cases: (what identifies the case, a function that measures it and returns the rest of its row).
      fresh: forget what the record holds.
    """
    kept = json.loads(path.read_text())["rows"] if path.exists() and not fresh else []
    rows: list[dict[str, Any]] = []
    about = {**environment(), "kernels": kernels.backends()["native"].detail}
    record: dict[str, Any] = {"environment": about, "peak_gflops": peak_gflops(os.cpu_count() or 1)}
    path.parent.mkdir(parents=True, exist_ok=True)
    for identity, measure in cases:
        known = [row for row in kept if identity.items() <= row.items()]
        rows.append(known[0] if known else {**identity, **measure()})
        share = rows[-1]["gflops"] / record["peak_gflops"] if record["peak_gflops"] else None
        rows[-1].setdefault("share_of_peak", share if share is None else round(share, 3))
        print("  ".join(f"{name}={value}" for name, value in rows[-1].items()), flush=True)
        timing.write_rows(path, record, rows)


def row(times: Paired, cold: Paired, operations: float, moved: float) -> dict[str, Any]:
    """The measured part of a row.

    Args:
      times: warm.
      cold: cold.
      operations: floating-point operations of the sparse contender, two a multiply-add.
      moved: bytes that it must read and write at least once.
    """
    return {
        "dense_ms": round(times.dense * 1e3, 4),
        "sparse_ms": round(times.sparse * 1e3, 4),
        "ratio": round(times.ratio, 2),
        "ratio_quartiles": [round(times.low, 2), round(times.high, 2)],
        "ratio_cold": round(cold.ratio, 2),
        "gflops": round(operations / times.sparse / 1e9, 1),
        "megabytes": round(moved / 1e6, 2),
        "gigabytes_per_s": round(moved / times.sparse / 1e9, 1),
    }
