"""Criteria from the curvature of a loss."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from rigl_jax import checks, scores, trees
from rigl_jax.base import Array, Criterion, PyTree
from rigl_jax.criteria.losses import Loss, at, one_leaf, part_size, parts, signals
from rigl_jax.messages import shown

TOGETHER = 64
"""How many columns of the Hessian `obd` computes at a time."""


def grasp(loss: Loss) -> Criterion:
    """W (H g): how much of the squared gradient norm would go with a weight (Wang et al. 2020, eq. 8).

    One product of the Hessian with the gradient, by forward over reverse, about the cost of two gradients. The score
    has a sign, and magnitudes play no part.

    Args:
      loss: `(params, batch) -> scalar`, twice differentiable. The authors divide the logits by T = 200.

    >>> import jax.numpy as jnp
    >>> grasp(lambda p, batch: (p["w"] ** 3).sum() / 3)({"w": jnp.array([2.0])}, None)["w"].tolist()  # 2 w^4
    [32.0]
    """
    checks.functions("grasp", loss=loss)
    value = at("grasp", loss)

    def criterion(params: PyTree, batch: Any) -> PyTree:
        return scores.gradient_flow(lambda p: value(p, batch))(signals(params, None))

    return criterion


def taylor(loss: Loss, order: int = 1) -> Criterion:
    """The squared change of the loss when a weight is set to 0, by its Taylor series (Molchanov et al. 2019, eq. 7, 8).

    Order 1: (g w)^2. Order 2: (g w - w (H w) / 2)^2, with one product of the Hessian with the weights; its sum without
    the square is the fall of a quadratic loss when all weights go. The term of a single weight contains half of its
    interactions with all others; `obd` has only the term of the weight itself.

    The authors score the gates of channels, square the scores of each minibatch, and average the squares over 30
    minibatches. Here a call takes one batch; to average over several, give a criterion that adds their scores. A
    structure takes the mean of the squares of a unit's weights, not the square of their sum.

    Args:
      loss: `(params, batch) -> scalar`, for order 2 twice differentiable.
      order: 1 or 2.

    >>> import jax.numpy as jnp
    >>> cube = lambda p, batch: (p["w"] ** 3).sum()
    >>> taylor(cube)({"w": jnp.array([1.0, 2.0])}, None)["w"].tolist()  # (3 w^3)^2
    [9.0, 576.0]
    >>> taylor(cube, order=2)({"w": jnp.array([1.0, 2.0])}, None)["w"].tolist()  # (3 w^3 - 3 w^3)^2
    [0.0, 0.0]
    """
    checks.functions("taylor", loss=loss)
    if not checks.is_whole(order, 1) or order > 2:
        raise ValueError(f"taylor: order must be 1 or 2, got {shown(order)}")
    value = at("taylor", loss)

    def criterion(params: PyTree, batch: Any) -> PyTree:
        weights, join = trees.floats(params)
        _, place = trees.floats(jax.tree.map(jnp.zeros_like, params))
        slope = jax.grad(lambda given: value(join(given), batch))
        if order == 1:
            change = slope(weights)
        else:
            grads, curved = jax.jvp(slope, (weights,), (weights,))
            change = [g - h / 2 for g, h in zip(grads, curved, strict=True)]
        return place([jnp.square(w * c) for w, c in zip(weights, change, strict=True)])

    return criterion


def obd(loss: Loss, samples: int | None = None, key: Array | None = None) -> Criterion:
    """H_ii w^2 / 2: how much the loss rises at a minimum when a weight goes alone (LeCun et al. 1990, Brain Damage).

    Args:
      loss: `(params, batch) -> scalar`, twice differentiable.
      samples: None: the exact diagonal of the Hessian, by one product with it for each weight: for small networks. A
        number: Hutchinson's estimate, the mean of v (H v) over so many random v of +1 and -1; its cost does not depend
        on the number of weights, and it is exact where the Hessian is diagonal.
      key: PRNG key of the estimate.

    The authors drop what the Gauss-Newton approximation neglects, so that H_ii >= 0. Here a negative curvature gives a
    negative score. The gradient is taken to be 0: for a network that is not at a minimum see `taylor`.

    >>> import jax.numpy as jnp
    >>> obd(lambda p, batch: (p["w"] ** 4).sum())({"w": jnp.array([1.0, -2.0])}, None)["w"].tolist()  # 6 w^4
    [6.0, 96.0]
    """
    checks.functions("obd", loss=loss)
    value = at("obd", loss)
    if samples is None:
        return one_leaf(value, lambda value, w: _diagonal(value, w) * jnp.square(w) / 2)
    if not checks.is_whole(samples, 1):
        raise ValueError(f"obd: samples must be a whole number, at least 1, or None, got {shown(samples)}")
    key = checks.key("obd", key)

    def criterion(params: PyTree, batch: Any) -> PyTree:
        weights, join = trees.floats(params)
        _, place = trees.floats(jax.tree.map(jnp.zeros_like, params))
        slope = jax.grad(lambda given: value(join(given), batch))

        def sample(total: list[Array], k: Array) -> tuple[list[Array], None]:
            keys = jax.random.split(jax.random.fold_in(key, k), len(weights))
            signs = [_signs(key, w) for key, w in zip(keys, weights, strict=True)]
            curved = jax.jvp(slope, (weights,), (signs,))[1]
            return [t + v * h for t, v, h in zip(total, signs, curved, strict=True)], None

        total, _ = lax.scan(sample, [jnp.zeros_like(w) for w in weights], jnp.arange(samples))
        return place([t / samples * jnp.square(w) / 2 for t, w in zip(total, weights, strict=True)])

    return criterion


def _signs(key: Array, w: Array) -> Array:
    """+1 and -1, the same in every type of weights."""
    return jnp.where(jax.random.bernoulli(key, np.float32(0.5), jnp.shape(w)), 1, -1).astype(jnp.result_type(w))


def _diagonal(value: Any, w: Array) -> Array:
    """The exact diagonal of the Hessian of a function of one array."""
    if not w.size:
        return jnp.zeros_like(w)
    slope = jax.grad(value)

    def entry(i: Array) -> Array:
        one = (jnp.arange(w.size) == i).astype(w.dtype).reshape(w.shape)
        return jax.jvp(slope, (w,), (one,))[1].reshape(-1)[i]

    return lax.map(entry, jnp.arange(w.size), batch_size=min(TOGETHER, w.size)).reshape(w.shape)


def fisher(loss: Loss, size: int = 1) -> Criterion:
    """w^2 F_ii / 2, `obd` with the diagonal of the empirical Fisher matrix: the mean of g^2 over examples.

    As in Theis et al. 2018 (eq. 3), who sum g w over a feature map before they square. At a minimum of a negative
    log-likelihood that fits the data, F approximates the Hessian. It is never negative.

    Args:
      loss: `(params, batch) -> scalar`, a mean over the examples of the batch, which lie along the first axis of its
        arrays. It is called with parts of the batch, one at a time.
      size: how many examples a gradient is taken of. More are faster and, as g averages over them, no longer the Fisher
        matrix of single examples.

    >>> import jax.numpy as jnp
    >>> loss = lambda p, x: jnp.mean(x @ p["w"])  # g of an example is x
    >>> fisher(loss)({"w": jnp.array([1.0, 2.0])}, jnp.array([[1.0, 0.0], [3.0, 1.0]]))["w"].tolist()
    [2.5, 1.0]
    """
    checks.functions("fisher", loss=loss)
    size, value = part_size("fisher", size), at("fisher", loss)

    def criterion(params: PyTree, batch: Any) -> PyTree:
        weights, join = trees.floats(params)
        _, place = trees.floats(jax.tree.map(jnp.zeros_like, params))
        cut = parts("fisher", batch, size)
        slope = jax.grad(lambda given, part: value(join(given), part))

        def add(total: list[Array], part: Any) -> tuple[list[Array], None]:
            return [t + jnp.square(g) for t, g in zip(total, slope(weights, part), strict=True)], None

        n = 1 if cut is None else jax.tree.leaves(cut)[0].shape[0]
        total, _ = lax.scan(add, [jnp.zeros_like(w) for w in weights], cut, length=n)
        return place([t / n * jnp.square(w) / 2 for t, w in zip(total, weights, strict=True)])

    return criterion
