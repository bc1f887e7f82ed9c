"""Kills runs at random moments, and trains one for a long time; the results must be those of an undisturbed run.

    python -m experiments.soak [--kills 30] [--steps 20000] [--cases masked packed ...] [--out experiments/records]

Takes about 6 minutes for 30 kills of one process (2 cores), half an hour for all. The record is `soak.json`; the exit
code is 1 if anything differs.
"""

from __future__ import annotations

import argparse
import collections
import json
import os
import random
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from signal import Signals
from typing import Any, NamedTuple

import jax
import numpy as np

from configs import digits_mlp
from experiments import sharding
from experiments.io import checkpoint, digests, files
from experiments.io.environment import environment
from experiments.task import prepare
from experiments.train import train

ROOT = Path(__file__).parents[1]
KINDS = ("step", "rewiring", "checkpoint", "epoch", "start")
"""Where a kill is aimed: ordinary step, rewiring, a checkpoint's write, an epoch's first step, the start."""


class Case(NamedTuple):
    """How a run is executed, by how many processes, and by which signal it is stopped."""

    execution: str = "masked"
    processes: int = 1
    rules: sharding.Rules = ()
    signal: Signals = Signals.SIGKILL


CASES = {
    "masked": Case(),
    "packed": Case("packed"),
    "masked, 2 processes": Case(processes=2),
    "packed, 2 processes": Case("packed", processes=2),
    "packed and cut, 2 processes": Case("packed", processes=2, rules=sharding.ALL_FSDP),
    "masked, SIGTERM": Case(signal=signal.SIGTERM),
    "masked, 2 processes, SIGTERM to one": Case(processes=2, signal=signal.SIGTERM),
}
STEPS, PERIOD, EPOCH = 2000, 5, 1437 // 16
PATIENCE = 600  # seconds that a run may take to end
UNTIMED = ("examples_per_s", "seconds")


def command(workdir: Path, execution: str, rules: sharding.Rules) -> list[str]:
    """A run of a few seconds that writes a line after every step, which shows its progress."""
    values = {"steps": STEPS, "log_every": 1, "eval_every": 20, "checkpoint_every": 20, "method.period": PERIOD}
    values |= {"execution": execution, "sharding": rules, "check_every": 10}
    options = [f"--config.{key}={value}" for key, value in values.items()]
    config = ["--config", "configs/digits_mlp.py:smoke", "--workdir", str(workdir)]
    return [sys.executable, "-m", "experiments.main", *config, *options]


def start(workdir: Path, case: str, cache: Path) -> list[subprocess.Popen[bytes]]:
    """Starts the processes of a run."""
    execution, count, rules, _ = CASES[case]
    environ = os.environ | {"JAX_COMPILATION_CACHE_DIR": str(cache), "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0"}
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{probe.getsockname()[1]}"
    found = []
    for index in range(count):
        own = {"JAX_COORDINATOR_ADDRESS": address, "JAX_NUM_PROCESSES": str(count), "JAX_PROCESS_ID": str(index)}
        with (workdir.parent / f"{workdir.name}-{index}.txt").open("ab") as log:
            environment = environ | (own if count > 1 else {})
            found.append(
                subprocess.Popen(command(workdir, execution, rules), cwd=ROOT, env=environment, stdout=log, stderr=log)
            )
    return found


def position(metrics: Path) -> int:
    """The step of the last whole line; -1 without one."""
    try:
        with metrics.open("rb") as file:
            file.seek(max(file.seek(0, os.SEEK_END) - 8192, 0))
            lines = file.read().split(b"\n")[:-1]
        return json.loads(lines[-1])["step"] if lines else -1
    except (FileNotFoundError, ValueError):
        return -1


def writing(workdir: Path) -> bool:
    """Whether a checkpoint is being written."""
    return any((workdir / "checkpoints").glob("*tmp*"))


def there(kind: str, workdir: Path, target: int) -> bool:
    """Whether a run has reached, by its files, the point of a kill of this kind."""
    step = position(workdir / "metrics.jsonl")
    if step < target:
        return False
    return {
        "step": step % PERIOD != 0,
        "rewiring": step % PERIOD == 0,
        "checkpoint": writing(workdir),
        "epoch": step % EPOCH == 0,
    }[kind]


def inode(path: Path) -> int:
    """Changes when a restart has cut the metrics back to its checkpoint."""
    return path.stat().st_ino if path.exists() else 0


def kill_once(workdir: Path, case: str, cache: Path, kind: str, rng: random.Random) -> dict[str, Any] | None:
    """Starts or resumes the run and stops it; None if it ended before.

    Returns:
      `{"aimed": kind, "line": last step written, "writing": whether a checkpoint was being written}`.

    Raises:
      ValueError: a run ended with an error by itself, or after SIGTERM.
      subprocess.TimeoutExpired: it hangs.
    """
    metrics = workdir / "metrics.jsonl"
    before, moment = inode(metrics), time.monotonic() + rng.uniform(0.2, 8.0)
    processes, target = start(workdir, case, cache), None
    while all(process.poll() is None for process in processes):
        if kind == "start":
            hit = time.monotonic() > moment
        elif inode(metrics) in (0, before):
            hit = False
        else:
            target = position(metrics) + rng.randint(1, 40) if target is None else target
            hit = there(kind, workdir, target)
        if hit:
            time.sleep(rng.uniform(0, 0.003))
            break
        time.sleep(0.0005)
    ended = all(process.poll() is not None for process in processes)
    codes = [process.poll() for process in processes]
    if any(codes):
        raise ValueError(f"soak: {case} ended by itself with {codes}: {_log(workdir)}")
    now = {"aimed": kind, "line": position(metrics), "writing": writing(workdir)}
    if CASES[case].signal == signal.SIGTERM:
        rng.choice(processes).send_signal(signal.SIGTERM)
        codes = [process.wait(timeout=PATIENCE) for process in processes]
        if any(codes) and not (workdir / "summary.json").exists():  # after it, signals are no longer handled
            raise ValueError(f"soak: {case} ended with {codes} after SIGTERM: {_log(workdir)}")
    else:
        for process in rng.sample(processes, len(processes)):
            process.kill()
            process.wait()
    return None if ended or (workdir / "summary.json").exists() else now


def finish(workdir: Path, case: str, cache: Path) -> None:
    """Runs to the end.

    Raises:
      ValueError: it ended with an error.
    """
    codes = [process.wait(timeout=PATIENCE) for process in start(workdir, case, cache)]
    if any(codes) or not (workdir / "summary.json").exists():
        raise ValueError(f"soak: {case} ended with {codes}: {_log(workdir)}")


def _log(workdir: Path) -> str:
    return (workdir.parent / f"{workdir.name}-0.txt").read_text(encoding="utf-8", errors="replace")[-2000:]


def differences(left: Path, right: Path) -> list[str]:
    """What differs between two finished runs: arrays of the last checkpoint by name, metric lines, the summary."""
    found = []
    states = [_arrays(run) for run in (left, right)]
    found += [name for name in states[0] if not np.array_equal(states[0][name], states[1][name], equal_nan=False)]
    lines = [[_untimed(line) for line in files.read_lines(run / "metrics.jsonl")] for run in (left, right)]
    if len(lines[0]) != len(lines[1]):
        found.append(f"metrics.jsonl: {len(lines[0])} and {len(lines[1])} lines")
    found += [f"metrics.jsonl: step {a['step']} {a['kind']}" for a, b in zip(*lines, strict=False) if a != b]
    summaries = [_untimed(files.read_json(run / "summary.json") or {}) for run in (left, right)]
    found += [f"summary.json: {key}" for key in summaries[0] if summaries[0][key] != summaries[1].get(key)]
    return found


def _untimed(line: dict[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in line.items() if key not in UNTIMED}


def _arrays(run: Path) -> dict[str, np.ndarray]:
    config = files.read_json(run / "config.json") or {}
    store = checkpoint.open_checkpoints(run / "checkpoints", keep=1)
    found = store.restore(prepare(config, jax.devices()[:1]).execution.abstract())
    store.close()
    if found is None:
        raise ValueError(f"soak: {run} has no checkpoint")
    state = found[0]
    named = {"digest": np.asarray(digests.digest(state))}
    for path, leaf in jax.tree_util.tree_leaves_with_path(state):
        is_key = jax.dtypes.issubdtype(leaf.dtype, jax.dtypes.prng_key)
        named[jax.tree_util.keystr(path)] = np.asarray(jax.random.key_data(leaf) if is_key else leaf)
    return named


def survive(case: str, kills: int, folder: Path, seed: int = 0) -> dict[str, Any]:
    """Kills a run so many times, finishes it and compares it with one that was left alone. A row of the record."""
    rng, cache = random.Random(seed), folder / "cache"
    kinds = KINDS if CASES[case].signal == signal.SIGKILL else KINDS[:-1]  # before it listens, SIGTERM is a kill
    straight, killed = folder / f"{case}-straight", folder / f"{case}-killed"
    began = time.monotonic()
    finish(straight, case, cache)
    moments: list[dict[str, Any]] = []
    while len(moments) < kills:
        moment = kill_once(killed, case, cache, kinds[len(moments) % len(kinds)], rng)
        if moment is None:
            break  # finished early: fewer kills, and the record has their number
        moments.append(moment)
        print(f"{case}: kill {len(moments)}/{kills} {moment}", flush=True)
    finish(killed, case, cache)
    return {
        "case": case,
        "asked": kills,
        "kills": len(moments),
        "aimed": dict(collections.Counter(moment["aimed"] for moment in moments)),
        "while_writing": sum(moment["writing"] for moment in moments),
        "damaged": len(list((killed / "checkpoints").glob("damaged-*"))),
        "steps": STEPS,
        "differences": differences(straight, killed)[:20],
        "seconds": round(time.monotonic() - began),
        **_when(),
    }


def endure(execution: str, steps: int, folder: Path) -> dict[str, Any]:
    """A long run with a rewiring every 10 steps: counts, memory and compilations. A row of the record."""
    config = digits_mlp.get_config()
    config.steps, config.execution, config.dataset.batch_size, config.model.features = steps, execution, 32, (64, 32)
    config.method.update({"period": 10, "stop": steps})
    config.update({"log_every": 100, "eval_every": 500, "checkpoint_every": 1000})
    config.update({"check_every": 10, "tensorboard": False})
    compiled: list[float] = []

    def listen(event: str, duration_secs: float, **_: str | int) -> None:
        if event.endswith("backend_compile_duration"):
            compiled.append(duration_secs)

    jax.monitoring.register_event_duration_secs_listener(listen)
    at: dict[int, tuple[float, int]] = {}
    first, last = min(2000, steps // 2), steps - 1

    def note(step: int) -> bool:
        if step in (first, last):
            at[step] = (_megabytes(), len(compiled))
        return False

    workdir, began = folder / f"long-{execution}", time.monotonic()
    values = json.loads(config.to_json_best_effort())
    train(values, workdir, devices=jax.devices()[:1], interrupted=note)
    plan = prepare(values, jax.devices()[:1]).plan or {}
    density = {name: leaf.active_weights / int(np.prod(leaf.shape)) for name, leaf in plan.items()}
    lines = [line for line in files.read_lines(workdir / "metrics.jsonl") if line["kind"] == "masks"]
    return {
        "execution": execution,
        "steps": steps,
        "rewirings": len(lines) - 1,
        "inexact_counts": sum(line["density"] != density for line in lines),
        "megabytes": {str(step): round(found[0], 1) for step, found in at.items()},
        "compilations_between": at[last][1] - at[first][1],
        "seconds": round(time.monotonic() - began),
        **_when(),
    }


def _megabytes() -> float:
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * os.sysconf("SC_PAGE_SIZE") / 2**20


def main(arguments: Sequence[str] | None = None) -> int:
    """The command; returns the exit code: 1 if anything differs from an undisturbed run."""
    parser = argparse.ArgumentParser("experiments.soak", description=__doc__)
    parser.add_argument("--kills", type=int, default=30, help="of each case [30]")
    parser.add_argument("--steps", type=int, default=20_000, help="of the long run, 2000 or more; 0: none [20000]")
    parser.add_argument("--cases", nargs="*", choices=list(CASES), default=list(CASES))
    parser.add_argument("--out", type=Path, default=ROOT / "experiments" / "records", help="folder of the record")
    options = parser.parse_args(arguments)
    path, long = options.out / "soak.json", ["masked", "packed"] if options.steps else []
    before = files.read_json(path) or {}
    rows = {row["case"]: row for row in before.get("killed", [])}  # the cases that are not run now keep their row
    longs = {row["execution"]: row for row in before.get("long", [])}
    with tempfile.TemporaryDirectory() as folder:
        for execution in long:
            longs[execution] = endure(execution, options.steps, Path(folder))
            _write(path, rows, longs)
            print(longs[execution], flush=True)
        for case in options.cases:
            rows[case] = survive(case, options.kills, Path(folder))
            _write(path, rows, longs)
            print(rows[case], flush=True)
    wrong = any(
        rows[case]["differences"] or rows[case]["damaged"] or rows[case]["kills"] < options.kills
        for case in options.cases
    )
    grown = any(longs[name]["inexact_counts"] or longs[name]["compilations_between"] for name in long)
    return int(wrong or grown)


_WHEN = ("git_commit", "time")  # of each row, for rows are kept from one run to the next


def _when() -> dict[str, Any]:
    return {key: environment()[key] for key in _WHEN}


def _write(path: Path, rows: dict[str, Any], longs: dict[str, Any]) -> None:
    machine = {key: value for key, value in environment().items() if key not in _WHEN}
    value = {"environment": machine, "killed": [*rows.values()], "long": [*longs.values()]}
    files.write_json(path, value)


if __name__ == "__main__":
    sys.exit(main())
