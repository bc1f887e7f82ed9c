"""Trains one network from a config file.

    python -m experiments.main --config configs/digits_mlp.py --workdir runs/digits
    python -m experiments.main --config configs/digits_mlp.py:smoke --workdir runs/try --config.sparsity=0.95

After a stop or a kill, the same command resumes the run from its last checkpoint. On SIGTERM a run saves
one first and exits with 0.

On several hosts the same command with --distributed runs on each, the workdir being one folder that all of them see.
Cloud TPUs and Slurm give a process its number; elsewhere JAX_COORDINATOR_ADDRESS=HOST:PORT, JAX_NUM_PROCESSES and
JAX_PROCESS_ID do, and then the flag may be left out.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax

from experiments import command, own, processes, texts


class Command(NamedTuple):
    """What a command line asks for.

    Attributes:
      config: an ml_collections config.
      workdir: the run's folder.
      distributed: whether the process is one of several.
    """

    config: Any
    workdir: Path
    distributed: bool


def parse(arguments: Sequence[str]) -> Command:
    """The command line, without the program's name.

    Raises:
      ValueError: one line that says which argument is wrong.
      SystemExit: after the help text, if that was asked for.
    """
    parser = command.parser("experiments.main", __doc__ or "")
    parser.add_argument("--workdir", metavar="FOLDER", help="run directory; made if missing, resumed if not")
    parser.add_argument(
        "--distributed",
        nargs="?",
        const="true",
        default="false",
        choices=("true", "false"),
        help="one of several processes",
    )
    options, values = command.parse(parser, arguments or ["--help"])
    for name in ("config", "workdir"):
        if not getattr(options, name):
            raise ValueError(f"main: --{name} is missing; python -m experiments.main --help shows how")
    return Command(command.read(options.config, values), Path(options.workdir), options.distributed == "true")


def main(arguments: Sequence[str] | None = None) -> int:
    """The command, without the program's name; returns the exit code."""
    arguments = sys.argv[1:] if arguments is None else arguments

    def run() -> None:
        config, workdir, distributed = parse(arguments)
        processes.join(asked=distributed)
        with processes.preemption() as interrupted:
            from experiments.train import train  # after the flags, so that a typo is reported at once

            summary = train(config, workdir, interrupted=interrupted)
        if jax.process_index() > 0:
            return  # the first process speaks for all
        step, folder = summary["steps"], texts.plain(workdir)
        if step < min(config.stop_at or config.steps, config.steps):
            print(f"{folder}: stopped by SIGTERM, saved at step {step}; the same command resumes it")
            return
        accuracy = summary["test_accuracy"]
        print(
            f"{folder}: {own.label(summary['method'])} at {100 * summary['final_sparsity']:.1f} % sparsity, "
            f"step {summary['steps']}"
            + (f", test accuracy {100 * accuracy:.2f} %" if accuracy is not None else "")
            + f", {summary['flops_inference_x_dense']:.3f}x the FLOPs of dense, {summary['seconds']:.0f} s"
        )

    return command.guarded(run, debug="--debug" in arguments)  # also of what cannot be parsed


if __name__ == "__main__":
    sys.exit(main())
