"""One JAX primitive made of three products, which makes a kernel differentiable, batchable and portable.

A sparse layer y = f(x, values) is linear in x and linear in values, and so are its two gradients:

    forward(x, values) -> y        input_gradient(dy, values) -> dx        values_gradient(x, dy) -> dvalues

Each is the transpose of another, so derivatives of any order, forward and reverse, need only these three. Therefore
this is a primitive and not a `jax.custom_vjp`: forward mode and Hessian-vector products work, a gradient that is not
used is not computed, and `vmap` over the batch becomes one call *before* it is differentiated (under custom_vjp the
gradient of the values would be computed for each example and then summed).
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Hashable
from typing import Any, Literal, NamedTuple

import jax
from jax.extend.core import Primitive
from jax.interpreters import ad, batching, mlir

Array = jax.Array
Kind = Literal["forward", "input_gradient", "values_gradient"]
Run = Callable[[Kind, Array, Array, Any, Any], Array]
"""`(kind, a, b, pattern, options) -> result`; (a, b) as in the products above."""
Shape = Callable[[Kind, tuple[int, ...], tuple[int, ...], Any, Any], tuple[int, ...]]
"""The shape of the result, from the shapes of a and b."""

# For each kind of product, with ct the cotangent of its result: the product that gives the cotangent of operand a (or
# of operand b), and the order of its arguments.
_OF_A: dict[Kind, tuple[Kind, Callable[[Array, Array], tuple[Array, Array]]]] = {
    "forward": ("input_gradient", lambda ct, values: (ct, values)),
    "input_gradient": ("forward", lambda ct, values: (ct, values)),
    "values_gradient": ("input_gradient", lambda ct, dy: (dy, ct)),
}
_OF_B: dict[Kind, tuple[Kind, Callable[[Array, Array], tuple[Array, Array]]]] = {
    "forward": ("values_gradient", lambda ct, x: (x, ct)),
    "input_gradient": ("values_gradient", lambda ct, dy: (ct, dy)),
    "values_gradient": ("forward", lambda ct, x: (x, ct)),
}


class Bilinear(NamedTuple):
    """A bilinear sparse operation, made by `bilinear`. Call `product(x, values, pattern, options)`."""

    primitive: Primitive

    def __call__(self, x: Array, values: Array, pattern: Any, options: Hashable) -> Array:
        """Y = f(x, values). x and values have one floating dtype; the result has it too."""
        return _bind(self.primitive, "forward", x, values, pattern, options)

    def lowered_by(self, run: Run, platform: str) -> None:
        """From now on the products run so on that platform."""
        mlir.register_lowering(self.primitive, _lowered(run), platform=platform)

    def transposed(self, x: Array, values: Array, pattern: Any, options: Hashable) -> Array:
        """The product with the transposed weight, which is also the gradient of the input."""
        return _bind(self.primitive, "input_gradient", x, values, pattern, options)


def bilinear(name: str, shape: Shape, run: Run, run_cpu: Run) -> Bilinear:
    """Makes the primitive. `run` is for every platform but the CPU; the batch is axis 0 of x and of y."""
    primitive = Primitive(name)

    @functools.cache
    def compiled(kind: Kind, treedef: Any, options: Hashable) -> Callable[..., Array]:
        return jax.jit(functools.partial(primitive.bind, kind=kind, treedef=treedef, options=options))

    def abstract(a: Any, b: Any, *leaves: Any, kind: Kind, treedef: Any, options: Hashable) -> Any:
        pattern = jax.tree.unflatten(treedef, leaves)
        return a.update(shape=shape(kind, a.shape, b.shape, pattern, options), weak_type=False)

    def run_eagerly(*operands: Array, **params: Any) -> Array:
        with jax.disable_jit(False):  # like primitives of JAX, which always run through jit
            return compiled(**params)(*operands)

    primitive.def_impl(run_eagerly)
    primitive.def_abstract_eval(abstract)
    mlir.register_lowering(primitive, _lowered(run))
    mlir.register_lowering(primitive, _lowered(run_cpu), platform="cpu")
    ad.primitive_jvps[primitive] = functools.partial(_jvp, primitive)
    ad.primitive_transposes[primitive] = functools.partial(_transpose, primitive)
    batching.primitive_batchers[primitive] = functools.partial(_batch, primitive)
    return Bilinear(primitive)


def _lowered(run: Run) -> Any:
    def call(a: Array, b: Array, *leaves: Array, kind: Kind, treedef: Any, options: Hashable) -> Array:
        return run(kind, a, b, jax.tree.unflatten(treedef, leaves), options)

    return mlir.lower_fun(call, multiple_results=False)


def _bind(primitive: Primitive, kind: Kind, a: Array, b: Array, pattern: Any, options: Hashable) -> Array:
    leaves, treedef = jax.tree.flatten(pattern)
    return primitive.bind(*varying_alike(a, b, *leaves), kind=kind, treedef=treedef, options=options)


def varying_alike(*operands: Array) -> list[Array]:
    """Marks replicated operands inside shard_map as varying, so that their gradients are summed over devices."""
    names = [_axes_of(x) for x in operands]
    union = frozenset().union(*names)
    pairs = zip(operands, names, strict=True)
    return [jax.lax.pcast(x, tuple(union - own), to="varying") if union - own else x for x, own in pairs]


def _axes_of(x: Array) -> frozenset[str]:
    """The mesh axes that x varies over; JAX 0.10.2 moved the attribute that holds them."""
    aval = jax.typeof(x)
    return getattr(getattr(aval, "mat", aval), "varying", getattr(aval, "vma", frozenset()))


def _jvp(primitive: Primitive, primals: Any, tangents: Any, **params: Any) -> tuple[Any, Any]:
    a, b, *leaves = primals
    bind = functools.partial(primitive.bind, **params)
    out = bind(a, b, *leaves)
    terms = [bind(t, b, *leaves) for t in tangents[:1] if not isinstance(t, ad.Zero)]
    terms += [bind(a, t, *leaves) for t in tangents[1:2] if not isinstance(t, ad.Zero)]
    tangent = functools.reduce(ad.add_jaxvals, terms) if terms else ad.Zero(jax.typeof(out).to_tangent_aval())
    return out, tangent


def _transpose(primitive: Primitive, ct: Any, a: Any, b: Any, *leaves: Any, kind: Kind, **params: Any) -> list[Any]:
    in_a = ad.is_undefined_primal(a)
    other, (then, order) = (b, _OF_A[kind]) if in_a else (a, _OF_B[kind])
    if isinstance(ct, ad.Zero):
        result = ad.Zero((a if in_a else b).aval)
    else:
        result = primitive.bind(*order(ct, other), *leaves, kind=then, **params)
    return [*((result, None) if in_a else (None, result)), *[None] * len(leaves)]


def _batch(primitive: Primitive, operands: Any, axes: Any, *, kind: Kind, **params: Any) -> tuple[Array, int]:
    bind = functools.partial(primitive.bind, kind=kind, **params)
    a, *rest = operands
    if kind != "values_gradient" and all(axis is None for axis in axes[1:]):
        folded = jax.numpy.moveaxis(a, axes[0], 0)
        out = bind(folded.reshape(-1, *folded.shape[2:]), *rest)
        return out.reshape(*folded.shape[:2], *out.shape[1:]), 0
    moved = [x if axis is None else jax.numpy.moveaxis(x, axis, 0) for x, axis in zip(operands, axes, strict=True)]
    mapped = tuple(x for x, axis in zip(moved, axes, strict=True) if axis is not None)

    def one(slices: tuple[Array, ...]) -> Array:
        own = iter(slices)
        return bind(*[x if axis is None else next(own) for x, axis in zip(moved, axes, strict=True)])

    return jax.lax.map(one, mapped), 0
