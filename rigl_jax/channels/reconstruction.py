"""The channels that reconstruct what a model computes: i-SpaSP."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp

from rigl_jax import arguments as rules
from rigl_jax.arguments import arguments
from rigl_jax.base import Array, PyTree
from rigl_jax.channels.gating import ChannelCriterion, Scores, inputs_of, parted, read_sums, sizes, tapped
from rigl_jax.channels.grouping import Group


@arguments(apply=rules.function, keep=rules.share, steps=rules.whole(1))
def i_spasp(apply: Callable[[PyTree, Any], Any], keep: float = 0.5, steps: int = 20) -> ChannelCriterion:
    """The channels whose sum comes nearest to the outputs (i-SpaSP, Wolfe and Kyrillidis 2022, algorithm 1).

    For every group apart, with s channels to keep: from an empty set on, the residual R is what the outputs lack
    without the other channels; the 2 s channels with the largest derivative of |R|^2 / 2 by what is read of them,
    summed over examples and positions with its sign, join the set; of the union the s with the largest sum of what is
    read stay. For a product with a matrix W the derivative is W' R.

    Departures: the authors reconstruct the output of the block that a layer is in, here it is what `apply` returns. The
    sums are of absolute values, as what is read need not come from a ReLU. In the authors' code the
    pruned block normalises by other statistics than the dense one; give an `apply` in inference mode.

    Args:
      apply: `(params, inputs) -> outputs`; the batch is inputs, or `(inputs, labels)`.
      keep: the share of each group that is looked for, rounded, at least one channel.
      steps: how often the set is changed.

    Returns:
      `(groups, params, batch) -> scores`; float[size] for each group: the share in the sum of what is read of the
      group, plus 1 for the channels of the set. Select the same share, with `scope="layer"`.

    Example:
      >>> import rigl_jax as rx
      >>> params = {"a": jnp.array([[1.0, 0.0, 3.0, 4.0]]), "b": jnp.array([[5.0], [0.0], [2.0], [0.0]])}
      >>> apply = lambda p, x: jax.nn.relu(x @ p["a"]) @ p["b"]
      >>> groups = rx.channels.groups(apply, params, jnp.ones((1, 1)))
      >>> [s.tolist() for s in i_spasp(apply, 0.25)(groups, params, jnp.ones((2, 1)))]
      [[0.125, 0.0, 1.375, 0.5]]
    """

    def criterion(groups: Sequence[Group], params: PyTree, batch: Any) -> Scores:
        inputs = inputs_of(batch)
        model = tapped("i_spasp", apply, groups, params, inputs)
        total = model.noted(functools.partial(read_sums, jnp.abs), params, inputs)
        whole, pull = jax.vjp(lambda shift: model.shifted(shift, params, inputs), jnp.zeros(model.size))
        starts, out = sizes(groups), []
        for start, group, own in zip(starts[:-1], groups, parted(groups, total), strict=True):
            chosen = jnp.zeros(group.size, bool)
            if not group.why:
                s, place = max(1, round(keep * group.size)), slice(start, start + group.size)

                def change(_: Array, chosen: Array, s: int = s, place: slice = place, own: Array = own) -> Array:
                    scale = jnp.ones(model.size).at[place].set(chosen.astype(jnp.float32))
                    left = jax.tree.map(jnp.subtract, whole, model.gated(scale, params, inputs))
                    importance = pull(left)[0][place]
                    return _first(jnp.where(chosen | _first(importance, 2 * s), own, -1.0), s)

                chosen = jax.lax.fori_loop(0, steps, change, chosen)
            share = jnp.sum(own)
            out.append(own / jnp.where(share > 0, share, 1.0) + chosen)
        return tuple(out)

    return criterion


def _first(values: Array, count: int) -> Array:
    """bool: the `count` largest; of equal ones those before others."""
    order = jnp.argsort(-values, stable=True)
    return jnp.zeros(values.shape, bool).at[order[:count]].set(True)
