"""Bounds of every value of a model over a box of inputs: interval arithmetic as rules of the interpreter (IBP).

Sound: a value never leaves its bounds, but for float32's rounding. Exact for a monotone or affine operation of inputs
that are independent; where values depend on each other, as in a network of several layers, bounds are wider than
needed.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from rigl_jax.base import Array
from rigl_jax.tracing import geometry, primitives
from rigl_jax.tracing.program import Program
from rigl_jax.tracing.walk import Rule, Walker, branches


class Interval(NamedTuple):
    """A value that is known to lie between two others.

    Attributes:
      low: the least it can be.
      high: the most it can be, of the same shape.
    """

    low: Array
    high: Array

    @property
    def fixed(self) -> bool:
        """Whether it does not depend on the box: a weight, a constant, or computed from these."""
        return self.low is self.high


def fixed(value: Any) -> Interval:
    """A value that is known."""
    return Interval(value, value)


def _constant(value: Any, aval: Any) -> Interval:
    return fixed(value if isinstance(value, jax.Array) else np.asarray(value, aval.dtype))


def bounds(
    program: Any, operands: Sequence[Interval], seen: Callable[[Any, Interval], None] = lambda eqn, x: None
) -> list[Interval]:
    """Bounds of the outputs of a closed jaxpr.

    Args:
      program: of `jax.make_jaxpr`.
      operands: of its inputs.
      seen: called with each application of `max(x, 0)`, and the bounds of x.

    Raises:
      ValueError: a primitive that has no rule depends on the box; names it.
    """
    return Walker(RULES, _unknown, _constant, seen, _shortcut)(program, operands)


def program_bounds(
    program: Program, operands: Sequence[Interval], seen: Callable[[Any, Interval], None]
) -> dict[Any, Interval]:
    """As `bounds`, of all variables of a program of `trace`, whose functions with custom derivatives are inlined."""
    known = {v: _constant(value, v.aval) for v, value in program.constants.items()}
    known.update(zip(program.inputs, operands, strict=True))
    Walker(RULES, _unknown, _constant, seen, _shortcut).follow(program.equations, known)
    return known


def unstable(x: Interval, gamma: Any = None, p: float = 2.0) -> Array:
    """NRS of each ReLU (Li et al. 2022): `-tanh(1 + low high / |gamma|^p)`; -1 where both bounds have one sign.

    Args:
      x: what it reads.
      gamma: the scale of the normalisation before it, which broadcasts against the bounds, or None. Has no gradient.
      p: the exponent.
    """
    scale: Any = 1.0 if gamma is None else jnp.abs(jax.lax.stop_gradient(jnp.asarray(gamma))) ** p + 1e-20
    scale = jnp.broadcast_to(jnp.reshape(scale, (1,) * (x.low.ndim - jnp.ndim(scale)) + jnp.shape(scale)), x.low.shape)
    return -jnp.tanh(1 + x.low * x.high / scale)


def _shortcut(eqn: Any, ins: list[Interval]) -> Any:
    """What does not depend on the box is computed as it stands."""
    if primitives.called(eqn) is not None or not all(x.fixed for x in ins):
        return None
    return [fixed(out) for out in primitives.bind(eqn, [x.low for x in ins])]


_COMPARISONS = frozenset(("eq", "ne", "ge", "gt", "le", "lt"))


def _unknown(walker: Walker, eqn: Any, ins: list[Interval]) -> Any:
    name = eqn.primitive.name
    hint = "; for a choice by a comparison take jnp.maximum, as of x and 0.1 x" if name in _COMPARISONS else ""
    raise ValueError(f"interval_bounds: apply must use operations that have a rule, got {name!r}{hint}")


def _bind(eqn: Any, *operands: Array) -> Array:
    (out,) = primitives.bind(eqn, operands)
    return out


def _rising(walker: Walker, eqn: Any, ins: list[Interval]) -> list[Interval]:
    """Operations that rise with every operand, or move entries."""
    return [Interval(_bind(eqn, *[x.low for x in ins]), _bind(eqn, *[x.high for x in ins]))]


def _falling(walker: Walker, eqn: Any, ins: list[Interval]) -> list[Interval]:
    (x,) = ins
    return [Interval(_bind(eqn, x.high), _bind(eqn, x.low))]


def _sub(walker: Walker, eqn: Any, ins: list[Interval]) -> list[Interval]:
    a, b = ins
    return [Interval(_bind(eqn, a.low, b.high), _bind(eqn, a.high, b.low))]


def _corners(eqn: Any, ins: list[Interval]) -> list[Interval]:
    a, b = ins
    found = [_bind(eqn, x, y) for x in a for y in b]
    low, high = found[0], found[0]
    for other in found[1:]:
        low, high = jnp.minimum(low, other), jnp.maximum(high, other)
    return [Interval(low, high)]


def _mul(walker: Walker, eqn: Any, ins: list[Interval]) -> list[Interval]:
    if eqn.invars[0] is eqn.invars[1]:
        return [_squared(ins[0])]
    return _corners(eqn, ins)


def _div(walker: Walker, eqn: Any, ins: list[Interval]) -> list[Interval]:
    if not ins[1].fixed:
        _unknown(walker, eqn, ins)
    return _corners(eqn, ins)


def _squared(x: Interval) -> Interval:
    ends = x.low**2, x.high**2
    return Interval(jnp.where((x.low <= 0) & (x.high >= 0), 0, jnp.minimum(*ends)), jnp.maximum(*ends))


def _square(walker: Walker, eqn: Any, ins: list[Interval]) -> list[Interval]:
    return [_squared(ins[0])]


def _power(walker: Walker, eqn: Any, ins: list[Interval]) -> list[Interval]:
    if eqn.params["y"] == 2:
        return [_squared(ins[0])]
    if eqn.params["y"] > 0 and eqn.params["y"] % 2:
        return _rising(walker, eqn, ins)
    return _unknown(walker, eqn, ins)


def _max(walker: Walker, eqn: Any, ins: list[Interval]) -> list[Interval]:
    """A ReLU is `max(x, 0)`; what `seen` gets is x."""
    for x, other in (ins, ins[::-1]):
        known = other.fixed and not isinstance(other.low, jax.core.Tracer)
        if known and not x.fixed and not np.any(np.asarray(other.low)):
            walker.context(eqn, x)
    return _rising(walker, eqn, ins)


def _product(walker: Walker, eqn: Any, ins: list[Interval]) -> list[Interval]:
    """A dense layer or convolution: positive weights with one end, negative ones with the other."""
    a, b = ins
    if not (a.fixed or b.fixed):
        _unknown(walker, eqn, ins)
    x, w = (b, a.low) if a.fixed else (a, b.low)
    order = (lambda x, w: (w, x)) if a.fixed else (lambda x, w: (x, w))
    positive, negative = jnp.maximum(w, 0), jnp.minimum(w, 0)
    apply = lambda x, w: _bind(eqn, *order(x, w))  # noqa: E731
    return [
        Interval(
            apply(x.low, positive) + apply(x.high, negative),
            apply(x.high, positive) + apply(x.low, negative),
        )
    ]


def _clamp(walker: Walker, eqn: Any, ins: list[Interval]) -> list[Interval]:
    least, x, most = ins
    return [Interval(_bind(eqn, least.low, x.low, most.low), _bind(eqn, least.high, x.high, most.high))]


def _gather(walker: Walker, eqn: Any, ins: list[Interval]) -> list[Interval]:
    return (_rising if ins[1].fixed else _unknown)(walker, eqn, ins)


def _convert(walker: Walker, eqn: Any, ins: list[Interval]) -> list[Interval]:
    """To bool it does not rise: -1 is True, and so is 1."""
    return (_unknown if jnp.dtype(eqn.params["new_dtype"]).kind == "b" else _rising)(walker, eqn, ins)


def _select(walker: Walker, eqn: Any, ins: list[Interval]) -> list[Interval]:
    which, *cases = ins
    if which.fixed:
        ends = zip(*cases, strict=True)
        return [Interval(*(_bind(eqn, which.low, *end) for end in ends))]
    low, high = cases[0]
    for case in cases[1:]:
        low, high = jnp.minimum(low, case.low), jnp.maximum(high, case.high)
    return [Interval(low, high)]


def _abs(walker: Walker, eqn: Any, ins: list[Interval]) -> list[Interval]:
    (x,) = ins
    least = jnp.where((x.low <= 0) & (x.high >= 0), 0, jnp.minimum(jnp.abs(x.low), jnp.abs(x.high)))
    return [Interval(least, jnp.maximum(jnp.abs(x.low), jnp.abs(x.high)))]


_RISING = """
add add_any max min exp log log1p expm1 tanh logistic sqrt erf floor ceil round sign cbrt atan asinh copy
reduce_precision stop_gradient reshape slice concatenate pad rev cumsum cummax cummin
"""
RULES: dict[str, Rule] = {
    **dict.fromkeys(_RISING.split(), _rising),
    **dict.fromkeys(geometry.MOVES.keys() - {"argmax", "argmin", "reduce_prod"}, _rising),
    **dict.fromkeys(geometry.WINDOWED, _rising),
    **dict.fromkeys(("dot_general", "conv_general_dilated"), _product),
    "neg": _falling,
    "sub": _sub,
    "mul": _mul,
    "div": _div,
    "square": _square,
    "integer_pow": _power,
    "max": _max,
    "abs": _abs,
    "clamp": _clamp,
    "convert_element_type": _convert,
    "gather": _gather,
    "select_n": _select,
    "cond": branches(
        lambda values: Interval(
            jnp.min(jnp.stack([x.low for x in values]), 0), jnp.max(jnp.stack([x.high for x in values]), 0)
        )
    ),
}
"""The bounds of the result of a primitive; others are refused where they depend on the box."""
