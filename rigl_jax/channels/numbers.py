"""Small numbers that a program computes from nothing: positions, divisors, rows that are written down."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import jax
import numpy as np

from rigl_jax.tracing.program import Program

_LARGEST = 1 << 12


def read_numbers(program: Program) -> dict[Any, np.ndarray]:
    """`{variable: array}` of all that is known, up to a few thousand entries each."""
    known: dict[Any, np.ndarray] = {}
    for variable, value in program.constants.items():
        if math.prod(variable.aval.shape) <= _LARGEST and not _extended(variable.aval):
            known[variable] = np.asarray(value)
    for eqn in program.equations:
        rule = _RULES.get(eqn.primitive.name)
        if rule is None or any(v not in known for v in eqn.invars) or math.prod(eqn.outvars[0].aval.shape) > _LARGEST:
            continue
        with np.errstate(all="ignore"):
            value = np.asarray(rule(eqn, *(known[v] for v in eqn.invars)))
            known[eqn.outvars[0]] = value.astype(eqn.outvars[0].aval.dtype)
    return known


def _extended(aval: Any) -> bool:
    return jax.dtypes.issubdtype(aval.dtype, jax.dtypes.extended)


def _iota(eqn: Any) -> np.ndarray:
    shape, axis = eqn.outvars[0].aval.shape, eqn.params["dimension"]
    return np.broadcast_to(np.arange(shape[axis]).reshape([-1 if k == axis else 1 for k in range(len(shape))]), shape)


def _broadcast(eqn: Any, x: np.ndarray) -> np.ndarray:
    shape, into = eqn.outvars[0].aval.shape, eqn.params["broadcast_dimensions"]
    sizes = dict(zip(into, x.shape, strict=True))
    return np.broadcast_to(x.reshape([sizes.get(k, 1) for k in range(len(shape))]), shape)


def _plain(function: Callable[..., Any]) -> Callable[..., Any]:
    return lambda eqn, *operands: function(*operands)


_RULES: dict[str, Callable[..., Any]] = {
    "add": _plain(np.add),
    "sub": _plain(np.subtract),
    "mul": _plain(np.multiply),
    "div": lambda eqn, x, y: np.trunc(x / y) if np.issubdtype(x.dtype, np.integer) else x / y,
    "max": _plain(np.maximum),
    "min": _plain(np.minimum),
    "lt": _plain(np.less),
    "gt": _plain(np.greater),
    "ge": _plain(np.greater_equal),
    "le": _plain(np.less_equal),
    "eq": _plain(np.equal),
    "select_n": lambda eqn, which, *cases: np.choose(which.astype(np.int64), cases),
    "convert_element_type": _plain(lambda x: x),
    "copy": _plain(lambda x: x),
    "broadcast_in_dim": _broadcast,
    "iota": _iota,
    "reshape": lambda eqn, x: x.reshape(eqn.outvars[0].aval.shape),
    "squeeze": lambda eqn, x: x.reshape(eqn.outvars[0].aval.shape),
    "concatenate": lambda eqn, *parts: np.concatenate(parts, eqn.params["dimension"]),
}
