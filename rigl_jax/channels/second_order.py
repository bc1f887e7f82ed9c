"""Criteria of channels from what they do together: the Hessian of a loss by their factors."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp

from rigl_jax import arguments as rules
from rigl_jax.arguments import arguments
from rigl_jax.base import Array, PyTree
from rigl_jax.channels.gating import ChannelCriterion, Scores, inputs_of, parted, removable, tapped
from rigl_jax.channels.grouping import Group
from rigl_jax.criteria.losses import Loss, at


@arguments(loss=rules.function)
def sosp_h(loss: Loss) -> ChannelCriterion:
    """|dL/dc| + |(H c)_c| / 2 with the Hessian H by the factors c = 1: SOSP-H (Nonnenmacher et al. 2022, eq. 6).

    With w the weights that read a channel, dL/dc = g w and (H c)_c = w H w_all, where w_all are those that read any
    channel that can be removed: one product with the Hessian for all channels of all layers. The authors take the
    weights of a filter, which make a channel, in place of those that read it; their code is not public.

    The row sums can cancel: of two channels with the interactions [[1, -1], [-1, 1]] each has 0, although to remove
    one of them costs 1/2. `sosp_i` knows the pairs.

    Args:
      loss: `(params, batch) -> scalar`, with normalisation layers in inference mode.

    Returns:
      `(groups, params, batch) -> scores`; float[size] for each group. Channels that no product reads have 0.

    Example:
      >>> import rigl_jax as rx
      >>> params = {"a": jnp.array([[1.0, 2.0]]), "b": jnp.array([[3.0], [-1.0]])}
      >>> apply = lambda p, x: x @ p["a"] @ p["b"]
      >>> x = jnp.ones((1, 1))
      >>> groups = rx.channels.groups(apply, params, x)
      >>> loss = lambda p, x: jnp.square(apply(p, x)).sum()  # H = 2 [[9, -6], [-6, 4]], gradient 2 [3, -2]
      >>> [s.tolist() for s in sosp_h(loss)(groups, params, x)]
      [[9.0, 6.0]]
    """

    def criterion(groups: Sequence[Group], params: PyTree, batch: Any) -> Scores:
        model = tapped("sosp_h", at("sosp_h", loss), groups, params, batch)
        first, rows = model.curved(jnp.asarray(removable(groups), jnp.float32), params, batch)
        return parted(groups, jnp.abs(first) + jnp.abs(rows) / 2)

    return criterion


@arguments(apply=rules.function, loss=rules.optional(rules.function), pairwise_abs=rules.flag)
def sosp_i(
    apply: Callable[[PyTree, Any], Any], loss: Loss | None = None, *, pairwise_abs: bool = False
) -> ChannelCriterion:
    """The order in which channels go, each the one that costs least with those before it: SOSP-I, eq. 5.

    The cost of a set is the sum of |dL/dc| over it and of all `interactions` within it. Needs the matrix of all pairs:
    for networks of some thousand channels.

    Args:
      apply: `(params, inputs) -> logits[examples, ..., classes]`; the batch is `(inputs, labels)` or inputs.
      loss: `(params, batch) -> scalar`, for the first derivatives. None: these are 0, as at a minimum.
      pairwise_abs: True: every interaction by its absolute value. The text of the paper was not at hand to tell.

    Returns:
      `(groups, params, batch) -> scores`; float[size] for each group: the number in the order, over all groups, from
      0, the first to go. Channels that cannot be removed come last. Rank them with `normalize="none"`.

    Example:
      >>> import rigl_jax as rx
      >>> params = {"a": jnp.array([[1.0, 2.0, 1.0]]), "b": jnp.array([[3.0, 0.0], [-1.0, 0.0], [3.1, 0.0]])}
      >>> apply = lambda p, x: x @ p["a"] @ p["b"]
      >>> groups = rx.channels.groups(apply, params, jnp.ones((1, 1)))
      >>> [s.tolist() for s in sosp_i(apply)(groups, params, jnp.ones((1, 1)))]  # the first two cancel in part
      [[1.0, 0.0, 2.0], [3.0, 4.0]]
    """

    def criterion(groups: Sequence[Group], params: PyTree, batch: Any) -> Scores:
        inputs = inputs_of(batch)
        pairs = interactions("sosp_i", apply, groups, params, inputs)
        first = jnp.zeros(len(pairs))
        if loss is not None:
            model = tapped("sosp_i", at("sosp_i", loss), groups, params, batch)
            first = jnp.abs(model.slope(params, batch)(jnp.ones(model.size)))
        pairs = jnp.abs(pairs) if pairwise_abs else pairs
        free = jnp.asarray(removable(groups))

        def step(n: Array, state: tuple[Array, Array]) -> tuple[Array, Array]:
            order, together = state
            left = order < 0
            among = jnp.where(jnp.any(left & free), left & free, left)  # what cannot be removed comes last
            cost = first + jnp.diagonal(pairs) + 2 * together
            chosen = jnp.argmax(among & (cost <= jnp.min(jnp.where(among, cost, jnp.inf))))
            return order.at[chosen].set(n.astype(order.dtype)), together + pairs[chosen]

        start = jnp.full(len(pairs), -1.0), jnp.zeros(len(pairs))
        return parted(groups, jax.lax.fori_loop(0, len(pairs), step, start)[0])

    return criterion


def interactions(
    who: str, apply: Callable[[PyTree, Any], Any], groups: Sequence[Group], params: PyTree, inputs: Any
) -> Array:
    """float[channels, channels]: w G w' / 2 of all pairs, with the Gauss-Newton matrix G of the cross-entropy.

    G is the mean over examples of J' (diag(p) - p p') J, J being the derivative of the logits.
    """
    one = jax.tree.map(lambda x: jnp.asarray(x)[:1], inputs)
    model = tapped(who, apply, groups, params, one)

    def example(x: Any) -> Array:
        x = jax.tree.map(lambda a: a[None], x)
        logits = lambda scale: model.gated(scale, params, x)  # noqa: E731
        ones = jnp.ones(model.size)
        jacobian = jax.jacrev(logits)(ones).reshape(-1, jnp.shape(logits(ones))[-1], model.size)
        p = jax.nn.softmax(logits(ones).reshape(jacobian.shape[:2]))
        centred = jacobian - jnp.einsum("nc,ncs->ns", p, jacobian)[:, None]
        return jnp.einsum("nc,ncs,nct->st", p, centred, centred) / len(p)

    inputs = jax.tree.map(jnp.asarray, inputs)
    examples = len(jax.tree.leaves(inputs)[0])
    of_one = jax.eval_shape(example, jax.tree.map(lambda a: a[0], inputs))
    start = jnp.zeros(of_one.shape, of_one.dtype)
    # Added up one by one: a matrix of each example would not fit.
    return jax.lax.scan(lambda total, x: (total + example(x), None), start, inputs)[0] / (2 * examples)
