"""What solutions of RigL are, on LeNet-300-100: architectures, lottery tickets, ways out of minima; resumable.

    python -m experiments.studies.solutions                     # all cells that have no record yet
    python -m experiments.studies.solutions --part paths --seed 0

Three experiments of the RigL paper, on Fashion-MNIST. `search` (Table 2): layers that begin 99 % and 89 % sparse; input
pixels and units that are cut off are removed after the training. `tickets` (Table 3): the masks that RigL found, with
the weights of the start. `escape` and `paths` (section 4.4): training that begins at a static solution, and curves from
a static solution to a pruned one. A cell is one seed. A finished cell is one line of
experiments/records/solutions/lenet_300_100.jsonl. The data are those of `experiments.studies.method_table`.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

import rigl_jax as rx
from experiments.models import MLP
from experiments.studies import cells as store
from experiments.studies.method_networks import forward
from experiments.studies.method_training import BATCH, Data, Images, Run, State, compile_run, load, optimizer, solve

MODEL = "lenet_300_100"
RECORDS = store.FOLDER / "solutions"
SEEDS = (0, 1, 2)
FEATURES, STEPS, RATE = (300, 100), 1000, 0.1
SPARSITY = 0.98
"""Of tickets, escapes and paths, ERK."""
LAYERS = {"paper": (0.99, 0.89), "plus": (0.96, 0.86)}
"""Sparsities of the first two layers in the search; the third is dense."""
LONGER, OFTEN = 3, 20
"""The search is so many times as long, and its masks change every so many steps: units are given up slowly."""
OPTIONS: Mapping[str, Mapping[str, Any]] = {
    "static": {},
    "set": {"period": 100, "fraction": 0.3, "stop": 0.75},
    "rigl": {"period": 100, "fraction": 0.3, "stop": 0.75},
    "gmp": {"period": 100, "start": 0.3, "stop": 0.75},
}
"""`start` and `stop` are shares of the training."""
FIRST: Mapping[str, Sequence[str]] = {
    "tickets": ("static", "rigl", "ticket_static", "ticket_rigl"),
    "escape": ("static", "rigl"),
    "search": ("rigl", "static"),
    "paths": ("gmp",),
}
LATER: Mapping[str, Sequence[str]] = {
    "search": ("rigl_plus", "set", "widths"),
    "tickets": ("rigl_2x", "other_static"),
    "escape": ("set",),
}
"""Methods by part, in the order in which they are run: first what the paper's sections need, then what goes beyond."""
CURVES: Mapping[str, tuple[int, bool]] = {
    "cubic, sparse": (3, True),
    "cubic, dense": (3, False),
}
"""Degree of the Bezier curve, and whether its control points stay on the masks of the two ends."""
EXAMPLES, CURVE_STEPS, CURVE_RATE, OTHERS = 2000, 60, 0.01, 5000
"""Training images whose loss curves descend; steps and rate of Adam on the control points; validation images, on which
a path is looked at too: curves learn the training images that bend them."""
PLACES = 21


class Cell(NamedTuple):
    """What one record stands for."""

    model: str
    part: str
    method: str
    seed: int


def cells(seeds: Sequence[int] = SEEDS) -> Iterator[Cell]:
    """Every cell, method by method; what cells share is trained once in a process."""
    for parts in (FIRST, LATER):
        for part, methods in parts.items():
            yield from (Cell(MODEL, part, method, seed) for method in methods for seed in seeds)


class Bench(NamedTuple):
    """What cells share.

    Attributes:
      data: the images.
      run: `(method, layout, multiple of the length) -> compiled run`; layouts are "erk" and the names of `LAYERS`.
      solution: `(method, layout, seed) -> (state, facts)`, trained from random weights and masks.
      steps: of a run.
    """

    data: Data
    run: Callable[..., Run]
    solution: Callable[[str, str, int], tuple[State, dict[str, Any]]]
    steps: int


def make_bench(data: Data, steps: int = STEPS) -> Bench:
    """Runs are compiled, and solutions trained, when they are first asked for."""
    run = functools.cache(functools.partial(_compiled, steps))

    def solution(method: str, layout: str, seed: int) -> tuple[State, dict[str, Any]]:
        return solve(run(method, layout, LONGER if layout in LAYERS else 1), data, seed)

    return Bench(data, run, functools.cache(solution), steps)


def _module(features: Sequence[int] = FEATURES) -> MLP:
    return MLP(10, features=tuple(features))


def plan_of(layout: str) -> rx.Plan:
    """The plan of a layout."""
    image = jax.ShapeDtypeStruct((1, 28, 28, 1), jnp.float32)
    shapes = jax.eval_shape(_module().init, jax.random.key(0), image)["params"]
    if layout == "erk":
        return rx.make_plan(shapes, SPARSITY, rx.erk)
    first, second = LAYERS[layout]
    rules = (("Dense_2/kernel", None), (".*kernel", rx.unstructured()), (".*", None))
    return rx.make_plan(shapes, 0.0, rules=rules, sparsities={"Dense_0/kernel": first, "Dense_1/kernel": second})


def _compiled(steps: int, method: str, layout: str, multiple: int = 1) -> Run:
    steps, options = steps * multiple, dict(OPTIONS[method])
    for name in options.keys() & {"start", "stop"}:
        options[name] = int(options[name] * steps)
    if layout in LAYERS and "period" in options:
        options["period"] = OFTEN
    return compile_run(_module(), rx.ALGORITHMS[method](plan_of(layout), **options), steps, RATE)


def placed(params: Any, masks: Any, state: State) -> State:
    """The first state of a run, moved to other weights and masks; all buffers are its own, as training takes them."""
    params, masks = jax.tree.map(jnp.copy, (params, masks))
    params, opt_state = rx.replace_masks(optimizer(lambda step: RATE), state.opt_state, params, masks)
    return state._replace(params=params, opt_state=opt_state, explored=jax.tree.map(jnp.copy, masks))


def architecture(module: MLP, state: State, data: Data) -> dict[str, Any]:
    """What is left when pixels and units that are cut off are removed, and what it takes to store it.

    The size is the paper's: 32 bits for each active weight and bias, and one bit for each place of a weight.
    """

    def apply(params: Any, x: Any) -> Any:
        return module.apply({"params": params}, x)

    image = jax.ShapeDtypeStruct((1, *data.test.x.shape[1:]), jnp.float32)
    small = rx.execution.compact(apply, state.params, state.opt_state.masks, image)
    kernels = [np.asarray(small.params[name]["kernel"]) for name in ("Dense_0", "Dense_1", "Dense_2")]
    pixels = int(kernels[0].any(axis=1).sum())
    widths = [pixels, *(kernel.shape[0] for kernel in kernels[1:])]
    places = sum(rows * columns for rows, columns in zip(widths, [*widths[1:], 10], strict=True))
    active = sum(int(np.count_nonzero(kernel)) for kernel in kernels)
    right = jnp.argmax(jax.jit(small.apply)(small.params, data.test.x), -1) == data.test.y
    return {
        "widths": widths,
        "active_weights": active,
        "bytes": (32 * active + places + 32 * (sum(widths[1:]) + 10)) // 8,
        "test_small": round(float(right.mean()), 4),
    }


def search(bench: Bench, method: str, seed: int) -> dict[str, Any]:
    """Table 2: the network after its training, with all that is cut off removed."""
    if method == "widths":
        return dense_of_widths(bench, seed)
    layout = "plus" if method == "rigl_plus" else "paper"
    state, facts = bench.solution(method.removesuffix("_plus"), layout, seed)
    return facts | architecture(_module(), state, bench.data)


def dense_of_widths(bench: Bench, seed: int) -> dict[str, Any]:
    """The dense network of the widths that RigL found, trained from new weights on the pixels that it read."""
    state, _ = bench.solution("rigl", "paper", seed)
    found = architecture(_module(), state, bench.data)
    pixels: Any = np.asarray(state.params["Dense_0"]["kernel"]).any(axis=1)
    module = _module(found["widths"][1:])
    shapes = jax.eval_shape(module.init, jax.random.key(0), jnp.zeros((1, 784)))["params"]
    rules = (("Dense_0/kernel", rx.unstructured()), (".*", None))
    plan = rx.make_plan(shapes, 1 - pixels.sum() / pixels.size, rules=rules)
    run = compile_run(module, rx.static(plan), LONGER * bench.steps, RATE)

    def begin(state: State) -> State:
        shape = state.params["Dense_0"]["kernel"].shape
        masks = jax.tree.map(lambda mask: jnp.asarray(np.broadcast_to(pixels[:, None], shape)), state.opt_state.masks)
        fresh = run.init(seed).params
        return placed(rx.apply_masks(fresh, masks), masks, state)

    trained, facts = solve(run, bench.data, seed, begin)
    return facts | architecture(module, trained, bench.data)


def tickets(bench: Bench, method: str, seed: int) -> dict[str, Any]:
    """Table 3: training from the masks that RigL found, and from the weights of its start or others."""
    if method in ("static", "rigl"):
        return bench.solution(method, "erk", seed)[1]
    if method == "rigl_2x":
        return solve(bench.run("rigl", "erk", 2), bench.data, seed)[1]
    start, name = method.split("_")
    masks = bench.solution("rigl", "erk", seed)[0].opt_state.masks
    run = bench.run(name, "erk")
    params = _module().init(jax.random.split(jax.random.key(seed + 1000 * (start == "other")))[0], jnp.zeros((1, 784)))
    return solve(run, bench.data, seed, lambda state: placed(rx.apply_masks(params["params"], masks), masks, state))[1]


def escape(bench: Bench, method: str, seed: int) -> dict[str, Any]:
    """Section 4.4: training that begins at the static solution, with the learning rate of a new start."""
    begin, before = bench.solution("static", "erk", seed)
    run, masks = bench.run(method, "erk"), begin.opt_state.masks
    after, facts = solve(run, bench.data, seed, lambda state: placed(begin.params, masks, state))
    loss = _loss(bench.data.train, 1000)
    return facts | {"before": before["test"], "losses": [float(loss(s.params)) for s in (begin, after)]}


def _loss(images: Images, count: int) -> Callable[[Any], Any]:
    x, y = images.x[:count], images.y[:count]
    apply = forward(_module())

    @jax.jit
    def loss(params: Any) -> Any:
        return optax.softmax_cross_entropy_with_integer_labels(apply(params, x), y).mean()

    return loss


def paths(bench: Bench, method: str, seed: int) -> dict[str, Any]:
    """Section 4.4: losses on a line and on curves from the static solution to that of `method`."""
    ends = [bench.solution(name, "erk", seed)[0] for name in ("static", method)]
    a, b = (state.params for state in ends)
    union = jax.tree.map(jnp.logical_or, *(state.opt_state.masks for state in ends))
    loss, others = _loss(bench.data.train, EXAMPLES), _loss(bench.data.validation, OTHERS)
    curves = {"linear": [a, b]}
    for name, (degree, sparse) in CURVES.items():
        bend = functools.partial(rx.landscape.bezier_path, loss, masks=union if sparse else None, degree=degree)
        curves[name] = jax.jit(
            lambda a, b, key, bend=bend: bend(a, b, steps=CURVE_STEPS, key=key, optimizer=optax.adam(CURVE_RATE))
        )(a, b, jax.random.key(seed))

    def losses(of: Callable[[Any], Any]) -> dict[str, list[float]]:
        places = np.linspace(0, 1, PLACES)
        found = {name: rx.landscape.path_losses(of, points, places) for name, points in curves.items()}
        return {name: [round(float(value), 4) for value in values] for name, values in found.items()}

    tests = [bench.solution(name, "erk", seed)[1]["test"] for name in ("static", method)]
    return {"curves": losses(loss), "others": losses(others), "test": tests}


KINDS: Mapping[str, Callable[[Bench, str, int], dict[str, Any]]] = {
    "search": search,
    "tickets": tickets,
    "escape": escape,
    "paths": paths,
}


def read(folder: Path = RECORDS) -> dict[Cell, dict[str, Any]]:
    """All records of a folder, by cell."""
    return store.read(folder, Cell)


def main(argv: Sequence[str] | None = None) -> None:
    """Runs every cell that has no record."""
    parser = store.parser(__doc__, RECORDS, [MODEL])
    parser.add_argument("--part", action="append", choices=KINDS)
    parser.add_argument("--seed", action="append", type=int, choices=SEEDS)
    options = parser.parse_args(argv)
    bench, done = make_bench(load(options.source)), read(options.records)
    settings = {"steps": STEPS, "batch": BATCH, "rate": RATE}  # those of the search differ: see LONGER, OFTEN
    wanted = (c for c in cells(options.seed or SEEDS) if c not in done and c.part in (options.part or KINDS))
    find = lambda cell: {"settings": settings, **KINDS[cell.part](bench, cell.method, cell.seed)}  # noqa: E731
    store.run(options.records, wanted, find, clock="cpu_seconds", tell="test")


if __name__ == "__main__":
    main()
