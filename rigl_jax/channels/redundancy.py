"""Criteria of channels that ask what others know as well, or nothing at all."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp

from rigl_jax import arguments as rules
from rigl_jax.arguments import arguments
from rigl_jax.base import Array, PyTree
from rigl_jax.channels.first_order import gradients
from rigl_jax.channels.gating import ChannelCriterion, Read, Scores, inputs_of, parted, tapped
from rigl_jax.channels.grouping import Group
from rigl_jax.criteria.losses import Loss
from rigl_jax.linear_algebra import energy_rank, unit
from rigl_jax.tracing import geometry


@arguments(key=rules.key)
def random(key: Array) -> ChannelCriterion:
    """Uniform scores, independent of the weights: the control of every criterion.

    Args:
      key: PRNG key; equal keys give equal scores.

    Returns:
      `(groups, params, batch) -> scores`; float32[size] for each group. Params and batch are not read.

    Example:
      >>> import rigl_jax as rx
      >>> params = {"a": jnp.ones((1, 2)), "b": jnp.ones((2, 1))}
      >>> groups = rx.channels.groups(lambda p, x: x @ p["a"] @ p["b"], params, jnp.ones((1, 1)))
      >>> [s.shape for s in random(jax.random.key(0))(groups, params, None)]
      [(2,)]
    """

    def criterion(groups: Sequence[Group], params: PyTree, batch: Any) -> Scores:
        return tuple(jax.random.uniform(jax.random.fold_in(key, g), (h.size,)) for g, h in enumerate(groups))

    return criterion


@arguments(loss=rules.function, energy=rules.share)
def effective_rank(loss: Loss, energy: float = 0.99) -> ChannelCriterion:
    """What a channel adds to the others in the matrix of gradients, examples by channels (after Zhou et al. 2022).

    The matrix of a group holds dL/dc of every example and channel. Its effective rank is the number of singular values
    that hold the `energy`, a share of the sum of their squares: so many channels are worth keeping. Channels are picked
    one by one, always the one with the largest part that those before do not explain (a QR decomposition with
    pivots). The score is that part, as a share of all squares, plus 1 for as many channels as the rank.

    The text of the paper was not at hand: this is in its style.

    Args:
      loss: `(params, batch) -> scalar`, in inference mode; called with one example at a time.
      energy: above 0, at most 1.

    Returns:
      `(groups, params, batch) -> scores`; float[size] for each group. The number of scores of at least 1 is the rank.

    Example:
      >>> import rigl_jax as rx
      >>> params = {"a": jnp.array([[1.0, 1.0, 0.0], [0.0, 0.0, 2.0]]), "b": jnp.array([[1.0], [1.0], [1.0]])}
      >>> apply = lambda p, x: x @ p["a"] @ p["b"]
      >>> groups = rx.channels.groups(apply, params, jnp.ones((1, 2)))
      >>> loss = lambda p, x: apply(p, x).sum()
      >>> scores = effective_rank(loss)(groups, params, jnp.eye(2))
      >>> [round(float(s), 2) for s in scores[1]]  # the first two are the same
      [1.17, 0.0, 1.67]
    """

    def criterion(groups: Sequence[Group], params: PyTree, batch: Any) -> Scores:
        grads = gradients("effective_rank", loss, groups, params, batch, 1)
        return tuple(_novel(matrix.T, energy) for matrix in parted(groups, grads.T))

    return criterion


def _novel(matrix: Array, energy: float) -> Array:
    """float[columns]: see `effective_rank`."""
    matrix = matrix / unit([matrix])
    total = jnp.sum(jnp.square(matrix))
    rank = energy_rank(matrix, energy)

    def pick(n: Array, state: tuple[Array, Array]) -> tuple[Array, Array]:
        left, scores = state
        norms = jnp.where(scores < 0, jnp.sum(jnp.square(left), 0), -1.0)
        chosen = jnp.argmax(norms)
        new = left[:, chosen] / jnp.sqrt(jnp.maximum(norms[chosen], 1e-30))
        part = jnp.maximum(norms[chosen], 0) / jnp.where(total > 0, total, 1)
        return left - jnp.outer(new, new @ left), scores.at[chosen].set(part + (n < rank))

    return jax.lax.fori_loop(0, matrix.shape[1], pick, (matrix, jnp.full(matrix.shape[1], -1.0)))[1]


@arguments(apply=rules.function, key=rules.key, samples=rules.whole(2), bins=rules.whole(2))
def mutual_information(
    apply: Callable[[PyTree, Any], Any], key: Array, samples: int = 4096, bins: int = 16
) -> ChannelCriterion:
    """The information that the outputs of the next layers hold on a channel, without data (after Ferianc et al. 2021).

    The channels that a product reads are given independent values, uniform in [0, 1): of maximum entropy. The score is
    the sum over outputs of the mutual information of the channel and the output, by a histogram, in nats. A convolution
    is given the channels of one window. With few samples for `bins` ** 2 the estimate is too large, by about
    (bins - 1) ** 2 / (2 samples), for all channels alike.

    The text of the paper was not at hand: this is in its style. Unlike there, the values of all layers have one range.

    Args:
      apply: `(params, inputs) -> outputs`; the batch is inputs, or `(inputs, labels)`. Only its shapes are read.
      key: PRNG key of the values.
      samples: how many there are.
      bins: of the histogram of each variable, of equal width between its least and largest value.

    Returns:
      `(groups, params, batch) -> scores`; float[size] for each group. Only products with weights count, and of grouped
      convolutions none.

    Example:
      >>> import rigl_jax as rx
      >>> params = {"a": jnp.ones((1, 2)), "b": jnp.array([[1.0], [0.0]])}
      >>> apply = lambda p, x: x @ p["a"] @ p["b"]
      >>> x = jnp.ones((1, 1))
      >>> groups = rx.channels.groups(apply, params, x)
      >>> scores = mutual_information(apply, jax.random.key(0))(groups, params, x)  # log 16
      >>> [round(float(s), 1) for s in scores[0]]
      [2.8, 0.0]
    """

    def note(read: Read, operands: list[Array]) -> Array:
        size = operands[read.side].shape[read.axis]
        if not read.weight or operands[1 - read.side].shape[read.other] != size:
            return jnp.zeros(size)
        return _informative(_rows(read, operands[1 - read.side]), key, samples, bins)

    def criterion(groups: Sequence[Group], params: PyTree, batch: Any) -> Scores:
        inputs = inputs_of(batch)
        one = jax.tree.map(lambda x: jnp.asarray(x)[:1], inputs)
        return parted(groups, tapped("mutual_information", apply, groups, params, one).noted(note, params, one))

    return criterion


def _rows(read: Read, w: Array) -> Array:
    """The weight as `[positions of the channel, other rows, columns]`."""
    if read.eqn.primitive.name == "dot_general":
        rows = [k for k in geometry.dot(read.eqn).summed[1 - read.side] if k != read.other]
    else:
        rows = list(geometry.conv(read.eqn).kernel[2:])
    columns = [k for k in range(w.ndim) if k not in (read.other, *rows)]
    count = math.prod(w.shape[k] for k in columns)
    return w.transpose(read.other, *rows, *columns).reshape(w.shape[read.other], -1, count)


def _informative(w: Array, key: Array, samples: int, bins: int) -> Array:
    """float[positions]: nats that the columns hold on the rows, for independent uniform rows."""
    size, others, _ = w.shape
    x = jax.random.uniform(key, (samples, size * others))
    y = x @ w.reshape(size * others, -1).astype(x.dtype)
    low, width = jnp.min(y, 0), jnp.max(y, 0) - jnp.min(y, 0)
    where = jnp.floor((y - low[None]) / jnp.where(width > 0, width, 1)[None] * bins)
    outputs = jax.nn.one_hot(jnp.clip(where.astype(jnp.int32), 0, bins - 1), bins)

    def information(row: Array) -> Array:
        inputs = jax.nn.one_hot((row * bins).astype(jnp.int32), bins)
        joint = jnp.einsum("sa,sjb->jab", inputs, outputs) / samples
        apart = joint.sum(2, keepdims=True) * joint.sum(1, keepdims=True)
        return jnp.sum(jnp.where(joint > 0, joint * jnp.log(jnp.where(joint > 0, joint / apart, 1)), 0))

    return jax.lax.map(information, x.T).reshape(size, others).sum(1)
