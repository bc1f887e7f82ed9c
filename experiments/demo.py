"""The demo: one small network on real digits, trained dense, with a fixed random mask, with SET and with RigL.

    python -m experiments.demo             # or: make demo

Ends in a table and a page of pictures in `runs/demo/`, and measures a step of a larger network dense, masked and
packed. Finished runs are not repeated, an interrupted one is resumed; `--fresh` starts all of them again.
"""

from __future__ import annotations

import argparse
import shutil
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

from rich.console import Console

from configs import digits_mlp
from experiments import real_sparsity, report, texts
from experiments.io import run_directory
from experiments.io.lock import locked
from experiments.train import train

DESCRIPTIONS: dict[str, str] = {
    "dense": "Dense: every weight is active; the reference.",
    "static": "Static: one weight in fifty is active, chosen at random before training and never changed.",
    "set": "SET: the same number; at intervals the smallest are dropped and others are grown at random.",
    "rigl": "RigL: the same number; at intervals the smallest are dropped and those of largest gradient grown.",
}
"""What the demo trains, with its description of each."""

SPARSITY = 0.98
"""So high that masks that move are visibly better than a fixed one."""


class Trial(NamedTuple):
    """One run of the demo."""

    method: str
    seed: int
    workdir: Path

    @property
    def finished(self) -> bool:
        """Whether there is nothing left to train."""
        return run_directory.finished(self.workdir)


def trials(workdir: str | Path, seeds: int, methods: Sequence[str] = tuple(DESCRIPTIONS)) -> list[Trial]:
    """The runs of the demo, in order: each method with seeds 0, 1, ..."""
    return [Trial(m, seed, Path(workdir) / f"{m}-s{seed}") for m in methods for seed in range(seeds)]


def configure(trial: Trial, variant: str = "") -> Any:
    """The config of one run: `configs/digits_mlp.py` with method, sparsity and seed as values."""
    config = digits_mlp.get_config(variant)
    config.method.name = trial.method
    config.sparsity = SPARSITY
    config.distribution.name = "erk"
    config.seed = trial.seed
    config.tensorboard = False  # a second at each start that a demo can save
    return config


def clear(todo: Sequence[Trial]) -> None:
    """Deletes the run directories of the trials, and only folders that are run directories.

    Raises:
      OSError: one of them is in use.
    """
    for trial in todo:
        if (trial.workdir / "config.json").exists():
            with locked(trial.workdir):
                shutil.rmtree(trial.workdir)


def run_all(todo: Sequence[Trial], console: Console, variant: str = "") -> None:
    """Trains what is not finished yet, and describes each method."""
    for number, trial in enumerate(todo):
        if trial.finished:
            continue
        if number == 0 or todo[number - 1].method != trial.method or todo[number - 1].finished:
            console.print(f"\n[bold]{DESCRIPTIONS[trial.method]}[/bold]", highlight=False)
        verb = "Resuming" if (trial.workdir / "config.json").exists() else "Training"
        console.print(f"{verb} {trial.workdir.name} (seed {trial.seed})", highlight=False)
        summary = train(configure(trial, variant), trial.workdir)
        accuracy, seconds = 100 * summary["test_accuracy"], summary["seconds"]
        console.print(f"  test accuracy {accuracy:.2f} % after {seconds:.0f} s", highlight=False)


def conclude(todo: Sequence[Trial], workdir: Path, console: Console) -> dict[str, Path]:
    """Prints the table, writes picture and page into `workdir`, and prints what to look at and what to do next."""
    runs = [report.read_run(trial.workdir) for trial in todo]
    console.print()
    report.show(runs, console)
    title = "RigL beside its dense, static and SET twins, on 8x8 digits"
    paths = report.write(runs, workdir, title)
    for what in ("accuracy", "first_layer", "page"):
        if what in paths:
            line = texts.terminal(f"{what.replace('_', ' ').capitalize():12} {paths[what]}")
            console.print(line, highlight=False, soft_wrap=True)
    chance = "On this small test set differences below 1 % can be chance"
    chance += "." if len({trial.seed for trial in todo}) > 1 else "; --seeds 3 tells more."
    look = f"Look at: do SET and RigL, which move connections, win back what Static loses to Dense? {chance}"
    console.print(f"\n{look}", highlight=False)
    return paths


def really_sparse(console: Console, variant: str = "") -> None:
    """Measures what masks cost and what packed execution saves, on a network that is large enough to tell."""
    console.print()
    real_sparsity.show(console, (32, 32) if variant == "smoke" else real_sparsity.FEATURES)
    console.print("Next: the same on Fashion-MNIST, with [bold]make fashion_mnist[/bold].", highlight=False)


def demo(
    workdir: str | Path = "runs/demo",
    *,
    seeds: int = 1,
    fresh: bool = False,
    variant: str = "",
    methods: Sequence[str] = tuple(DESCRIPTIONS),
    console: Console | None = None,
) -> dict[str, Path]:
    """Runs the demo.

    Args:
      workdir: where the run directories, the pictures and the page go.
      seeds: how many runs of each method.
      fresh: delete the demo's runs and train again.
      variant: of `configs/digits_mlp.py`; "smoke" for a few steps.
      methods: keys of `DESCRIPTIONS`.
      console: where to print; the terminal by default.

    Returns:
      `{name: path}` of the files written, as `report.write` gives.

    Raises:
      ValueError: fewer than one seed, or a finished run in `workdir` was trained with another config.
    """
    if seeds < 1:
        raise ValueError(f"demo: expected 1 seed or more, got {seeds}")
    console = console or Console()
    todo = trials(workdir, seeds, methods)
    if fresh:
        clear(todo)
    finished = [trial for trial in todo if trial.finished]
    console.print(
        f"The same network (LeNet-300-100, 8x8 digits of scikit-learn) trained in {len(methods)} ways, "
        f"sparse ones with {100 * SPARSITY:g} % of the weights off. "
        "ERK, the rule that divides the others over the layers, gives small layers a larger share.",
        highlight=False,
    )
    if finished:
        names = "all runs are" if len(finished) == len(todo) else f"{len(finished)} of {len(todo)} runs are"
        console.print(
            texts.terminal(f"From earlier: {names} finished in {workdir} and not trained again (--fresh does)."),
            highlight=False,
            soft_wrap=True,
        )
    run_all(todo, console, variant)
    paths = conclude(todo, Path(workdir), console)
    really_sparse(console, variant)
    return paths


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the command; returns its exit code."""
    parser = argparse.ArgumentParser("experiments.demo", description="Dense, static, SET and RigL on real digits.")
    parser.add_argument("--seeds", type=int, default=1, help="runs of each method [1]")
    parser.add_argument("--workdir", type=Path, default=Path("runs/demo"), help="[runs/demo]")
    parser.add_argument("--fresh", action="store_true", help="delete the demo's earlier runs and train again")
    options = parser.parse_args(arguments)
    try:
        demo(options.workdir, seeds=options.seeds, fresh=options.fresh)
    except (ValueError, FloatingPointError, OSError) as error:
        print(f"{texts.plain(error)}\n(`python -m experiments.demo --fresh` starts again)", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("\ndemo: interrupted; the same command resumes it from the last checkpoint", file=sys.stderr)
        return 130
    return 0


if __name__ == "__main__":
    sys.exit(main())
