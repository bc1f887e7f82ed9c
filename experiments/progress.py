"""The progress bar of a run."""

from __future__ import annotations

from collections.abc import Callable
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
