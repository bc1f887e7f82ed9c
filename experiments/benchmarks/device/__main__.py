"""Measures the library on an accelerator that is there for minutes.

    python -m experiments.benchmarks.device --seconds 540 [--out FOLDER] [--only NAME ...] [--toy]
    python -m experiments.benchmarks.device --read FOLDER/device.jsonl

FOLDER (default: $OUT, else the current folder) gets `device.jsonl` and `device.log`, what the steps wrote on stderr.
What it measures needs the CUDA kernels, built by `python -m rigl_jax.native.build` here or on a like machine; the first
step says whether they are there. The table is printed last, and again by `--read`. `--toy` runs every step at sizes for
a CPU, to rehearse: its times mean nothing. The study reads Fashion-MNIST from the folder $FASHION_MNIST, if it is set.
"""

from __future__ import annotations

import argparse
import os
import signal
import sys
from pathlib import Path

from experiments.benchmarks.device.driver import Step, drive, read, table

# In order of value; the limits fit into 540 s together. What is late is cut off, and its rows until then are kept.
STEPS = (
    Step("environment", 30, "versions, the card, and the ceilings of memory and of products"),
    Step("selection", 50, "select and rewire, bit for bit those of the CPU"),
    Step("masks", 25, "masks of a short RigL run, those of the CPU"),
    Step("tiles_forward", 25, "y = x @ W for W of tiles, against float64"),
    Step("tiles_dx", 20, "its gradient of x"),
    Step("tiles_dvalues", 20, "its gradient of the tiles"),
    Step("cuda_forward", 20, "y = x @ W for single weights and runs of 16, against float64"),
    Step("cuda_dx", 15, "its gradient of x"),
    Step("cuda_dvalues", 15, "its gradient of the values"),
    Step("tiles", 75, "tiles against the dense product, in the same dtype"),
    Step("rewiring", 40, "selections and rewirings of 25 M weights and of ResNet-50"),
    Step("masked_step", 40, "a training step: dense, masked, deciding in the graph"),
    Step("batch_1", 35, "products with one example"),
    Step("unstructured", 40, "single weights, runs of 16 and 2:4 against the dense product"),
    Step("mlp_block", 30, "a training step of a transformer's MLP block with tiles"),
    Step("contracts", 50, "the suite's tests of topology, methods, packed runs and kernels"),
    Step("memory", 10, "peak memory of packed and dense training"),
)
# Only where they are named: for another call, if device time is left.
MORE = (Step("study", 300, "accuracy of dense, static, SET and RigL"),)


def main() -> None:
    """Runs the steps, or prints what earlier ones found."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seconds", type=float, default=540, help="for all steps together (default 540)")
    parser.add_argument("--out", type=Path, default=Path(os.environ.get("OUT") or "."), help="folder of the results")
    parser.add_argument("--only", nargs="+", choices=[step.name for step in STEPS + MORE], help="these steps")
    parser.add_argument("--toy", action="store_true", help="sizes for a CPU: a rehearsal")
    parser.add_argument("--read", type=Path, metavar="FILE", help="print the table of an earlier run and run nothing")
    arguments = parser.parse_args()
    if arguments.read is not None:
        print(table(read(arguments.read)))
        return
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # so that the running step is killed with the driver
    # Where there is no such device, as in a rehearsal, JAX takes the CPU that it is told to take.
    os.environ.setdefault("JAX_PLATFORMS", "cpu" if arguments.toy else "cuda,cpu")
    toy = ["--toy"] if arguments.toy else []
    command = lambda name: [sys.executable, "-m", "experiments.benchmarks.device.steps", name, *toy]  # noqa: E731
    steps = list(STEPS) if arguments.only is None else [s for s in STEPS + MORE if s.name in arguments.only]
    if arguments.toy:  # a busy CPU compiles for minutes
        steps = [step._replace(seconds=20 * step.seconds) for step in steps]
    lines = drive(steps, arguments.seconds, arguments.out, command)
    print(table(lines), flush=True)


if __name__ == "__main__":
    main()
