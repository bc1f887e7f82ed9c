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
from rigl_jax import checks, contents, topology, trees
from rigl_jax.arguments import arguments
from rigl_jax.base import Array, PyTree
from rigl_jax.criteria import losses
from rigl_jax.linear_algebra import unit
from rigl_jax.messages import kind, shown

EXACT = 2**24
"""Whole numbers up to this one are exact in float32."""


@arguments(scores=rules.array(1), k=rules.whole(1), offset=rules.whole(0))
def top(scores: Array, k: int, *, offset: int = 0) -> Array:
    """The examples with the k highest scores, after the `offset` highest ones are left out.

    Paul et al. (2021) keep the hardest examples; with label noise they leave out the very hardest by an offset.

    Args:
      scores: [n], floats, or whole numbers such as counts. NaN ranks last. NumPy's float64 and integers are converted
        to float32, as JAX does unless `jax_enable_x64` is set: scores that are equal then are ties.
      k: how many.
      offset: how many of the highest to leave out.

    Returns:
      int32[k], in ascending order. Equal scores go to the lower index.

    Raises:
      ValueError: k + offset is more than n; all scores are NaN, or whole numbers beyond 2**24 (seen outside of jit
        only).

    >>> scores = jnp.array([0.1, 0.9, 0.5, 0.9, 0.2])
    >>> top(scores, 2).tolist(), top(scores, 2, offset=1).tolist()
    ([1, 3], [2, 3])
    """
    fits("top", k + offset, scores.shape[0], "k + offset" if offset else "k")
    if jnp.issubdtype(scores.dtype, jnp.integer):
        limit = f"at most {EXACT} in size, to be exact in float32"
        scores = contents.every("top", "scores", limit, scores, lambda x: (x >= -EXACT) & (x <= EXACT))
        scores = jnp.asarray(scores).astype(jnp.float32)
    elif not jnp.issubdtype(scores.dtype, jnp.floating):
        raise ValueError(f"top: scores must be real numbers, got {shown(scores)}")
    host = contents.known(scores)
    if host is not None and np.isnan(host).all():
        raise ValueError(f"top: scores must hold a number, got NaN in all {len(host)}")
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


def written(who: str, index: Array, n: int) -> Array:
    """Indices of n examples to be written to, each once; those out of range as n, which a write drops.

    Raises:
      ValueError: they are no whole numbers; one is out of range or there twice (seen outside of jit only).
    """
    contents.distinct(who, "index", contents.whole(who, "index", index, n))
    index = jnp.asarray(index)
    return jnp.where((index >= 0) & (index < n), index.astype(jnp.int32), n)


def of_examples(who: str, name: str, kind_: type, state: Any, n: int) -> None:
    """Checks that a state is of its type, and of n examples.

    Raises:
      ValueError: says what was given.
    """
    sizes = {jnp.shape(x) for x in state} if isinstance(state, kind_) else None
    if sizes != {(n,)}:
        found = kind(state) if sizes is None else f"that of arrays of shapes {sorted(sizes)}"
        raise ValueError(f"{who}: {name} must be the {kind_.__name__} of {n} examples, got {found}")


def indices(mask: Array, k: int) -> Array:
    """int32[k]: where a mask with k True entries has them."""
    return jnp.nonzero(mask, size=k)[0].astype(jnp.int32)


@arguments(logits=rules.logits(2), labels=rules.array(1))
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
      ValueError: fewer than two classes; labels are not one integer for each example; one is not a class, or a logit
        is NaN (seen outside of jit only).

    >>> [round(float(x), 4) for x in el2n(jnp.array([[0.0, 0.0], [50.0, 0.0]]), jnp.array([0, 1]))]
    [0.7071, 1.4142]
    """
    contents.labels("el2n", labels, *logits.shape)
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
      loss: `(params, batch) -> scalar`, in evaluation mode. It gets batches of one example, so that its mean is the
        loss of that example. In training mode BatchNorm would normalise each example by itself, and scores would say
        nothing.
      params: all weights that count. Leaves that are no floats stay as they are.
      batch: tree of arrays with a first axis of n examples.
      chunk: examples whose gradients are computed together; memory is `chunk` times that of params.

    Returns:
      f32[n]. No square over- or underflows: a score is 0 or inf only where float32 has no other number for it.

    Raises:
      ValueError: batch has no array, or arrays with different numbers of examples; loss gives no scalar; params hold
        no floats.

    >>> loss = lambda params, x: jnp.mean((x @ params) ** 2) / 2
    >>> grand(loss, jnp.array([1.0, 0.0]), jnp.array([[1.0, 0.0], [3.0, 4.0]])).tolist()  # |w x| times the norm of x
    [1.0, 15.0]
    """
    given = jax.tree.leaves(batch)
    sizes = {leaf.shape[:1] if hasattr(leaf, "dtype") else () for leaf in given}
    if len(sizes) != 1 or not sizes.isdisjoint({(), (0,)}):
        found = [shown(leaf) for leaf in given[:3]] if len(sizes) > 1 else kind(batch)
        raise ValueError(f"grand: batch must be arrays with one first axis of at least one example, got {found}")
    if not all(hasattr(leaf, "dtype") for leaf in jax.tree.leaves(params)):
        raise ValueError(f"grand: params must be a tree of arrays, got {kind(params)}")
    weights, join = trees.floats(params)
    if not weights:
        raise ValueError(f"grand: params must hold an array of floats, got {kind(params)}")
    value = losses.at("grand", loss)

    def norm(example: Any) -> Array:
        grads = jax.grad(lambda w: value(join(w), jax.tree.map(lambda x: x[None], example)))(weights)
        return _length([g.astype(jnp.float32) for g in grads])

    return jax.lax.map(norm, batch, batch_size=chunk)


def _length(grads: list[Array]) -> Array:
    scale = unit(grads)
    return scale * jnp.sqrt(sum(jnp.sum((g / scale) ** 2) for g in grads))


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
      update: `(state, index int[b], correct bool[b]) -> state`, for the examples of a minibatch, each once. Indices
        out of range and repeated ones are refused outside of jit. Under jit those out of range, such as -1 for
        padding, change nothing.
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

    @arguments("forgetting: update", index=rules.array(1), correct=rules.array(1))
    def update(state: ForgettingState, index: Array, correct: Array) -> ForgettingState:
        of_examples("forgetting: update", "state", ForgettingState, state, n)
        checks.same_shape("forgetting: update", index.shape, correct=correct)
        if correct.dtype != bool:
            raise ValueError(f"forgetting: update: correct must be bool, got {shown(correct)}")
        return _recorded(state, written("forgetting: update", index, n), correct)

    def scores(state: ForgettingState) -> Array:
        of_examples("forgetting: scores", "state", ForgettingState, state, n)
        return jnp.where(state.learned, state.events.astype(jnp.float32), jnp.inf)

    return Forgetting(init, update, scores)


@jax.jit
def _recorded(state: ForgettingState, index: Array, correct: Array) -> ForgettingState:
    forgot = state.correct[index] & ~correct
    return ForgettingState(
        state.correct.at[index].set(correct, mode="drop"),
        state.learned.at[index].max(correct, mode="drop"),
        state.events.at[index].add(forgot.astype(jnp.int32), mode="drop"),
    )
