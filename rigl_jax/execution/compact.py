"""Dead units removed: a masked model becomes a smaller dense one that computes the same function.

A unit (a neuron, a channel) is dead if nothing that it reaches is read any more, or if no input reaches it, so that it
always outputs the same number. The first is cut out; the second too, once the biases it feeds hold what it added. The
model's own jaxpr says which rows, columns and biases make up a unit, so any function of params can be compacted.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from rigl_jax import checks, trees
from rigl_jax.base import Array, Masks, PyTree, Shape
from rigl_jax.tracing import primitives
from rigl_jax.tracing.channels import Labels, read_units
from rigl_jax.tracing.constants import Product, read_products
from rigl_jax.tracing.program import Custom, Program, Step, evaluate, trace

Kept = dict[str, dict[int, np.ndarray]]
"""`{leaf: {axis: int64[new size]}}`: the ascending positions that are left of every axis that shrank."""


class Compact(NamedTuple):
    """A model without its dead units.

    Attributes:
      params: a tree like the params, with smaller arrays, and zeros where the small masks are False.
      masks: the masks, cut to the same shapes.
      apply: `(params, *inputs) -> outputs`, the given `apply` at the smaller shapes. Takes any batch size that the
        given one takes. Traced on every call, so jit it. Its gradients are those of the given one: functions with
        derivatives of their own (`jax.custom_jvp`, `jax.custom_vjp`) keep them.
      kept: which positions are left of every axis that shrank; empty if no unit was dead.
      shapes: `{leaf: (shape before, shape now)}` of the same leaves. To build the model itself anew, read its widths
        here, as in `MLP(features=(compact.shapes["Dense_0/kernel"][1][1], ...))`: its own `apply` then takes params.
    """

    params: PyTree
    masks: Masks
    apply: Callable[..., Any]
    kept: Kept
    shapes: dict[str, tuple[Shape, Shape]]


def compact(apply: Callable[..., Any], params: PyTree, masks: Masks, *inputs: Any) -> Compact:
    """Removes the units of a model that contribute nothing, biases folded in. Runs on the host, outside of jit.

    Exact up to rounding, for finite activations. A unit is removed only if that is certain everywhere it occurs (a
    residual stream occurs in many places). These stay as they are:
      * inputs and outputs of the model, and one unit of every axis, even if all are dead;
      * units that meet anything but products, unpadded axes of pooling, reshapes that keep them apart, transposes,
        reductions over other axes and elementwise operations: normalisation over features, attention, grouped and
        depthwise convolutions, loops, concatenations, or arrays that `apply` closes over (pass batch statistics as
        part of `params`, with None for masks);
      * units without inputs whose number is not 0 and that feed a padded convolution, where it would miss at the
        borders, a transposed convolution with strides, where it would miss between the pixels, or a layer without a
        bias of its own to take it. A bias is a one-dimensional, unmasked weight, used
        once: added to the product, or subtracted from it, as a running mean is.

    Args:
      apply: `(params, *inputs) -> outputs`, a pure function, for inference (no dropout).
      params: the weights.
      masks: parallel to params, bool[*shape] or None, as `state.masks`. Weights off them count as 0, and so do zeros
        on them.
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
    program = trace(apply, params, *inputs)
    labels, units = read_units(program, len(weights))
    products, beyond = read_products(program, weights, labels)
    units.fix(tuple(beyond))
    biases = _biases(program, labels, products, [mask is None for mask in parallel])
    own = [labels[i] for i in program.inputs[: len(weights)]]
    gone = _gone(units.roots(), products, [bias is not None for bias in biases], own)
    kept = {
        name: {k: np.flatnonzero(~gone[a]) for k, a in enumerate(axes) if a is not None and gone[a].any()}
        for name, axes in zip(leaves, own, strict=True)
    }
    kept = {name: axes for name, axes in kept.items() if axes}
    folded = _folded(weights, products, biases, gone)
    cut = [_cut(weight, kept.get(name, {})) for name, weight in zip(leaves, folded, strict=True)]
    small = [
        None if mask is None else jnp.asarray(_cut(np.asarray(mask), kept.get(name, {})))
        for name, mask in zip(leaves, parallel, strict=True)
    ]
    structure = jax.tree.structure(params)
    before = jax.tree.map(lambda p: jax.ShapeDtypeStruct(jnp.shape(p), jnp.result_type(p)), params)
    return Compact(
        params=jax.tree.unflatten(structure, [jnp.asarray(weight) for weight in cut]),
        masks=jax.tree.unflatten(structure, small),
        apply=_at_smaller_shapes(apply, before, kept),
        kept=kept,
        shapes={name: (w.shape, now.shape) for name, w, now in zip(leaves, weights, cut, strict=True) if name in kept},
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


_Bias = tuple[int, int]  # a leaf, and the sign with which it is added


def _gone(roots: np.ndarray, products: list[Product], foldable: list[bool], own: list[Labels]) -> np.ndarray:
    """bool[positions]: those of dead units."""
    last = np.zeros(len(roots), np.int64)  # by roots: the last product that reads a unit
    for order, product in enumerate(products):
        last[roots[product.rows]] = order
    held = np.zeros(len(roots), bool)
    held[0] = True
    while True:
        gone = _dead(roots, products, foldable, held)
        emptied = [roots[a[0]] for axes in own for a in axes if a is not None and gone[a].all()]
        if not emptied:
            return gone
        # An axis keeps one unit. The latest layer first: its unit keeps units before it alive, which then will do.
        held[max(emptied, key=last.__getitem__)] = True


def _dead(roots: np.ndarray, products: list[Product], foldable: list[bool], held: np.ndarray) -> np.ndarray:
    """A unit lives if it is held, or if a product needs one of its rows for a living output. Found from the end on."""
    read = np.zeros(len(roots), bool)  # by roots: units that some product sums; of others nothing is known
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


def _biases(
    program: Program, labels: dict[int, Labels], products: list[Product], dense: list[bool]
) -> list[_Bias | None]:
    """For every product the weight that can take what its rows carry."""
    uses, made_by = program.uses, {step.outs[0]: step for step in program.steps}
    weights = {value: leaf for leaf, value in enumerate(program.inputs[: len(dense)]) if dense[leaf]}

    def source(value: int) -> int | None:
        """The weight that a value is, seen through changes of rank and type."""
        while uses[value] == 1 and value in made_by and made_by[value].name in _VIEWS:
            value = made_by[value].ins[0]
        return weights.get(value) if uses[value] == 1 else None

    def reader(value: int) -> Step | None:
        """The only operation that reads a value."""
        return next((step for step in program.steps if value in step.ins), None) if uses[value] == 1 else None

    def bias(product: Product) -> _Bias | None:
        value, axis = product.out, product.axis
        while (step := reader(value)) is not None and step.name in ("convert_element_type", "transpose"):
            value = step.outs[0]
            axis = step.params["permutation"].index(axis) if step.name == "transpose" else axis
        if step is None or step.name not in ("add", "sub") or (step.name == "sub" and step.ins[0] != value):
            return None
        other = step.ins[1] if step.ins[0] == value else step.ins[0]
        leaf, n = source(other), len(product.columns)
        if leaf is None or program.avals[program.inputs[leaf]].shape != (n,):
            return None
        whole, shape = program.avals[value].shape, program.avals[other].shape
        if len(shape) != len(whole) or shape[axis] != n or program.avals[step.outs[0]].shape != whole:
            return None
        own, there = labels[program.inputs[leaf]][0], labels[other][axis]
        same = n == 1 or (own is not None and there is not None and np.array_equal(own, there))
        return (leaf, 1 if step.name == "add" else -1) if same else None

    return [bias(product) for product in products]


_VIEWS = ("reshape", "broadcast_in_dim", "convert_element_type", "squeeze")


def _folded(
    weights: list[np.ndarray], products: list[Product], biases: list[_Bias | None], gone: np.ndarray
) -> list[np.ndarray]:
    """The weights, with what dead units added in the biases."""
    weights = list(weights)
    for product, bias in zip(products, biases, strict=True):
        dead = gone[product.rows]
        if bias is not None and product.value[dead].any():
            leaf, sign = bias
            weight = weights[leaf]
            weights[leaf] = (weight.astype(np.float64) + sign * product.carried(dead)).astype(weight.dtype)
    return weights


def _at_smaller_shapes(apply: Callable[..., Any], full: PyTree, kept: Kept) -> Callable[..., Any]:
    """`apply` on cut weights: its program at the full shapes, in which sizes that are written down shrink as well."""

    def run(params: PyTree, *inputs: Any) -> Any:
        program = trace(apply, full, *inputs)
        leaves = trees.named_leaves(full)
        labels, units = read_units(program, len(leaves))
        roots = units.roots()
        gone = np.zeros(len(roots), bool)
        for name, value in zip(leaves, program.inputs, strict=False):
            for axis, positions in kept.get(name, {}).items():
                whole = labels[value][axis]
                if whole is not None:
                    gone[roots[np.delete(whole, positions)]] = True
        if gone[0]:
            raise ValueError("compact: these inputs take the model another way than those it was compacted with")

        def places(value: int) -> list[np.ndarray]:
            shape = program.avals[value].shape
            axes = labels.get(value, (None,) * len(shape))
            return [
                np.arange(n) if a is None else np.flatnonzero(~gone[roots[a]]) for n, a in zip(shape, axes, strict=True)
            ]

        def size(step: Step) -> tuple[int, ...]:
            return tuple(map(len, places(step.outs[0])))

        rules = {
            "reshape": lambda step, xs: jax.lax.reshape(xs[0], size(step), step.params["dimensions"]),
            "broadcast_in_dim": lambda step, xs: jax.lax.broadcast_in_dim(
                xs[0], size(step), step.params["broadcast_dimensions"]
            ),
        }
        around = functools.partial(_with_own_derivatives, program, places)
        return evaluate(program, jax.tree.leaves((params, inputs)), rules, around)

    return run


def _with_own_derivatives(
    program: Program,
    places: Callable[[int], list[np.ndarray]],
    custom: Custom,
    outs: Sequence[int],
    run: Callable[..., list[Array]],
    operands: Sequence[Any],
) -> list[Array]:
    """A call with derivatives of its own, on arrays that shrank. See `Around`.

    Its rule is written for the full shapes. It is asked there, removed units being 0, and only where a derivative is
    taken; the call itself runs at the smaller shapes. `places(value)` are the positions left of each axis.
    """

    def cut(i: int) -> bool:
        return any(len(kept) < n for kept, n in zip(places(i), program.avals[i].shape, strict=True))

    def whole(*operands: Any) -> list[Array]:
        filled = [
            jnp.zeros(program.avals[i].shape, x.dtype).at[jnp.ix_(*places(i))].set(x) if cut(i) else x
            for i, x in zip(custom.ins, operands, strict=True)
        ]
        results = dict(zip(custom.outs, primitives.bind(custom.eqn, filled), strict=True))
        return [results[i][jnp.ix_(*places(i))] if cut(i) else results[i] for i in outs]

    if not any(map(cut, (*custom.ins, *outs))):
        return whole(*operands)
    if custom.eqn.primitive.name == "custom_jvp_call":
        forward = jax.custom_jvp(run)
        forward.defjvp(lambda primals, tangents: jax.jvp(whole, primals, tangents))
        return forward(*operands)
    backward = jax.custom_vjp(run)
    backward.defvjp(lambda *operands: jax.vjp(whole, *operands), lambda pull, ct: pull(ct))
    return backward(*operands)
