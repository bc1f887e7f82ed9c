"""How small and how cheap a sparse network is, and how far two of them share their weights' places."""

from __future__ import annotations

import functools
import math

import jax.numpy as jnp

from rigl_jax import checks, trees
from rigl_jax.base import Array, Masks, PyTree
from rigl_jax.messages import kind, shown
from rigl_jax.tracing.flops import Flops


def compression(params: PyTree, masks: Masks) -> float:
    """Weights of the whole model for each that is left: `size / active`, dense leaves included (ShrinkBench).

    Args:
      params: all trained weights; only shapes are read. What is no weight, such as batch statistics, leave out.
      masks: parallel to params, bool[*shape] or None (dense: all of it is left).

    Raises:
      ValueError: masks that do not fit params, or leave nothing.

    ShrinkBench's code counts weights that are not 0, so that a bias of 0 is not counted; here masks alone count.

    >>> params, masks = {"w": jnp.ones((4, 4)), "b": jnp.ones(4)}, {"w": jnp.eye(4, dtype=bool), "b": None}
    >>> compression(params, masks)  # 20 / (4 + 4)
    2.5
    """
    masks = checks.masks("compression", masks, params)
    leaves, masked = trees.named_leaves(params), trees.named_leaves(masks)
    total = sum(math.prod(jnp.shape(leaf)) for leaf in leaves.values())
    left = sum(
        int(jnp.sum(masked[name])) if name in masked else math.prod(jnp.shape(leaf)) for name, leaf in leaves.items()
    )
    if not left:
        raise ValueError(f"compression: masks must leave a weight active, got none of {total}")
    return total / left


def density_for(compression: float, prunable: int, total: int) -> float:
    """The density of the prunable leaves at which the whole model has a compression (ShrinkBench).

    `(total / compression - (total - prunable)) / prunable`; its counterpart is the sparsity for `rx.make_plan`, one
    minus it.

    Args:
      compression: size over active weights of the whole model, at least 1.
      prunable: weights in leaves that may be pruned, at least 1.
      total: all weights.

    Raises:
      ValueError: a compression that is out of reach even with all prunable weights gone; says the largest.

    >>> density_for(2.5, prunable=16, total=20)
    0.25
    """
    for name, value, least in (("prunable", prunable, 1), ("total", total, prunable)):
        if isinstance(value, bool) or not isinstance(checks.plain(value), int) or value < least:
            raise ValueError(f"density_for: {name} must be a whole number, at least {least}, got {shown(value)}")
    compression = checks.number("density_for", "compression", compression, "must be at least 1", lambda c: c >= 1)
    density = (total / compression - (total - prunable)) / prunable
    if density < 0:
        raise ValueError(
            f"density_for: compression must be at most {total / (total - prunable):.6g} where {prunable} of {total} "
            f"weights may be pruned, got {shown(compression)}"
        )
    return density


def speedup(cost: Flops) -> float:
    """Theoretical speed-up: multiply-accumulates of the dense model over those of active weights (ShrinkBench).

    Args:
      cost: of `rx.flops(apply, params, *inputs, masks=masks)`.

    Raises:
      ValueError: no `Flops`, or one whose weights do nothing.

    >>> import rigl_jax as rx
    >>> params, masks = {"w": jnp.ones((4, 4))}, {"w": jnp.eye(4, dtype=bool)}
    >>> speedup(rx.flops(lambda p, x: x @ p["w"], params, jnp.ones((1, 4)), masks=masks))
    4.0
    """
    if not isinstance(cost, Flops):
        raise ValueError(f"speedup: cost must be what rx.flops gives, got {kind(cost)}")
    if not cost.total:
        raise ValueError("speedup: cost must be that of a model whose active weights do work, got 0 multiplications")
    return cost.dense_total / cost.total


def mask_overlap(a: Masks, b: Masks) -> Array:
    """Active weights of both networks over those of either, over all masked leaves; f32 scalar, 1 for equal masks.

    Random masks of density d overlap by d / (2 - d) on average. 1 where nothing is active.

    Args:
      a: masks, None for dense leaves, which do not count.
      b: masks of the same leaves.

    Raises:
      ValueError: masks of other leaves or shapes; names the leaf.

    >>> round(float(mask_overlap({"w": jnp.array([1, 1, 0], bool)}, {"w": jnp.array([1, 0, 1], bool)})), 6)
    0.333333
    """
    first, second = trees.named_leaves(a), trees.named_leaves(b)
    if not first:
        raise ValueError(f"mask_overlap: a must hold masks, got {kind(a)} without leaves")
    for name in [*first, *second]:
        for argument, masks in (("a", first), ("b", second)):
            other = (first | second)[name]
            if not hasattr(other, "dtype"):
                raise ValueError(f"mask_overlap: {argument} must hold masks, got {shown(other)} at leaf {name!r}")
            checks.mask(f"mask_overlap: {argument}", name, masks.get(name), other)
    both = _count([first[name] & second[name] for name in first])
    either = _count([first[name] | second[name] for name in first])
    return jnp.where(either > 0, both / jnp.maximum(either, 1), 1.0)


def _count(masks: list[Array]) -> Array:
    return functools.reduce(jnp.add, [jnp.sum(mask, dtype=jnp.int32).astype(jnp.float32) for mask in masks])
