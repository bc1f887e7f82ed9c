"""Reading jaxprs: what the programs that walk them share."""

from __future__ import annotations

from typing import Any

import jax.extend.core as jex

_CALLS = frozenset(("jit", "closed_call", "remat2", "custom_jvp_call", "custom_vjp_call"))


def called(eqn: Any) -> jex.ClosedJaxpr | None:
    """The program that an equation only wraps, its inputs and outputs being those of the equation; None for another.

    Calls that repeat, choose or split what they hold (scan, cond, shard_map ...) are no such wrappers.
    """
    if eqn.primitive.name not in _CALLS:
        return None
    inner = eqn.params["jaxpr"] if "jaxpr" in eqn.params else eqn.params["call_jaxpr"]
    return inner if isinstance(inner, jex.ClosedJaxpr) else jex.ClosedJaxpr(inner, ())
