"""Runs a sweep: every run that has no summary yet, each in a process of its own.

    python -m experiments.launch --config configs/digits_mlp.py    # dense, static, SET and RigL, one seed
    python -m experiments.launch --config my.py --methods rigl --seeds 3 --config.sparsity=0.8,0.9 --config.steps=500
    python -m experiments.launch --study fashion_mnist             # experiments/studies/fashion_mnist.py
    python -m experiments.launch --study my_study.py               # its sweep(add) names the runs
    python -m experiments.launch --study fashion_mnist --dry_run   # prints the commands
    python -m experiments.launch --config configs/imagenet_resnet50.py --methods rigl --runs /mnt/runs --hosts a,b
    python -m experiments.launch --config configs/imagenet_resnet50.py --methods rigl --runs /mnt/runs --tpu NAME:ZONE

With --config, --config.KEY=A,B makes a run of each value, and of each combination with those of other keys; commas in
brackets and quotes part nothing. A dense run, which has no masks, is made once for all values that are about masks. An
option that only your own method takes (or model, optimizer ...) is left out of the runs of others, made once likewise.
With --study, --config.KEY=VALUE holds for all runs.
The last two print what starts one run on several hosts, or on every worker of a TPU slice, and start nothing.
After a stop or a kill, give the same command: finished runs are kept, an unfinished one resumes from its checkpoint.
Paths are those of the folder in which the command is given; those in a study are the project's, or of the study's file.
What a run prints goes to `log.txt` in its directory.
"""

from __future__ import annotations

import argparse
import inspect
import itertools
import os
import shlex
import signal
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from experiments import build, command, own, processes, remote, studies, texts
from experiments.command import ROOT, Values
from experiments.config import DENSE, MASKS_ONLY
from experiments.io import files, run_directory
from experiments.main import parse
from rigl_jax import trees

DEFAULT_METHODS = ("dense", "static", "set", "rigl")


class Job(NamedTuple):
    """One run: its name, its directory and the command that makes it."""

    name: str
    workdir: Path
    command: list[str]

    @property
    def finished(self) -> bool:
        """Whether the run has its summary."""
        return run_directory.finished(self.workdir)


def study(name: str, root: Path, values: Values) -> list[Job]:
    """The jobs of a study, in its order.

    Args:
      name: a study of the project, or a file that has `sweep(add)`.
      root: the folder of all runs.
      values: further values that are set in every run.

    Raises:
      ValueError: an unknown study, a sweep that does not take `add`, or two runs of one name.
    """
    known = list(studies.SWEEPS)
    if name.endswith(".py"):
        sweep, folder, name = own.load(f"{name}:sweep"), Path(os.path.abspath(name)).parent, Path(name).stem
    elif name in known:
        sweep, folder = own.load(f"experiments.studies.{name}:sweep"), ROOT
    else:
        raise ValueError(f"launch: unknown study {name!r}, there is {', '.join(known)}{trees.hint(name, known)}")
    jobs: dict[str, Job] = {}

    def add(run: str, config: str, chosen: Mapping[str, Any]) -> None:
        if run in jobs:
            raise ValueError(f"launch: study {name!r} has two runs named {run!r}")
        own_values = [(key, str(value)) for key, value in chosen.items()]
        jobs[run] = job(run, str(folder / config), [*own_values, *values], root / name)

    try:
        inspect.signature(sweep).bind(add)
    except TypeError as error:
        raise ValueError(f"launch: sweep of study {name!r} must be a function of add alone: {error}") from None
    sweep(add)
    return list(jobs.values())


def grid(config: str, axes: Mapping[str, Sequence[str]], root: Path) -> list[Job]:
    """The jobs of one config file with every combination of some values.

    Args:
      config: the file, with `:VARIANT` if wanted.
      axes: `{key: values}`, with "method.name" and "seed" among them; keys of several values name the runs.
      root: the folder of all runs.

    Raises:
      ValueError: a value that is given twice, or two combinations of one name.
    """
    for key, values in axes.items():
        if twice := [text for i, text in enumerate(values) if text in values[:i]]:
            raise ValueError(f"launch: {key} is given {twice[0]!r} twice")
    folder = root / config.removesuffix(".py").replace(".py:", "-").rsplit("/", 1)[-1]
    jobs: dict[str, Job] = {}
    for cell in itertools.product(*axes.values()):
        chosen = dict(zip(axes, cell, strict=True))
        method = chosen["method.name"]
        shown = [key for key in axes if len(axes[key]) > 1 and key not in ("method.name", "seed")]
        if method == DENSE:
            masks_only = {key for key in shown if key.split(".")[0] in MASKS_ONLY}
            chosen |= {key: axes[key][0] for key in masks_only}
            shown = [key for key in shown if key not in masks_only]
        chosen = {key: text for key, text in chosen.items() if not _is_of_another(key, chosen, axes)}
        shown = [key for key in shown if key in chosen]
        parts = [f"{key.removesuffix('.name')}={own.label(chosen[key])}" for key in shown]
        name = texts.file_name("-".join([own.label(method), *parts, f"s{chosen['seed']}"]))
        made = job(name, os.path.abspath(config), list(chosen.items()), folder)
        if jobs.setdefault(name, made) != made:
            raise ValueError(f"launch: two runs would be named {name!r}")
    return list(jobs.values())


def _is_of_another(key: str, chosen: Mapping[str, str], axes: Mapping[str, Sequence[str]]) -> bool:
    """Whether a key is an option that the chosen entry of its section does not take, but another of the sweep does."""
    section, _, option = key.partition(".")
    names = axes.get(f"{section}.name", ())
    return (
        option != "name"
        and len(names) > 1
        and not build.takes(section, chosen[f"{section}.name"], option)
        and any(build.takes(section, name, option) for name in names)
    )


def split(text: str) -> list[str]:
    """The parts of a text between its commas, but for those in brackets and quotes.

    >>> split("0.8,0.9"), split("(1, 2),(3, 4)")
    (['0.8', '0.9'], ['(1, 2)', '(3, 4)'])
    """
    parts, depth, quote = [""], 0, ""
    for character in text:
        if quote:
            quote = "" if character == quote else quote
        elif character in "'\"":
            quote = character
        else:
            depth += (character in "([{") - (character in ")]}")
        if character == "," and not depth and not quote:
            parts.append("")
        else:
            parts[-1] += character
    return parts


def job(name: str, config: str, values: Values, folder: Path) -> Job:
    """A run as a job of its own process."""
    settings = [f"{command.PREFIX}{key}={text}" for key, text in values]
    line = [sys.executable, "-m", "experiments.main", "--config", config, *settings]
    return Job(name, folder / name, [*line, "--workdir", str(folder / name)])


def cores(slot: int, slots: int) -> set[int] | None:
    """The cores of one of several processes side by side; None if the system does not provide this."""
    if not hasattr(os, "sched_getaffinity"):
        return None
    mine = sorted(os.sched_getaffinity(0))
    return set(mine[slot % len(mine) :: slots]) if slots > 1 else set(mine)


def start(job: Job, slot: int, slots: int) -> subprocess.Popen[bytes]:
    """Starts a job on its share of the cores; XLA takes as many threads as it finds cores."""
    job.workdir.mkdir(parents=True, exist_ok=True)
    share = cores(slot, slots)
    path = os.pathsep.join([str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])])
    environment = {"JAX_COMPILATION_CACHE_DIR": str(ROOT / ".jax_cache"), **os.environ, "PYTHONPATH": path}
    with files.open_to_append(job.workdir / "log.txt") as log:
        # A session of its own: Ctrl-C reaches the launcher alone, which then asks its jobs to save.
        process = subprocess.Popen(job.command, stdout=log, stderr=log, env=environment, start_new_session=True)
    if share is not None:
        os.sched_setaffinity(process.pid, share)  # before it has begun to make threads
    return process


def outcome(job: Job, code: int) -> str:
    """One line about a job that ended."""
    if code == 0 and job.finished and (summary := run_directory.read_summary(job.workdir)):
        accuracy = summary["test_accuracy"]
        tested = "" if accuracy is None else f"test accuracy {100 * accuracy:.2f} %, "
        return f"{tested}{summary['seconds']:.0f} s"
    if code == 0:
        return "stopped before its end, by a signal or stop_at; the same command resumes it"
    if code == -signal.SIGTERM:
        return "stopped before it began to train; the same command starts it"
    lines = (job.workdir / "log.txt").read_text(encoding="utf-8", errors="replace").strip().splitlines()
    return f"failed with code {code}: {texts.plain(lines[-1]) if lines else 'no output'}"


def check(jobs: Sequence[Job]) -> None:
    """Reads and checks the configs of all jobs that are not finished, before any of them starts.

    Raises:
      ValueError: the first that is wrong; names the run.
    """
    for job in jobs:
        if not job.finished:
            try:
                build.check(parse(job.command[3:]).config)
            except ValueError as error:
                raise ValueError(f"launch: run {job.name}: {error}") from None


def run(jobs: Sequence[Job], slots: int) -> int:
    """Runs the jobs that are not finished, `slots` at a time; the number that failed or were left.

    Ctrl-C or SIGTERM stops the running ones, which save where they are and which the next launch resumes.
    """
    todo = [job for job in jobs if not job.finished]
    print(f"{len(jobs)} runs, {len(jobs) - len(todo)} finished before, {len(todo)} to do", flush=True)
    queue, running = list(todo), dict[int, tuple[Job, subprocess.Popen[bytes]]]()
    ended = failed = 0
    with processes.preemption() as interrupted:
        try:
            while (queue or running) and not interrupted(ended):
                for slot in range(slots):
                    while slot not in running and queue and queue[0].finished:  # by another launch in the meantime
                        ended += 1
                        print(f"[{ended}/{len(todo)}] {queue.pop(0).name}: finished by another launch", flush=True)
                    if queue and slot not in running:
                        running[slot] = (queue[0], start(queue.pop(0), slot, slots))
                for slot, (job, process) in list(running.items()):
                    code = process.poll()
                    if code is not None:
                        del running[slot]
                        ended, failed = ended + 1, failed + (code != 0)
                        print(f"[{ended}/{len(todo)}] {job.name}: {outcome(job, code)}", flush=True)
                time.sleep(0.2)
        finally:
            for _, process in running.values():
                process.terminate()
            for job, process in running.values():
                print(f"{job.name}: {outcome(job, process.wait())}", flush=True)
    return failed + len(running) + len(queue)


def commands(job: Job, options: argparse.Namespace) -> list[str]:
    """What starts a job, line by line: here, on several hosts or on a TPU slice."""
    if options.hosts is not None:
        return remote.on_hosts(job.command, options.hosts.split(","), options.port)
    return [remote.on_tpu(job.command, options.tpu)] if options.tpu is not None else [shlex.join(job.command)]


def parser() -> command.Parser:
    """The flags of the command."""
    made = command.parser("experiments.launch", __doc__ or "")
    made.add_argument("--study", help="a file in experiments/studies, or your own FILE.py; in place of --config")
    made.add_argument("--methods", default=",".join(DEFAULT_METHODS), help="with --config [%(default)s]")
    made.add_argument("--seeds", type=int, default=1, help="with --config, how many [1]")
    made.add_argument("--runs", type=Path, default=Path("runs"), help="folder of all runs [runs]")
    made.add_argument("--jobs", type=int, default=1, help="runs at a time, each on its share of the cores [1]")
    made.add_argument("--dry_run", action="store_true", help="print the commands of the runs that are left")
    made.add_argument("--hosts", help="print the commands of each run for these hosts, comma-separated")
    made.add_argument("--tpu", help="print the command of each run for a TPU slice, NAME:ZONE")
    made.add_argument("--port", type=int, default=8476, help="with --hosts, on the first one [%(default)s]")
    return made


def jobs_of(options: argparse.Namespace, values: Values) -> list[Job]:
    """The runs that a command line asks for.

    Raises:
      ValueError: flags that contradict each other, or what is wrong with the sweep.
    """
    if (options.study is None) == (options.config is None):
        raise ValueError("launch: give either --config or --study; python -m experiments.launch --help shows how")
    if options.hosts is not None and options.tpu is not None:
        raise ValueError("launch: give either --hosts or --tpu")
    if options.jobs < 1 or options.seeds < 1:
        raise ValueError(f"launch: expected 1 or more, got --jobs {options.jobs} --seeds {options.seeds}")
    root = options.runs.absolute()  # other hosts start elsewhere
    if options.study is not None:
        return study(options.study, root, values)
    axes = {"seed": [str(seed) for seed in range(options.seeds)], "method.name": options.methods.split(",")}
    return grid(options.config, axes | {key: split(text) for key, text in values}, root)


def main(arguments: Sequence[str] | None = None) -> int:
    """The command, without the program's name; returns the exit code: 0, 1 if a run failed, 2 for a wrong argument."""
    arguments = sys.argv[1:] if arguments is None else arguments
    failed = 0

    def launch() -> None:
        nonlocal failed
        options, values = command.parse(parser(), arguments or ["--help"])
        jobs = jobs_of(options, values)
        check(jobs)
        if options.dry_run or options.hosts is not None or options.tpu is not None:
            for job in jobs:
                if not job.finished:
                    print("\n".join(commands(job, options)))
        else:
            failed = run(jobs, options.jobs)

    return command.guarded(launch, debug="--debug" in arguments) or int(failed > 0)


if __name__ == "__main__":
    sys.exit(main())
