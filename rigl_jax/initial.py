"""Initialisation that knows the masks."""

from __future__ import annotations

import math

import jax.numpy as jnp

from rigl_jax import checks, trees
from rigl_jax.base import Array, Masks, Plan, PyTree
from rigl_jax.messages import shown


def rescale_init(params: PyTree, masks: Masks, axis: int = -1, *, plan: Plan | None = None) -> PyTree:
    """The masked params, each output unit scaled by sqrt(fan-in / active fan-in), before training.

    Initialisers scale by the fan-in of a dense layer. With a tenth of it active, the variance of a layer's outputs
    falls to a tenth, layer after layer. This restores it unit by unit, as in Evci et al. (2022, "Gradient flow in
    sparse neural networks"). RigL's own experiments leave the dense initialisation as it is.

    Args:
      params: tree of weights.
      masks: parallel to params; leaves with None are returned as they are.
      axis: the output axis of the kernels. The last for Flax and Haiku; 0 for Equinox and PyTorch's layout.
      plan: from `make_plan`. The outputs of each leaf are those that it knows, in a stack those of each layer; `axis`
        where it knows none.

    Returns:
      Params in their own types, exactly 0 off the masks. A unit without any active weight is 0.

    >>> params, masks = {"w": jnp.ones((4, 2))}, {"w": jnp.array([[1, 1], [0, 1], [0, 1], [0, 1]], bool)}
    >>> rescale_init(params, masks)["w"][0].tolist()
    [2.0, 1.0]
    """
    masks = checks.masks("rescale_init", masks, params)
    if plan is not None:
        checks.plan("rescale_init", plan)
    units: dict[str, tuple[int, ...]] = {}
    for name, mask in trees.named_leaves(masks).items():
        known = plan[name].axes if plan is not None and name in plan else None
        if known is None and (not isinstance(axis, int) or not -mask.ndim <= axis < mask.ndim):
            raise ValueError(f"rescale_init: axis must be one of leaf {name!r}, {mask.shape}, got {shown(axis)}")
        units[name] = (axis % mask.ndim,) if known is None else (*known.stack, *known.outputs)

    def one(mask: Array, p: Array, name: str) -> Array:
        rest = tuple(i for i in range(mask.ndim) if i not in units[name])
        active = jnp.sum(mask, axis=rest, keepdims=True, dtype=jnp.float32)
        gain = jnp.sqrt(math.prod(mask.shape[i] for i in rest) / jnp.maximum(active, 1))
        return jnp.where(mask, p * gain.astype(p.dtype), jnp.zeros((), p.dtype))

    return trees.map_masked(one, masks, params, trees.names(params))
