"""Runs steps in order of value, each a process of its own that is killed at its limit.

A fault on an accelerator takes its process with it, and a hang does not end. The lines of a step are written as they
come, so that a killed step, or a killed driver, loses nothing that was measured.
"""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import threading
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import IO, Any, NamedTuple

from experiments import pages

LEAST = 10.0
"""Seconds below which no step is started."""


class Step(NamedTuple):
    """A process of its own: its name, the seconds after which it is killed, what it is."""

    name: str
    seconds: float
    what: str


def drive(
    steps: Sequence[Step], seconds: float, folder: Path, command: Callable[[str], list[str]], *, least: float = LEAST
) -> list[dict[str, Any]]:
    """Runs steps one after the other until the time is over.

    Args:
      steps: in order of value.
      seconds: for all of them.
      folder: gets `device.jsonl` and `device.log`, which are appended to.
      command: the command line of a step, by its name. It prints JSON objects, one a line, and ignored text.
      least: seconds below which no step is started.

    Returns:
      The lines: those of the steps, with the step's name, and one for the end of each step, with its `status`.
    """
    folder.mkdir(parents=True, exist_ok=True)
    found: list[dict[str, Any]] = []
    end = time.monotonic() + seconds
    with (folder / "device.jsonl").open("a") as file, (folder / "device.log").open("a") as log:

        def write(line: dict[str, Any]) -> None:
            found.append(line)
            file.write(json.dumps(line) + "\n")
            file.flush()

        for step in steps:
            start = time.monotonic()
            allowed = min(step.seconds, end - start)
            if allowed < least:
                write({"step": step.name, "status": "not started, no time is left"})
                continue
            log.write(f"== {step.name}\n")
            log.flush()
            status = _run(command(step.name), allowed, log, lambda row, name=step.name: write({"step": name, **row}))
            write({"step": step.name, "status": status, "seconds": round(time.monotonic() - start, 1)})
            print(f"{step.name}: {status} after {time.monotonic() - start:.0f} s", flush=True)
    return found


def _run(command: list[str], seconds: float, log: IO[str], write: Callable[[dict[str, Any]], None]) -> str:
    """Runs one step, writes its rows as they come, and says how it ended."""
    # A session of its own: the children of a step that is killed are killed too.
    child = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=log, text=True, start_new_session=True)
    assert child.stdout is not None
    reader = threading.Thread(target=_read, args=(child.stdout, write, log), daemon=True)
    reader.start()
    try:
        code = child.wait(seconds)
        status = "done" if code == 0 else f"failed with {code}, see device.log"
    except subprocess.TimeoutExpired:
        status = f"killed after {seconds:.0f} s"
    finally:
        # Also after an ordinary end, because a child of the step may still hold the pipe.
        with contextlib.suppress(ProcessLookupError, PermissionError):
            os.killpg(child.pid, signal.SIGKILL)
    try:
        child.wait(5)
    except subprocess.TimeoutExpired:
        status += ", and did not die"
    reader.join(5)
    return status


def _read(lines: IO[str], write: Callable[[dict[str, Any]], None], log: IO[str]) -> None:
    with lines:
        for line in lines:
            row = _row(line)
            if row is None:
                log.write(line)
                log.flush()
            else:
                write(row)


def _row(line: str) -> dict[str, Any] | None:
    """The JSON object of a line; None where it is something else, such as one that was cut off."""
    try:
        row = json.loads(line)
    except ValueError:
        return None
    return row if isinstance(row, dict) else None


def table(lines: Sequence[dict[str, Any]]) -> str:
    """What was found, a heading for each step and a table for rows of the same columns."""
    text: list[str] = []
    for name in dict.fromkeys(line["step"] for line in lines):
        own = [{key: value for key, value in line.items() if key != "step"} for line in lines if line["step"] == name]
        rows = [row for row in own if "status" not in row]
        ends = [f"{row['status']}, {row.get('seconds', 0)} s" for row in own if "status" in row]
        text.append(f"\n### {name}: {'; '.join(ends) or 'no end was written'}\n")
        for columns in dict.fromkeys(tuple(row) for row in rows):
            alike = [[str(value) for value in row.values()] for row in rows if tuple(row) == columns]
            text.append(pages.table(list(columns), alike))
    return "\n".join(text)


def read(path: Path) -> list[dict[str, Any]]:
    """The lines that a driver wrote. The last may be cut off, then it is left out."""
    rows = map(_row, path.read_text().splitlines())
    return [row for row in rows if row is not None and "step" in row]
