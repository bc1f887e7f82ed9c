"""Masks and costs of a run as what its files hold. The counts of masks are those of `rigl_jax.mask_metrics`."""

from __future__ import annotations

import base64
from collections.abc import Callable, Collection, Mapping
from typing import Any

import jax
import numpy as np

from rigl_jax import trees
from rigl_jax.base import Algorithm, Masks, PyTree
from rigl_jax.costs import training_cost
from rigl_jax.tracing.flops import flops


def pack_mask(name: str, mask: Any) -> dict[str, Any]:
    """A "first_layer" line: the mask of one leaf, 8 weights to the byte in C order, in base 64."""
    packed = np.packbits(np.asarray(mask))
    return {"leaf": name, "shape": list(mask.shape), "rows_packed": base64.b64encode(packed.tobytes()).decode()}


def unpack_mask(line: Mapping[str, Any]) -> np.ndarray:
    """The mask of a "first_layer" line, `bool[*shape]`: the inverse of `pack_mask`.

    >>> bool((unpack_mask(pack_mask("a", np.eye(3, dtype=bool))) == np.eye(3)).all())
    True
    """
    packed = np.frombuffer(base64.b64decode(line["rows_packed"]), np.uint8)
    size = int(np.prod(line["shape"]))
    return np.unpackbits(packed, count=size).astype(bool).reshape(line["shape"])


def shapes(masks: Masks | None) -> dict[str, tuple[int, ...]]:
    """`{name: shape}` of the sparse leaves, in pytree order; {} where there are no masks."""
    return {name: tuple(mask.shape) for name, mask in trees.named_leaves(masks).items()}


def first_layer(apply: Callable[..., Any], params: PyTree, image: Any, sparse: Collection[str]) -> str:
    """The name of the sparse leaf of the first product in a trace of the model (trees are sorted by name)."""
    products = flops(apply, params, image).products
    return next((p.name for p in products if p.name is not None and p.name in sparse), min(sparse))


def cost(
    apply: Callable[..., Any],
    params: PyTree,
    image: Any,
    *,
    masks: Masks | None,
    algorithm: Algorithm | None,
    steps: int,
    scoring: float = 0.0,
) -> dict[str, Any]:
    """The cost of a network, for the summary.

    FLOPs are 2 a multiply-accumulate, of one example, of products with weights and between activations (no biases,
    norms or activation functions). Training counts forward and backward pass and the dense gradients that the
    method reads, as appendix H of the RigL paper does, and the forward passes for scores of examples.

    Args:
      apply: `(params, image) -> logits`.
      params: arrays.
      image: `[1, H, W, C]`, abstract.
      masks: on the host; None for a dense run.
      algorithm: None for a dense run.
      steps: of the whole training.
      scoring: forward passes of one example for each one that a step trains on, by which data pruning scores examples.
    """
    counted = flops(apply, params, image, masks=masks)
    total = sum(int(np.prod(p.shape)) for p in jax.tree.leaves(params))
    pruned = sum(int(mask.size - np.count_nonzero(mask)) for mask in jax.tree.leaves(masks))
    dense = counted.dense_total
    training = 1.0 if algorithm is None else training_cost(algorithm, counted.total, dense, steps) / (3 * dense)
    training += scoring * counted.total / (3 * dense)
    return {
        "params": total,
        "active_params": total - pruned,
        "flops_inference": 2 * counted.total,
        "flops_inference_dense": 2 * dense,
        "flops_inference_x_dense": counted.total / dense,
        "flops_training_x_dense": training,
    }
