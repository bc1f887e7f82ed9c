"""Multiply-accumulates (MACs) of any model, counted on its jaxpr and charged to the weights that do them.

Nothing runs: the model is traced with abstract values, and every matrix product and convolution found on the way is
written down as a `Product`. One MAC is one multiplication and one addition, so two FLOPs.

What a product costs: the elements it writes times the terms summed into each of them. Positions that a convolution
reads from its padding count (the usual convention); the zeros that a transposed convolution inserts do not.
Elementwise work, reductions, gathers and opaque calls (FFI) cost nothing here.

Whom it is charged to: a weight stays itself through any operation whose other operands are constants (casts, slices,
a mask multiplied in); a concatenation belongs to its parts by size; a product of two weights (weight normalisation) to
the larger one; any other mix of weights to nobody. What is mixed with data is data. Hence pass data as `inputs`, and
close over what is a constant of the model, masks above all.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.extend.core as jex
import numpy as np

from rigl_jax import checks, trees
from rigl_jax.base import Masks, PyTree, Shape
from rigl_jax.messages import shown
from rigl_jax.tables import table
from rigl_jax.tracing import primitives

Origin = dict[str, float] | None
"""Where a value comes from: `{leaf name: share of it}`, `{}` for a constant, None for anything computed from data."""


class Product(NamedTuple):
    """A matrix product or convolution, or a leaf's share of one.

    Attributes:
      name: the parameter leaf that does the work; None where no operand is a weight (attention scores).
      macs: its dense multiply-accumulates, over all trips of the loops around it.
      outputs: the elements it writes, over the same trips.
    """

    name: str | None
    macs: float
    outputs: float


class Flops(NamedTuple):
    """What one call of a model costs. All counts are MACs of the whole call: divide by the batch you traced with.

    Attributes:
      products: every product in the order of execution.
      density: fraction of active weights for every parameter leaf; 1 where no mask was given. For the cost at densities
        that are planned but not yet masks: `flops._replace(density={**flops.density, name: 0.1})`.
    """

    products: tuple[Product, ...]
    density: dict[str, float]

    @property
    def macs(self) -> dict[str, float]:
        """Dense MACs of every leaf; 0 for those that no product reads (biases, looked-up embeddings)."""
        total = dict.fromkeys(self.density, 0.0)
        for product in self.products:
            if product.name is not None:
                total[product.name] += product.macs
        return total

    @property
    def sparse_macs(self) -> dict[str, float]:
        """MACs of every leaf when only its active weights work."""
        return {name: macs * self.density[name] for name, macs in self.macs.items()}

    @property
    def other(self) -> float:
        """MACs of products without a weight, such as attention scores; always dense."""
        return math.fsum(product.macs for product in self.products if product.name is None)

    @property
    def total(self) -> float:
        """All MACs, sparse where there are masks."""
        return math.fsum(self.sparse_macs.values()) + self.other

    @property
    def dense_total(self) -> float:
        """All MACs of the same model without masks."""
        return math.fsum(self.macs.values()) + self.other

    def __str__(self) -> str:
        """A table of the leaves that do work: dense MACs, density, sparse MACs."""
        sparse = self.sparse_macs
        lines = [(n, f"{m:,.0f}", f"{self.density[n]:.4f}", f"{sparse[n]:,.0f}") for n, m in self.macs.items() if m]
        if self.other:
            lines.append(("products without a weight", f"{self.other:,.0f}", "", f"{self.other:,.0f}"))
        total = ("total", f"{self.dense_total:,.0f}", "", f"{self.total:,.0f}")
        return table([("leaf", "dense MACs", "density", "sparse MACs"), *lines, total], words=1)


def flops(
    apply: Callable[..., Any],
    params: PyTree,
    *inputs: Any,
    masks: Masks | None = None,
    while_trips: int | None = None,
) -> Flops:
    """Counts the multiply-accumulates of `apply(params, *inputs)` without running it.

    Works through jit, scan (every trip counts), cond (the most expensive branch counts), remat, custom derivatives,
    vmap, shard_map and pmap (the work of all devices, repeated work included). What is traced is counted, even if its
    result is never used.

    Args:
      apply: the model, or any other function of the params: `jax.grad(loss)` counts a backward pass as well.
      params: tree of arrays or `jax.ShapeDtypeStruct`.
      *inputs: further arguments, arrays or `jax.ShapeDtypeStruct`; Python options are closed over.
      masks: tree parallel to params, `bool[*shape]` or None (dense) for a leaf. None: everything is dense.
      while_trips: how often the body of a `while_loop` is taken to run. A trace cannot tell.

    Raises:
      ValueError: masks do not fit the params; products inside a `while_loop` and no `while_trips`; products inside a
        primitive that this walk does not know (a Pallas kernel).

    Example:
      >>> import jax, jax.numpy as jnp
      >>> weights = {"w": jnp.ones((4, 3))}
      >>> cost = flops(lambda p, x: x @ p["w"], weights, jax.ShapeDtypeStruct((2, 4), jnp.float32))
      >>> cost.macs
      {'w': 24.0}
      >>> print(cost)
      leaf   dense MACs  density  sparse MACs
      w              24   1.0000           24
      total          24                    24
    """
    checks.functions("flops", apply=apply)
    if while_trips is not None and not checks.is_whole(while_trips):
        raise ValueError(f"flops: while_trips must be a whole number, 0 or more, got {shown(while_trips)}")
    leaves = trees.named_leaves(params)
    density = dict.fromkeys(leaves, 1.0) | ({} if masks is None else _densities(params, leaves, masks))
    jaxpr = jax.make_jaxpr(apply)(params, *inputs).jaxpr
    owned: list[Origin] = [{name: 1.0} for name in leaves]
    data = [None] * (len(jaxpr.invars) - len(owned))
    sizes = {name: math.prod(np.shape(leaf)) for name, leaf in leaves.items()}
    _, products = _walk(jaxpr, owned + data, _Context(sizes, while_trips))
    return Flops(tuple(products), density)


_Walked = tuple[list[Origin], list[Product]]  # origins of the outputs, and the products on the way


class _Context(NamedTuple):
    sizes: dict[str, int]  # of the parameter leaves
    while_trips: int | None


def _densities(params: PyTree, leaves: Mapping[str, Any], masks: Masks) -> dict[str, float]:
    """Measured density of every masked leaf."""
    masks = checks.masks("flops", masks, params)
    parallel = zip(leaves, jax.tree.structure(params).flatten_up_to(masks), strict=True)
    return {name: np.count_nonzero(mask) / max(1, np.size(mask)) for name, mask in parallel if mask is not None}


def _walk(jaxpr: Any, origins: Sequence[Origin], context: _Context) -> _Walked:
    """Origins of the outputs of an (open) jaxpr, given those of its inputs, and its products."""
    known = dict(zip(jaxpr.invars, origins, strict=True))

    def origin(atom: Any) -> Origin:
        return {} if isinstance(atom, jex.Literal) else known.get(atom, {})  # what is not an input is a constant

    products = []
    for equation in jaxpr.eqns:
        outs, found = _equation(equation, [origin(atom) for atom in equation.invars], context)
        known.update(zip(equation.outvars, outs, strict=True))
        products += found
    return [origin(atom) for atom in jaxpr.outvars], products


def _equation(equation: Any, ins: list[Origin], context: _Context) -> _Walked:
    name, params = equation.primitive.name, equation.params
    if name in _TERMS:
        outputs = math.prod(equation.outvars[0].aval.shape)
        shapes = [atom.aval.shape for atom in equation.invars]
        return [None], _charge(ins[:2], outputs * _TERMS[name](shapes, params), outputs, context)
    if name == "scan":
        body, consts, carry = primitives.scan(equation)
        outs, found = _loop(body.jaxpr, ins, consts, carry, context)
        return outs, _repeat(found, params["length"])
    if name == "while":
        return _while(equation, ins, context)
    if name == "cond":
        branches = [_walk(branch.jaxpr, ins[1:], context) for branch in primitives.branches(equation)]
        outs = [_join(list(outs)) for outs in zip(*(outs for outs, _ in branches), strict=True)]
        return outs, max((found for _, found in branches), key=lambda found: sum(p.macs for p in found))
    if name == "optimization_barrier":  # output i is input i
        return ins, []
    inner = [held.jaxpr for held in primitives.held(equation)]
    arity = len(ins), len(equation.outvars)
    if len(inner) == 1 and (len(inner[0].invars), len(inner[0].outvars)) == arity:  # a call
        outs, found = _walk(inner[0], ins, context)
        devices = math.prod(params["mesh"].shape[axis] for axis in params.get("newly_manual_axes", ()))
        return outs, _repeat(found, devices)  # the body of shard_map is the work of one device
    if any(_has_products(jaxpr) for jaxpr in inner):
        raise ValueError(f"flops: expected primitives that can be counted, got products inside {name!r}")
    return [_merge(equation, ins, context)] * len(equation.outvars), []


def _while(equation: Any, ins: list[Origin], context: _Context) -> _Walked:
    """The body and the condition, `while_trips` times each."""
    condition, body, tests, consts = primitives.while_loop(equation)
    outs, found = _loop(body.jaxpr, ins[tests:], consts, len(ins) - tests - consts, context)
    found = _walk(condition.jaxpr, ins[:tests] + outs, context)[1] + found
    if found and context.while_trips is None:
        owners = ", ".join(sorted({repr(product.name) for product in found}))
        raise ValueError(
            "flops: a trace cannot tell how often a while_loop runs: expected while_trips=... (or a scan), got None; "
            f"the loop holds products of {owners}"
        )
    return outs, _repeat(found, context.while_trips or 0)


def _loop(body: Any, ins: list[Origin], n_consts: int, n_carry: int, context: _Context) -> _Walked:
    """One trip of a loop, with the origins that its carry has after any number of trips."""
    consts, carry, scanned = ins[:n_consts], ins[n_consts : n_consts + n_carry], ins[n_consts + n_carry :]
    while True:  # ends: constant -> leaf -> data is the longest way a carry can go
        outs, found = _walk(body, consts + carry + scanned, context)
        widened = [_join([before, after]) for before, after in zip(carry, outs, strict=False)]
        if widened == carry:
            return carry + outs[n_carry:], found
        carry = widened


def _join(origins: list[Origin]) -> Origin:
    """Origin of a value that is computed from, or may be any of, several; constants do not matter."""
    owners = [origin for origin in origins if origin != {}]
    return next(iter(owners), {}) if all(owner == owners[0] for owner in owners) else None


def _merge(equation: Any, ins: list[Origin], context: _Context) -> Origin:
    """Origin of the result of an operation that is not a product."""
    if None in ins:
        return None
    if equation.primitive.name in ("mul", "div"):  # zeros of a factor are zeros of the result
        return _largest(ins, context)
    if equation.primitive.name not in ("concatenate", "stack"):
        return _join(ins)
    parts: dict[str, float] = {}
    whole = max(1, math.prod(equation.outvars[0].aval.shape))
    for atom, origin in zip(equation.invars, ins, strict=True):
        for name, share in (origin or {}).items():
            parts[name] = parts.get(name, 0.0) + share * math.prod(atom.aval.shape) / whole
    return parts


def _largest(ins: Sequence[Origin], context: _Context) -> dict[str, float]:
    """The owner with the most weights; of equals the last: in `x @ w` it is the right one."""
    owners = [origin for origin in reversed(ins) if origin]
    return max(owners, key=lambda owner: sum(context.sizes[name] for name in owner), default={})


def _charge(ins: Sequence[Origin], macs: float, outputs: int, context: _Context) -> list[Product]:
    """A product, shared out among the leaves that own its weight operand."""
    shares: dict[str | None, float] = {**_largest(ins, context)}
    rest = 1.0 - math.fsum(shares.values())
    if rest > 1e-9:
        shares[None] = rest
    return [Product(name, share * macs, share * outputs) for name, share in shares.items()]


def _repeat(products: list[Product], trips: int) -> list[Product]:
    return [Product(name, trips * macs, trips * outputs) for name, macs, outputs in products if trips]


def _dot_terms(shapes: Sequence[Shape], params: Mapping[str, Any]) -> float:
    """Terms summed into one output."""
    ragged = params.get("ragged_dot_dimension_numbers")
    (contracted, _), _ = ragged.dot_dimension_numbers if ragged else params["dimension_numbers"]
    terms = math.prod(shapes[0][axis] for axis in contracted)
    if ragged and set(ragged.lhs_ragged_dimensions) & set(contracted):  # a weight gradient: a group sums its own part
        return terms / shapes[2][-1]
    return terms


def _convolution_terms(shapes: Sequence[Shape], params: Mapping[str, Any]) -> float:
    _, *summed = params["dimension_numbers"].rhs_spec  # output channels, input channels of one group, window
    return math.prod(shapes[1][axis] for axis in summed) / math.prod(params["lhs_dilation"])


_TERMS = {"dot_general": _dot_terms, "ragged_dot_general": _dot_terms, "conv_general_dilated": _convolution_terms}


def _has_products(jaxpr: Any) -> bool:
    return any(
        equation.primitive.name in _TERMS or any(_has_products(held.jaxpr) for held in primitives.held(equation))
        for equation in jaxpr.eqns
    )
