"""One training step: the state, the loss, its gradient, and the state after it. Nothing is compiled or placed here."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from experiments.data_pruning import DataPruning, Examples
from experiments.finite import finite, skip_nonfinite
from experiments.models.adapters import Model
from rigl_jax import trees
from rigl_jax.base import Array, Masks, PyTree

Batch = Mapping[str, Any]
Apply = Callable[..., Any]
"""The network: `Model.apply`, or the same on packed weights."""


class TrainState(NamedTuple):
    """All that changes while training; arrays only, so that it is donated, sharded and saved as a whole.

    This is the form that checkpoints hold and that every execution starts from, the packed one too.

    Attributes:
      step: int32 scalar, steps done.
      params: the weights; those that the method does not store are exactly 0.
      batch_stats: running statistics of batch normalisation, {} without.
      opt_state: `rx.SparseState` of a sparse run, the optimizer's own state of a dense one.
      key: typed key for dropout, never advanced: each step folds its number in.
      explored: masks of the weights that were ever active; a tree without arrays (None) where no leaf is sparse.
      totals: sums of the training metrics since the last line, {"loss", "accuracy", "steps"}, of the batches left out,
        "skipped", and of those among them that would have updated weights, "missed": float32 scalars.
      examples: which training examples are in use, and what is known of them; None where all are.
    """

    step: Array
    params: PyTree
    batch_stats: PyTree
    opt_state: Any
    key: Array
    explored: Masks
    totals: dict[str, Array]
    examples: Examples | None = None


class Objective(NamedTuple):
    """What is trained and how it is evaluated, for every execution.

    Attributes:
      model: the network.
      image_shape: of one example.
      seed: of all randomness; see `key`.
      label_smoothing: the share of the target that is spread over all classes, in [0, 1).
      skip_nonfinite: whether a batch whose loss or gradient is not finite is left out.
      pruning: which examples are used.
    """

    model: Model
    image_shape: tuple[int, ...]
    seed: int
    pruning: DataPruning
    label_smoothing: float = 0.0
    skip_nonfinite: bool = False

    def key(self, use: str) -> Array:
        """One key for each use of randomness ("params", "masks", "dropout", "examples"), all from the seed."""
        return trees.leaf_key(jax.random.key(self.seed), use)


def init_variables(objective: Objective) -> tuple[PyTree, PyTree]:
    """The model's first `(params, batch_stats)`, dense."""
    image = jnp.zeros((1, *objective.image_shape), jnp.float32)
    variables = dict(objective.model.init(objective.key("params"), image, train=False))
    return variables["params"], variables.get("batch_stats", {})


def new_state(
    objective: Objective, params: PyTree, batch_stats: PyTree, opt_state: Any, explored: Masks = None
) -> TrainState:
    """The state before the first step."""
    return TrainState(
        step=jnp.zeros((), jnp.int32),
        params=params,
        batch_stats=batch_stats,
        opt_state=opt_state,
        key=objective.key("dropout"),
        explored=explored,
        totals=no_totals(),
        examples=objective.pruning.init(),
    )


def no_totals() -> dict[str, Array]:
    """`TrainState.totals` before the first step, and after a line was written."""
    return {name: jnp.zeros((), jnp.float32) for name in ("loss", "accuracy", "steps", "skipped", "missed")}


# --- the loss ----------------------------------------------------------------------------------------------------


def cross_entropy(logits: Array, labels: Array, smoothing: float = 0.0) -> Array:
    """Softmax cross-entropy of each example, `float32[batch]`, in nats.

    Args:
      logits: `[batch, classes]`.
      labels: `int[batch]`.
      smoothing: the share of the target that is spread over all classes, in [0, 1).
    """
    targets = jax.nn.one_hot(labels, logits.shape[-1])
    return optax.softmax_cross_entropy(logits, optax.smooth_labels(targets, smoothing))


def example_losses(
    objective: Objective, apply: Apply, weights: PyTree, state: Any, batch: Batch
) -> tuple[Array, tuple[Array, PyTree]]:
    """`(losses, (right, batch_stats))` of a training batch.

    Args:
      objective: the model's loss.
      apply: the model, or the model on packed weights.
      weights: what `apply` takes for params.
      state: its running statistics, key and step are read.
      batch: {"image": `[batch, H, W, C]`, "label": `int[batch]`}.

    Returns:
      The loss and the right answer, `float32[batch]` and `bool[batch]`, of each example; the new running statistics.
    """
    logits, mutated = apply(
        {"params": weights, "batch_stats": state.batch_stats},
        batch["image"],
        train=True,
        mutable=["batch_stats"],
        rngs={"dropout": jax.random.fold_in(state.key, state.step)},
    )
    losses = cross_entropy(logits, batch["label"], objective.label_smoothing)
    return losses, (jnp.argmax(logits, -1) == batch["label"], mutated.get("batch_stats", {}))


def gradient_of(
    objective: Objective,
    apply: Apply,
    to_weights: Callable[[PyTree], PyTree],
    params: PyTree,
    state: Any,
    batch: Batch,
) -> tuple[PyTree, dict[str, Array], dict[str, Any]]:
    """`(gradient, metrics, new)` of the mean loss of a batch at `params`, each example by its weight.

    `to_weights` makes of the params what `apply` takes: it puts masks on, or values into their patterns. `metrics` is
    what the step adds to `TrainState.totals`, `new` the fields of the state after the step that the batch decides:
    running statistics, and what is known of the examples.
    """
    pruning, index = objective.pruning, batch.get("index")

    def mean_loss(params: PyTree) -> Any:
        losses, (right, batch_stats) = example_losses(objective, apply, to_weights(params), state, batch)
        loss = jnp.mean(pruning.weigh(state.examples, index, losses))
        metrics = {**no_totals(), "loss": loss, "accuracy": jnp.mean(right), "steps": jnp.float32(1)}
        return loss, (metrics, batch_stats, losses, right)

    gradient, (metrics, batch_stats, losses, right) = jax.grad(mean_loss, has_aux=True)(params)
    examples = pruning.observe(state.examples, index, losses, right)
    return gradient, metrics, {"batch_stats": batch_stats, "examples": examples}


def evaluation_sums(apply: Apply, weights: PyTree, state: Any, batch: Batch) -> Array:
    """`float32[3]`: sums of loss, right answers and weights over a test batch."""
    logits: Any = apply({"params": weights, "batch_stats": state.batch_stats}, batch["image"], train=False)
    right = (jnp.argmax(logits, -1) == batch["label"]).astype(jnp.float32)
    weight = batch["weight"].astype(jnp.float32)
    # Padding has the label -1, whose one-hot vector is 0; its loss is 0 and its weight too.
    return jnp.stack(
        [jnp.sum(v * weight) for v in (cross_entropy(logits, batch["label"]), right, jnp.ones_like(right))]
    )


def example_scores(objective: Objective, params: PyTree, state: TrainState, batch: Batch) -> Array:
    """float32[batch]: the score by which examples are chosen, of the network in evaluation.

    Raises:
      ValueError: they are not chosen by a score.
    """
    if (score := objective.pruning.score) is None:
        raise ValueError("example_scores: examples are not chosen by a score")

    def apply(params: PyTree, images: Array) -> Any:
        return objective.model.apply({"params": params, "batch_stats": state.batch_stats}, images, train=False)

    return score(apply, params, batch["image"], batch["label"])


# --- the state after a step --------------------------------------------------------------------------------------


def advance(
    objective: Objective, state: Any, gradient: PyTree, metrics: dict[str, Array], *, updates: bool, **new: Any
) -> Any:
    """The state after a step, with its `new` fields and counted; or before it, where the batch is to be left out.

    Args:
      objective: says whether a batch that is not finite is left out.
      state: a `TrainState`, or its packed form.
      gradient: of the batch.
      metrics: of the batch, added to the totals.
      updates: whether the step updates weights; see `experiments.finite.skip_nonfinite`.
      new: fields of the state.
    """
    totals = jax.tree.map(jnp.add, state.totals, metrics)
    after = state._replace(step=state.step + 1, totals=totals, **new)
    if not objective.skip_nonfinite:
        return after
    return skip_nonfinite(finite((metrics["loss"], gradient)), after, state, updates=updates)
