"""The run directory: what a run writes, and what of it is worth keeping.

    config.json  env.json  metrics.jsonl  summary.json  checkpoints/  tensorboard/  lock

`metrics.jsonl` holds one JSON object a line with a `kind` and a `step`, the number of training steps done when it was
made. A run without `summary.json` is not finished. `lock` is held by the process that trains.
"""

from __future__ import annotations

import argparse
import datetime
import errno
import importlib.metadata
import json
import math
import os
import platform
import subprocess
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from experiments import files, texts


class Writer(NamedTuple):
    """Where a run's lines go.

    Attributes:
      write: `(kind, step, values)`: one line, in one piece; its numbers also go to TensorBoard. OSError where the disk
        does not take it.
      sync: waits until the lines so far would survive a power cut. Before a checkpoint, which vouches for them.
      lines: how many there are by now, with those from before.
      close: writes out what is buffered.
    """

    write: Callable[[str, int, Mapping[str, Any]], None]
    sync: Callable[[], None]
    lines: Callable[[], int]
    close: Callable[[], None]


def open_writer(workdir: Path, step: int, *, tensorboard: bool, active: bool = True) -> Writer:
    """A writer that continues after `step`: lines of later steps, left by a run that was killed, are removed.

    Args:
      workdir: the run directory.
      step: the number of steps done (those of the restored checkpoint); -1 starts from nothing.
      tensorboard: also write TensorBoard events.
      active: False (every process but the first) writes nothing at all.
    """
    if not active:
        return Writer(lambda kind, step, values: None, lambda: None, lambda: 0, lambda: None)
    path = workdir / "metrics.jsonl"
    count = truncate(path, step)
    file = files.open_to_append(path)
    events = _events(workdir / "tensorboard", step) if tensorboard else None

    def write(kind: str, step: int, values: Mapping[str, Any]) -> None:
        nonlocal count
        line = (json.dumps({"step": step, "kind": kind, **values}, allow_nan=False) + "\n").encode()
        with files.told(path):
            if (written := file.write(line)) != len(line):
                raise OSError(errno.ENOSPC, f"{written} of {len(line)} bytes were written")
        count += 1
        if events is not None:
            for name, value in _scalars(values):
                events.add_scalar(f"{kind}/{name}", value, step)

    def close() -> None:
        file.close()
        if events is not None:
            events.close()

    return Writer(write, lambda: os.fsync(file.fileno()), lambda: count, close)


class Bar(NamedTuple):
    """A progress bar with the time left; `advance(step)`, `describe(text)`, `close()`."""

    advance: Callable[[int], None]
    describe: Callable[[str], None]
    close: Callable[[], None]


def open_bar(steps: int, done: int, *, active: bool) -> Bar:
    """A bar in a terminal; nothing where there is none, or if not `active`."""
    console = Console(stderr=True)
    if not (active and console.is_terminal):
        return Bar(lambda step: None, lambda text: None, lambda: None)
    columns = (BarColumn(24), MofNCompleteColumn(), TextColumn("{task.description}"), TimeRemainingColumn())
    progress = Progress(*columns, console=console, refresh_per_second=4, transient=True)
    task = progress.add_task("starting", total=steps, completed=done)
    progress.start()
    return Bar(
        lambda step: progress.update(task, completed=step),
        lambda text: progress.update(task, description=text),
        progress.stop,
    )


def make(workdir: Path) -> None:
    """Makes the run directory, if it is missing.

    Raises:
      OSError: one line that names it.
    """
    with files.told(workdir):
        workdir.mkdir(parents=True, exist_ok=True)


def begin(workdir: Path, config: Mapping[str, Any]) -> None:
    """Makes the run directory and writes config and environment, where an earlier start has not."""
    make(workdir)
    if not (workdir / "env.json").exists():
        files.write_json(workdir / "env.json", environment())
    if not (workdir / "config.json").exists():
        files.write_json(workdir / "config.json", dict(config))


SUMMARY = ("test_accuracy", "steps", "seed", "method", "final_sparsity", "flops_inference_x_dense", "seconds")
"""Fields of `summary.json` that commands read."""


def read_summary(workdir: Path) -> dict[str, Any] | None:
    """The summary of a finished run, None for an unfinished one.

    Raises:
      ValueError: the file is damaged; it names the fields that are missing.
    """
    summary = files.read_json(workdir / "summary.json")
    if summary is None:
        return None
    if missing := [name for name in SUMMARY if name not in summary]:
        raise ValueError(f"{workdir / 'summary.json'}: expected the summary of a run, it lacks {', '.join(missing)}")
    for name in SUMMARY:
        number = isinstance(summary[name], (int, float)) or (name == "test_accuracy" and summary[name] is None)
        if name != "method" and not number:
            raise ValueError(f"{workdir / 'summary.json'}: {name} must be a number, got {summary[name]!r:.50}")
    return summary


def finished(workdir: Path) -> bool:
    """Whether a run has its summary; one that is damaged is made again from the last checkpoint."""
    try:
        return read_summary(workdir) is not None
    except ValueError:
        return False


def _events(directory: Path, step: int) -> Any:
    import tensorboardX  # here, because it costs a second that a run without events need not pay

    return tensorboardX.SummaryWriter(str(directory), purge_step=max(step + 1, 0))


def _scalars(values: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, float]]:
    for key, value in values.items():
        if isinstance(value, Mapping):
            yield from _scalars(value, f"{prefix}{key}/")
        elif isinstance(value, (int, float)) and not isinstance(value, bool):
            yield prefix + key, value


def truncate(path: Path, step: int) -> int:
    """Keeps the lines of steps up to `step`; drops later ones and a last line that was cut short. How many are kept."""
    if not path.exists():
        return 0
    kept = [line for line in files.read_lines(path) if line["step"] <= step]
    files.write_atomically(path, "".join(json.dumps(line) + "\n" for line in kept))
    return len(kept)


def environment() -> dict[str, Any]:
    """What produced a run: versions, platform, devices, commit, time. No paths and no host name."""
    versions = {name: importlib.metadata.version(name) for name in ("jax", "jaxlib", "flax", "optax", "numpy")}
    devices = jax.devices()
    return {
        "python": platform.python_version(),
        **versions,
        "platform": f"{platform.system()} {platform.machine()}",
        "cores": os.cpu_count(),
        "device_kind": devices[0].device_kind,
        "device_count": len(devices),
        "git_commit": _commit(),
        "time": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
    }


def _commit() -> str | None:
    command = ["git", "-C", str(Path(__file__).parent), "rev-parse", "HEAD"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=10, check=False)
    except (OSError, subprocess.TimeoutExpired):
        return None
    return done.stdout.strip() or None if done.returncode == 0 else None


def check_finite(loss: float, step: int) -> None:
    """Stops a run whose loss is lost.

    Raises:
      FloatingPointError: the mean loss since the last line is nan or infinite.
    """
    if not math.isfinite(loss):
        raise FloatingPointError(f"the loss is {loss} at step {step}")


# --- committed records -------------------------------------------------------------------------------------------


def export(run: Path, records: Path, *, points: int = 40, pictures: bool = False) -> Path:
    """Copies what is worth committing of a finished run into `records/<name of the run>`.

    Kept are config, environment and summary, and of the metrics the eval lines and at most `points` evenly spaced
    masks lines (the first and the last among them), with floats rounded to 6 digits. `pictures` keeps the
    first-layer masks too, which are the largest lines.

    Raises:
      ValueError: the run is not finished.
    """
    if files.read_json(run / "summary.json") is None:
        raise ValueError(f"export: {run.name} is not finished, it has no summary.json")
    if absent := [name for name in ("config.json", "env.json", "metrics.jsonl") if not (run / name).exists()]:
        raise ValueError(f"export: {run.name} has no {absent[0]}")
    target = records / run.name
    target.mkdir(parents=True, exist_ok=True)
    for name in ("config.json", "env.json", "summary.json"):
        value = files.read_json(run / name) or {}
        if name == "config.json" and isinstance(value.get("dataset"), dict):
            value["dataset"].pop("data_dir", None)  # a path of the machine the run was made on
        files.write_json(target / name, value)
    lines = files.read_lines(run / "metrics.jsonl")
    masks = [line for line in lines if line["kind"] == "masks"]
    spaced = {round(i * (len(masks) - 1) / max(points - 1, 1)) for i in range(min(points, len(masks)))}
    dropped = {id(line) for i, line in enumerate(masks) if len(masks) > points and i not in spaced}
    kinds = {"eval", "masks"} | ({"first_layer"} if pictures else set())
    kept = [line for line in lines if line["kind"] in kinds and id(line) not in dropped]
    text = "".join(json.dumps(_rounded(line), separators=(",", ":")) + "\n" for line in kept)
    files.write_atomically(target / "metrics.jsonl", text)
    return target


def _rounded(value: Any) -> Any:
    if isinstance(value, float):
        return round(value, 6)
    return {k: _rounded(v) for k, v in value.items()} if isinstance(value, dict) else value


def main(argv: Sequence[str] | None = None) -> int:
    """`python -m experiments.records runs/fashion_mnist experiments/records/fashion_mnist` exports finished runs."""
    parser = argparse.ArgumentParser(description="Copy what is worth committing of the finished runs of a study.")
    parser.add_argument("study", type=Path, help="folder of run directories")
    parser.add_argument("records", type=Path, help="folder to write to")
    arguments = parser.parse_args(argv)
    try:
        for path in sorted(arguments.study.glob("*/summary.json")):
            summary = read_summary(path.parent) or {}
            # One seed's pictures are enough to look at.
            print(texts.plain(export(path.parent, arguments.records, pictures=summary.get("seed") == 0).name))
    except (ValueError, OSError) as error:
        print(f"error: {texts.plain(error)}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
