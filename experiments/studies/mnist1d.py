"""MNIST-1D: all methods tuned with one small budget, longer training, ablations of RigL, lottery tickets; resumable.

    python -m experiments.studies.mnist1d                 # all cells that have no record yet: about an hour of one core
    python -m experiments.studies.mnist1d --part tickets
    python -m experiments.studies.mnist1d --part table --method rigl --sparsity 0.98

The network is the paper's of MNIST-1D: two hidden layers of 100 units, 15,000 weights. 3,000 signals are for training,
1,000 for validation, and the 1,000 of the test part are looked at once, after the last step. Every method is tried
in four settings with two seeds each; the setting of the best mean validation accuracy is then run with five others.
"""

from __future__ import annotations

import functools
import math
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

import rigl_jax as rx
from experiments.io.environment import environment
from experiments.models import MODELS
from experiments.studies import cells as store
from experiments.studies import mnist1d_data
from experiments.studies.method_training import (
    BATCH,
    OPTIMIZER,
    Data,
    Images,
    Run,
    State,
    compile_run,
    measure,
    optimizer,
    trained,
    tune,
)

RECORDS = store.FOLDER / "mnist1d"
SEEDS, TUNING_SEEDS = (0, 1, 2, 3, 4), (10, 11)
EPOCHS, STOP, VALIDATION, WIDTH, INPUTS = 65, 0.75, 1000, 100, mnist1d_data.LENGTH
SPARSITIES = (0.95, 0.98, 0.9, 0.8)
"""In the order in which they are run."""
RATE, PERIOD, FRACTION = 0.2, 50, 0.3
"""Of everything that is not tuned."""
RATES, PAIRS = (0.05, 0.2), ((50, 0.3), (200, 0.5))
"""The settings tried for methods that rewire at intervals; the others try `ALL_RATES`."""
ALL_RATES = (0.03, 0.05, 0.1, 0.2)

METHODS: Mapping[str, tuple[str, ...]] = {
    "static": (),
    "set": ("period", "fraction"),
    "rigl": ("period", "fraction"),
    "dense": (),
    "snip": (),
    "small_dense": (),
    "snfs": ("period", "fraction"),
    "srigl": ("period", "fraction"),
    "granet": ("period", "fraction"),
    "gmp": ("period",),
    "dsr": ("period",),
    "deep_r": (),
}
"""Which of the options that are tuned a method has, in the order in which they are run."""
FIXED: Mapping[str, Mapping[str, Any]] = {
    "snip": {"jointly": True},
    "gmp": {"start": 0.3},
    "granet": {"initial_sparsity": 0.5},
    "dsr": {"target": 0.002},
    "srigl": {"never_ablate": [".*Dense_2/kernel"]},
}
ABLATIONS: Mapping[str, Mapping[str, Any]] = {
    "as in the table, untuned": {},
    "uniform": {"distribution": "uniform"},
    "every 10 steps": {"period": 10},
    "every 200 steps": {"period": 200},
    "every 500 steps": {"period": 500},
    "fraction 0.1": {"fraction": 0.1},
    "fraction 0.5": {"fraction": 0.5},
    "constant fraction": {"fraction": "constant"},
    "fraction by inverse power 3": {"fraction": "power"},
    "first rewiring after a period": {"start": PERIOD},
    "grown weights from a normal": {"grow_values": "normal"},
    "grown weights from -0.1 gradient": {"grow_values": "gradient"},
    "drop by magnitude, grow at random": {"grow": "random"},
    "drop by magnitude, grow smallest gradient": {"grow": "least"},
    "drop at random, grow by gradient": {"drop": "random"},
    "drop at random, grow at random": {"drop": "random", "grow": "random"},
    "drop by weight times gradient, grow by gradient": {"drop": "taylor"},
}
"""What is different from RigL with `RATE`, `PERIOD`, `FRACTION`."""
TICKETS = ("static", "ticket", "rigl", "ticket_rigl")
PARTS = ("table", "ablations", "tickets")


class Cell(NamedTuple):
    """The key of a record. `multiplier` is the length of the training as a multiple of `EPOCHS`."""

    part: str
    method: str
    sparsity: float
    multiplier: int = 1


def cells() -> Iterator[Cell]:
    """Every cell, in the order in which they are run."""
    methods, hard = tuple(METHODS), SPARSITIES[:2]
    yield from (Cell("table", m, s) for s in hard for m in methods[:3])
    yield Cell("table", "dense", 0.0)
    yield from (Cell("ablations", name, 0.95) for name in ABLATIONS)
    yield from (Cell("tickets", name, s) for s in hard for name in TICKETS)
    yield from (Cell("table", m, s) for s in hard for m in methods[4:])
    yield from (Cell("table", m, s, k) for k in (5, 2) for s in hard for m in methods[:3])
    yield from (Cell("table", m, s) for s in SPARSITIES[2:] for m in methods if m != "dense")


def load() -> Data:
    """The data set, of which the last part of the training signals is for validation."""
    train, test = mnist1d_data.generate()

    def part(x: np.ndarray, y: np.ndarray) -> Images:
        return Images(jnp.asarray(x, jnp.float32), jnp.asarray(y, jnp.int32))

    n = len(train.y) - VALIDATION
    return Data(part(train.x[:n], train.y[:n]), part(train.x[n:], train.y[n:]), part(*test))


def small_width(weights: int) -> int:
    """The widest pair of hidden layers whose dense network has at most that many weights."""
    extra = INPUTS + 10
    return int((math.sqrt(extra**2 + 4 * weights) - extra) / 2)


def plan_of(sparsity: float, *, distribution: str = "erk", structure: Any = None) -> rx.Plan:
    """All three kernels are sparse."""
    module = MODELS["mlp"](10, features=(WIDTH, WIDTH))
    shapes = jax.eval_shape(module.init, jax.random.key(0), jnp.zeros((1, INPUTS)))["params"]
    rules = [(".*kernel", structure or rx.unstructured()), (".*", None)]
    return rx.make_plan(shapes, sparsity, {"erk": rx.erk, "uniform": rx.uniform}[distribution], rules=rules)


def choices(method: str) -> list[dict[str, Any]]:
    """The four settings that are tried for a method."""
    if not METHODS[method]:
        return [{"rate": rate} for rate in ALL_RATES]
    pairs = [dict(zip(("period", "fraction"), pair, strict=True)) for pair in PAIRS]
    return [{"rate": rate} | {name: pair[name] for name in METHODS[method]} for rate in RATES for pair in pairs]


def compiled(method: str, sparsity: float, steps: int, options: Mapping[str, Any]) -> Run:
    """The run of a method; `options` hold the rate and the method's own."""
    rest, width, algorithm = dict(options), WIDTH, None
    rate = rest.pop("rate")
    if method == "small_dense":
        width = small_width(sum(leaf.n_active for leaf in plan_of(sparsity).values()))
    elif method != "dense":
        plan = plan_of(
            sparsity,
            distribution=rest.pop("distribution", "erk"),
            structure=rx.fan_in() if method == "srigl" else None,
        )
        if "period" in rest:
            rest["stop"] = int(STOP * steps)
        if method == "gmp":
            rest["start"] = int(rest["start"] * steps)
        algorithm = rx.ALGORITHMS[method](plan, **_as_functions(rest))
    module = MODELS["mlp"](10, features=(width, width))
    return compile_run(module, algorithm, steps, rate, noisy=method == "deep_r", shape=(INPUTS,))


def _as_functions(options: dict[str, Any]) -> dict[str, Any]:
    """Names of the ablations -> what the library takes."""
    scores = {"random": rx.scores.random, "taylor": rx.scores.taylor}
    if options.get("fraction") == "constant":
        options["fraction"] = lambda step: FRACTION
    if options.get("fraction") == "power":
        options["fraction"] = rx.schedules.inverse_power(FRACTION, options["stop"], 3.0)
    if "grow_values" in options:
        values = {"normal": rx.regrow_init.normal(1.0), "gradient": rx.regrow_init.scaled_gradient(-0.1)}
        options["grow_values"] = values[options["grow_values"]]
    if options.get("grow") == "least":
        options["grow"] = lambda signals: jax.tree.map(lambda g: -jnp.abs(g), signals.grads)
    return options | {name: scores[options[name]] for name in ("drop", "grow") if options.get(name) in scores}


def tuned(method: str, sparsity: float, steps: int, data: Data) -> tuple[Run, dict[str, Any], list[dict[str, Any]]]:
    """The run of the best setting, that setting, and the mean validation accuracy of all that were tried."""
    fixed = dict(FIXED.get(method, {}))
    return tune(choices(method), lambda choice: compiled(method, sparsity, steps, choice | fixed), data, TUNING_SEEDS)


def ticket_of(dense: Run, data: Data, plan: rx.Plan, rate: float, seed: int, state: State) -> State:
    """The first state with the masks of the densely trained network's largest weights, and the weights of its start."""
    masks = rx.prune(plan, trained(dense, data, seed)).masks
    params = dense.init(seed).params
    params, opt_state = rx.replace_masks(optimizer(lambda step: rate), state.opt_state, params, masks)
    copies = jax.tree.map(jnp.copy, opt_state.masks)
    return state._replace(params=params, opt_state=opt_state, explored=copies)


def run_cell(cell: Cell, data: Data) -> dict[str, Any]:
    """Settings and runs of a cell."""
    steps = EPOCHS * cell.multiplier * (len(data.train.y) // BATCH)
    plain = {"rate": RATE, "period": PERIOD, "fraction": FRACTION}
    begin: dict[int, Any] = {}
    extra: dict[str, Any] = {}
    if cell.part == "table":
        run, settings, tried = tuned(cell.method, cell.sparsity, steps, data)
        extra = {"tried": tried, "fixed": dict(FIXED.get(cell.method, {}))}
    elif cell.part == "ablations":
        settings = plain | dict(ABLATIONS[cell.method])
        run = compiled("rigl", cell.sparsity, steps, settings)
    else:
        moves = cell.method.endswith("rigl")
        settings = plain if moves else {"rate": RATE}
        run = compiled("rigl" if moves else "static", cell.sparsity, steps, settings)
        if cell.method.startswith("ticket"):
            dense = compiled("dense", 0.0, steps, {"rate": RATE})
            plan = plan_of(cell.sparsity)
            begin = {seed: functools.partial(ticket_of, dense, data, plan, RATE, seed) for seed in SEEDS}
    runs = [measure(run, data, seed, *([begin[seed]] if begin else [])) for seed in SEEDS]
    shared = {"epochs": EPOCHS * cell.multiplier, "steps": steps, "batch": BATCH, **OPTIMIZER}
    return {"settings": {**shared, **settings, "features": list(run.module.features)}, **extra, "runs": runs}


def read(folder: Path = RECORDS) -> dict[Cell, dict[str, Any]]:
    """All records of a folder, by cell."""
    return store.read(folder, Cell)


def main(argv: Sequence[str] | None = None) -> None:
    """Runs every cell that has no record."""
    parser = store.parser(__doc__, RECORDS, ())
    parser.add_argument("--part", action="append", choices=PARTS)
    parser.add_argument("--method", action="append", choices=dict.fromkeys(cell.method for cell in cells()))
    parser.add_argument("--sparsity", action="append", type=float)
    options = parser.parse_args(argv)
    data, done = load(), read(options.records)
    chosen = [(name, values) for name in ("part", "method", "sparsity") if (values := getattr(options, name))]
    for cell in cells():
        if cell in done or not all(getattr(cell, name) in values for name, values in chosen):
            continue
        started, before = time.process_time(), environment()
        found = run_cell(cell, data)
        seconds = round(time.process_time() - started, 1)
        store.append(options.records, {"model": "mlp", **cell._asdict(), **found, "cpu_seconds": seconds,
                                       "environment": before})  # fmt: skip
        mean = np.mean([run["test"] for run in found["runs"]])
        print(f"{time.strftime('%H:%M')} {cell} {mean:.4f} in {seconds} s", flush=True)


if __name__ == "__main__":
    main()
