"""MIMO (Havasi et al. 2021): one network predicts several inputs at once, at test time one input several times.

`x` of a MIMO network is float `[batch, members, ..., channels]`. The network inside sees the members' channels side by
side and gives `members * classes` logits.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jax import Array

from rigl_jax import arguments as rules
from rigl_jax.arguments import arguments

Apply = Callable[[Any, Array], Array]
_SHARE = rules.rule("a share from 0 to 1", lambda value: isinstance(value, int | float) and 0 <= value <= 1)


@arguments(key=rules.key, x=rules.array(), y=rules.array(1), members=rules.whole(1), rho=_SHARE, repeats=rules.whole(1))
def mimo_batch(key: Array, x: Array, y: Array, members: int, rho: float = 0.0, repeats: int = 1) -> tuple[Array, Array]:
    """A batch in which the members see different examples, as in the authors' code (uncertainty-baselines).

    Every example is repeated, and all are shuffled. The first `int(n (1 - rho))` rows are shuffled again for each
    member apart; in the others all members see the same example.

    Args:
      key: PRNG key.
      x: [b, ...] examples.
      y: int[b] labels.
      members: M.
      rho: the share of rows that are the same for all members. The authors take 0 on CIFAR and 0.6 on ImageNet.
      repeats: how often each example is in the batch; n = b * repeats. The authors take 4 and 2.

    Returns:
      x as `[n, members, ...]`, and y as `int[n, members]`.

    >>> x, y = mimo_batch(jax.random.key(0), jnp.arange(3.0)[:, None], jnp.arange(3), members=2, rho=1.0)
    >>> x.shape, bool((y[:, 0] == y[:, 1]).all())
    ((3, 2, 1), True)
    """
    rows = jnp.tile(jnp.arange(len(y)), repeats)
    of_all, *of_members = jax.random.split(key, members + 1)
    rows = jax.random.permutation(of_all, rows)
    apart = int(len(y) * repeats * (1 - rho))
    shuffled = [jnp.concatenate([jax.random.permutation(own, rows[:apart]), rows[apart:]]) for own in of_members]
    index = jnp.stack(shuffled, axis=1)
    return x[index], y[index]


def mimo(apply: Apply, members: int) -> Apply:
    """A network of one input as one of several inputs.

    Args:
      apply: `(params, x [batch, ..., members * c]) -> [batch, members * classes]`.
      members: M.

    Returns:
      `(params, x [batch, members, ..., c]) -> logits [batch, members, classes]`.

    >>> mimo(lambda w, x: x @ w, 2)(jnp.eye(4), jnp.ones((3, 2, 2))).shape
    (3, 2, 2)
    """

    def joined(params: Any, x: Array) -> Array:
        channels = jnp.moveaxis(x, 1, -2)
        logits = apply(params, channels.reshape(*channels.shape[:-2], -1))
        return logits.reshape(len(x), members, -1)

    return joined


def mimo_loss(logits: Array, labels: Array) -> Array:
    """The cross-entropies of all members added up, and the mean of that over the batch.

    >>> round(float(mimo_loss(jnp.zeros((1, 2, 4)), jnp.array([[0, 3]]))), 4)  # 2 log 4
    2.7726
    """
    return optax.softmax_cross_entropy_with_integer_labels(logits, labels).sum(axis=1).mean()


def mimo_predict(apply: Apply, params: Any, x: Array, members: int) -> Array:
    """The mean of the members' probabilities, all members given the same input; as logarithms `[batch, classes]`.

    Args:
      apply: what `mimo` gives.
      params: its weights.
      x: `[batch, ..., c]`.
      members: M.

    >>> found = mimo_predict(mimo(lambda w, x: x @ w, 2), jnp.zeros((2, 4)), jnp.ones((1, 1)), 2)
    >>> jnp.exp(found).tolist()
    [[0.5, 0.5]]
    """
    logits = apply(params, jnp.repeat(x[:, None], members, axis=1))
    return jax.nn.logsumexp(jax.nn.log_softmax(logits), axis=1) - jnp.log(members)
