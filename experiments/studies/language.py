"""Sparse character models: a GRU in the paper's set-up at small scale, and a small GPT; one process, resumable.

    apt-get install bible-kjv && python -m experiments.import_text --name kjv
    python -m experiments.studies.language                      # all cells that have no record yet
    python -m experiments.studies.language --model char_gru --method rigl
    python -m experiments.import_text --name wikitext103 --source FOLDER
    python -m experiments.studies.language --model wikitext103 --method rigl      # the paper's own set-up, not run here

The text is the King James Bible as a TFDS data set, 4 MB: 90 % for training, 5 % for validation, 5 % for testing, in
the order of the text. Windows of 64 characters follow one another; a model reads each from a state of zero. A cell is
one seed. A finished cell is one line of experiments/records/language/MODEL.jsonl.

As in the paper's experiment on WikiText-103: 75 % sparse, all layers alike, Adam, gradients clipped to a norm of 10, a
tenth of the weights moved at first and by a cosine none at the end, pruning between 1/4 and 3/4 of the training.
Smaller: the models, the text, and above all the training. Embeddings, positions, norms and logits are dense.
"""

from __future__ import annotations

import bisect
import functools
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax

import rigl_jax as rx
from experiments.data import text
from experiments.models.language import GPT, CharGRU
from experiments.studies import cells as store
from experiments.studies.method_networks import forward
from experiments.studies.method_training import Data, Images, Run, compile_run, solve

RECORDS = store.FOLDER / "language"
SEEDS = (0, 1, 2)
VOCABULARY, SPARSITY, CLIP = 256, 0.75, 10.0
EVALUATED = 2000
"""Windows of the validation and of the test part that are looked at."""
SPARSE = ".*(recurrent_kernel|(input|readout.|attention.|project.|up.|down.)/kernel)"
"""The leaves that are sparse."""
DYNAMIC = {"fraction": 0.1, "stop": 1.0}
METHODS: Mapping[str, Mapping[str, Any]] = {
    "dense": {},
    "static": {},
    "set": DYNAMIC,
    "rigl": DYNAMIC,
    "gmp": {"start": 0.25, "stop": 0.75},
    "rigl_clock": DYNAMIC,
    "small_dense": {},
}
"""`start` and `stop` are shares of the training; `rigl_clock` is RigL with `rx.per_weight_adam`."""
SHORT = {"text": "kjv", "length": 64, "batch": 16, "steps": 2000, "period": {"gmp": 100, "other": 100}}
MODELS: Mapping[str, Mapping[str, Any]] = {
    "char_gru": SHORT | {
        "network": CharGRU, "options": {"embedding": 32, "width": 128, "readout": (64,)},
        "rate": 5e-3, "constant": False, "l2": 0.0, "leaves_out": (),
    },
    "gpt": SHORT | {
        "network": GPT, "options": {"width": 64, "layers": 2, "heads": 4, "context": 64},
        "rate": 3e-3, "constant": False, "l2": 0.0, "leaves_out": (),
    },
    "wikitext103": {
        "text": "wikitext103", "length": 512, "batch": 32, "steps": 200_000, "period": {"gmp": 1000, "other": 100},
        "network": CharGRU, "options": {"embedding": 128, "width": 512, "readout": (256, 128)},
        "rate": 7e-4, "constant": True, "l2": 5e-4, "leaves_out": ("rigl_clock",),
    },
}  # fmt: skip
"""`text` is the TFDS set, `rate` the peak of the learning rate, from which it falls by a cosine unless it
is `constant`. Rates were not tuned. `wikitext103` has the numbers of the paper's appendix."""
PLANNED = ("char_gru", "gpt")


class Cell(NamedTuple):
    """What one record stands for."""

    model: str
    method: str
    seed: int


def cells(models: Sequence[str] = PLANNED, methods: Sequence[str] = tuple(METHODS)) -> Iterator[Cell]:
    """Every cell, method by method."""
    for model in models:
        for method in methods:
            if method not in MODELS[model]["leaves_out"]:
                yield from (Cell(model, method, seed) for seed in SEEDS)


def load(model: str, data_dir: str | None = None) -> Data:
    """The three parts of a model's text as windows; those of validation and test are spread evenly over their part."""
    spec = MODELS[model]
    parts = {part: text.windows(found, spec["length"]) for part, found in text.prepared(spec["text"], data_dir).items()}

    def images(part: str) -> Images:
        found, count = parts[part], len(parts[part].inputs)
        rows = slice(None) if part == "train" else np.linspace(0, count - 1, EVALUATED).astype(int)
        return Images(jnp.asarray(found.inputs[rows]), jnp.asarray(found.targets[rows], jnp.int32))

    return Data(*(images(part) for part in text.PARTS))


def network(model: str, share: float = 1.0) -> nn.Module:
    """The model, with its widths multiplied by `share`; those of attention stay multiples of the heads."""
    options, kind = dict(MODELS[model]["options"]), MODELS[model]["network"]
    if kind is GPT:
        options["hidden"] = max(1, round(4 * options["width"] * share))
        options["width"] = options["heads"] * max(1, round(options["width"] * share / options["heads"]))
    else:
        options["width"] = max(1, round(options["width"] * share))
        options["readout"] = tuple(max(1, round(width * share)) for width in options["readout"])
    return kind(VOCABULARY, **options)


def _shapes(module: nn.Module) -> Any:
    return jax.eval_shape(module.init, jax.random.key(0), jax.ShapeDtypeStruct((1, 8), jnp.float32))["params"]


def plan_of(module: nn.Module) -> rx.Plan:
    """Of the sparse leaves; uniform."""
    rules = ((SPARSE, rx.unstructured()), (".*", None))
    return rx.make_plan(_shapes(module), SPARSITY, rx.uniform, rules=rules)


def _sparse_weights(module: nn.Module) -> int:
    return sum(math.prod(leaf.shape) for leaf in plan_of(module).values())


def small(model: str) -> nn.Module:
    """The dense network whose layers, those that are sparse in the others, hold at most as many weights as theirs."""
    most = sum(leaf.n_active for leaf in plan_of(network(model)).values())
    percent = bisect.bisect_right(range(1, 101), most, key=lambda k: _sparse_weights(network(model, k / 100)))
    return network(model, percent / 100)


def prepare(model: str, method: str, steps: int | None = None) -> Run:
    """The compiled run of a method, of the model's length or of `steps`."""
    spec = MODELS[model]
    steps = steps or spec["steps"]
    module = small(model) if method == "small_dense" else network(model)
    options, algorithm = dict(METHODS[method]), None
    for name in options.keys() & {"start", "stop"}:
        options[name] = int(options[name] * steps)
    if "stop" in options:
        options["period"] = spec["period"].get(method, spec["period"]["other"])
    if not method.endswith("dense"):
        algorithm = rx.ALGORITHMS[method.removesuffix("_clock")](plan_of(module), **options)
    adam = rx.per_weight_adam if method == "rigl_clock" else optax.adam

    def inner(rate: optax.Schedule) -> optax.GradientTransformation:
        clip, decay = optax.clip_by_global_norm(CLIP), optax.add_decayed_weights(spec["l2"])
        return optax.chain(decay, clip, adam(spec["rate"] if spec["constant"] else rate))

    shape, batch = (spec["length"],), spec["batch"]
    return compile_run(module, algorithm, steps, spec["rate"], shape=shape, batch=batch, inner=inner)


def bits(run: Run) -> Callable[[Any, Images], Any]:
    """`(params, windows) -> bits per character`, compiled."""
    apply = forward(run.module)

    def mean(params: Any, part: Images) -> Any:
        return optax.softmax_cross_entropy_with_integer_labels(apply(params, part.x), part.y).mean()

    @jax.jit
    def found(params: Any, windows: Images) -> Any:
        parts = jax.tree.map(lambda x: x.reshape(-1, EVALUATED // 20, *x.shape[1:]), windows)
        return jax.lax.map(functools.partial(mean, params), parts).mean() / math.log(2)

    return found


def read(folder: Path = RECORDS) -> dict[Cell, dict[str, Any]]:
    """All records of a folder, by cell."""
    return store.read(folder, Cell)


def main(argv: Sequence[str] | None = None) -> None:
    """Runs every cell that has no record."""
    parser = store.parser(__doc__, RECORDS, MODELS)
    parser.add_argument("--method", action="append", choices=METHODS)
    parser.add_argument(
        "--data_dir", help="of TFDS, with the set; $TFDS_DATA_DIR or ~/tensorflow_datasets if not given"
    )
    options = parser.parse_args(argv)
    done, text_of = read(options.records), functools.cache(functools.partial(load, data_dir=options.data_dir))
    prepared = functools.lru_cache(1)(lambda model, method: (run := prepare(model, method), bits(run)))

    def find(cell: Cell) -> dict[str, Any]:
        (run, entropy), data, spec = prepared(cell.model, cell.method), text_of(cell.model), MODELS[cell.model]
        state, found = solve(run, data, cell.seed)
        for part in ("validation", "test"):
            found[f"{part}_bits"] = round(float(entropy(state.params, getattr(data, part))), 4)
        settings = {"steps": run.steps} | {name: spec[name] for name in ("batch", "length", "rate", "l2")}
        settings |= {"sparsity": SPARSITY, "parameters": sum(p.size for p in jax.tree.leaves(state.params))}
        return {"settings": settings, **found}

    wanted = (c for c in cells(options.model or PLANNED, options.method or tuple(METHODS)) if c not in done)
    store.run(options.records, wanted, find, clock="cpu_seconds", tell="test_bits")


if __name__ == "__main__":
    main()
