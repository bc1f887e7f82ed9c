"""Masks and costs as numbers. Masks are counted on the device, and one small array is fetched."""

from __future__ import annotations

import base64
from collections.abc import Callable, Collection, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from rigl_jax import trees
from rigl_jax.base import Algorithm, Array, Masks, PyTree
from rigl_jax.costs import training_cost
from rigl_jax.tracing.flops import flops

COLUMNS = ("active", "dropped", "grown", "explored", "dead")


def counts(old: Masks, new: Masks, explored: Masks) -> Array:
    """`int32[leaves, 5]`, the columns of `COLUMNS` for each sparse leaf, in pytree order. Jit it.

    - active: weights that are on in `new`;
    - dropped, grown: on in `old` only, on in `new` only. A weight that a method drops and grows again in one
      rewiring counts as neither;
    - explored: on in `explored`;
    - dead: output units without any active incoming weight (the last axis of a linen kernel holds the outputs).
    """
    rows = [
        jnp.stack([_count(b), _count(a & ~b), _count(b & ~a), _count(e), _dead(b)])
        for a, b, e in zip(*map(jax.tree.leaves, (old, new, explored)), strict=True)
    ]
    return jnp.stack(rows)


def _count(mask: Array) -> Array:
    return jnp.sum(mask, dtype=jnp.int32)


def _dead(mask: Array) -> Array:
    return _count(~jnp.any(mask, axis=tuple(range(mask.ndim - 1))))


def mask_values(shapes: Mapping[str, tuple[int, ...]], table: np.ndarray) -> dict[str, Any]:
    """A "masks" line of the records, from the counts of `counts` and the sparse leaves' shapes in pytree order.

    `dropped_fraction` and `grown_fraction` are of the weights that were active before; `explored` is the share R_s of
    in-time over-parameterisation (Liu et al. 2021): weights ever active over all weights of the sparse leaves.

    >>> mask_values({"a": (2, 2)}, np.array([[2, 1, 1, 3, 0]]))["explored"]
    0.75
    """
    rows = {name: dict(zip(COLUMNS, map(int, row), strict=True)) for name, row in zip(shapes, table, strict=True)}
    sizes = {name: int(np.prod(shape)) for name, shape in shapes.items()}
    before = {name: row["active"] + row["dropped"] - row["grown"] for name, row in rows.items()}

    def total(column: str) -> int:
        return sum(row[column] for row in rows.values())

    size, was = sum(sizes.values()), max(sum(before.values()), 1)
    return {
        "sparsity": 1 - total("active") / size,
        "dropped_fraction": total("dropped") / was,
        "grown_fraction": total("grown") / was,
        "explored": total("explored") / size,
        "density": {name: row["active"] / sizes[name] for name, row in rows.items()},
        "dropped": {name: row["dropped"] / max(before[name], 1) for name, row in rows.items()},
        "dead_units": {name: row["dead"] for name, row in rows.items()},
    }


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
) -> dict[str, Any]:
    """The cost of a network, for the summary.

    FLOPs are 2 a multiply-accumulate, of one example, of products with weights and between activations (no biases,
    norms or activation functions). Training counts forward and backward pass and the dense gradients that the
    method reads, as appendix H of the RigL paper does.

    Args:
      apply: `(params, image) -> logits`.
      params: arrays.
      image: `[1, H, W, C]`, abstract.
      masks: on the host; None for a dense run.
      algorithm: None for a dense run.
      steps: of the whole training.
    """
    counted = flops(apply, params, image, masks=masks)
    total = sum(int(np.prod(p.shape)) for p in jax.tree.leaves(params))
    pruned = sum(int(mask.size - np.count_nonzero(mask)) for mask in jax.tree.leaves(masks))
    dense = counted.dense_total
    training = 1.0 if algorithm is None else training_cost(algorithm, counted.total, dense, steps) / (3 * dense)
    return {
        "params": total,
        "active_params": total - pruned,
        "flops_inference": 2 * counted.total,
        "flops_inference_dense": 2 * dense,
        "flops_inference_x_dense": counted.total / dense,
        "flops_training_x_dense": training,
    }
