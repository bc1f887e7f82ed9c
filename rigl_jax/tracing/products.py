"""`capture`: the inputs and outputs of the products with weights."""

from __future__ import annotations

import dataclasses
import functools
import itertools
import math
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from rigl_jax import arguments as rules
from rigl_jax import trees
from rigl_jax.arguments import arguments
from rigl_jax.base import Array, Axes, PyTree, Shape
from rigl_jax.messages import listed
from rigl_jax.tracing import geometry, primitives
from rigl_jax.tracing.uses import Data, Owned, Part, traced, weights
from rigl_jax.tracing.walk import Walker


@functools.partial(jax.tree_util.register_dataclass, data_fields=["x", "y"], meta_fields=["axes"])
@dataclasses.dataclass(frozen=True)
class Captured:
    """One product of a weight with data, as matrices: `y = x @ to_matrix(weight, axes)`.

    If the model first masks, casts or scales the weight, the result of that takes its place.

    Attributes:
      x: `[*stack, n, in]`, the n rows that it multiplies. For a convolution they are patches, one for each position of
        the output, channels before taps.
      y: `[*stack, n, out]`, the products.
      axes: which axes of the weight are `in` (`inputs`, then `window`), `out` and `stack`, in the order of the rows.
    """

    x: Array
    y: Array
    axes: Axes


class _Value(NamedTuple):
    array: Array
    owned: Owned


class _Context(NamedTuple):
    uses: Walker  # over what the values are made of
    leaves: Collection[str]
    add: Mapping[str, Sequence[Array]]
    found: dict[str, list[Captured]]


_NAMES = rules.optional(rules.one_of((list, tuple, set, frozenset, Mapping), "names of leaves"))


@arguments(apply=rules.function, leaves=_NAMES, add=rules.optional(rules.one_of(Mapping, "{name: arrays}")))
def capture(
    apply: Any,
    params: PyTree,
    *inputs: Any,
    leaves: Iterable[str] | None = None,
    add: Mapping[str, Sequence[Array]] | None = None,
) -> tuple[Any, dict[str, tuple[Captured, ...]]]:
    """Runs `apply(params, *inputs)`, and also returns the inputs and outputs of its products with weights.

    A leaf is found in `dot_general` and convolutions, also behind casts, transposes, reshapes, masks and other
    elementwise operations with constants, inside jit and `jax.checkpoint`. A pure function: for jit, grad and vmap.
    Derivatives are those of `apply`, custom derivatives included.

    For gradients with respect to the products, differentiate with respect to `add`:

        _, products = jax.eval_shape(lambda: rx.tracing.capture(apply, params, x))
        zeros = {name: [jnp.zeros(p.y.shape, p.y.dtype) for p in uses] for name, uses in products.items()}
        dy = jax.grad(lambda add: loss(rx.tracing.capture(apply, params, x, add=add)[0]))(zeros)

    Args:
      apply: `(params, *inputs) -> outputs`.
      params: the weights, arrays.
      *inputs: trees of arrays.
      leaves: names of the leaves to capture, as a plan has them; None: all that are found in products.
      add: `{name: one array for each of its products}`, of the shapes of `y`, which are added to the products.

    Returns:
      The outputs of `apply`, and `{name: its products}`, names and products in the order of execution. (JAX sorts the
      names where a dict passes through a transformation such as jit.) Patches of convolutions take as many times the
      memory of the image as the kernel has taps.

    Raises:
      ValueError: names a leaf that is in no product, or in one that cannot be captured: inside scan, while_loop, cond,
        shard_map or a function with custom derivatives, in a grouped convolution, of a part of the leaf or in another
        order, or after a product with another weight.

    >>> out, products = capture(lambda p, x: jnp.tanh(x @ p["w"]), {"w": jnp.ones((3, 2))}, jnp.ones((4, 3)))
    >>> [(p.x.shape, p.y.shape) for p in products["w"]]
    [((4, 3), (4, 2))]
    """
    names = trees.named_leaves(params)
    wanted = tuple(names if leaves is None else leaves)
    for name in (*wanted, *(add or ())):
        if name not in names:
            raise ValueError(f"capture: leaves and add must name leaves, got {name!r}; there are {listed(names)}")
    shapes, program, out = traced(params, apply, inputs)
    walker, owned = weights(shapes)
    arrays = [jnp.asarray(p) for p in names.values() if hasattr(p, "shape")]
    given = [_Value(array, own) for array, own in zip(arrays, owned, strict=True)]
    given += [_Value(x, Data({})) for x in jax.tree.leaves(inputs)]
    context = _Context(walker, [name for name in wanted if name in shapes], add or {}, {})
    bound = dict.fromkeys(primitives.CUSTOM, _bound)
    results = Walker(bound, _bound, lambda value, aval: _Value(value, {}), context, _without_weights)(program, given)
    for name in (*(wanted if leaves is not None else ()), *context.add):
        if name not in context.found:
            raise ValueError(f"capture: leaf {name!r} is in no product; found in products: {listed(context.found)}")
    for name, arrays in context.add.items():
        if len(arrays) != len(context.found[name]):
            n = len(context.found[name])
            raise ValueError(f"capture: add of leaf {name!r} must hold {n} arrays, one a product, got {len(arrays)}")
    products = {name: tuple(used) for name, used in context.found.items()}
    return jax.tree.unflatten(jax.tree.structure(out), [x.array for x in results]), products


@arguments(weight=rules.array(), axes=rules.axes)
def to_matrix(weight: Array, axes: Axes) -> Array:
    """A weight as the matrices `[*stack, in, out]` of its products; `in` are the inputs, then the window.

    >>> to_matrix(jnp.ones((3, 3, 4, 8)), Axes(inputs=(2,), outputs=(3,), window=(0, 1))).shape
    (36, 8)
    """
    order, stack = _order("to_matrix", weight.shape, axes)
    size = math.prod(weight.shape[axis] for axis in axes.outputs)
    return weight.transpose(order).reshape(*(weight.shape[axis] for axis in stack), -1, size)


@arguments(matrix=rules.array(), axes=rules.axes, shape=rules.shape)
def from_matrix(matrix: Array, axes: Axes, shape: Shape) -> Array:
    """The inverse of `to_matrix`: an array of the matrices in the shape of the weight.

    >>> axes = Axes(inputs=(1,), outputs=(0,))
    >>> from_matrix(jnp.ones((4, 8)), axes, (8, 4)).shape
    (8, 4)
    """
    order, _ = _order("from_matrix", shape, axes)
    if math.prod(matrix.shape) != math.prod(shape):
        raise ValueError(f"from_matrix: matrix must hold {math.prod(shape)} entries, got {list(matrix.shape)}")
    inverse = sorted(range(len(order)), key=order.__getitem__)
    return matrix.reshape([shape[axis] for axis in order]).transpose(inverse)


def _order(who: str, shape: Shape, axes: Axes) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """The axes in the order of the matrices, and those of the stack; axes of 1 need not be named."""
    named = (*axes.stack, *axes.inputs, *axes.window, *axes.outputs)
    if len(set(named)) < len(named) or not set(named) <= set(range(len(shape))):
        raise ValueError(f"{who}: axes must be those of {list(shape)}, each once, got {axes}")
    ones = [axis for axis in range(len(shape)) if axis not in named]
    return (*axes.stack, *ones, *named[len(axes.stack) :]), axes.stack


# --- how operations run ----------------------------------------------------------------------------------------------


def _without_weights(eqn: Any, operands: Sequence[_Value]) -> list[_Value] | None:
    if any(map(_leaves, operands)):
        return None
    owned: Owned = Data({}) if any(isinstance(x.owned, Data) for x in operands) else {}
    return [_Value(y, owned) for y in primitives.bind(eqn, [x.array for x in operands])]


def _bound(walker: Walker, eqn: Any, operands: Sequence[_Value]) -> list[_Value]:
    """Executes an operation unchanged, and captures the products inside it."""
    context: _Context = walker.context
    uses = context.uses.context.uses
    before = {name: len(uses[name]) for name in context.leaves}
    owned = context.uses.results(eqn, [x.owned for x in operands])
    results = primitives.bind(eqn, [x.array for x in operands])
    for name in context.leaves:
        if any(use.kind in ("product", "depthwise") for use in uses[name][before[name] :]):
            results = [_record(context, name, eqn, operands, *results)]
        elif eqn.primitive.name in ("rev", "gather", "sort") and any(isinstance(o, dict) and name in o for o in owned):
            _refuse(name, f"is put into another order by {eqn.primitive.name}")
    return [_Value(y, own) for y, own in zip(results, owned, strict=True)]


def _refuse(name: str, what: str) -> None:
    raise ValueError(
        f"capture: leaf {name!r} {what}, so its products are not seen: name the leaves to capture in leaves=..."
    )


def _record(context: _Context, name: str, eqn: Any, operands: Sequence[_Value], *results: Array) -> Array:
    """Records a product, and returns it plus its `add`."""
    where, shape = eqn.primitive.name, context.uses.context.shapes[name]
    if where not in READERS:
        _refuse(name, f"is used inside {where}")
    if name in context.uses.context.paired:
        _refuse(name, "is multiplied by another weight first")
    (y,), (x, axes, order, n_out) = results, READERS[where](name, eqn, operands)
    moved = y.transpose(order)
    n_stack, n_rows = x.ndim - 2, len(order) - n_out
    rows = moved.reshape(*moved.shape[:n_stack], x.shape[-2], math.prod(moved.shape[n_rows:]))
    size = lambda *axes: math.prod(shape[axis] for axis in axes)  # noqa: E731
    named = (*axes.stack, *axes.inputs, *axes.window, *axes.outputs)
    if len(set(named)) < len(named):
        _refuse(name, "has an axis that is split by a reshape")
    whole = size(*axes.stack), size(*axes.inputs, *axes.window), size(*axes.outputs)
    if whole != (math.prod(x.shape[:-2]), x.shape[-1], rows.shape[-1]) or math.prod(whole) != size(*range(len(shape))):
        _refuse(name, f"is used in part, or repeated, in {where}")
    used = context.found.setdefault(name, [])
    used.append(Captured(x, rows, axes))
    if len(context.add.get(name, ())) < len(used):
        return y
    added = context.add[name][len(used) - 1]
    if jnp.shape(added) != rows.shape:
        raise ValueError(
            f"capture: add of leaf {name!r} must hold an array {list(rows.shape)} for product {len(used) - 1}, "
            f"got {list(jnp.shape(added))}"
        )
    return (rows + added).astype(y.dtype).reshape(moved.shape).transpose(np.argsort(order).tolist())


def _leaves(value: _Value) -> Collection[str]:
    """The leaves that a value is computed from; none for data and constants."""
    return value.owned if isinstance(value.owned, dict) else ()


Read = tuple[Array, Axes, list[int], int]
"""x; the axes of the weight; the axes of the result, the stack first and the outputs last; how many are outputs."""


def _dot(name: str, eqn: Any, operands: Sequence[_Value]) -> Read:
    dot = geometry.dot(eqn)
    side = next(s for s in (0, 1) if name in _leaves(operands[s]))
    parts, x = operands[side].owned[name], operands[1 - side].array  # pyrefly: ignore
    pairs = sorted(zip((parts[axis] for axis in dot.summed[side]), dot.summed[1 - side], strict=True))
    outputs = sorted(dot.free[side], key=parts.__getitem__)
    axes = Axes(_joined(part for part, _ in pairs), _joined(map(parts.__getitem__, outputs)))
    axes = axes._replace(stack=_joined(map(parts.__getitem__, dot.batch[side])))
    batch, rows = dot.batch[1 - side], dot.free[1 - side]
    moved = x.transpose(*batch, *rows, *(axis for _, axis in pairs))
    stack, n = moved.shape[: len(batch)], math.prod(moved.shape[len(batch) : len(batch) + len(rows)])
    written = [{own: axis for axis, own in places.items()} for places in dot.written]
    order = [written[1 - side][axis] for axis in (*batch, *rows)] + [written[side][axis] for axis in outputs]
    return moved.reshape(*stack, n, math.prod(x.shape[axis] for _, axis in pairs)), axes, order, len(outputs)


def _conv(name: str, eqn: Any, operands: Sequence[_Value]) -> Read:
    conv, given, (x, kernel) = geometry.conv(eqn), eqn.params, operands
    if not conv.plain or _leaves(x):
        _refuse(name, "is used in a grouped convolution, or as its image")
    parts = kernel.owned[name]  # pyrefly: ignore
    out, channels, *window = conv.kernel
    patches = jax.lax.conv_general_dilated_patches(
        x.array,
        [kernel.array.shape[axis] for axis in window],
        given["window_strides"],
        given["padding"],
        given["lhs_dilation"],
        given["rhs_dilation"],
        given["dimension_numbers"],
        precision=jax.lax.Precision.HIGHEST,
    )
    order = [axis for axis in range(len(conv.out)) if axis != conv.out[1]] + [conv.out[1]]
    patches = patches.transpose(order)
    axes = Axes(parts[channels], parts[out], _joined(map(parts.__getitem__, window)))
    return patches.reshape(math.prod(patches.shape[:-1]), patches.shape[-1]), axes, order, 1


def _joined(parts: Iterable[Part]) -> Part:
    return tuple(itertools.chain.from_iterable(parts))


READERS: dict[str, Callable[[str, Any, Sequence[_Value]], Read]] = {"dot_general": _dot, "conv_general_dilated": _conv}
"""How a primitive multiplies by a leaf; products of other primitives are not captured."""
