"""Runs any model, unchanged, on packed weights: products with a packed weight use the sparse kernels.

The model is traced with the dense shapes (which are never allocated), then its jaxpr is evaluated (`tracing.walk`) with
packed weights in the place of dense ones. An operation without a packed weight is executed unchanged.
"""

from __future__ import annotations

import dataclasses
import functools
import math
import warnings
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding, PartitionSpec

from rigl_jax import checks, trees
from rigl_jax.base import Array
from rigl_jax.execution import kernels, stacks
from rigl_jax.execution.kernels.conv import patches as conv_patches
from rigl_jax.execution.over import over
from rigl_jax.execution.packed import Packed, Whole
from rigl_jax.execution.weight import Weight
from rigl_jax.messages import shown
from rigl_jax.tracing import geometry, primitives
from rigl_jax.tracing.walk import Rule, Walker

Observe = Callable[[Weight, Array, Array], Array]
"""`(weight, rows, y) -> y`: called for every product y = rows @ weight (for a convolution, rows are patches of the
image, channels before taps); its result takes the place of y."""


class Context(NamedTuple):
    """How the rules compute products.

    Attributes:
      observe: called for each product; None: no function is.
      batch: the sharding of batches on several devices; None: each product runs where it is called, on one device, or
        on each device by itself inside `shard_map`.
    """

    observe: Observe | None = None
    batch: NamedSharding | None = None


def run_packed(apply: Callable[..., Any], *, batch: NamedSharding | None = None) -> Callable[..., Any]:
    """`apply` on packed weights: the same function, called with a `Packed` wherever it takes params.

    Matrix products (`dot_general`, also over several axes as in attention) and convolutions (1-D with WIO kernels, 2-D
    and 3-D; in groups, transposed) run on the sparse kernels, through casts, transposes, `jit`, `scan`, `cond`,
    `while_loop` and `jax.checkpoint`. Kernels are HWIO and DHWIO, or have the order that their plan says. Stacked
    layers are used one by one, by the `scan` that goes through them or where `vmap` makes one product of all. For any
    other operation a packed weight is made dense, with a warning that names leaf and operation.
    Differentiable in `packed.values`; works inside jit, grad, scan and vmap over the batch.

    Args:
      apply: any JAX function of weights and inputs: a linen `model.apply`, a function that merges an NNX state, an
        Equinox model's call, a bare function. Traced on every call, so jit what uses the result.
      batch: for jit over several devices: the sharding of the inputs, such as
        `NamedSharding(mesh, PartitionSpec("data"))`; the weights are replicated. Every product is then split over these
        devices along the first axis of its rows, and the gradients of the values are summed; if that axis does not
        divide, each device computes the whole product. Weights in slabs (`sharding` of `packed_training`) are also
        divided over their own axis of the mesh. The compiler cannot split a kernel by itself: without this,
        every device computes every product. Not needed inside `shard_map` or `pmap`, where each device calls the
        function on its own part.

    Returns:
      `run(*args, **kwargs)`: arguments as for `apply`, with one `Packed` or more in them, at any depth; numbers and
      strings stay static, as in a call that is not jitted. Without any it raises an error: dense params would be
      multiplied as they are, with all their zeros.

    >>> from rigl_jax.execution import pack
    >>> packed = pack({"w": jnp.eye(3)}, {"w": jnp.eye(3, dtype=bool)})
    >>> run_packed(lambda params, x: x @ params["w"])(packed, jnp.arange(3.0)[None]).tolist()
    [[0.0, 1.0, 2.0]]
    """
    checks.functions("run_packed", apply=apply)
    spec = tuple(batch.spec) if isinstance(batch, NamedSharding) else ()
    if batch is not None and (not spec or not isinstance(spec[0], str) or any(spec[1:])):
        raise ValueError(
            "run_packed: batch must be the NamedSharding of inputs whose first axis is split over one mesh axis, "
            f"say NamedSharding(mesh, PartitionSpec('data')), got {shown(batch)}"
        )
    context = Context(batch=None if batch is None else NamedSharding(batch.mesh, PartitionSpec(spec[0])))

    @functools.wraps(apply)
    def run(*args: Any, **kwargs: Any) -> Any:
        if not any(map(_is_packed, jax.tree.leaves((args, kwargs), is_leaf=_is_packed))):
            raise ValueError(
                "run_packed: expected packed weights, rx.pack(params, masks), among the arguments, got none; "
                "for dense params call the function itself"
            )
        return run_with(context, apply, *args, **kwargs)

    return run


def run_with(context: Context, apply: Callable[..., Any], /, *args: Any, **kwargs: Any) -> Any:
    """`run_packed(apply)(*args, **kwargs)` in a context."""
    opened = jax.tree.map(_open, (args, kwargs), is_leaf=_is_packed)
    leaves, treedef = jax.tree.flatten(opened, is_leaf=_is_weight)
    moving = [i for i, leaf in enumerate(leaves) if _is_weight(leaf) or _is_array(leaf)]

    def flat(*arrays: Any) -> Any:
        filled = list(leaves)
        for i, array in zip(moving, arrays, strict=True):
            filled[i] = array
        args, kwargs = jax.tree.unflatten(treedef, filled)
        return apply(*args, **kwargs)

    given = [leaves[i] for i in moving]
    shapes = [jax.ShapeDtypeStruct(x.shape, x.dtype) if _is_weight(x) else x for x in given]
    closed, out = jax.make_jaxpr(flat, return_shape=True)(*shapes)
    results = Walker(RULES, _materialise, lambda value, aval: value, context, _without_weights)(closed, given)
    return jax.tree.unflatten(jax.tree.structure(out), [_as_array(x, "the output") for x in results])


def _open(x: Any) -> Any:
    """The params of a `Packed`, with a `Weight` for each packed leaf."""
    if not _is_packed(x):
        return x

    def one(name: str, values: Array, pattern: Any) -> Any:
        if pattern is None:
            return values
        if isinstance(pattern, Whole):
            return jnp.where(pattern.mask, values, jnp.zeros((), values.dtype))
        return Weight(values, pattern, name)

    return jax.tree.map(one, trees.names(x.values), x.values, x.patterns)


def _is_packed(x: Any) -> bool:
    return isinstance(x, Packed)


def _is_weight(x: Any) -> bool:
    return isinstance(x, Weight)


def _is_array(x: Any) -> bool:
    return hasattr(x, "shape") and hasattr(x, "dtype")


def _without_weights(eqn: Any, operands: Sequence[Any]) -> list[Any] | None:
    return None if any(map(_is_weight, operands)) else primitives.bind(eqn, operands)


def _materialise(walker: Walker, eqn: Any, operands: Sequence[Any]) -> list[Any]:
    """Makes packed operands dense for a primitive that no sparse kernel takes; `_as_array` warns."""
    del walker
    return primitives.bind(eqn, [_as_array(x, eqn.primitive.name) for x in operands])


def _as_array(x: Any, where: str) -> Any:
    if not _is_weight(x):
        return x
    warnings.warn(
        f"run_packed: leaf {x.name!r} meets {where} in a form that no sparse kernel takes: it is made dense there",
        stacklevel=2,
    )
    return x.dense()


# --- rules -------------------------------------------------------------------------------------------------------


def _dot_general(walker: Walker, eqn: Any, operands: Sequence[Any]) -> list[Any]:
    dot = geometry.dot(eqn)
    side = 1 if _is_weight(operands[1]) else 0
    weight, x = operands[side], operands[1 - side]
    if stacks.is_stack(weight) and not _is_weight(x):
        _refuse_observer(walker.context, operands, "vmap")
        y = stacks.product(walker, dot, side, weight, x)
        return _materialise(walker, eqn, operands) if y is None else [y.astype(eqn.outvars[0].aval.dtype)]
    pairs = sorted(zip(dot.summed[side], dot.summed[1 - side], strict=True))
    own, others = [i for i, _ in pairs], [i for _, i in pairs]
    groups = list(range(weight.first)), list(range(weight.first, len(weight.shape)))
    if not weight.first or own not in groups or dot.batch[0] or _is_weight(x):
        return _materialise(walker, eqn, operands)
    ends = range(-len(own), 0)
    rows = jnp.moveaxis(x, others, ends)
    lead = rows.shape[: x.ndim - len(own)]
    rows = rows.reshape(*lead, math.prod(rows.shape[len(lead) :]))
    y = _product(weight, rows, (own == groups[1]) != weight.flipped, walker.context)
    y = y.reshape(*lead, *(weight.shape[i] for i in dot.free[side]))
    if side == 0:  # dot_general puts the free axes of its left operand first
        y = jnp.moveaxis(y, range(len(lead), y.ndim), range(len(dot.free[side])))
    return [y.astype(eqn.outvars[0].aval.dtype)]


def _product(weight: Weight, rows: Array, transpose: bool, context: Context) -> Array:
    """rows[..., in] @ W, or rows[..., out] @ W.T."""
    product = functools.partial(kernels.matmul, transpose=transpose)
    y = over(context.batch, product, rows, weight, cut=(transpose, not transpose))
    return y if context.observe is None else context.observe(dataclasses.replace(weight, flipped=transpose), rows, y)


def _conv(walker: Walker, eqn: Any, operands: Sequence[Any]) -> list[Any]:
    (x, weight), conv, given = operands, geometry.conv(eqn), eqn.params
    kernel = (*conv.kernel[2:], conv.kernel[1], conv.kernel[0])
    served = (
        not _is_weight(x)
        and not weight.flipped
        and weight.order == kernel
        and given["batch_group_count"] == 1
        and all(min(pair) >= 0 for pair in given["padding"])
    )
    if not served:
        return _materialise(walker, eqn, operands)
    data, out = ((spec[0], *spec[2:], spec[1]) for spec in (conv.data, conv.out))  # channels last
    convolve = _conv_1d if len(kernel) == 3 else _conv_nd
    y = convolve(walker.context, given, kernels.folded.spread(x.transpose(data), given["lhs_dilation"]), weight)
    if y is None:
        return _materialise(walker, eqn, operands)
    return [y.transpose(np.argsort(out)).astype(eqn.outvars[0].aval.dtype)]


def _conv_1d(context: Context, given: Any, x: Array, weight: Weight) -> Array | None:
    """A product with the windows of x; None: there is none for this form of the weight."""
    pattern = weight.pattern
    sizes = tuple(weight.shape[axis] for axis in weight.order)
    folded = isinstance(pattern, (kernels.Folded, kernels.Moved))
    if not folded or pattern.matrix.shape != kernels.as_matrix(sizes, 2):
        return None
    (stride,), (dilation,), (padding,) = (given[name] for name in ("window_strides", "rhs_dilation", "padding"))
    groups = given["feature_group_count"]
    rows = kernels.folded.windows(x, sizes[0], stride=stride, padding=padding, dilation=dilation, groups=groups)
    if groups == 1:
        return _product(weight, rows, False, context)
    image = dataclasses.replace(weight, pattern=kernels.slabs.as_kernel(pattern.matrix))
    y = _convolved(context, groups, rows[:, None], image)
    return None if y is None else y[:, 0]


def _convolved(context: Context, groups: int, x: Array, weight: Weight, **options: Any) -> Array | None:
    """The sparse convolution, of its slabs too; None: there is none for this form of the weight and these groups."""
    slabs, one = kernels.slabs.parted(weight.pattern)
    whole = groups == 1 or groups % slabs == 0  # groups in each slab
    if not isinstance(one, kernels.Pattern) or one.height > 1 or not whole:
        return None
    if groups > 1:
        _refuse_observer(context, [weight], "convolution in groups")
    product = functools.partial(kernels.conv, **options, groups=max(1, groups // slabs))
    return over(context.batch, product, x, weight, cut=(groups > 1, True))


def _conv_nd(context: Context, given: Any, x: Array, weight: Weight) -> Array | None:
    """A convolution of images with two or three axes; None as above."""
    pattern = weight.pattern.matrix if isinstance(weight.pattern, kernels.Moved) else weight.pattern
    weight = dataclasses.replace(weight, pattern=pattern)
    strides, padding, dilation = (tuple(given[name]) for name in ("window_strides", "padding", "rhs_dilation"))
    y = _convolved(
        context, given["feature_group_count"], x, weight, strides=strides, padding=padding, dilation=dilation
    )
    if y is None or context.observe is None:
        return y
    return context.observe(weight, conv_patches(x, weight.pattern, strides, padding, dilation), y)


def _cast(walker: Walker, eqn: Any, operands: Sequence[Any]) -> list[Any]:
    del walker
    (weight,) = operands
    return [dataclasses.replace(weight, values=weight.values.astype(eqn.params["new_dtype"]))]


def _transpose(walker: Walker, eqn: Any, operands: Sequence[Any]) -> list[Any]:
    (weight,) = operands
    n, first = len(weight.shape), weight.first
    if not first or geometry.moved(eqn) != (*range(first, n), *range(first)):
        return _materialise(walker, eqn, operands)
    return [dataclasses.replace(weight, flipped=not weight.flipped)]


def _checkpoint(walker: Walker, eqn: Any, operands: Sequence[Any]) -> list[Any]:
    (closed,) = primitives.held(eqn)
    if walker.context.observe is not None:  # observed tracers must not leave a checkpoint
        return walker(closed, operands)

    def body(*operands: Any) -> list[Any]:
        return [_as_array(x, "the end of a checkpoint") for x in walker(closed, operands)]

    given = eqn.params
    return jax.checkpoint(body, prevent_cse=given["prevent_cse"], policy=given["policy"])(*operands)


def _scan(walker: Walker, eqn: Any, operands: Sequence[Any]) -> list[Any]:
    _refuse_observer(walker.context, operands, "scan")
    given, (inside, constants, carried) = eqn.params, primitives.scan(eqn)
    consts, rest = operands[:constants], operands[constants:]
    start = [_as_array(x, "the carry of a scan") for x in rest[:carried]]
    scanned = [
        stacks.in_layers(x) if stacks.is_stack(x) else _as_array(x, "the stacked inputs of a scan")
        for x in rest[carried:]
    ]

    def body(carry: Any, xs: Any) -> Any:
        out = [_as_array(x, "the end of a scan") for x in walker(inside, [*consts, *carry, *xs])]
        return out[:carried], out[carried:]

    carry, ys = jax.lax.scan(body, start, scanned, given["length"], given["reverse"], unroll=given["unroll"])
    return [*carry, *ys]


def _cond(walker: Walker, eqn: Any, operands: Sequence[Any]) -> list[Any]:
    _refuse_observer(walker.context, operands, "cond")
    index, *rest = operands

    def branch(closed: Any) -> Callable[..., Any]:
        return lambda *xs: [_as_array(x, "the end of a cond") for x in walker(closed, xs)]

    return jax.lax.switch(index, [branch(closed) for closed in primitives.branches(eqn)], *rest)


def _while(walker: Walker, eqn: Any, operands: Sequence[Any]) -> list[Any]:
    _refuse_observer(walker.context, operands, "while_loop")
    condition, inside, first, second = primitives.while_loop(eqn)
    of_cond, of_body = operands[:first], operands[first : first + second]
    start = [_as_array(x, "the carry of a while_loop") for x in operands[first + second :]]

    def body(carry: Any) -> list[Any]:
        return [_as_array(x, "a while_loop") for x in walker(inside, [*of_body, *carry])]

    return jax.lax.while_loop(lambda c: walker(condition, [*of_cond, *c])[0], body, start)


def _refuse_observer(context: Context, operands: Sequence[Any], where: str) -> None:
    if context.observe is not None:
        name = next(x.name for x in operands if _is_weight(x))
        raise ValueError(f"streamed growth: leaf {name!r} is used inside a {where}, where its products cannot be seen")


RULES: dict[str, Rule] = {
    "dot_general": _dot_general,
    "conv_general_dilated": _conv,
    "convert_element_type": _cast,
    "transpose": _transpose,
    **dict.fromkeys(primitives.CUSTOM, _materialise),  # walked, it would lose its derivatives
    "remat2": _checkpoint,
    "scan": _scan,
    "cond": _cond,
    "while": _while,
}
"""The results of a primitive with packed weights (`Weight`) among its operands, which do not become dense."""
