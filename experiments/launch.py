"""Runs a study: every run that has no summary yet, each in a process of its own.

    python -m experiments.launch --study fashion_mnist             # experiments/studies/fashion_mnist.py
    python -m experiments.launch --config configs/digits_mlp.py    # dense, static, SET and RigL, one seed
    python -m experiments.launch --study fashion_mnist --dry_run   # prints the commands
    python -m experiments.launch --config configs/imagenet_resnet50.py --methods rigl --runs /mnt/runs --hosts a,b
    python -m experiments.launch --config configs/imagenet_resnet50.py --methods rigl --runs /mnt/runs --tpu NAME:ZONE

The last two print what starts one run on several hosts, or on every worker of a TPU slice, and start nothing.
Stopped or killed, the same command goes on: finished runs are kept, an unfinished one resumes from its checkpoint.
Paths are those of the folder in which the command is given; a study's configs are the project's.
What a run prints goes to `log.txt` in its directory.
"""

from __future__ import annotations

import argparse
import importlib
import os
import pkgutil
import re
import shlex
import signal
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from experiments import build, studies, texts
from experiments.io import files, run_directory
from experiments.main import ROOT, guarded, parse, preemption
from rigl_jax import trees

METHODS = ("dense", "static", "set", "rigl")


class Job(NamedTuple):
    """One run: its name, its directory and the command that makes it."""

    name: str
    workdir: Path
    command: list[str]

    @property
    def finished(self) -> bool:
        """Whether the run has its summary."""
        return run_directory.finished(self.workdir)


def study(name: str, root: Path) -> list[Job]:
    """The jobs of a study, in its order.

    Raises:
      ValueError: an unknown study, or two runs of one name.
    """
    known = [module.name for module in pkgutil.iter_modules(studies.__path__)]
    if name not in known:
        raise ValueError(f"launch: unknown study {name!r}, there is {', '.join(known)}{trees.hint(name, known)}")
    jobs: dict[str, Job] = {}

    def add(run: str, config: str, values: Mapping[str, Any]) -> None:
        if run in jobs:
            raise ValueError(f"launch: study {name!r} has two runs named {run!r}")
        jobs[run] = job(run, str(ROOT / config), values, root / name)

    importlib.import_module(f"experiments.studies.{name}").sweep(add)
    return list(jobs.values())


def methods(config: str, chosen: Sequence[str], seeds: int, root: Path) -> list[Job]:
    """The jobs that compare methods on one config file."""
    if twice := [method for i, method in enumerate(chosen) if method in chosen[:i]]:
        raise ValueError(f"launch: --methods names {twice[0]!r} twice")
    folder = root / config.removesuffix(".py").replace(".py:", "-").rsplit("/", 1)[-1]
    config = os.path.abspath(config)
    return [
        job(f"{method}-s{seed}", config, {"method.name": method, "seed": seed}, folder)
        for seed in range(seeds)
        for method in chosen
    ]


def job(name: str, config: str, values: Mapping[str, Any], folder: Path) -> Job:
    """A run as a job of its own process."""
    overrides = [f"--config.{key}={value}" for key, value in values.items()]
    command = [sys.executable, "-m", "experiments.main", "--config", config, *overrides]
    return Job(name, folder / name, [*command, "--workdir", str(folder / name)])


def cores(slot: int, slots: int) -> set[int] | None:
    """The cores of one of several processes side by side; None where the system cannot say."""
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
        return "stopped before its end, for a signal or stop_at; the same command goes on"
    if code == -signal.SIGTERM:
        return "stopped before it had begun to train; the same command goes on"
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
                build.check(parse(job.command[2:]).config)
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
    with preemption() as interrupted:
        try:
            while (queue or running) and not interrupted(ended):
                for slot in range(slots):
                    while slot not in running and queue and queue[0].finished:  # by another launch meanwhile
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
        return on_hosts(job, options.hosts.split(","), options.port)
    return [on_tpu(job, options.tpu)] if options.tpu is not None else [shlex.join(job.command)]


def on_hosts(job: Job, hosts: Sequence[str], port: int) -> list[str]:
    """The command of each host for one run: the same but for its number. The first host is the coordinator.

    Args:
      job: the run; its directory must be one folder that all hosts see.
      hosts: addresses by which the hosts reach each other.
      port: free on the first host.

    Raises:
      ValueError: fewer than 2 hosts, or one named twice.
    """
    if len(hosts) < 2 or len(set(hosts)) < len(hosts) or not all(re.fullmatch(r"[\w.:\[\]-]+", host) for host in hosts):
        raise ValueError(f"launch: --hosts takes two or more different addresses, got {','.join(hosts)!r}")
    if not 0 < port < 1 << 16:
        raise ValueError(f"launch: --port must be from 1 to 65535, got {port}")
    command = shlex.join(["python", *_in_project(job.command[1:]), "--distributed"])
    place = f"JAX_COORDINATOR_ADDRESS={shlex.quote(f'{hosts[0]}:{port}')} JAX_NUM_PROCESSES={len(hosts)}"
    return [f"# on {host}\n{place} JAX_PROCESS_ID={i} {command}" for i, host in enumerate(hosts)]


def _in_project(arguments: Sequence[str]) -> list[str]:
    """The arguments for another machine, in its copy of the project: there the project's configs lie elsewhere."""
    configs = f"{ROOT}{os.sep}configs{os.sep}"
    return [f"configs/{a.removeprefix(configs)}" if a.startswith(configs) else a for a in arguments]


def on_tpu(job: Job, slice_: str) -> str:
    """The one command that starts a run on every worker of a TPU slice, `NAME:ZONE`; JAX finds their places itself.

    Raises:
      ValueError: not a name and a zone.
    """
    name, _, zone = slice_.partition(":")
    if not all(re.fullmatch(r"\w[\w.-]*", part) for part in (name, zone)):
        raise ValueError(f"launch: --tpu takes NAME:ZONE, got {slice_!r}")
    command = shlex.join([".venv/bin/python", *_in_project(job.command[1:]), "--distributed"])
    remote = f"cd {shlex.quote(ROOT.name)} && {command}"
    return shlex.join(
        ["gcloud", "compute", "tpus", "tpu-vm", "ssh", name, "--zone", zone, "--worker=all", f"--command={remote}"]
    )


def main(arguments: Sequence[str] | None = None) -> int:
    """The command; returns the exit code: 0, 1 if a run failed, 2 for a wrong argument."""
    parser = argparse.ArgumentParser(
        "experiments.launch", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    what = parser.add_mutually_exclusive_group(required=True)
    what.add_argument("--study", help="name of a file in experiments/studies")
    what.add_argument("--config", help="config file, with :variant if wanted")
    parser.add_argument("--methods", default=",".join(METHODS), help="with --config [%(default)s]")
    parser.add_argument("--seeds", type=int, default=1, help="with --config [1]")
    parser.add_argument("--runs", type=Path, default=Path("runs"), help="folder of all runs [runs]")
    parser.add_argument("--jobs", type=int, default=1, help="runs at a time, each on its share of the cores [1]")
    parser.add_argument("--dry_run", action="store_true", help="print the commands of what is left to do")
    where = parser.add_mutually_exclusive_group()
    where.add_argument("--hosts", help="print the commands of each run for these hosts, comma-separated")
    where.add_argument("--tpu", help="print the command of each run for a TPU slice, NAME:ZONE")
    parser.add_argument("--port", type=int, default=8476, help="with --hosts, on the first one [%(default)s]")
    options = parser.parse_args(arguments)
    failed = 0

    def launch() -> None:
        nonlocal failed
        if options.jobs < 1 or options.seeds < 1:
            raise ValueError(f"launch: expected 1 or more, got --jobs {options.jobs} --seeds {options.seeds}")
        root = options.runs.absolute()  # other hosts start elsewhere
        if options.study:
            jobs = study(options.study, root)
        else:
            jobs = methods(options.config, options.methods.split(","), options.seeds, root)
        check(jobs)
        if options.dry_run or options.hosts is not None or options.tpu is not None:
            for job in jobs:
                if not job.finished:
                    print("\n".join(commands(job, options)))
        else:
            failed = run(jobs, options.jobs)

    return guarded(launch, debug=False) or int(failed > 0)


if __name__ == "__main__":
    sys.exit(main())
