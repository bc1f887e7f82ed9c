"""Trains one network from a config file.

    python -m experiments.main --config configs/digits_mlp.py --workdir runs/digits
    python -m experiments.main --config configs/digits_mlp.py:smoke --workdir runs/try --config.sparsity=0.95

Any value of the config can be set with --config.KEY=VALUE, --config.method.name=static|set|rigl|dense among them, and
so can every option of what a section's name stands for: --config.optimizer.name=adam --config.optimizer.b2=0.99.
Stopped or killed, a run goes on where its last checkpoint was when the same command is given again. On SIGTERM it saves
one first and exits with 0.

On several hosts the same command with --distributed runs on each, the workdir being one folder that all of them see.
Cloud TPUs and Slurm tell a process its place; elsewhere JAX_COORDINATOR_ADDRESS=HOST:PORT, JAX_NUM_PROCESSES and
JAX_PROCESS_ID do, and then the flag may be left out.

A config file is Python and is run: use files that you trust.
"""

from __future__ import annotations

import contextlib
import os
import re
import signal
import sys
import threading
import traceback
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
from absl import flags
from ml_collections import config_flags

from experiments import overrides, texts

PLACE = ("JAX_COORDINATOR_ADDRESS", "JAX_NUM_PROCESSES", "JAX_PROCESS_ID")
"""Environment variables that tell a process where the others are, how many there are, and which of them it is."""


ROOT = Path(__file__).resolve().parent.parent


class Command(NamedTuple):
    """What a command line asks for.

    Attributes:
      config: an ml_collections config.
      workdir: the run's folder.
      distributed: whether the process is one of several.
      debug: whether an error shows its traceback.
    """

    config: Any
    workdir: Path
    distributed: bool
    debug: bool


def _flags(argv: Sequence[str]) -> flags.FlagValues:
    """The command's flags, of which nothing global is kept."""
    values = flags.FlagValues()
    config_flags.DEFINE_config_file(
        "config", None, "Config file, with :variant if wanted.", flag_values=values, sys_argv=[*argv]
    )
    flags.DEFINE_string("workdir", None, "Run directory; made if missing, resumed if not.", flag_values=values)
    flags.DEFINE_bool("distributed", False, "One of several processes, on one host or many.", flag_values=values)
    flags.DEFINE_bool("debug", False, "Show the traceback of an error.", flag_values=values)
    flags.DEFINE_bool("help", False, "Show this text.", short_name="h", flag_values=values)
    return values


def parse(argv: Sequence[str]) -> Command:
    """The command line, the program's name first.

    Raises:
      ValueError: one line that says which argument is wrong.
      SystemExit: after the help text, if that was asked for.
    """
    if len(argv) == 1 or {"--help", "-h", "-help"} & set(argv):
        print(f"{__doc__}\n{_flags(argv).main_module_help()}")
        raise SystemExit(0)
    argv, ours = overrides.split(argv, _file_alone(argv))
    values = _flags(argv)
    try:
        rest = values([*argv])
    except (Exception, SystemExit) as error:  # a config file is Python, and may raise anything
        raise _refused(error, argv, list(values)) from None
    if len(rest) > 1:
        raise ValueError(f"main: expected only --flags, got {rest[1]!r}")
    flag: Any = values["config"]
    if flag.present and flag.config_filename and flag.value is None:
        raise ValueError("main: get_config of the config file gives None; does it return the config?")
    for name in ("config", "workdir"):
        if not values[name].present or (flag.config_filename if name == "config" else values[name].value) == "":
            raise ValueError(f"main: --{name} is missing; python -m experiments.main --help shows how")
    file = flag.config_filename.split(":")[0]
    if not Path(file).exists():
        raise _no_file(file)
    overrides.apply(flag.value, ours)
    return Command(flag.value, Path(str(values["workdir"].value)), values.distributed, values.debug)


def _no_file(file: str) -> ValueError:
    folder = Path("configs") if Path("configs").is_dir() else ROOT / "configs"
    there = ", ".join(sorted(str(path) for path in folder.glob("*.py") if path.stem != "common"))
    return ValueError(f"main: there is no config file {file}" + (f"; there are {there}" if there else ""))


def _refused(error: BaseException, argv: Sequence[str], known: list[str]) -> ValueError:
    """The error for a command line, or for the config file that it names."""
    if (place := _raised_in(error, argv)) is not None:
        return ValueError(f"main: reading the config, {place}: {type(error).__name__}: {_last_line(error)}")
    if isinstance(error, flags.UnrecognizedFlagError):
        return overrides.unknown(error.flagname, known)
    if isinstance(error, (KeyError, AttributeError)):  # what ml_collections says of a key that the config does not have
        return _unknown_key(argv)
    told = _last_line(error)
    missing = re.search(r"No such file or directory: '(.+)'", told)
    return _no_file(missing[1]) if missing else ValueError(f"main: {told}")


def _raised_in(error: BaseException | None, argv: Sequence[str]) -> str | None:
    """File and line of the config at which an error, or what was behind it, was raised; None if it was elsewhere."""
    if error is None:
        return None
    if isinstance(error, SyntaxError) and error.filename != "<unknown>":  # that is a key
        return f"{error.filename}, line {error.lineno}" if error.filename else "which is no text"
    named = {os.path.abspath(part.split("=")[-1].split(":")[0]) for part in argv[1:] if ".py" in part}
    frames = [f for f in traceback.extract_tb(error.__traceback__) if os.path.abspath(f.filename) in named]
    if frames:
        return f"{frames[-1].filename}, line {frames[-1].lineno}"
    return _raised_in(error.__cause__ or error.__context__, argv)


def _plain(argv: Sequence[str]) -> Any:
    """What the config file gives, without what the command line sets."""
    plain = [argv[0], *(a for a in argv[1:] if not re.match(r"--?(no)?config\.", a))]
    values = _flags(plain)
    values(plain, known_only=True)
    return values["config"].value


def _file_alone(argv: Sequence[str]) -> Any:
    """The same where something is set, None where nothing is or the file cannot be read, which is told later."""
    if not any(re.match(r"--?config\.", a) for a in argv[1:]):
        return None
    try:
        return _plain(argv)
    except (Exception, SystemExit):
        return None


def _unknown_key(argv: Sequence[str]) -> ValueError:
    """The error for the first --config.KEY that the config does not have; the file is read again without them."""
    try:
        return overrides.refuse_unknown(argv, _plain(argv))
    except (KeyError, AttributeError) as error:
        return ValueError(f"main: the config file must give get_config(variant), it raises {_last_line(error)}")


def _last_line(error: BaseException) -> str:
    """What an error says, in one line: a traceback that was put into a message ends with the reason."""
    lines = [line.strip() for line in str(error.args[0] if error.args else error).splitlines() if line.strip()]
    return lines[-1].removeprefix("ValueError: ") if lines else type(error).__name__


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
        raise ValueError(f"main: expected an address, a number of processes and a smaller process id, got {given}")
    return {"coordinator_address": address, "num_processes": int(numbers[0]), "process_id": int(numbers[1])}


def join(*, asked: bool) -> None:
    """Joins the other processes of a run, if that was asked for or the environment says so; before any device is used.

    Raises:
      ValueError: the environment does not say where the others are.
    """
    if not asked and not os.environ.get("JAX_COORDINATOR_ADDRESS"):
        return
    options = place(os.environ)
    try:
        jax.distributed.initialize(**options)
    except ValueError as error:
        raise ValueError(f"main: --distributed: {_last_line(error)} Set {', '.join(PLACE)}.") from None


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


def guarded(run: Callable[[], Any], *, debug: bool) -> int:
    """Runs it; 0, 2 after an error that a user can mend, told in one line on stderr, 130 after Ctrl-C."""
    try:
        run()
    except (ValueError, FloatingPointError, OSError) as error:
        if debug:
            traceback.print_exc()
        print(f"error: {texts.plain(' '.join(str(error).split()))}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        if debug:
            traceback.print_exc()
        print("\nstopped; the same command goes on from the last checkpoint", file=sys.stderr)
        return 130
    return 0


def main(argv: Sequence[str] | None = None) -> int:
    """The command; returns the exit code."""
    argv = sys.argv if argv is None else argv

    def run() -> None:
        config, workdir, distributed, _ = parse(argv)
        join(asked=distributed)
        with preemption() as interrupted:
            from experiments.train import train  # after the flags, so that a typo is told at once

            summary = train(config, workdir, interrupted=interrupted)
        if jax.process_index() > 0:
            return  # the first process speaks for all
        step, folder = summary["steps"], texts.plain(workdir)
        if step < min(config.stop_at or config.steps, config.steps):
            print(f"{folder}: stopped by SIGTERM, saved at step {step}; the same command goes on from there")
            return
        accuracy = summary["test_accuracy"]
        print(
            f"{folder}: {summary['method']} at {100 * summary['final_sparsity']:.1f} % sparsity, "
            f"step {summary['steps']}"
            + (f", test accuracy {100 * accuracy:.2f} %" if accuracy is not None else "")
            + f", {summary['flops_inference_x_dense']:.3f}x the FLOPs of dense, {summary['seconds']:.0f} s"
        )

    return guarded(run, debug={"--debug", "-debug", "--debug=true"} & {*argv} != set())  # also of what cannot be parsed


if __name__ == "__main__":
    sys.exit(main())
