"""Multiply-accumulates (MACs) of any model, counted from its jaxpr and assigned to the weights.

The model is traced with abstract values and not run. Every matrix product and convolution is recorded as a `Product`.
One MAC is one multiplication and one addition, so two FLOPs.

The cost of a product is the number of elements it writes times the terms summed into each of them. Positions that a
convolution reads from its padding count (the usual convention); the zeros that a transposed convolution inserts do not.
Elementwise operations, reductions, gathers and opaque calls (FFI) count as free.

A product is assigned to a weight as follows. A value that is computed from one weight and constants (casts, slices, a
multiplied mask) belongs to this weight. A concatenation belongs to its parts, by size. A product of two weights (weight
normalisation) belongs to the larger one. Any other combination of weights belongs to none. A combination with data is
data. Therefore pass data as `inputs`, and close over the constants of the model, masks in particular.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import numpy as np

from rigl_jax import checks, trees
from rigl_jax.base import Masks, PyTree
from rigl_jax.messages import shown
from rigl_jax.tables import html_table, table
from rigl_jax.tracing import geometry, primitives
from rigl_jax.tracing.walk import Rule, Walker

Origin = dict[str, float] | None
"""Where a value comes from: `{leaf name: share of it}`, `{}` for a constant, None for anything computed from data."""


class Product(NamedTuple):
    """A matrix product or convolution, or a leaf's share of one.

    Attributes:
      name: the parameter leaf of the product; None if no operand is a weight (attention scores).
      macs: its dense multiply-accumulates, over all trips of the loops around it.
      outputs: the elements it writes, over the same trips.
    """

    name: str | None
    macs: float
    outputs: float


class Flops(NamedTuple):
    """The cost of one call of a model. All counts are MACs of the whole call: divide by the size of the traced batch.

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
        """MACs of every leaf for its active weights only."""
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
        """A table of the leaves that have MACs: dense MACs, density, sparse MACs; MACs of the whole traced batch."""
        return table(self._cells(), words=1)

    def _repr_html_(self) -> str:
        return html_table(self._cells(), words=1)

    def _cells(self) -> list[tuple[str, ...]]:
        sparse = self.sparse_macs
        lines = [(n, f"{m:,.0f}", f"{self.density[n]:.4f}", f"{sparse[n]:,.0f}") for n, m in self.macs.items() if m]
        if self.other:
            lines.append(("products without a weight", f"{self.other:,.0f}", "", f"{self.other:,.0f}"))
        total = ("total", f"{self.dense_total:,.0f}", "", f"{self.total:,.0f}")
        return [("leaf", "dense MACs", "density", "sparse MACs"), *lines, total]


def flops(
    apply: Callable[..., Any],
    params: PyTree,
    *inputs: Any,
    masks: Masks | None = None,
    while_trips: int | None = None,
) -> Flops:
    """Counts the multiply-accumulates of `apply(params, *inputs)`, all examples together, without running it.

    For the cost of one example trace a batch of one, or divide by the size of the batch.

    Works through jit, scan (every trip counts), cond (the most expensive branch counts), remat, custom derivatives,
    vmap, shard_map and pmap (the work of all devices, repeated work included). Everything that is traced is
    counted, even if its result is not used.

    Args:
      apply: the model, or any other function of the params: `jax.grad(loss)` counts a backward pass as well.
      params: tree of arrays or `jax.ShapeDtypeStruct`.
      *inputs: further arguments, arrays or `jax.ShapeDtypeStruct`; Python options are closed over.
      masks: tree parallel to params, `bool[*shape]` or None (dense) for a leaf. None: everything is dense.
      while_trips: the assumed number of iterations of a `while_loop`, which a trace does not contain.

    Raises:
      ValueError: masks do not fit the params; products inside a `while_loop` and no `while_trips`; products inside a
        primitive that has no rule (a Pallas kernel).

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
    program = jax.make_jaxpr(apply)(params, *inputs)
    owned: list[Origin] = [{name: 1.0} for name in leaves]
    data = [None] * (len(program.jaxpr.invars) - len(owned))
    sizes = {name: math.prod(np.shape(leaf)) for name, leaf in leaves.items()}
    counted = _Counted(sizes, while_trips, [])
    Walker(RULES, _other, lambda *_: {}, counted)(program, owned + data)
    return Flops(tuple(counted.products), density)


class _Counted(NamedTuple):
    """The context of the rules."""

    sizes: dict[str, int]  # of the parameter leaves
    while_trips: int | None
    products: list[Product]


def _densities(params: PyTree, leaves: Mapping[str, Any], masks: Masks) -> dict[str, float]:
    """Measured density of every masked leaf."""
    masks = checks.masks("flops", masks, params)
    parallel = zip(leaves, jax.tree.structure(params).flatten_up_to(masks), strict=True)
    return {name: np.count_nonzero(mask) / max(1, np.size(mask)) for name, mask in parallel if mask is not None}


# --- products ------------------------------------------------------------------------------------------------------


def charge(walker: Walker, operands: Sequence[Origin], macs: float, outputs: float) -> None:
    """Counts a product, divided among the leaves that its weight operand belongs to. The rule of a primitive that
    multiplies calls it, as in `RULES["mine"] = lambda walker, eqn, ins: [charge(walker, ins, macs, outputs)]`.
    """
    shares: dict[str | None, float] = {**_largest(operands, walker.context)}
    rest = 1.0 - math.fsum(shares.values())
    if rest > 1e-9:
        shares[None] = rest
    walker.context.products.extend(Product(name, share * macs, share * outputs) for name, share in shares.items())


def _product(terms: Callable[[Any], float]) -> Rule:
    """The rule of a product with a number of terms in each output."""

    def rule(walker: Walker, eqn: Any, ins: list[Origin]) -> list[Origin]:
        outputs = math.prod(eqn.outvars[0].aval.shape)
        charge(walker, ins[:2], outputs * terms(eqn), outputs)
        return [None]

    return rule


def _dot_terms(eqn: Any) -> float:
    shape = eqn.invars[0].aval.shape
    return math.prod(shape[axis] for axis in geometry.dot(eqn).summed[0])


def _ragged_terms(eqn: Any) -> float:
    given, shape = eqn.params["ragged_dot_dimension_numbers"], eqn.invars[0].aval.shape
    (summed, _), _ = given.dot_dimension_numbers
    terms = math.prod(shape[axis] for axis in summed)
    if set(given.lhs_ragged_dimensions) & set(summed):  # a weight gradient: a group sums its own part
        return terms / eqn.invars[2].aval.shape[-1]
    return terms


def _convolution_terms(eqn: Any) -> float:
    _, *summed = geometry.conv(eqn).kernel  # channels of one group, window
    shape = eqn.invars[1].aval.shape
    return math.prod(shape[axis] for axis in summed) / math.prod(eqn.params["lhs_dilation"])


# --- loops and branches --------------------------------------------------------------------------------------------


def _apart(walker: Walker, program: Any, ins: list[Origin]) -> tuple[list[Origin], list[Product]]:
    """The origins of the outputs of a program, and its products, which the caller has to count."""
    products: list[Product] = []
    return walker._replace(context=walker.context._replace(products=products))(program, ins), products


def _add(walker: Walker, products: Sequence[Product], trips: int) -> None:
    if trips:
        walker.context.products.extend(Product(name, trips * macs, trips * out) for name, macs, out in products)


def _loop(
    walker: Walker, body: Any, ins: list[Origin], n_consts: int, n_carry: int
) -> tuple[list[Origin], list[Product]]:
    """One trip of a loop, with the origins that its carry has after any number of trips."""
    consts, carry, scanned = ins[:n_consts], ins[n_consts : n_consts + n_carry], ins[n_consts + n_carry :]
    while True:  # ends: constant -> leaf -> data is the longest way a carry can go
        outs, found = _apart(walker, body, consts + carry + scanned)
        widened = [_join([before, after]) for before, after in zip(carry, outs, strict=False)]
        if widened == carry:
            return carry + outs[n_carry:], found
        carry = widened


def _scan(walker: Walker, eqn: Any, ins: list[Origin]) -> list[Origin]:
    body, consts, carry = primitives.scan(eqn)
    outs, found = _loop(walker, body, ins, consts, carry)
    _add(walker, found, eqn.params["length"])
    return outs


def _while(walker: Walker, eqn: Any, ins: list[Origin]) -> list[Origin]:
    """The body and the condition, `while_trips` times each."""
    condition, body, tests, consts = primitives.while_loop(eqn)
    outs, found = _loop(walker, body, ins[tests:], consts, len(ins) - tests - consts)
    found = _apart(walker, condition, ins[:tests] + outs)[1] + found
    trips = walker.context.while_trips
    if found and trips is None:
        owners = ", ".join(sorted({repr(product.name) for product in found}))
        raise ValueError(
            "flops: a trace cannot tell how often a while_loop runs: expected while_trips=... (or a scan), got None; "
            f"the loop holds products of {owners}"
        )
    _add(walker, found, trips or 0)
    return outs


def _cond(walker: Walker, eqn: Any, ins: list[Origin]) -> list[Origin]:
    branches = [_apart(walker, branch, ins[1:]) for branch in primitives.branches(eqn)]
    _add(walker, max((found for _, found in branches), key=lambda found: sum(p.macs for p in found)), 1)
    return [_join(list(outs)) for outs in zip(*(outs for outs, _ in branches), strict=True)]


# --- other operations ----------------------------------------------------------------------------------------------


def _other(walker: Walker, eqn: Any, ins: list[Origin]) -> list[Origin]:
    """The cost of a primitive without a rule: none, unless it contains programs with products."""
    if (inner := primitives.wrapped(eqn)) is not None:
        outs, found = _apart(walker, inner, ins)
        _add(walker, found, primitives.devices(eqn))
        return outs
    if any(_has_products(held.jaxpr) for held in primitives.held(eqn)):
        name = eqn.primitive.name
        raise ValueError(f"flops: expected primitives that can be counted, got products inside {name!r}")
    return [_join(ins)] * len(eqn.outvars)


def _has_products(jaxpr: Any) -> bool:
    return any(
        eqn.primitive.name in _PRODUCTS or any(_has_products(held.jaxpr) for held in primitives.held(eqn))
        for eqn in jaxpr.eqns
    )


def _join(origins: list[Origin]) -> Origin:
    """Origin of a value that is computed from, or may be any of, several; constants do not matter."""
    owners = [origin for origin in origins if origin != {}]
    return next(iter(owners), {}) if all(owner == owners[0] for owner in owners) else None


def _factors(walker: Walker, eqn: Any, ins: list[Origin]) -> list[Origin]:
    """The rule of a factor, whose zeros are zeros of the result."""
    return [None if None in ins else _largest(ins, walker.context)]


def _parts(walker: Walker, eqn: Any, ins: list[Origin]) -> list[Origin]:
    """The rule of a concatenation, which belongs to its parts, by size."""
    if None in ins:
        return [None]
    parts: dict[str, float] = {}
    whole = max(1, math.prod(eqn.outvars[0].aval.shape))
    for atom, origin in zip(eqn.invars, ins, strict=True):
        for name, share in (origin or {}).items():
            parts[name] = parts.get(name, 0.0) + share * math.prod(atom.aval.shape) / whole
    return [parts]


def _largest(ins: Sequence[Origin], counted: _Counted) -> dict[str, float]:
    """The origin with the most weights; if equal, the last one: in `x @ w` it is the right operand."""
    owners = [origin for origin in reversed(ins) if origin]
    return max(owners, key=lambda owner: sum(counted.sizes[name] for name in owner), default={})


_PRODUCTS: dict[str, Rule] = {
    "dot_general": _product(_dot_terms),
    "ragged_dot_general": _product(_ragged_terms),
    "conv_general_dilated": _product(_convolution_terms),
}
RULES: dict[str, Rule] = {
    **_PRODUCTS,
    "scan": _scan,
    "while": _while,
    "cond": _cond,
    "mul": _factors,
    "div": _factors,
    "concatenate": _parts,
    "stack": _parts,
    "optimization_barrier": lambda walker, eqn, ins: ins,  # output i is input i
}
"""Counts the cost of a primitive (`charge`) and gives the origins of its results; others are free, see `flops`."""
