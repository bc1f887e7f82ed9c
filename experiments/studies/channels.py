"""Accuracy against MACs without channels on Fashion-MNIST, by every score; one process, resumable.

    python -m experiments.studies.channels                  # all cells that have no record yet
    python -m experiments.studies.channels --model lenet5 --share 0.25

A cell is a network, the share of its MACs that is left, a score of channels, and what is done with the smaller network:
"finetune" trains on from the weights that are left; "scratch_e" trains new weights for as many epochs as the dense
network had, "scratch_b" for as many as cost the same MACs, at most twice as many (Liu et al. 2019). With the scope
"layer" every layer loses the same share of its channels: scores differ in which channels go and not in how many, and
one training from scratch stands for all of them. With "global" all channels are ranked together by their scores as they
are, with "global_mean" by scores that are divided by the mean of their layer. A finished cell is one line of
experiments/records/channels/MODEL.jsonl with a run for each seed, and a second start goes on with the cells that are
missing. Scores are those of `rx.channels.CRITERIA`, a new one has cells of its own, and Network Slimming.

The data are the four IDX files of Fashion-MNIST: `apt-get install dataset-fashion-mnist`, or `--source FOLDER`.
"""

from __future__ import annotations

import functools
import itertools
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np
import optax

import rigl_jax as rx
from experiments.io.environment import environment
from experiments.studies import cells as store
from experiments.studies import channels_training as training
from experiments.studies.method_training import BATCH, Data, Images, load, order

RECORDS = store.FOLDER / "channels"
SEEDS = (0, 1, 2)
SHARES = (0.25, 0.5, 0.1)
"""Of MACs that are left, in the order in which they are run."""
SCOPES: Mapping[str, Mapping[str, Any]] = {
    "layer": {"scope": "layer"},
    "global_mean": {"scope": "global", "normalize": "mean"},
    "global": {"scope": "global"},
}
"""What `rx.channels.select` is told, in the order in which they are run."""
SCORED = 256
"""Training images that a score sees."""
SLIMMING = 1e-4
"""The strength of the penalty of Network Slimming, its authors' for VGG."""

MODELS: Mapping[str, Mapping[str, Any]] = {
    "lenet5": {"images": 10_000, "epochs": 10, "finetune": 2, "rate": 0.05},
    "resnet8": {"images": 10_000, "epochs": 10, "finetune": 2, "rate": 0.05},
}
"""`images` is the number of training images; epochs and the peak of the learning rate of the dense training."""
SCRATCH = ("scratch_e", "scratch_b")


class Cell(NamedTuple):
    """What one record stands for. Of "scratch" runs the score is "any", of the dense network "none"."""

    model: str
    scope: str
    share: float
    score: str
    recipe: str


def _loss(network: training.Network, params: Any, batch: Images) -> jax.Array:
    logits = network.plain(params, batch.x)
    return optax.softmax_cross_entropy_with_integer_labels(logits, batch.y).mean()


EAGER = ("magnitude", "magnitude_2", "random")
"""Criteria that run outside of jit."""
SLIMMED = "slimming"
"""|scale| of a network that was trained with the penalty of Network Slimming."""
SCORES = (*rx.channels.CRITERIA, SLIMMED)
"""In the order in which they are run."""


def cells(models: Sequence[str] = tuple(MODELS)) -> Iterator[Cell]:
    """Every cell, in the order in which they are run."""
    for scope, model in itertools.product(SCOPES, models):
        if scope == "layer":
            yield Cell(model, scope, 1.0, "none", "dense")
        for share in SHARES:
            for recipe in SCRATCH if scope == "layer" else ():
                yield Cell(model, scope, share, "any", recipe)
            for score in SCORES:
                if score != SLIMMED or training.NETWORKS[model]().scales is not None:
                    yield Cell(model, scope, share, score, "finetune")


class Study:
    """The networks of one model: each is trained once, and compiled once for each set of widths."""

    def __init__(self, model: str, data: Data) -> None:
        self.model, self.settings = model, MODELS[model]
        self.network = training.NETWORKS[model]()
        self.train = training.trainer(self.network)
        self.slim = training.trainer(self.network, SLIMMING)
        self.test = training.tester(self.network)
        n = self.settings["images"]
        self.images, self.held_out = Images(data.train.x[:n], data.train.y[:n]), data.test
        self.batch = Images(self.images.x[:SCORED], self.images.y[:SCORED])
        params = jax.eval_shape(self.network.init, jax.random.key(0))
        one = jax.ShapeDtypeStruct((1, *self.images.x.shape[1:]), self.images.x.dtype)
        self.groups = rx.channels.groups(self.network.plain, params, one)
        self.one = one

    def fit(self, params: Any, seed: int, epochs: float, rate: float, *, slimming: bool = False) -> Any:
        """Trains; the order of the images is the seed's. Epochs are rounded to whole steps."""
        steps = round(epochs * (len(self.images.y) // BATCH))
        most = 2 * self.settings["epochs"] * (len(self.images.y) // BATCH)
        batches = order(seed, most, len(self.images.y))  # always of one shape, so that nothing is compiled twice
        return (self.slim if slimming else self.train)(params, self.images, batches, rate, steps)

    @functools.cache  # noqa: B019 - a study lives as long as the process
    def dense(self, seed: int, *, slimming: bool = False) -> Any:
        """The trained network of a seed."""
        start = self.network.init(jax.random.key(seed))
        return self.fit(start, seed, self.settings["epochs"], self.settings["rate"], slimming=slimming)

    @functools.cache  # noqa: B019
    def criterion(self, name: str, seed: int) -> Callable[[Any, Images], Sequence[Any]]:
        """`(params, batch) -> scores`, compiled once for all seeds but where it draws."""
        loss, apply = functools.partial(_loss, self.network), self.network.plain
        entry = rx.channels.CRITERIA[name]
        made = functools.partial(entry.make(loss=loss, apply=apply, key=jax.random.key(seed)), self.groups)
        return made if name in EAGER else jax.jit(made)

    @functools.cache  # noqa: B019
    def scores(self, name: str, seed: int) -> Sequence[np.ndarray]:
        """The scores of a seed's channels."""
        params = self.dense(seed, slimming=name == SLIMMED)
        if name == SLIMMED:
            return rx.channels.scores(self.groups, params, rx.channels.only(str(self.network.scales)))
        draws = rx.channels.CRITERIA[name].random
        found = self.criterion(name, seed if draws else SEEDS[0])(params, self.batch)
        return [np.asarray(score) for score in found]

    def run(self, cell: Cell, seed: int) -> dict[str, Any]:
        """One seed of a cell."""
        settings = self.settings
        if cell.recipe == "dense":
            return {"seed": seed, "test": self.right(self.dense(seed))}
        params = self.dense(seed, slimming=cell.score == SLIMMED)
        scores = self.scores("magnitude" if cell.score == "any" else cell.score, seed)
        keep = rx.channels.select(self.groups, scores, macs=cell.share, **SCOPES[cell.scope])
        small = rx.channels.shrink(self.network.plain, params, keep, self.one)
        assert small.macs is not None  # as the inputs are given
        found: dict[str, Any] = {"seed": seed, "macs": small.macs, "weights": small.weights}
        if cell.recipe == "finetune":
            found["pruned"] = self.right(small.params)
            new = self.fit(small.params, seed + 100, settings["finetune"], settings["rate"] / 5)
        else:
            longer = 1.0 if cell.recipe == "scratch_e" else min(2.0, small.macs[0] / small.macs[1])
            start = _fresh(small.params, self.network.init, jax.random.key(seed + 100))
            new = self.fit(start, seed, settings["epochs"] * longer, settings["rate"])
        return found | {"test": self.right(new)}

    def right(self, params: Any) -> float:
        """Share of the test images that are recognised."""
        return round(float(self.test(params, self.held_out)), 4)


def _fresh(small: Any, init: Callable[[jax.Array], Any], key: jax.Array) -> Any:
    """New weights of the smaller shapes: as for the full ones, and as large as a layer of so many inputs wants."""

    def one(path: Any, w: jax.Array, full: jax.Array) -> jax.Array:
        part = full[tuple(slice(n) for n in w.shape)]
        if path[-1].key != "kernel":
            return part
        return part * np.sqrt(np.prod(full.shape[:-1]) / np.prod(w.shape[:-1]))

    return jax.tree_util.tree_map_with_path(one, small, init(key))


def read(folder: Path = RECORDS) -> dict[Cell, dict[str, Any]]:
    """All records."""
    return store.read(folder, Cell)


def main(argv: Sequence[str] | None = None) -> None:
    """Runs every cell that has no record."""
    parser = store.parser(__doc__, RECORDS, MODELS)
    parser.add_argument("--share", action="append", type=float)
    options = parser.parse_args(argv)
    data, done = load(options.source), read(options.records)
    study = functools.cache(lambda model: Study(model, data))
    for cell in cells(options.model or tuple(MODELS)):
        if cell in done or (options.share and cell.share not in (1.0, *options.share)):
            continue
        started, before = time.monotonic(), environment()
        runs = [study(cell.model).run(cell, seed) for seed in SEEDS]
        seconds = round(time.monotonic() - started, 1)
        record = {**cell._asdict(), "settings": MODELS[cell.model], "runs": runs, "seconds": seconds}
        store.append(options.records, record | {"environment": before})
        print(f"{time.strftime('%H:%M')} {cell} {np.mean([r['test'] for r in runs]):.4f} in {seconds} s", flush=True)


if __name__ == "__main__":
    main()
