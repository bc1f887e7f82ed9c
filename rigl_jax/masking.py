"""Weights and their masks: put on, looked through, measured and checked."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp

from rigl_jax import checks, trees
from rigl_jax.base import Array, Masks, Plan, PyTree
from rigl_jax.messages import shown


def apply_masks(params: PyTree, masks: Masks) -> PyTree:
    """The params with exact zeros where a mask is False; dense leaves as they are.

    >>> apply_masks({"w": jnp.array([1.0, 2.0]), "b": jnp.array([3.0])}, {"w": jnp.array([True, False]), "b": None})
    {'b': Array([3.], dtype=float32), 'w': Array([1., 0.], dtype=float32)}
    """
    masks = checks.masks("apply_masks", masks, params)
    return trees.map_masked(lambda mask, p: jnp.where(mask, p, jnp.zeros((), p.dtype)), masks, params)


def straight_through(params: PyTree, masks: Masks) -> PyTree:
    """`apply_masks` whose gradient passes to every weight as if there were no mask.

    >>> grad = jax.grad(lambda w: straight_through({"w": w}, {"w": jnp.array([True, False])})["w"].sum())
    >>> grad(jnp.ones(2)).tolist()
    [1.0, 1.0]
    """
    masks = checks.masks("straight_through", masks, params)
    return trees.map_masked(lambda mask, p: _straight(p, mask), masks, params)


@jax.custom_jvp
def _straight(p: Array, mask: Array) -> Array:
    return jnp.where(mask, p, jnp.zeros((), p.dtype))


@_straight.defjvp
def _straight_jvp(primals: Any, tangents: Any) -> tuple[Array, Array]:
    return _straight(*primals), tangents[0]


def sparsity(tree: PyTree) -> Array:
    """Measured fraction of zeros over all the arrays of a tree, f32 scalar; of False where they are masks.

    Give it masks, or the leaves you mean: over all params it also counts biases that are still 0.

    >>> float(sparsity({"w": jnp.array([[1.0, 0.0], [0.0, 0.0]]), "b": None}))
    0.75
    """
    checks.not_in_patterns("sparsity", tree)
    leaves = jax.tree.leaves(tree)
    if strange := [leaf for leaf in leaves if not hasattr(leaf, "dtype")]:
        raise ValueError(f"sparsity: expected a tree of arrays, got a leaf {shown(strange[0])}")
    if hasattr(tree, "patterns"):  # packed weights, whose indices are no weights
        raise ValueError(
            "sparsity: expected weights or masks, got packed weights; ask rx.sparsity(rx.execution.masks_of(packed))"
        )
    for leaf in leaves:
        checks.total("sparsity", "weights of one leaf", leaf.size)
    return share([leaf == jnp.zeros((), leaf.dtype) for leaf in leaves])


def share(chosen: Sequence[Array]) -> Array:
    """The share of True over several bool arrays, each of fewer than 2**31 entries, f32 scalar."""
    total = float(sum(leaf.size for leaf in chosen))  # may be more than int32 holds
    return sum(
        (jnp.sum(leaf, dtype=jnp.int32).astype(jnp.float32) / total for leaf in chosen),
        start=jnp.zeros((), jnp.float32),
    )


def check_masked(params: PyTree, masks: Masks, plan: Plan | None = None) -> None:
    """Checks that every pruned weight is exactly 0; on the host, outside of jit.

    Args:
      params: the weights.
      masks: `state.masks`.
      plan: if given, each leaf must also have as many active weights as it says: for a state that was loaded, and a
        method that keeps counts.

    Raises:
      ValueError: names the first leaf that has a weight off its mask, and how many. Usual causes: params were never
        masked (`apply_masks`), a transformation after `sparsify` changes the updates, or weights were set from outside.
        Infinite and NaN weights are counted separately: pruning does not set them to 0.

    >>> import jax.numpy as jnp
    >>> masks = {"w": jnp.array([True, False])}
    >>> check_masked({"w": jnp.array([3.0, 0.0])}, masks)
    >>> check_masked({"w": jnp.array([3.0, 1.0])}, masks)
    Traceback (most recent call last):
    ...
    ValueError: check_masked: leaf 'w' must be 0 off its mask, got 1 other ...
    """
    checks.not_in_patterns("check_masked", masks)
    if plan is not None:
        checks.plan("check_masked", plan)
    planned = {} if plan is None else {name: leaf.active_weights for name, leaf in plan.items()}
    arrays, found = trees.named_leaves(params), trees.named_leaves(masks)
    if not found:
        raise ValueError("check_masked: there is no mask to check against, got a tree without leaves")
    for name, mask in found.items():
        if name not in arrays:
            raise ValueError(f"check_masked: params have no leaf {name!r}, for which there is a mask")
        checks.mask("check_masked", name, mask, arrays[name])
        if isinstance(arrays[name], jax.core.Tracer) or isinstance(mask, jax.core.Tracer):
            raise ValueError(f"check_masked: leaf {name!r} is traced; call it outside of jit")
        if plan is not None and int(jnp.sum(mask)) != (wanted := planned.get(name, 0)):
            raise ValueError(
                f"check_masked: leaf {name!r} must have {wanted} active weights by the plan, got {int(jnp.sum(mask))}"
            )
        stray = (arrays[name] != 0) & ~mask
        if lost := int(jnp.sum(stray & ~jnp.isfinite(arrays[name]))):
            raise ValueError(
                f"check_masked: leaf {name!r} must be 0 off its mask, got {lost} infinite or NaN weights there, "
                "which no update can set to 0; training diverged before they were pruned"
            )
        if stray := int(jnp.sum(stray)):
            raise ValueError(
                f"check_masked: leaf {name!r} must be 0 off its mask, got {stray} other weights; "
                "is something wrapped around sparsify, or apply_masks missing?"
            )
