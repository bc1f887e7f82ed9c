"""The optimizer M-FAC: steps by the inverse of the empirical Fisher matrix of the last m gradients."""

from __future__ import annotations

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax import lax
from jax.scipy.linalg import solve

from rigl_jax import checks, trees
from rigl_jax.base import Array, Masks, PyTree
from rigl_jax.messages import shown

BEST = lax.Precision.HIGHEST


class MFacState(NamedTuple):
    """The window of gradients.

    Attributes:
      count: int32 scalar, the updates so far.
      gradients: float[m, n], the last m gradients of n weights; row `count % m` is the next to be replaced.
      gram: float[m, m], their products with each other.
    """

    count: Array
    gradients: Array
    gram: Array


def m_fac_optimizer(
    learning_rate: optax.ScalarOrSchedule,
    m: int = 512,
    damping: float = 1e-5,
    *,
    b1: float = 0.0,
    weight_decay: float = 0.0,
    masks: Masks | None = None,
) -> optax.GradientTransformationExtraArgs:
    """Steps of -learning_rate F^-1 g, F = damping 1 + sum g g^T / m over the last m gradients (Frantar et al. 2021).

    The dynamic algorithm of section 3.2. The step is G^T (damping 1 + G G^T / m)^-1 e, with the rows of G the gradients
    and e the place of the last one: a system of m equations, and two products with G. As in the authors' code, weight
    decay is part of the gradient that enters the window, momentum averages the steps, and the window begins with zeros.
    They keep the products of gradients by a recursion; here the system is solved anew, in float32.

    In `sparsify` the window is that of the active weights: what it holds of a weight that is 0 and has no gradient is
    forgotten, so a weight that is grown again starts without a history. (One that is dropped and grown in the same step
    keeps it.) Give `tx.update` the params. Memory: 4 m bytes a weight, in one array that is not sharded as the weights
    are; with `masks`, 4 m bytes an active weight. The authors' defaults are a rate of 0.001 and m = 1024.

    Args:
      learning_rate: number or schedule.
      m: how many gradients the window holds.
      damping: above 0.
      b1: decay of the average of the steps, in [0, 1); 0: none.
      weight_decay: is added to the gradient, times the weight.
      masks: of a network that is pruned already, parallel to params, None for dense leaves, with known values: the
        window holds gradients of active weights only, others get no step. This is the authors' sparse variant; with
        `rx.static(plan, masks)` it takes the same steps as without it, and a method that rewires must not be given it.

    >>> tx = m_fac_optimizer(1.0, m=4, damping=0.5)
    >>> params = {"w": jnp.array([1.0, 1.0])}
    >>> updates, _ = tx.update({"w": jnp.array([1.0, 1.0])}, tx.init(params), params)
    >>> updates["w"].tolist()  # -g / (damping + |g|^2 / m)
    [-1.0, -1.0]
    """
    who = "m_fac_optimizer"
    if not callable(learning_rate) and not isinstance(learning_rate, jax.Array):
        checks.number(who, "learning_rate", learning_rate, "must be a number or a schedule", lambda _: True)
    if not checks.is_whole(m, 1):
        raise ValueError(f"{who}: m must be a whole number, at least 1, got {shown(m)}")
    damping = checks.number(who, "damping", damping, "must be above 0", lambda x: x > 0)
    b1 = checks.number(who, "b1", b1, "must be at least 0 and below 1", lambda x: 0 <= x < 1)
    decay = checks.number(who, "weight_decay", weight_decay, "must be at least 0", lambda x: x >= 0)
    if masks is not None:
        held = jax.tree.leaves(masks)
        known = all(hasattr(x, "dtype") and not isinstance(x, jax.core.Tracer) for x in held)
        if not held or not known or any(x.dtype != np.bool_ for x in held):
            raise ValueError(f"{who}: masks must be a tree of bool arrays with known values, got {shown(masks)}")
    before = [optax.add_decayed_weights(decay)] if decay else []
    after = [optax.ema(b1, debias=False)] if b1 else []
    scale = _scale_by_m_fac(int(m), damping, masks)
    return optax.with_extra_args_support(
        optax.chain(*before, scale, *after, optax.scale_by_learning_rate(learning_rate))
    )


def _scale_by_m_fac(m: int, damping: float, masks: Masks | None) -> optax.GradientTransformation:
    def active(tree: PyTree) -> np.ndarray | None:
        """The places of the weights in the window; None for all."""
        if masks is None or not jax.tree.leaves(tree):  # no leaves: a placeholder of optax
            return None
        held = trees.named_leaves(checks.masks("m_fac_optimizer", masks, tree))
        full = lambda name, p: np.asarray(held[name]) if name in held else np.ones(p.shape, bool)  # noqa: E731
        return np.flatnonzero(np.concatenate([full(*leaf).ravel() for leaf in trees.named_leaves(tree).items()]))

    def init(params: PyTree) -> MFacState:
        leaves, here = jax.tree.leaves(params), active(params)
        n, dtype = sum(p.size for p in leaves), jnp.result_type(jnp.float32, *leaves)
        n = n if here is None else len(here)
        return MFacState(jnp.zeros((), jnp.int32), jnp.zeros((m, n), dtype), jnp.zeros((m, m), dtype))

    def update(updates: PyTree, state: MFacState, params: PyTree | None = None) -> tuple[PyTree, MFacState]:
        leaves, treedef = jax.tree.flatten(updates)
        here = active(updates)
        g = _flat(leaves, state.gradients.dtype, here)
        gradients, gram = state.gradients, state.gram
        if params is not None:
            gone = (g == 0) & (_flat(jax.tree.leaves(params), g.dtype, here) == 0)
            held = jnp.any(gradients != 0, axis=0)
            gradients, gram = lax.cond(jnp.any(gone & held), _without, lambda _, *same: same, gone, gradients, gram)
        place = state.count % m
        gradients = gradients.at[place].set(g)
        products = jnp.matmul(gradients, g, precision=BEST)
        gram = gram.at[place].set(products).at[:, place].set(products)
        # Rounding of the products may exceed the damping: what it can take off an eigenvalue is added.
        least = damping + jnp.finfo(gram.dtype).eps * jnp.trace(gram) / m
        eye = jnp.eye(m, dtype=gram.dtype)
        shares = solve(gram / m + least * eye, eye[place], assume_a="pos")
        step, start, steps = jnp.matmul(shares, gradients, precision=BEST), 0, []
        if here is not None:
            step = jnp.zeros(sum(leaf.size for leaf in leaves), step.dtype).at[here].set(step)
        for leaf in leaves:
            steps.append(step[start : start + leaf.size].reshape(leaf.shape).astype(leaf.dtype))
            start += leaf.size
        return treedef.unflatten(steps), MFacState(state.count + 1, gradients, gram)

    return optax.GradientTransformation(init, update)  # pyrefly: ignore[bad-argument-type]


def _flat(leaves: list[Any], dtype: Any, here: np.ndarray | None) -> Array:
    flat = jnp.concatenate([jnp.ravel(leaf).astype(dtype) for leaf in leaves])
    return flat if here is None else flat[here]


def _without(gone: Array, gradients: Array, gram: Array) -> tuple[Array, Array]:
    del gram
    left = jnp.where(gone[None], 0, gradients)
    return left, jnp.matmul(left, left.T, precision=BEST)
