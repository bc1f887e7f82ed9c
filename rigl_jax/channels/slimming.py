"""Network Slimming (Liu et al. 2017): an L1 penalty on the scales of normalisations, which then rank the channels.

tx = optax.chain(rx.channels.slimming(1e-4, "scale"), optax.sgd(0.1, momentum=0.9))
...
groups = rx.channels.groups(apply, params, x)
keep = rx.channels.select(groups, rx.channels.scores(groups, params, rx.channels.only("scale")), remove=0.5)
"""

from __future__ import annotations

import re
from typing import Any

import jax
import jax.numpy as jnp
import optax

from rigl_jax import checks, trees
from rigl_jax.base import Criterion, PyTree
from rigl_jax.messages import shown


def slimming(strength: float, leaves: str) -> optax.GradientTransformation:
    """Adds `strength * sign(w)` to the gradients of some leaves, the subgradient of `strength * sum |w|`.

    Put it before the optimizer, as the authors do: it then passes through momentum. They use 1e-4 for VGG, 1e-5 for
    ResNet and DenseNet, and start scales at 0.5.

    Args:
      strength: of the penalty, at least 0.
      leaves: a regular expression; leaves whose names it matches (`re.search`) are penalised.

    Returns:
      A transformation without state, whose `update` needs params.

    Raises:
      ValueError: a strength below 0, `leaves` is no regular expression or matches none, no params.

    Example:
      >>> params = {"scale": jnp.array([2.0, -0.5, 0.0]), "kernel": jnp.ones(2)}
      >>> tx = slimming(0.1, "scale")
      >>> grads, _ = tx.update(jax.tree.map(jnp.zeros_like, params), tx.init(params), params)
      >>> [round(g, 3) for g in grads["scale"].tolist()], grads["kernel"].tolist()
      ([0.1, -0.1, 0.0], [0.0, 0.0])
    """
    strength = checks.number("slimming", "strength", strength, "must be at least 0", lambda x: x >= 0)
    pattern = _pattern("slimming", leaves)

    def update(updates: PyTree, state: Any, params: PyTree | None = None) -> tuple[PyTree, Any]:
        if params is None:
            raise ValueError("slimming: params must be given to update, got None")
        chosen = _chosen("slimming", pattern, params)
        penalised = lambda g, p, c: g + (strength * jnp.sign(p)).astype(g.dtype) if c else g  # noqa: E731
        return jax.tree.map(penalised, updates, params, chosen), state

    return optax.GradientTransformation(lambda params: optax.EmptyState(), update)


def soft_threshold(params: PyTree, amount: float, leaves: str) -> PyTree:
    """Moves some leaves towards 0 by an amount, and to exactly 0 what is nearer: the proximal step of the L1 penalty.

    Call it after the optimizer's step, instead of `slimming`, with `amount = learning_rate * strength`. Scales then
    become exactly 0, which the subgradient never reaches. (The authors use the subgradient.)

    Args:
      params: the weights after the step.
      amount: at least 0.
      leaves: a regular expression, as for `slimming`.

    Returns:
      The weights.

    Raises:
      ValueError: an amount below 0, `leaves` is no regular expression or matches none.

    Example:
      >>> soft_threshold({"scale": jnp.array([2.0, -0.5, 0.25])}, 0.5, "scale")["scale"].tolist()
      [1.5, 0.0, 0.0]
    """
    amount = checks.number("soft_threshold", "amount", amount, "must be at least 0", lambda x: x >= 0)
    chosen = _chosen("soft_threshold", _pattern("soft_threshold", leaves), params)
    nearer = lambda p: (jnp.sign(p) * jnp.maximum(jnp.abs(p) - amount, 0) + 0.0).astype(p.dtype)  # noqa: E731
    return jax.tree.map(lambda p, c: nearer(p) if c else p, params, chosen)


def only(leaves: str) -> Criterion:
    """A criterion for `scores`: |w| of some leaves, NaN for the others, which then do not count.

    Args:
      leaves: a regular expression, as for `slimming`.

    Returns:
      `(params, batch) -> scores`; it reads no batch.

    Raises:
      ValueError: `leaves` is no regular expression; when called, it matches none.

    Example:
      >>> only("scale")({"scale": jnp.array([-2.0]), "kernel": jnp.ones(1)}, None)["scale"].tolist()
      [2.0]
    """
    pattern = _pattern("only", leaves)

    def criterion(params: PyTree, batch: Any) -> PyTree:
        del batch
        chosen = _chosen("only", pattern, params)
        return jax.tree.map(lambda p, c: jnp.abs(p) if c else jnp.full(jnp.shape(p), jnp.nan), params, chosen)

    return criterion


def _pattern(who: str, leaves: Any) -> re.Pattern[str]:
    try:
        return re.compile(leaves)
    except (re.error, TypeError):
        raise ValueError(f"{who}: leaves must be a regular expression, got {shown(leaves)}") from None


def _chosen(who: str, pattern: re.Pattern[str], params: PyTree) -> PyTree:
    chosen = jax.tree.map(lambda name: pattern.search(name) is not None, trees.names(params))
    if not any(jax.tree.leaves(chosen)):
        raise ValueError(f"{who}: leaves must match a name of params, got {pattern.pattern!r}")
    return chosen
