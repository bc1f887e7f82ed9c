"""How hard an example is, measured while a network is trained on it: EL2N, GraNd and forgetting events.

A high score means a hard example, or one with a wrong label. All are noisy in one run: average the scores of ten
independent runs (the mean of norms, not the norm of a mean), as Paul et al. (2021) do.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from rigl_jax import arguments as rules
from rigl_jax import checks, topology
from rigl_jax.arguments import arguments
from rigl_jax.base import Array, PyTree
from rigl_jax.messages import kind, shown


@arguments(scores=rules.array(1), k=rules.whole(1), offset=rules.whole(0))
def top(scores: Array, k: int, *, offset: int = 0) -> Array:
    """The examples with the k highest scores, after the `offset` highest ones are left out.

    Paul et al. (2021) keep the hardest examples; with label noise they leave out the very hardest by an offset.

    Args:
      scores: float[n]; NaN ranks last.
      k: how many.
      offset: how many of the highest to leave out.

    Returns:
      int32[k], in ascending order. Equal scores go to the lower index.

    Raises:
      ValueError: k + offset is more than n.

    >>> scores = jnp.array([0.1, 0.9, 0.5, 0.9, 0.2])
    >>> top(scores, 2).tolist(), top(scores, 2, offset=1).tolist()
    ([1, 3], [2, 3])
    """
    fits("top", k + offset, scores.shape[0], "k + offset" if offset else "k")
    return _top(scores, k, offset)


@functools.partial(jax.jit, static_argnames=("k", "offset"))
def _top(scores: Array, k: int, offset: int) -> Array:
    first = topology.select(scores, k + offset)
    return indices(first & ~topology.select(scores, offset), k)


def fits(who: str, k: int, n: int, name: str = "k") -> None:
    """Checks that k of n examples can be chosen.

    Raises:
      ValueError: they cannot.
    """
    if k > n:
        raise ValueError(f"{who}: {name} must be at most the number of examples, {n}, got {k}")


def finite(who: str, **given: Array) -> None:
    """Checks that arrays hold no NaN and no infinity; says nothing of what is traced.

    Raises:
      ValueError: one does; it is named.
    """
    for name, array in given.items():
        if not isinstance(array, jax.core.Tracer) and not np.isfinite(np.asarray(array)).all():
            raise ValueError(f"{who}: {name} must be finite, got NaN or infinity")


def in_range(who: str, n: int, **given: Array) -> None:
    """Checks that arrays hold whole numbers from 0 to n - 1; of what is traced only that they are whole.

    Raises:
      ValueError: one does not; it is named.
    """
    for name, array in given.items():
        if not jnp.issubdtype(array.dtype, jnp.integer):
            raise ValueError(f"{who}: {name} must be whole numbers, got {shown(array)}")
        if not isinstance(array, jax.core.Tracer) and array.size:
            least, most = np.min(array), np.max(array)
            if not 0 <= least <= most < n:
                raise ValueError(f"{who}: {name} must be from 0 to {n - 1}, got {least} to {most}")


def indices(mask: Array, k: int) -> Array:
    """int32[k]: where a mask with k True entries has them."""
    return jnp.nonzero(mask, size=k)[0].astype(jnp.int32)


@arguments(logits=rules.array(2), labels=rules.array(1))
def el2n(logits: Array, labels: Array) -> Array:
    """EL2N (Paul et al. 2021): the length of `softmax(logits) - onehot(label)`, from 0 to the root of 2.

    Take it early in training: their reproduction study uses epoch 20 of 200 on CIFAR-10. The network is in evaluation
    mode, and the inputs are not augmented.

    Args:
      logits: float[n, classes].
      labels: int[n].

    Returns:
      f32[n].

    Raises:
      ValueError: labels are not one integer for each example; one is not a class (seen outside of jit only).

    >>> [round(float(x), 4) for x in el2n(jnp.array([[0.0, 0.0], [50.0, 0.0]]), jnp.array([0, 1]))]
    [0.7071, 1.4142]
    """
    if labels.shape != logits.shape[:1]:
        raise ValueError(f"el2n: labels must be int{list(logits.shape[:1])}, one for each example, got {shown(labels)}")
    in_range("el2n", logits.shape[1], labels=labels)
    return _el2n(logits, labels)


@jax.jit
def _el2n(logits: Array, labels: Array) -> Array:
    error = jax.nn.softmax(logits.astype(jnp.float32)) - jax.nn.one_hot(labels, logits.shape[1], dtype=jnp.float32)
    return jnp.sqrt(jnp.sum(error**2, axis=1))


@arguments(loss=rules.function, chunk=rules.whole(1))
def grand(loss: Callable[[PyTree, Any], Array], params: PyTree, batch: Any, *, chunk: int = 128) -> Array:
    """GraNd (Paul et al. 2021): the length of the gradient of an example's loss, over all params.

    The authors' code holds the gradients of a whole batch; here `chunk` of them exist at a time. Take it late in
    training, like EL2N. That it works at initialisation does not reproduce (Kirsch 2023): there it follows the norm of
    the input.

    Args:
      loss: `(params, batch) -> scalar`. It gets batches of one example, so that its mean is the loss of that example.
      params: all weights that count.
      batch: tree of arrays with a first axis of n examples.
      chunk: examples whose gradients are computed together; memory is `chunk` times that of params.

    Returns:
      f32[n].

    Raises:
      ValueError: batch has no array, or arrays with different numbers of examples.

    >>> loss = lambda params, x: jnp.mean((x @ params) ** 2) / 2
    >>> grand(loss, jnp.array([1.0, 0.0]), jnp.array([[1.0, 0.0], [3.0, 4.0]])).tolist()  # |w x| times the norm of x
    [1.0, 15.0]
    """
    leaves = jax.tree.leaves(batch)
    sizes = {leaf.shape[:1] if hasattr(leaf, "dtype") else () for leaf in leaves}
    if len(sizes) != 1 or () in sizes:
        raise ValueError(f"grand: batch must be arrays with one first axis of examples, got {kind(batch)}")
    if not all(hasattr(leaf, "dtype") for leaf in jax.tree.leaves(params)) or not jax.tree.leaves(params):
        raise ValueError(f"grand: params must be a tree of arrays, got {kind(params)}")

    def norm(example: Any) -> Array:
        grads = jax.grad(loss)(params, jax.tree.map(lambda x: x[None], example))
        return jnp.sqrt(sum(jnp.sum(g.astype(jnp.float32) ** 2) for g in jax.tree.leaves(grads)))

    return jax.lax.map(norm, batch, batch_size=chunk)


class ForgettingState(NamedTuple):
    """What is known of n examples so far; a pytree, to be saved with the run.

    Attributes:
      correct: bool[n], the last prediction was right.
      learned: bool[n], some prediction was.
      events: int32[n], how often an example went from right to wrong.
    """

    correct: Array
    learned: Array
    events: Array


class Forgetting(NamedTuple):
    """Pure functions of forgetting events.

    Attributes:
      init: `() -> ForgettingState`.
      update: `(state, index int[b], correct bool[b]) -> state`, for the examples of a minibatch, each once.
      scores: `state -> f32[n]`, the number of events; inf for an example that was never right.
    """

    init: Callable[[], ForgettingState]
    update: Callable[[ForgettingState, Array, Array], ForgettingState]
    scores: Callable[[ForgettingState], Array]


@arguments(n=rules.whole(1))
def forgetting(n: int) -> Forgetting:
    """Forgetting events (Toneva et al. 2019): how often an example goes from classified rightly to wrongly.

    Give `update` the predictions of each training step, before the weights move. Examples that were never right have
    score inf, as in Paul et al.'s code; Toneva et al. count an event for each epoch of the run instead.

    Args:
      n: examples of the training set.

    >>> track = forgetting(2)
    >>> state = track.init()
    >>> for right in ([True, False], [False, False], [True, False], [False, False]):
    ...     state = track.update(state, jnp.arange(2), jnp.array(right))
    >>> track.scores(state).tolist()
    [2.0, inf]
    """

    def init() -> ForgettingState:
        return ForgettingState(jnp.zeros(n, bool), jnp.zeros(n, bool), jnp.zeros(n, jnp.int32))

    @arguments(index=rules.array(1), correct=rules.array(1))
    def update(state: ForgettingState, index: Array, correct: Array) -> ForgettingState:
        checks.same_shape("forgetting", index.shape, correct=correct)
        in_range("forgetting", n, index=index)
        if correct.dtype != bool:
            raise ValueError(f"forgetting: correct must be bool, got {shown(correct)}")
        return _recorded(state, index, correct)

    def scores(state: ForgettingState) -> Array:
        return jnp.where(state.learned, state.events.astype(jnp.float32), jnp.inf)

    return Forgetting(init, update, scores)


@jax.jit
def _recorded(state: ForgettingState, index: Array, correct: Array) -> ForgettingState:
    forgot = state.correct[index] & ~correct
    return ForgettingState(
        state.correct.at[index].set(correct),
        state.learned.at[index].max(correct),
        state.events.at[index].add(forgot.astype(jnp.int32)),
    )
