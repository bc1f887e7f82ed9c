"""The processes of a run: how they find each other, and how they are asked to stop."""

from __future__ import annotations

import contextlib
import os
import signal
import threading
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import jax

PLACE = ("JAX_COORDINATOR_ADDRESS", "JAX_NUM_PROCESSES", "JAX_PROCESS_ID")
"""Environment variables: the address of the first process, the number of processes, and the number of this one."""


def place(environ: Mapping[str, str]) -> dict[str, Any]:
    """The keywords of `jax.distributed.initialize` that the environment gives; {} where JAX must find out itself.

    Raises:
      ValueError: one of the three variables without the others, or one that is no number.

    >>> place({"JAX_COORDINATOR_ADDRESS": "10.0.0.2:1234", "JAX_NUM_PROCESSES": "2", "JAX_PROCESS_ID": "1"})
    {'coordinator_address': '10.0.0.2:1234', 'num_processes': 2, 'process_id': 1}
    """
    address, *numbers = (environ.get(name, "") for name in PLACE)
    if not any((address, *numbers)):
        return {}
    if not address or not all(number.isdigit() for number in numbers) or int(numbers[1]) >= int(numbers[0]):
        given = " ".join(f"{name}={environ.get(name, '')!r}" for name in PLACE)
        raise ValueError(f"--distributed: expected an address, a number of processes and a smaller id, got {given}")
    return {"coordinator_address": address, "num_processes": int(numbers[0]), "process_id": int(numbers[1])}


def join(*, asked: bool) -> None:
    """Joins the other processes of a run, if asked for or set in the environment; before any device is used.

    Raises:
      ValueError: the environment lacks the address of the first process.
    """
    if not asked and not os.environ.get("JAX_COORDINATOR_ADDRESS"):
        return
    options = place(os.environ)
    try:
        jax.distributed.initialize(**options)
    except ValueError as error:
        raise ValueError(f"--distributed: {error} Set {', '.join(PLACE)}.") from None


@contextlib.contextmanager
def preemption() -> Iterator[Callable[[int], bool]]:
    """Listens for SIGTERM, and gives `step -> bool`: is it time to save and go?

    Processes that train together are told by JAX, whose own handler hears the signal in any of them and has all stop
    at one step. Alone, the handler set here only leaves a note, and the one before is put back at the end.
    """
    if jax.distributed.is_initialized():
        from jax.experimental import multihost_utils

        yield multihost_utils.reached_preemption_sync_point
        return
    if threading.current_thread() is not threading.main_thread():  # elsewhere Python sets no handlers
        yield lambda step: False
        return
    asked = threading.Event()
    before = signal.signal(signal.SIGTERM, lambda number, frame: asked.set())
    try:
        yield lambda step: asked.is_set()
    finally:
        signal.signal(signal.SIGTERM, signal.SIG_DFL if before is None else before)
