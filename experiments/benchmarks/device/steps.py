"""One step of the driver: `python -m experiments.benchmarks.device.steps NAME [--toy]` prints rows as JSON lines."""

from __future__ import annotations

import argparse
import functools
import json
from collections.abc import Callable, Iterator, Mapping
from typing import Any

from experiments.benchmarks.device import checks, study, timings

Rows = Iterator[dict[str, Any]]

STEPS: Mapping[str, Callable[[bool], Rows]] = {
    "environment": checks.environment,
    "selection": checks.selection,
    "masks": checks.masks,
    "digests": checks.digests,
    "tiles_forward": functools.partial(checks.tiles, "forward"),
    "tiles_dx": functools.partial(checks.tiles, "dx"),
    "tiles_dvalues": functools.partial(checks.tiles, "dvalues"),
    "cuda_forward": functools.partial(checks.cuda_products, "forward"),
    "cuda_dx": functools.partial(checks.cuda_products, "dx"),
    "cuda_dvalues": functools.partial(checks.cuda_products, "dvalues"),
    "contracts": checks.contracts,
    "masked_step": timings.masked_step,
    "rewiring": timings.rewirings,
    "tiles": timings.tiles,
    "unstructured": timings.unstructured,
    "batch_1": timings.batch_1,
    "memory": timings.memory,
    "mlp_block": timings.mlp_block,
    "study": study.study,
}
"""`toy -> rows`, by the name of the step."""


def main() -> None:
    """Runs a step."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("name", choices=STEPS)
    parser.add_argument("--toy", action="store_true", help="sizes for a CPU")
    arguments = parser.parse_args()
    for row in STEPS[arguments.name](arguments.toy):
        print(json.dumps(row), flush=True)


if __name__ == "__main__":
    main()
