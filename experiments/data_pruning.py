"""Which examples a run trains on: `config.data_pruning`, as pure functions of a state that is saved with the run.

Data flow one way. Each training step tells `observe` the losses of its examples. Where it is due, `choose` makes of
what was observed a weight for every training example: 0 for those that are left out. The batches of the steps that
follow hold the others only, and their losses count by these weights. `experiments.feeding` does this for the loop.

The entries of `DATA_PRUNING` take n, the number of training examples, and the options of the config. Numbers of steps
count from 0: `start=100` chooses before the 101st step, and all examples are used until then.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

import rigl_jax as rx
from experiments.rules import is_number
from rigl_jax.arguments import arguments, flag, rule, scalar, whole, word
from rigl_jax.base import Array

KEEP = rule("a number above 0 and at most 1", lambda value: is_number(value) and 0 < value <= 1)
OFFSET = rule("a number in [0, 1)", lambda value: is_number(value) and 0 <= value < 1)


class Examples(NamedTuple):
    """What a run knows of its n training examples; a part of the train state.

    Attributes:
      weight: float32[n], by which the loss of an example counts; 0: it is not in use.
      stats: what was observed so far, a tree of arrays.
    """

    weight: Array
    stats: Any


Score = Callable[[Any, Any, Array, Array], Array]
"""`(apply, params, images, labels) -> float32[b]`: how hard examples are, `apply(params, images)` giving logits."""


class DataPruning(NamedTuple):
    """Pure functions that choose the examples of a run.

    Attributes:
      init: `() -> Examples` before the first step; None where all examples are used throughout.
      chosen_at: `step -> the step before which the examples of this step were chosen`, on the host; None: not yet.
      choose: `(examples, scores float32[n] or None, key) -> Examples`.
      observe: `(examples, index int32[b], losses float32[b], right bool[b]) -> Examples`, of the examples of a step.
      kept: how many examples are in use once they are chosen.
      score: what `choose` wants to know of all examples; None: nothing.
      passes: what one score costs, in forward passes of an example.
    """

    init: Callable[[], Examples | None]
    chosen_at: Callable[[int], int | None]
    choose: Callable[[Examples, Array | None, Array], Examples]
    observe: Callable[[Any, Any, Array, Array], Any]
    kept: int
    score: Score | None = None
    passes: int = 0

    def due(self, step: int) -> bool:
        """Whether examples are chosen before this step."""
        return self.chosen_at(step) == step

    def weigh(self, examples: Examples | None, index: Any, losses: Array) -> Array:
        """The losses of a batch, each by the weight of its example."""
        return losses if examples is None else losses * examples.weight[index]


def everything(n: int) -> DataPruning:
    """All examples throughout, and no state."""
    return DataPruning(
        init=lambda: None,
        chosen_at=lambda step: None,
        choose=lambda examples, scores, key: examples,
        observe=lambda examples, index, losses, right: examples,
        kept=n,
    )


# --- chosen again and again, by the losses of training ---------------------------------------------------------------


@arguments(keep=KEEP, period=whole(0), start=whole(0))
def random(n: int, *, keep: float, period: int, start: int = 0) -> DataPruning:
    """Another part, drawn uniformly, every `period` steps; 0: one part for good.

    Args:
      n: training examples.
      keep: the share that is kept, rounded down but at least one example.
      period: steps.
      start: the first step that trains on a part.
    """
    return _dynamic(n, "random", keep, period, start, weights=False)


@arguments(keep=KEEP, period=whole(0), start=whole(0), weights=flag, epsilon=scalar, rate=scalar)
def epsilon_greedy(
    n: int, *, keep: float, period: int, start: int = 0, weights: bool = False, epsilon: float = 0.1, rate: float = 0.1
) -> DataPruning:
    """The highest mean losses and a part `epsilon` at random, every `period` steps; see `rx.coreset.dynamic_pruning`.

    Args:
      n: training examples.
      keep: as of `random`.
      period: as of `random`.
      start: as of `random`.
      weights: whether losses count by Horvitz-Thompson weights, so that their mean estimates that of all examples.
      epsilon: the part of the kept that is drawn from the rest.
      rate: weight of a new loss in the moving averages.
    """
    return _dynamic(n, "epsilon_greedy", keep, period, start, weights=weights, epsilon=epsilon, rate=rate)


@arguments(keep=KEEP, period=whole(0), start=whole(0), weights=flag, epsilon=scalar, c=scalar, rate=scalar)
def ucb(
    n: int, *, keep: float, period: int, start: int = 0, weights: bool = False, epsilon: float = 0.0, c: float = 1.0,
    rate: float = 0.1,
) -> DataPruning:  # fmt: skip
    """The highest `mean + c var` of the losses, every `period` steps; see `rx.coreset.dynamic_pruning`.

    Args:
      n: training examples.
      keep: as of `random`.
      period: as of `random`.
      start: as of `random`.
      weights: as of `epsilon_greedy`; only with an epsilon above 0.
      epsilon: as of `epsilon_greedy`.
      c: how much the variance counts.
      rate: as of `epsilon_greedy`.
    """
    return _dynamic(n, "ucb", keep, period, start, weights=weights, epsilon=epsilon, c=c, rate=rate)


def _dynamic(n: int, name: str, keep: float, period: int, start: int, *, weights: bool, **options: Any) -> DataPruning:
    if weights and not options.get("epsilon"):
        raise ValueError(
            f"{name}: weights must be False where epsilon is 0: examples without a chance to be chosen are missing"
        )
    kept = _kept(n, keep)
    selector = rx.coreset.dynamic_pruning(n, kept, name, **options)

    def choose(examples: Examples, scores: Array | None, key: Array) -> Examples:
        del scores
        chosen = selector.select(examples.stats, key)
        weight = chosen.weight if weights else jnp.ones_like(chosen.weight)
        return _only(examples, chosen.index, weight)

    def observe(examples: Examples, index: Array, losses: Array, right: Array) -> Examples:
        del right
        return examples._replace(stats=selector.update(examples.stats, index, losses))

    return DataPruning(lambda: _all_of(n, selector.init()), _every(start, period), choose, observe, kept)


def _all_of(n: int, stats: Any = ()) -> Examples:
    return Examples(jnp.ones(n, jnp.float32), stats)


def _only(examples: Examples, index: Any, weight: Any) -> Examples:
    return examples._replace(weight=jnp.zeros_like(examples.weight).at[index].set(weight))


def _kept(n: int, keep: float) -> int:
    return max(int(keep * n + 1e-6), 1)


def _every(start: int, period: int) -> Callable[[int], int | None]:
    def chosen_at(step: int) -> int | None:
        if step < start:
            return None
        return start if not period else step - (step - start) % period

    return chosen_at


# --- chosen by a score -----------------------------------------------------------------------------------------------


@arguments(keep=KEEP, start=whole(1), period=whole(0), offset=OFFSET)
def el2n(n: int, *, keep: float, start: int, period: int = 0, offset: float = 0.0) -> DataPruning:
    """The hardest examples by EL2N of the network at step `start`: one forward pass over all training examples.

    Args:
      n: training examples.
      keep: as of `random`.
      start: the step before which they are scored and chosen.
      period: steps after which they are scored and chosen again; 0: never.
      offset: the share of all examples that is left out for being hardest; with wrong labels, above their share.
    """
    return _scored(n, "el2n", keep, offset, _every(start, period))._replace(score=_el2n, passes=1)


@arguments(keep=KEEP, start=whole(1), period=whole(0), offset=OFFSET)
def grand(n: int, *, keep: float, start: int, period: int = 0, offset: float = 0.0) -> DataPruning:
    """The hardest examples by GraNd: the same with the length of the gradient over all active weights.

    Args:
      n: training examples.
      keep: as of `random`.
      start: as of `el2n`.
      period: as of `el2n`.
      offset: as of `el2n`.
    """
    return _scored(n, "grand", keep, offset, _every(start, period))._replace(score=_grand, passes=3)


@arguments(keep=KEEP, start=whole(1), period=whole(0), offset=OFFSET)
def forgetting(n: int, *, keep: float, start: int, period: int = 0, offset: float = 0.0) -> DataPruning:
    """The examples that training forgot most often before step `start`; those that were never right come first.

    Args:
      n: training examples.
      keep: as of `random`.
      start: as of `el2n`.
      period: as of `el2n`.
      offset: as of `el2n`.
    """
    track = rx.coreset.forgetting(n)

    def observe(examples: Examples, index: Array, losses: Array, right: Array) -> Examples:
        fine = jnp.isfinite(losses)  # of the others nothing is known: their right answers stay as they were
        right = jnp.where(fine, right, examples.stats.correct[index])
        return examples._replace(stats=track.update(examples.stats, index, right))

    found = _scored(n, "forgetting", keep, offset, _every(start, period), lambda stats: track.scores(stats))
    return found._replace(init=lambda: _all_of(n, track.init()), observe=observe)


def _scored(
    n: int,
    name: str,
    keep: float,
    offset: float,
    chosen_at: Callable[[int], int | None],
    of_stats: Callable[[Any], Array] | None = None,
) -> DataPruning:
    """The highest scores; equal ones in random order, as the order of a data set may be that of its classes."""
    kept, left = _kept(n, keep), int(offset * n + 1e-6)
    if kept + left > n:
        raise ValueError(f"{name}: offset must be at most 1 - keep = {1 - keep:g}, got {offset}")

    def choose(examples: Examples, scores: Any, key: Array) -> Examples:
        scores = scores if of_stats is None else of_stats(examples.stats)
        order = jax.random.permutation(key, n)
        index = order[rx.coreset.top(scores[order], kept, offset=left)]
        return _only(examples, index, 1.0)

    return DataPruning(lambda: _all_of(n), chosen_at, choose, everything(n).observe, kept)


def _el2n(apply: Any, params: Any, images: Array, labels: Array) -> Array:
    return rx.coreset.el2n(apply(params, images), labels)


def _grand(apply: Any, params: Any, images: Array, labels: Array) -> Array:
    def loss(params: Any, batch: Any) -> Array:
        logits = jax.nn.log_softmax(apply(params, batch[0]).astype(jnp.float32))
        return -jnp.mean(jnp.take_along_axis(logits, batch[1][:, None], axis=1))

    return rx.coreset.grand(loss, params, (images, labels))


@arguments(path=word)
def from_file(n: int, *, path: str) -> DataPruning:
    """The examples of a file, from the first step on.

    Args:
      n: training examples.
      path: of an .npy file of whole numbers, or of a text file with one in each line; each index once.

    Raises:
      ValueError: no such file, or other content.
    """
    index = _indices(path)
    if index.max() >= n:
        raise ValueError(
            f"from_file: path must hold indices below {n}, the number of training examples, got {index.max()}"
        )

    def choose(examples: Examples, scores: Array | None, key: Array) -> Examples:
        del scores, key
        return _only(examples, index, 1.0)

    found = everything(n)
    return DataPruning(lambda: _all_of(n), _every(0, 0), choose, found.observe, len(index))


def _indices(path: str) -> np.ndarray:
    if not Path(path).is_file():
        raise ValueError(f"from_file: path must be an .npy or text file of indices, there is no file {path}")
    try:
        found = np.load(path) if path.endswith(".npy") else np.loadtxt(path, np.int64, ndmin=1)
    except (ValueError, OSError, EOFError) as error:
        raise ValueError(f"from_file: path must be an .npy or text file of indices, {path} is not: {error}") from None
    whole_numbers = isinstance(found, np.ndarray) and found.ndim == 1 and np.issubdtype(found.dtype, np.integer)
    if not whole_numbers or not found.size or found.min() < 0 or len(np.unique(found)) < len(found):
        raise ValueError(f"from_file: path must hold indices from 0, each once, {path} does not")
    return found.astype(np.int64)


DATA_PRUNING: dict[str, Callable[..., DataPruning]] = {
    "none": everything,
    "random": random,
    "epsilon_greedy": epsilon_greedy,
    "ucb": ucb,
    "el2n": el2n,
    "grand": grand,
    "forgetting": forgetting,
    "file": from_file,
}
