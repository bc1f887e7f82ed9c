"""Optimal Brain Surgeon: one weight at a time, all others make up for it."""

from __future__ import annotations

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.flatten_util import ravel_pytree

from rigl_jax import checks, topology, trees
from rigl_jax.base import LayerPlan, Masks, Plan, Pruned, PyTree, Surgeon
from rigl_jax.criteria.losses import Loss, at

MOST_WEIGHTS = 10_000  # the Hessian is a matrix of their square
TOGETHER = 64


def obs(loss: Loss, damping: float = 1e-4) -> Surgeon:
    """Drops the weight whose loss can be made up for best, and moves the others so (Hassibi & Stork 1993, eq. 5).

    With the Hessian H, the weight of the least w_q^2 / (2 [H^-1]_qq) goes, all others change by
    -w_q / [H^-1]_qq (H^-1)_q, and H^-1 becomes the inverse without q; until each group has its count. For a quadratic
    loss at its minimum each step is the cheapest removal of one weight, exactly.

    The exact Hessian, computed once, of all floating-point leaves: dense ones, such as biases, move too. (The authors
    sum outer products of gradients, and compute it again after each weight: `rx.prune(..., rounds=n)` does so in n
    rounds.) The gradient is taken to be 0: train to a minimum first. Linear algebra runs in float64 on the host, n^2
    numbers and n^2 operations for each weight that goes: for small networks, of at most 10,000 active weights.

    Args:
      loss: `(params, batch) -> scalar`, twice differentiable.
      damping: added to the diagonal of the Hessian; above 0. It must make it positive definite.

    Raises:
      ValueError: when pruning, if the Hessian is not positive definite, there are too many weights, or a structure's
        units are of several weights. Of equal costs the later weight goes.

    >>> import rigl_jax as rx
    >>> loss = lambda p, batch: (p["w"].sum() - 3) ** 2  # weights can replace each other
    >>> params = {"w": jnp.array([1.0, 2.0])}
    >>> plan = rx.make_plan(params, 0.5, rules=[("w", rx.unstructured())])
    >>> rx.prune(plan, params, obs(loss, 1e-3)).params["w"].round(2).tolist()
    [0.0, 3.0]
    """
    checks.functions("obs", loss=loss)
    damping, value = checks.number("obs", "damping", damping, "must be above 0", lambda x: x > 0), at("obs", loss)

    def surgeon(plan: Plan, params: PyTree, masks: Masks, batch: Any) -> Pruned:
        weights, join = trees.floats(params)
        flat, unravel = ravel_pytree(weights)
        groups = _groups(plan, params, masks)
        here = np.flatnonzero(groups.active)
        if len(here) > MOST_WEIGHTS:
            raise ValueError(f"obs: params must have at most {MOST_WEIGHTS} active weights, got {len(here)}")
        hessian = np.asarray(_hessian(lambda w: value(join(unravel(w)), batch), flat, here), np.float64)
        hessian = (hessian + hessian.T) / 2 + damping * np.eye(len(here))
        try:
            np.linalg.cholesky(hessian)
        except np.linalg.LinAlgError:
            least = np.linalg.eigvalsh(hessian)[0] - damping
            raise ValueError(
                f"obs: damping must make the Hessian positive definite; its least eigenvalue is {least:.3g}, "
                f"got {damping:.3g}"
            ) from None
        w = np.zeros(flat.size)
        w[here], gone = _eliminate(np.asarray(flat, np.float64)[here], hessian, groups.of[here], groups.surplus)
        kept = groups.active.copy()
        kept[here[gone]] = False
        after = join(unravel(jnp.asarray(w, flat.dtype)))
        return Pruned(after, _as_masks(kept, params, masks))

    return surgeon


class _Groups(NamedTuple):
    """Of the float leaves, flat: `of` is the number of a weight's group, 0 if dense; `surplus`: what each must lose."""

    active: np.ndarray
    of: np.ndarray
    surplus: np.ndarray


def _groups(plan: Plan, params: PyTree, masks: Masks) -> _Groups:
    active, of, surplus = [], [], [np.zeros(1, np.int64)]
    held = topology.count_groups("obs", plan, masks)
    found = trees.named_leaves(masks)
    first = 1
    for name, leaf in trees.named_leaves(params).items():
        if not jnp.issubdtype(jnp.result_type(leaf), jnp.floating):
            continue
        size = int(np.size(leaf))
        if name not in plan:
            active.append(np.ones(size, bool))
            of.append(np.zeros(size, np.int64))
            continue
        counts = held[name].reshape(-1)
        active.append(np.asarray(found[name]).reshape(-1))
        of.append(first + _group_numbers(plan[name]))
        surplus.append(np.maximum(counts - plan[name].n_active, 0))
        first += len(counts)
    return _Groups(*map(np.concatenate, (active, of, surplus)))


def _group_numbers(layer: LayerPlan) -> np.ndarray:
    """The number of the group of each weight, flat."""
    if layer.unit_size > 1:
        raise ValueError(
            f"obs: leaf {layer.name!r} must have a structure whose units are single weights, "
            f"got {layer.structure.name!r}"
        )
    axes = layer.structure.axes(layer.units)
    kept = [1 if axis in axes else n for axis, n in enumerate(layer.units)]
    return np.broadcast_to(np.arange(layer.groups).reshape(kept), layer.units).reshape(-1)


def _hessian(value: Any, flat: Any, here: np.ndarray) -> Any:
    """Rows and columns `here` of the Hessian."""
    slope, at = jax.grad(value), jnp.asarray(here)

    def column(i: Any) -> Any:
        return jax.jvp(slope, (flat,), ((jnp.arange(flat.size) == i).astype(flat.dtype),))[1][at]

    return jax.jit(lambda: lax.map(column, at, batch_size=min(TOGETHER, len(here))))()


def _eliminate(w: np.ndarray, hessian: np.ndarray, of: np.ndarray, surplus: np.ndarray) -> tuple[np.ndarray, list[int]]:
    """The weights after all removals, and which are gone."""
    w, inverse, surplus = w.copy(), np.linalg.inv(hessian), surplus.copy()
    there, gone = np.ones(len(w), bool), []
    while surplus.any():
        cost = np.full(len(w), np.inf)
        may = np.flatnonzero(there & (surplus[of] > 0))
        cost[may] = w[may] ** 2 / (2 * inverse[may, may])
        q = len(w) - 1 - int(np.argmin(cost[::-1]))
        row = inverse[q] / inverse[q, q]
        w -= w[q] * row
        inverse -= np.outer(inverse[q], row)
        there[q], surplus[of[q]] = False, surplus[of[q]] - 1
        inverse[q], inverse[:, q], w[q] = 0.0, 0.0, 0.0
        gone.append(q)
    return w, gone


def _as_masks(kept: np.ndarray, params: PyTree, masks: Masks) -> Masks:
    start, found = 0, {}
    for name, leaf in trees.named_leaves(params).items():
        if jnp.issubdtype(jnp.result_type(leaf), jnp.floating):
            found[name] = jnp.asarray(kept[start : start + np.size(leaf)].reshape(np.shape(leaf)))
            start += int(np.size(leaf))
    return jax.tree.map(lambda name, mask: None if mask is None else found[name], trees.names(params), masks)
