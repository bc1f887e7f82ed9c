"""The run directory: what a run writes, and what of it is worth keeping.

    config.json  env.json  metrics.jsonl  summary.json  checkpoints/  tensorboard/

`metrics.jsonl` holds one JSON object a line with a `kind` and a `step`, the number of training steps done when it was
made. A run without `summary.json` is not finished.
"""

from __future__ import annotations

import argparse
import contextlib
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

Line = dict[str, Any]


class Writer(NamedTuple):
    """Where a run's lines go.

    Attributes:
      write: `(kind, step, values)`: one line, in one piece; its numbers also go to TensorBoard. OSError where the disk
        does not take it.
      sync: waits until the lines so far would survive a power cut. Before a checkpoint, which vouches for them.
      close: writes out what is buffered.
    """

    write: Callable[[str, int, Mapping[str, Any]], None]
    sync: Callable[[], None]
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
        return Writer(lambda kind, step, values: None, lambda: None, lambda: None)
    path = workdir / "metrics.jsonl"
    truncate(path, step)
    file = path.open("ab", buffering=0)  # nothing is left behind in a buffer when a write fails
    events = _events(workdir / "tensorboard", step) if tensorboard else None

    def write(kind: str, step: int, values: Mapping[str, Any]) -> None:
        line = (json.dumps({"step": step, "kind": kind, **values}, allow_nan=False) + "\n").encode()
        with told(path):
            if (written := file.write(line)) != len(line):
                raise OSError(errno.ENOSPC, f"{written} of {len(line)} bytes were written")
        if events is not None:
            for name, value in _scalars(values):
                events.add_scalar(f"{kind}/{name}", value, step)

    def close() -> None:
        file.close()
        if events is not None:
            events.close()

    return Writer(write, lambda: os.fsync(file.fileno()), close)


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


def begin(workdir: Path, config: Mapping[str, Any]) -> None:
    """Makes the run directory and writes config and environment, where an earlier start has not."""
    with told(workdir):
        workdir.mkdir(parents=True, exist_ok=True)
    if not (workdir / "env.json").exists():
        write_json(workdir / "env.json", environment())
    if not (workdir / "config.json").exists():
        write_json(workdir / "config.json", dict(config))


def read_json(path: Path) -> Any:
    """A JSON file's value, None where there is no file.

    Raises:
      ValueError: the file is not JSON, or no object.
    """
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return None
    except ValueError as error:
        raise ValueError(f"{path}: not JSON: {error}") from None
    if not isinstance(value, dict):
        raise ValueError(f"{path}: expected a JSON object, got {type(value).__name__}")
    return value


SUMMARY = ("test_accuracy", "steps", "seed", "method", "final_sparsity", "flops_inference_x_dense", "seconds")
"""Fields of `summary.json` that commands read."""


def read_summary(workdir: Path) -> dict[str, Any] | None:
    """The summary of a finished run, None for an unfinished one.

    Raises:
      ValueError: the file is damaged; it names the fields that are missing.
    """
    summary = read_json(workdir / "summary.json")
    if summary is not None and (missing := [name for name in SUMMARY if name not in summary]):
        raise ValueError(f"{workdir / 'summary.json'}: expected the summary of a run, it lacks {', '.join(missing)}")
    return summary


def _events(directory: Path, step: int) -> Any:
    import tensorboardX  # here, because it costs a second that a run without events need not pay

    return tensorboardX.SummaryWriter(str(directory), purge_step=max(step + 1, 0))


def _scalars(values: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, float]]:
    for key, value in values.items():
        if isinstance(value, Mapping):
            yield from _scalars(value, f"{prefix}{key}/")
        elif isinstance(value, (int, float)) and not isinstance(value, bool):
            yield prefix + key, value


def truncate(path: Path, step: int) -> None:
    """Keeps the lines of steps up to `step`; drops later ones and a last line that was cut short."""
    if not path.exists():
        return
    kept = [line for line in read_lines(path) if line["step"] <= step]
    write_atomically(path, "".join(json.dumps(line) + "\n" for line in kept))


def read_lines(path: Path) -> list[Line]:
    """The lines of a metrics file. A last line that is cut short is left out.

    Raises:
      ValueError: a line that is not JSON, or no object with a "step" and a "kind", other than the last.
    """
    lines = path.read_text(encoding="utf-8").splitlines()
    found = []
    for i, line in enumerate(lines):
        try:
            value = json.loads(line)
        except json.JSONDecodeError as error:
            if i + 1 < len(lines):
                raise ValueError(f"{path.name}: line {i + 1} is not JSON: {error}") from None
            continue
        if not isinstance(value, dict) or not isinstance(value.get("step"), int) or "kind" not in value:
            raise ValueError(f'{path.name}: line {i + 1}: expected an object with "step" (int) and "kind"')
        found.append(value)
    return found


def write_atomically(path: Path, text: str) -> None:
    """Writes the whole file or none of it."""
    part = path.with_name(path.name + ".part")
    with told(path):
        with part.open("w", encoding="utf-8") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())  # or a power cut could leave the name without the content
        part.replace(path)


@contextlib.contextmanager
def told(path: Path) -> Iterator[None]:
    """Turns what goes wrong while writing into one line that names the file and what is left.

    Raises:
      OSError: in place of the one that came.
    """
    try:
        yield
    except OSError as error:
        raise OSError(
            f"records: cannot write {path}: {error.strerror or error}; checkpoints written before are intact"
        ) from error


def write_json(path: Path, value: Any) -> None:
    """Writes a small JSON file, indented, whole or not at all."""
    write_atomically(path, json.dumps(value, indent=2, allow_nan=False) + "\n")


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
    if read_json(run / "summary.json") is None:
        raise ValueError(f"export: {run.name} is not finished, it has no summary.json")
    if absent := [name for name in ("config.json", "env.json", "metrics.jsonl") if not (run / name).exists()]:
        raise ValueError(f"export: {run.name} has no {absent[0]}")
    target = records / run.name
    target.mkdir(parents=True, exist_ok=True)
    for name in ("config.json", "env.json", "summary.json"):
        value = read_json(run / name)
        if name == "config.json" and isinstance(value.get("dataset"), dict):
            value["dataset"].pop("data_dir", None)  # a path of the machine the run was made on
        write_json(target / name, value)
    lines = read_lines(run / "metrics.jsonl")
    masks = [line for line in lines if line["kind"] == "masks"]
    spaced = {round(i * (len(masks) - 1) / max(points - 1, 1)) for i in range(min(points, len(masks)))}
    dropped = {id(line) for i, line in enumerate(masks) if len(masks) > points and i not in spaced}
    kinds = {"eval", "masks"} | ({"first_layer"} if pictures else set())
    kept = [line for line in lines if line["kind"] in kinds and id(line) not in dropped]
    text = "".join(json.dumps(_rounded(line), separators=(",", ":")) + "\n" for line in kept)
    write_atomically(target / "metrics.jsonl", text)
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
            print(export(path.parent, arguments.records, pictures=summary.get("seed") == 0).name)
    except (ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
