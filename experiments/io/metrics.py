"""The metrics of a run: one JSON object a line, and the same numbers for TensorBoard."""

from __future__ import annotations

import errno
import json
import os
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

from experiments.io import files

Values = Mapping[str, Any]


class MetricWriter(NamedTuple):
    """Writes the lines of a run.

    Attributes:
      write: `(kind, step, values)`: writes one line at once; its numbers also go to TensorBoard. OSError if the disk
        does not accept it.
      write_later: `(kind, step, f)`: the same for `f()`, which is called before the next line is written; it may wait
        for the devices.
      flush: writes the lines of `write_later`.
      sync: waits until the lines so far are on the disk. Called before a checkpoint, which says how many there are.
      lines: the number of lines so far, those of earlier starts included.
      close: writes the buffered lines.
    """

    write: Callable[[str, int, Values], None]
    write_later: Callable[[str, int, Callable[[], Values]], None]
    flush: Callable[[], None]
    sync: Callable[[], None]
    lines: Callable[[], int]
    close: Callable[[], None]


def open_writer(workdir: Path, step: int, *, tensorboard: bool, active: bool = True) -> MetricWriter:
    """A writer that continues after `step`: lines of later steps, left by a run that was killed, are removed.

    Args:
      workdir: the run directory.
      step: the number of steps done (those of the restored checkpoint); -1 starts from nothing.
      tensorboard: also write TensorBoard events.
      active: False (every process but the first) writes nothing at all.
    """
    if not active:
        return MetricWriter(
            write=lambda kind, step, values: None,
            write_later=lambda kind, step, values: None,
            flush=lambda: None,
            sync=lambda: None,
            lines=lambda: 0,
            close=lambda: None,
        )
    path = workdir / "metrics.jsonl"
    count = truncate(path, step)
    file = files.open_to_append(path)
    events = _events(workdir / "tensorboard", step) if tensorboard else None

    later: list[tuple[str, int, Callable[[], Values]]] = []

    def flush() -> None:
        waiting = [*later]
        later.clear()
        for kind, step, values in waiting:
            write_now(kind, step, values())

    def write(kind: str, step: int, values: Values) -> None:
        flush()
        write_now(kind, step, values)

    def write_now(kind: str, step: int, values: Values) -> None:
        nonlocal count
        line = (json.dumps({"step": step, "kind": kind, **values}, allow_nan=False) + "\n").encode()
        with files.one_line_errors(path):
            if (written := file.write(line)) != len(line):
                raise OSError(errno.ENOSPC, f"{written} of {len(line)} bytes were written")
        count += 1
        if events is not None:
            for name, value in _scalars(values):
                events.add_scalar(f"{kind}/{name}", value, step)

    def sync() -> None:
        flush()
        os.fsync(file.fileno())

    def close() -> None:
        file.close()
        if events is not None:
            events.close()

    return MetricWriter(
        write, lambda kind, step, values: later.append((kind, step, values)), flush, sync, lambda: count, close
    )


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
