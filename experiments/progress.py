"""The progress bar and the clock of a run."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Iterator
from typing import NamedTuple

import rich.progress
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeRemainingColumn


class Progress(NamedTuple):
    """A progress bar with the time left; `advance(step)`, `describe(text)`, `close()`."""

    advance: Callable[[int], None]
    describe: Callable[[str], None]
    close: Callable[[], None]


def open_progress(steps: int, done: int, *, active: bool) -> Progress:
    """A bar in a terminal; nothing where there is none, or if not `active`."""
    console = Console(stderr=True)
    if not (active and console.is_terminal):
        return Progress(lambda step: None, lambda text: None, lambda: None)
    columns = (BarColumn(24), MofNCompleteColumn(), TextColumn("{task.description}"), TimeRemainingColumn())
    shown = rich.progress.Progress(*columns, console=console, refresh_per_second=4, transient=True)
    task = shown.add_task("starting", total=steps, completed=done)
    shown.start()
    return Progress(
        lambda step: shown.update(task, completed=step),
        lambda text: shown.update(task, description=text),
        shown.stop,
    )


class Clock:
    """Measures how long a run and its steps take.

    Args:
      started: when the run would have begun had it never been interrupted, by `time.monotonic`.
      step: steps done when it is made.
    """

    def __init__(self, started: float, step: int):
        self._started, self._since, self._step = started, time.monotonic(), step

    def seconds(self) -> float:
        """Of the whole run."""
        return time.monotonic() - self._started

    def lap(self, step: int) -> tuple[int, float]:
        """Steps and seconds since the last lap, pauses left out."""
        now = time.monotonic()
        steps, seconds = step - self._step, now - self._since
        self._since, self._step = now, step
        return steps, max(seconds, 1e-9)

    @contextlib.contextmanager
    def paused(self) -> Iterator[None]:
        """Excludes the time of its block from the lap."""
        began = time.monotonic()
        try:
            yield
        finally:
            self._since += time.monotonic() - began
