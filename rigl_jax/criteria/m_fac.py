"""M-FAC: the inverse of the empirical Fisher matrix by its gradients, without the matrix."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from rigl_jax import checks, topology, trees
from rigl_jax.base import Masks, Plan, Pruned, PyTree, Surgeon
from rigl_jax.criteria.losses import Loss, at, part_size, parts
from rigl_jax.messages import shown
from rigl_jax.topology.apportion import geometric


def m_fac(loss: Loss, damping: float = 1e-5, block: int | None = 128, steps: int = 16, size: int = 32) -> Surgeon:
    """Second-order pruning in which the weights that stay make up for those that go (Frantar et al. 2021, section 4).

    With m gradients g of parts of the batch and F = damping 1 + sum g g^T / m, weights are ranked by
    w_i^2 / (2 [F^-1]_ii), and those that stay change by F^-1 times the vector of -w_i / [F^-1]_ii at those that go. The
    change is exact for a single weight and an approximation for several, so this is done in `steps` steps of
    geometrically falling counts, each with new gradients.

    Gradients and blocks are of the active weights of the plan's leaves; dense leaves stay as they are. As in the
    authors' code, but: the inverse is computed by the identity of Woodbury in float64 on the host, not by their
    recursion, with which it agrees; their sum of m gradients holds one that is 0, and each of their steps takes other
    examples; they rank all layers together, here each leaf keeps the count of the plan. Memory: 16 m bytes a weight.

    With few gradients F is mostly damping, and with few steps most of the change is an approximation: either way little
    is left but magnitude pruning. For a small network take gradients of single examples (`size=1`).

    Args:
      loss: `(params, batch) -> scalar`, a mean over the examples of the batch, which lie along the first axis of its
        arrays; with normalisation layers in inference mode.
      damping: above 0. Without bound the ranking becomes that of magnitude.
      block: F is cut into blocks of so many weights, in the order of the leaves. None: one block.
      steps: how often gradients are computed, at least 1.
      size: how many examples a gradient is taken of; m = examples / size. The authors: m = 64 of 32.

    >>> import rigl_jax as rx
    >>> params, x = {"w": jnp.array([[1.0], [2.0]])}, jnp.array([[1.0, 1.0], [2.0, 2.0]])  # inputs that are alike
    >>> loss = lambda p, x: jnp.mean(x @ p["w"])
    >>> pruned = rx.prune(rx.make_plan(params, 0.5), params, m_fac(loss, 1e-3, steps=1, size=1), x)
    >>> pruned.params["w"][:, 0].round(2).tolist()
    [0.0, 3.0]
    """
    checks.functions("m_fac", loss=loss)
    damping = checks.number("m_fac", "damping", damping, "must be above 0", lambda x: x > 0)
    for name, n in (("block", 1 if block is None else block), ("steps", steps)):
        if not checks.is_whole(n, 1):
            raise ValueError(f"m_fac: {name} must be a whole number, at least 1, got {shown(n)}")
    size, value = part_size("m_fac", size), at("m_fac", loss)
    gradients = jax.jit(functools.partial(_gradients, value), static_argnums=0)

    def surgeon(plan: Plan, params: PyTree, masks: Masks, batch: Any) -> Pruned:
        cut = parts("m_fac", batch, size)
        held = topology.count_groups("m_fac", plan, masks)
        counts = {name: geometric(int(held[name].max()), layer.n_active, int(steps)) for name, layer in plan.items()}
        for k in range(int(steps)):
            aim = {name: layer._replace(n_active=int(counts[name][k])) for name, layer in plan.items()}
            rows = jax.tree.map(lambda g: np.asarray(g, np.float64), gradients(tuple(plan), params, cut))
            params, masks = _step(aim, params, masks, rows, damping, block)
        return Pruned(params, masks)

    return surgeon


def _gradients(value: Any, leaves: tuple[str, ...], params: PyTree, cut: Any) -> dict[str, Any]:
    """`{leaf: [m, size of the leaf]}`."""
    names = trees.names(params)
    given = {name: leaf for name, leaf in trees.named_leaves(params).items() if name in leaves}

    def of_part(part: Any) -> dict[str, Any]:
        fill = lambda own: jax.tree.map(lambda name, p: own.get(name, p), names, params)  # noqa: E731
        grads = jax.grad(lambda own: value(fill(own), part))(given)
        return {name: jnp.ravel(g) for name, g in grads.items()}

    return jax.tree.map(lambda g: g[None], of_part(None)) if cut is None else lax.map(of_part, cut)


def _step(
    aim: Plan, params: PyTree, masks: Masks, rows: dict[str, np.ndarray], damping: float, block: int | None
) -> Pruned:
    """Prunes to the counts of a plan with the gradients `rows`."""
    leaves, held = trees.named_leaves(params), trees.named_leaves(masks)
    flat = lambda tree: np.concatenate([np.asarray(tree[name]).reshape(-1) for name in aim])  # noqa: E731
    ends = np.cumsum([layer.size for layer in aim.values()])
    apart = lambda x: dict(zip(aim, np.split(x, ends[:-1]), strict=True))  # noqa: E731
    w, active = flat(leaves).astype(np.float64), flat(held)
    here = np.flatnonzero(active)  # blocks are of the weights that are left
    inverse = inverse_fisher(np.concatenate([rows[name] for name in aim], 1)[:, here], damping, block)
    cost = np.zeros(len(w))
    cost[here] = w[here] ** 2 / (2 * inverse.diagonal)
    costs, kept = apart(cost), {}
    for name, layer in aim.items():
        score = jnp.asarray(costs[name].reshape(layer.shape), jnp.promote_types(leaves[name].dtype, jnp.float32))
        kept[name] = topology.prune(layer.structure, score, layer.n_active, among=jnp.asarray(held[name]))
    stays = flat(kept)
    w[here] += inverse.product(np.where(stays[here], 0, -w[here] / inverse.diagonal))
    after = apart(np.where(stays, w, 0))
    new = {name: jnp.asarray(after[name].reshape(aim[name].shape), leaves[name].dtype) for name in aim}
    names = trees.names(params)
    return Pruned(
        jax.tree.map(lambda name, p: new.get(name, p), names, params),
        jax.tree.map(lambda name, mask: kept.get(name), names, masks),
    )


class InverseFisher(NamedTuple):
    """The inverse of F = damping 1 + G^T G / m, in blocks of weights; from `inverse_fisher`.

    Attributes:
      product: `float64[n] -> float64[n]`, F^-1 x.
      diagonal: float64[n], of F^-1.
    """

    product: Callable[[np.ndarray], np.ndarray]
    diagonal: np.ndarray


def inverse_fisher(gradients: np.ndarray, damping: float, block: int | None = None) -> InverseFisher:
    """F^-1 for gradients float64[m, n]; for each block a system of min(m, block) equations.

    Blocks of more weights than there are gradients are inverted by the identity of Woodbury, smaller ones directly.

    >>> inverse = inverse_fisher(np.array([[1.0, 1.0]]), 1.0)  # F = [[2, 1], [1, 2]]
    >>> inverse.diagonal.round(4).tolist()
    [0.6667, 0.6667]
    """
    m, n = gradients.shape
    block = n if block is None else min(block, n)
    cut = np.pad(gradients, ((0, 0), (0, -n % block))).reshape(m, -1, block).transpose(1, 0, 2)
    back = np.swapaxes(cut, 1, 2)
    if m < block:
        solved = np.linalg.solve(damping * np.eye(m) + cut @ back / m, cut)
        diagonal = (1 - np.sum(cut * solved, axis=1) / m) / damping
        product = lambda x: (x - np.swapaxes(solved, 1, 2) @ (cut @ x) / m) / damping  # noqa: E731
    else:
        inverse = np.linalg.inv(damping * np.eye(block) + back @ cut / m)
        diagonal, product = np.diagonal(inverse, axis1=1, axis2=2), lambda x: inverse @ x

    def of_flat(x: np.ndarray) -> np.ndarray:
        return product(np.pad(x, (0, -n % block)).reshape(-1, block, 1)).reshape(-1)[:n]

    return InverseFisher(of_flat, diagonal.reshape(-1)[:n])
