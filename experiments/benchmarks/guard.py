"""What survival costs: a look of the guard, and a step that can leave out a batch, beside a plain training step.

    python -m experiments.benchmarks.guard [--quick]

`look_ratio` is one look over one step: with `check_every=100` a hundredth of it is added. `skip_ratio` is the whole
step with `on_nonfinite=skip` over that with `stop`, which does not look at gradients at all.
"""

from __future__ import annotations

import argparse
import functools
import json
from typing import Any

import jax

from configs import digits_mlp
from experiments import guard, sharding
from experiments.benchmarks import timing
from experiments.task import prepare

FEATURES = ((300, 100), (1024, 1024))


def measure(features: tuple[int, ...], execution: str, rounds: int) -> dict[str, Any]:
    """One row."""
    base = digits_mlp.get_config()
    with base.unlocked():
        base.model.features, base.execution = features, execution
    values = json.loads(base.to_json_best_effort())
    values["dataset"].pop("data_dir", None)
    tasks = {name: prepare({**values, "on_nonfinite": name}, jax.devices()[:1]) for name in ("stop", "skip")}
    task, run = tasks["stop"], tasks["stop"].execution
    assert task.algorithm is not None  # the config's method is RigL
    batch = sharding.place(next(task.data.train(0)), task.mesh)
    state = run.from_masked(run.init())
    check = jax.jit(functools.partial(guard.measure_masks, task.algorithm))

    def look() -> Any:
        whole = run.to_masked(state)
        return check(whole.params, whole.opt_state.algorithm)

    calls = {
        name: timing.contender(each.step, each.from_masked(each.init()), batch)
        for name, each in ((name, of.execution) for name, of in tasks.items())
    }
    seconds = timing.interleave({**calls, "look": look}, rounds=rounds)
    return {
        "features": list(features),
        "execution": execution,
        "step_ms": timing.milliseconds(seconds["stop"]),
        "look_ms": timing.milliseconds(seconds["look"]),
        "look_ratio": round(timing.ratio(seconds["look"], seconds["stop"]), 3),
        "skip_ratio": round(timing.ratio(seconds["skip"], seconds["stop"]), 3),
    }


def main() -> None:
    """Measures, prints and writes the record."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--quick", action="store_true", help="few rounds, no record")
    arguments = parser.parse_args()
    rounds = 10 if arguments.quick else 101
    rows = []
    for features in FEATURES:
        for execution in ("masked", "packed"):
            rows.append(measure(features, execution, rounds))
            print("  ".join(f"{name}={value}" for name, value in rows[-1].items()), flush=True)
    if not arguments.quick:
        what = "one look of the guard / one training step, and skip / stop, digits in batches of 128, median of ratios"
        timing.write("guard", rows, what=what, rounds=rounds)


if __name__ == "__main__":
    main()
