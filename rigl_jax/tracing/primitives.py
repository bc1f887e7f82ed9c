"""The parameters of primitives, for all analyses.

JAX changes the parameters of its primitives from version to version. Therefore they are read only here, and where
possible from the shapes and the number of operands.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax.extend.core as jex

CUSTOM = frozenset(("custom_jvp_call", "custom_vjp_call"))
"""Calls of functions with custom derivatives."""
_CALLS = frozenset(("jit", "closed_call", "remat2")) | CUSTOM


class Scan(NamedTuple):
    """A `scan`: its operands are `consts` constants, then `carry` carried values, then what it scans.

    Attributes:
      body: the program of one trip: constants, carry and one element of the rest -> carry and one of the results.
      consts: how many operands come first.
      carry: how many come next.
    """

    body: jex.ClosedJaxpr
    consts: int
    carry: int


class While(NamedTuple):
    """A `while`: its operands are constants of the condition, then those of the body, then the carry.

    Attributes:
      condition: its constants and the carry -> whether to go on.
      body: its constants and the carry -> the carry.
      condition_consts: how many operands come first.
      body_consts: how many come next.
    """

    condition: jex.ClosedJaxpr
    body: jex.ClosedJaxpr
    condition_consts: int
    body_consts: int


def called(eqn: Any) -> jex.ClosedJaxpr | None:
    """The program of an equation that only calls it, with the same inputs and outputs; None for other equations.

    Calls that repeat, choose or split their program (scan, cond, shard_map ...) do not count.
    """
    if eqn.primitive.name not in _CALLS:
        return None
    (inner,) = held(eqn)
    return inner


def wrapped(eqn: Any) -> jex.ClosedJaxpr | None:
    """The only program of an equation, if it has as many inputs and outputs: that of `shard_map` and similar.

    It runs on `devices(eqn)` devices, each of which has a part of the arrays.
    """
    programs = held(eqn)
    if len(programs) != 1:
        return None
    inner = programs[0].jaxpr
    return programs[0] if (len(inner.invars), len(inner.outvars)) == (len(eqn.invars), len(eqn.outvars)) else None


def devices(eqn: Any) -> int:
    """How many devices run the program that an equation wraps, each on its part."""
    return math.prod(eqn.params["mesh"].shape[axis] for axis in eqn.params.get("newly_manual_axes", ()))


def bind(eqn: Any, operands: Sequence[Any]) -> list[Any]:
    """Executes an equation unchanged: JAX evaluates a jaxpr of this one equation."""
    pairs = [(a, x) for a, x in zip(eqn.invars, operands, strict=True) if not isinstance(a, jex.Literal)]
    names = jex.DebugInfo("rigl_jax", eqn.primitive.name, None, None)
    one = jex.Jaxpr((), [a for a, _ in pairs], eqn.outvars, [eqn], eqn.effects, names)
    return jex.jaxpr_as_fun(_closed(one))(*[x for _, x in pairs])


def held(eqn: Any) -> list[jex.ClosedJaxpr]:
    """All programs among an equation's parameters, also inside tuples."""
    values = [v for value in eqn.params.values() for v in (value if isinstance(value, tuple | list) else (value,))]
    return [_closed(value) for value in values if isinstance(value, jex.Jaxpr | jex.ClosedJaxpr)]


def scan(eqn: Any) -> Scan:
    """The parts of a `scan`. Values that are scanned or stacked have one more axis outside of the body."""
    (body,) = held(eqn)
    scanned = _deeper(eqn.invars, body.jaxpr.invars)
    stacked = _deeper(eqn.outvars, body.jaxpr.outvars)
    carry = len(eqn.outvars) - stacked
    return Scan(body, len(eqn.invars) - carry - scanned, carry)


def while_loop(eqn: Any) -> While:
    """The parts of a `while`. Its results are its carry."""
    condition, body = _closed(eqn.params["cond_jaxpr"]), _closed(eqn.params["body_jaxpr"])
    carry = len(eqn.outvars)
    return While(condition, body, len(condition.jaxpr.invars) - carry, len(body.jaxpr.invars) - carry)


def branches(eqn: Any) -> list[jex.ClosedJaxpr]:
    """The programs of a `cond`; its first operand selects which one runs on the others."""
    return held(eqn)


def _closed(jaxpr: Any) -> jex.ClosedJaxpr:
    return jaxpr if isinstance(jaxpr, jex.ClosedJaxpr) else jex.ClosedJaxpr(jaxpr, ())


def _deeper(outside: Sequence[Any], inside: Sequence[Any]) -> int:
    """How many values have more axes outside."""
    return sum(len(o.aval.shape) > len(i.aval.shape) for o, i in zip(outside, inside, strict=True))
