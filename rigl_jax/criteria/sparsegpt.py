"""SparseGPT: layer by layer, the weights that stay make up for those that go."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.scipy.linalg import solve_triangular

from rigl_jax import checks, topology, trees
from rigl_jax.base import Array, Axes, LayerPlan, Masks, Plan, Pruned, PyTree, Surgeon
from rigl_jax.criteria.losses import of_inputs
from rigl_jax.messages import shown
from rigl_jax.tracing import capture, from_matrix, to_matrix

BEST = lax.Precision.HIGHEST


def sparsegpt(apply: Callable[[PyTree, Any], Any], damping: float = 0.01, block: int = 128) -> Surgeon:
    """Prunes layer by layer so that outputs of layers change least (SparseGPT, Frantar & Alistarh 2023, algorithm 1).

    With the inputs X of a layer y = x W, H = X^T X + damping mean(diag(X^T X)) 1, and the upper triangular U of
    H^-1 = U^T U, the inputs are gone through in order. A weight w_ij that goes moves those of later inputs,

        w_lj -= (U_il / U_ii) w_ij for l > i, and costs (w_ij / U_ii)^2,

    by which the weights are ranked, anew for each block of inputs, after what the earlier blocks moved. Layers come in
    the order of execution, each with the inputs that the pruned layers before it give.

    A block holds its share of the leaf's count: the exact count of the plan, unstructured or by `rx.fan_in()`. In N:M
    along the inputs a block is as many inputs as hold whole groups: M of a dense layer, as the authors do. Where units
    hold several weights (blocks, channels) they are ranked once for the whole leaf. The weights of
    an input that is always 0 become 0, as in the authors' code.

    Args:
      apply: `(params, inputs) -> outputs`, with normalisation layers in inference mode; the batch is the inputs alone,
        without labels, all of it at once. Each leaf of the plan must be in a product that `rx.tracing.capture` finds;
        if it is in several, their inputs join, and the leaf must have the same axes in all.
      damping: what is added to the diagonal, as a share of its mean; above 0.
      block: how many inputs are ranked together (the authors' 128).

    >>> import rigl_jax as rx
    >>> params = {"w": jnp.array([[1.0], [2.0]])}
    >>> x = jnp.array([[1.0, 1.0], [1.0, 1.0]])  # two inputs that are alike: the one that stays takes over
    >>> pruned = rx.prune(rx.make_plan(params, 0.5), params, sparsegpt(lambda p, x: x @ p["w"], 1e-3), x)
    >>> [round(w, 2) for w in pruned.params["w"][:, 0].tolist()]
    [0.0, 3.0]
    """
    checks.functions("sparsegpt", apply=apply)
    damping = checks.number("sparsegpt", "damping", damping, "must be above 0", lambda x: x > 0)
    if not checks.is_whole(block, 1):
        raise ValueError(f"sparsegpt: block must be a whole number, at least 1, got {shown(block)}")
    model = of_inputs("sparsegpt", apply)

    def surgeon(plan: Plan, params: PyTree, masks: Masks, batch: Any) -> Pruned:
        names = trees.names(params)
        for name in _in_order(model, plan, params, batch):
            _, products = capture(model, params, batch, leaves=[name])
            axes, gram = _gram(name, products[name])
            w, mask = (trees.named_leaves(tree)[name] for tree in (params, masks))
            size, counts = _cuts(plan[name], axes, np.asarray(mask), int(block))
            layer = plan[name]._replace(n_active=0)  # one compilation for all counts
            w, mask = _operate(layer, axes, size, damping, w, mask, gram, counts)
            params, masks = (
                jax.tree.map(lambda n, old: new if n == name else old, names, tree)  # noqa: B023
                for tree, new in ((params, w), (masks, mask))
            )
        return Pruned(params, masks)

    return surgeon


def _in_order(apply: Any, plan: Plan, params: PyTree, batch: Any) -> list[str]:
    """The leaves of the plan in the order of execution."""
    order: list[str] = []
    jax.eval_shape(lambda *given: order.extend(capture(apply, *given, leaves=list(plan))[1]), params, batch)
    return order


def _gram(name: str, used: Any) -> tuple[Axes, Array]:
    """X^T X of all products with a leaf, `[stack, in, in]`."""
    axes = {product.axes for product in used}
    if len(axes) > 1:
        raise ValueError(f"sparsegpt: leaf {name!r} must have the same axes in all its products, got {sorted(axes)}")
    total: Any = 0.0
    for product in used:
        x = product.x.astype(jnp.promote_types(product.x.dtype, jnp.float32))
        x = x.reshape(-1, *x.shape[-2:])
        total += jnp.einsum("sni,snj->sij", x, x, precision=BEST)
    return axes.pop(), total


def _cuts(layer: LayerPlan, axes: Axes, mask: np.ndarray, block: int) -> tuple[int, Array]:
    """How the inputs are cut: how many at a time, and the units that each cut keeps in each group that it holds."""
    rows = np.moveaxis(np.asarray(to_matrix(jnp.arange(layer.size).reshape(layer.shape), axes)), -2, 0)
    n_in = rows.shape[0]
    if layer.unit_size > 1:
        return n_in, jnp.full(1, layer.n_active, jnp.int32)
    row_of = np.empty(layer.size, np.int64)
    row_of[rows] = np.arange(n_in).reshape(-1, *[1] * (rows.ndim - 1))
    units = layer.structure.axes(layer.units)
    row_of = row_of.reshape(layer.units)  # units of one weight: the pooled array is the weight, reshaped
    first, last = row_of.min(axis=units), row_of.max(axis=units)
    size = next(n for n in range(1, n_in + 1) if n_in % n == 0 and np.all(first // n == last // n))
    if size < n_in or n_in <= block:
        return size, jnp.full(n_in // size, layer.n_active, jnp.int32)
    alive = mask.reshape(layer.units)
    total = alive.sum(axis=units, keepdims=True)
    ends = np.minimum(np.arange(0, n_in + block, block), n_in)
    held = np.stack([(alive & (row_of < end)).sum(axis=units, keepdims=True) for end in ends])
    kept = (2 * np.minimum(layer.n_active, total) * held + total) // np.maximum(2 * total, 1)
    return block, jnp.asarray(np.diff(kept, axis=0), jnp.int32)


@functools.partial(jax.jit, static_argnums=(0, 1, 2, 3))
def _operate(
    layer: LayerPlan, axes: Axes, size: int, damping: float, w: Array, mask: Array, gram: Array, counts: Array
) -> tuple[Array, Array]:
    """The weight and its mask after all cuts. Matrices are `[stack, in, out]`, inputs padded to whole cuts."""
    n_stack, n_in, _ = gram.shape
    n_cuts = -(-n_in // size)
    pad = n_cuts * size - n_in
    matrix = lambda x: jnp.pad(to_matrix(x, axes).reshape(n_stack, n_in, -1), ((0, 0), (0, pad), (0, 0)))  # noqa: E731
    leaf = lambda x: from_matrix(x[:, :n_in], axes, layer.shape)  # noqa: E731
    silent = jnp.pad(jnp.diagonal(gram, axis1=1, axis2=2) == 0, ((0, 0), (0, pad)))
    upper = _upper(gram, damping)
    upper = jnp.pad(upper, ((0, 0), (0, pad), (0, pad))) + jnp.diag(jnp.arange(n_in + pad) >= n_in)[None]
    cost = 1 / jnp.square(jnp.diagonal(upper, axis1=1, axis2=2))[..., None]
    rows = jnp.arange(n_in + pad)[None, :, None]
    alive = matrix(mask)
    start = jnp.where(alive & ~silent[..., None], matrix(w).astype(gram.dtype), 0)

    def one_cut(k: Array, state: tuple[Array, Array]) -> tuple[Array, Array]:
        values, kept = state
        here = rows // size == k
        best = topology.prune(layer.structure, leaf(jnp.square(values) * cost), counts[k], among=leaf(alive & here))
        kept = jnp.where(here, matrix(best), kept)
        part = functools.partial(lax.dynamic_slice_in_dim, start_index=k * size, slice_size=size, axis=1)
        lines = part(upper)
        swept, errors = _sweep(part(values), part(kept), lax.dynamic_slice_in_dim(lines, k * size, size, axis=2))
        moved = values - jnp.einsum("sil,sio->slo", lines, errors, precision=BEST)
        values = jnp.where(rows // size > k, moved, values)
        return lax.dynamic_update_slice_in_dim(values, swept, k * size, axis=1), kept

    values, kept = lax.fori_loop(0, n_cuts, one_cut, (start, jnp.zeros_like(alive)))
    kept = leaf(kept)
    return jnp.where(kept, leaf(values), 0).astype(w.dtype), kept


def _sweep(values: Array, kept: Array, upper: Array) -> tuple[Array, Array]:
    """One input after the other: each that goes moves the later ones. The values, and what went over U_ii."""

    def one(i: Array, state: tuple[Array, Array]) -> tuple[Array, Array]:
        values, errors = state
        error = jnp.where(kept[:, i], 0, values[:, i] / upper[:, i, i, None])
        return values - upper[:, i, :, None] * error[:, None], errors.at[:, i].set(error)

    values, errors = lax.fori_loop(0, values.shape[1], one, (values, jnp.zeros_like(values)))
    return jnp.where(kept, values, 0), errors


def _upper(gram: Array, damping: float) -> Array:
    """The upper triangular U of (gram + damping)^-1 = U^T U, by one factorisation from the last input to the first."""
    diagonal = jnp.diagonal(gram, axis1=1, axis2=2)
    added = jnp.where(diagonal == 0, 1, 0) + damping * jnp.mean(diagonal, axis=1, keepdims=True)
    eye = jnp.eye(gram.shape[-1], dtype=gram.dtype)
    damped = gram + added[..., None] * eye[None]
    lower = jnp.linalg.cholesky(damped[:, ::-1, ::-1])  # so that damped = R R^T with R upper triangular
    inverse = jax.vmap(lambda a: solve_triangular(a, eye, lower=True))(lower)
    return inverse[:, ::-1, ::-1]
