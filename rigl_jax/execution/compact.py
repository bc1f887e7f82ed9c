"""Removes dead channels: a masked model becomes a smaller dense model that computes the same function.

A channel (or neuron) is dead if no output depends on it, or if it depends on no input and therefore always has the same
value. A channel of the first kind is removed. One of the second kind is removed too, and its constant contribution is
added to the biases of the layers that read it. The jaxpr of the model shows which rows, columns and biases belong to a
channel, so any function of params can be compacted.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from rigl_jax import checks, trees
from rigl_jax.base import Masks, PyTree
from rigl_jax.channels import folding
from rigl_jax.channels.resizing import at_smaller_shapes
from rigl_jax.channels.shrinking import Compact
from rigl_jax.tracing.channels import Labels, Reading, read_channels
from rigl_jax.tracing.constants import Contraction, read_contractions
from rigl_jax.tracing.program import Program, trace_model


def compact(apply: Callable[..., Any], params: PyTree, masks: Masks, *inputs: Any) -> Compact:
    """Removes dead channels of a model and folds constant ones into biases. Runs on the host, outside of jit.

    Exact up to rounding, for finite activations. A channel is removed only if it is dead wherever it occurs (a residual
    stream occurs in many places). These are kept:
      * inputs and outputs of the model, and one channel of every axis, even if all are dead;
      * channels that are operands of other operations than products, pooling over unpadded axes, reshapes that keep
        channels apart, transposes, reductions over other axes and elementwise operations; so channels in normalisation
        over features, attention, grouped and depthwise convolutions, loops, concatenations, and arrays that `apply`
        closes over (pass batch statistics as part of `params`, with None for masks);
      * channels with a constant value other than 0 that feed a padded convolution (a bias would be wrong at the
        borders), a transposed convolution with strides (a bias would be wrong between the pixels), or a layer without
        a bias. A bias is a one-dimensional, unmasked weight that is used once: added to the product, or subtracted from
        it, as a running mean is.

    Args:
      apply: `(params, *inputs) -> outputs`, a pure function, for inference (no dropout).
      params: the weights.
      masks: parallel to params, bool[*shape] or None, as `state.masks`. Weights off the masks count as 0; weights that
        are 0 count as pruned.
      *inputs: arrays or `jax.ShapeDtypeStruct`, for their shapes.

    Returns:
      The smaller model.

    Raises:
      ValueError: a mask that does not fit its weight; names the leaf.

    >>> params = {"a": jnp.ones((2, 3)), "b": jnp.ones((3, 1))}
    >>> masks = {"a": jnp.ones((2, 3), bool), "b": jnp.array([[True], [False], [True]])}
    >>> small = compact(lambda p, x: jnp.tanh(x @ p["a"]) @ p["b"], params, masks, jax.ShapeDtypeStruct((1, 2), float))
    >>> small.shapes
    {'a': ((2, 3), (2, 2)), 'b': ((3, 1), (2, 1))}
    """
    checks.functions("compact", apply=apply)
    leaves = trees.named_leaves(params)
    masks = checks.masks("compact", masks, params)
    parallel = jax.tree.structure(params).flatten_up_to(masks)
    weights = [_masked(leaf, mask) for leaf, mask in zip(leaves.values(), parallel, strict=True)]
    program = trace_model("compact", apply, params, *inputs)
    labels, channels = read_channels(program, len(weights))
    products, beyond = read_contractions(program, weights, labels)
    channels.fix(tuple(beyond))
    biases = folding.biases(program, labels, products, [mask is None for mask in parallel])
    own = [labels[i] for i in program.inputs[: len(weights)]]
    gone = _gone(channels.roots(), products, [bias is not None for bias in biases], own)
    kept = {
        name: {k: np.flatnonzero(~gone[a]) for k, a in enumerate(axes) if a is not None and gone[a].any()}
        for name, axes in zip(leaves, own, strict=True)
    }
    kept = {name: axes for name, axes in kept.items() if axes}
    folded = folding.folded(weights, products, biases, gone)
    cut = [_cut(weight, kept.get(name, {})) for name, weight in zip(leaves, folded, strict=True)]
    small = [
        None if mask is None else _cut(np.asarray(mask), kept.get(name, {}))
        for name, mask in zip(leaves, parallel, strict=True)
    ]
    structure = jax.tree.structure(params)
    before = jax.tree.map(lambda p: jax.ShapeDtypeStruct(jnp.shape(p), jnp.result_type(p)), params)
    return Compact(
        # jnp.asarray would compile a program for each shape.
        params=jax.tree.unflatten(structure, jax.device_put(cut)),
        masks=jax.tree.unflatten(structure, jax.device_put(small)),
        apply=at_smaller_shapes("compact", apply, before, kept, _read),
        kept=kept,
        shapes={name: (w.shape, now.shape) for name, w, now in zip(leaves, weights, cut, strict=True) if name in kept},
        weights=(sum(weight.size for weight in weights), sum(weight.size for weight in cut)),
    )


def _masked(leaf: Any, mask: Any) -> np.ndarray:
    """The weight on the host, zeros off its mask."""
    weight = np.asarray(leaf)
    if mask is None:
        return weight
    return np.where(np.asarray(mask), weight, np.zeros((), weight.dtype))


def _cut(array: np.ndarray, kept: dict[int, np.ndarray]) -> np.ndarray:
    for axis, positions in kept.items():
        array = np.take(array, positions, axis)
    return array


def _gone(roots: np.ndarray, products: list[Contraction], foldable: list[bool], own: list[Labels]) -> np.ndarray:
    """bool[positions]: those of dead channels."""
    last = np.zeros(len(roots), np.int64)  # by roots: the last product that reads a channel
    for order, product in enumerate(products):
        last[roots[product.rows]] = order
    held = np.zeros(len(roots), bool)
    held[0] = True
    while True:
        gone = _dead(roots, products, foldable, held)
        emptied = [roots[a[0]] for axes in own for a in axes if a is not None and gone[a].all()]
        if not emptied:
            return gone
        # An axis keeps one channel. The latest layer first: its channel keeps channels of earlier layers alive.
        held[max(emptied, key=last.__getitem__)] = True


def _dead(roots: np.ndarray, products: list[Contraction], foldable: list[bool], held: np.ndarray) -> np.ndarray:
    """bool[positions]: channels that are not held and whose rows no product needs for an output that is alive."""
    read = np.zeros(len(roots), bool)  # by roots: channels that some product sums; the others stay alive
    for product in products:
        read[roots[product.rows]] = True
    gone = np.zeros(len(roots), bool)
    while True:
        alive = held | ~read
        for product, folds in zip(products, foldable, strict=True):
            needed = product.nonzero[:, ~gone[product.columns]].any(axis=1)
            needed &= ~(product.constant & (folds | (product.value == 0)))
            alive[roots[product.rows[needed]]] = True
        after = ~alive[roots]
        if (after == gone).all():
            return gone
        gone = after


def _read(program: Program, weights: int) -> Reading:
    return Reading(*read_channels(program, weights)[::-1])
