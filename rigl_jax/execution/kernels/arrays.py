"""Checks of operands and index arrays: sizes whenever a kernel is traced, content where it is known."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

Array = jax.Array
HINT = "map over packed.values, not over patterns"


def expect(who: str, pattern: Any, **arrays: tuple[Any, tuple[int, ...]]) -> None:
    """ValueError if a field of a pattern is not an array of the (dtype, shape) that its static fields imply."""
    for name, (dtype, shape) in arrays.items():
        field = getattr(pattern, name)
        found = (getattr(field, "dtype", type(field).__name__), getattr(field, "shape", None))
        if found != (np.dtype(dtype), shape):
            raise ValueError(
                f"{who}: {name} of the {type(pattern).__name__} must be {np.dtype(dtype)} of shape {shape}, "
                f"got {found[0]} of shape {found[1]} ({HINT})"
            )


def check_operands(who: str, x: Any, values: Any, *, inputs: int, nnz: int) -> None:
    """ValueError if x is not [..., inputs], or values not [nnz]."""
    if x.ndim < 1 or x.shape[-1] != inputs:
        raise ValueError(f"{who}: x must have shape (..., {inputs}), got {x.shape}")
    if values.shape != (nnz,):
        raise ValueError(f"{who}: values must have shape ({nnz},), got {values.shape}")


def host(*arrays: Any) -> list[np.ndarray] | None:
    """The arrays as NumPy arrays; None if one is traced or is not entirely in this process."""
    for array in arrays:
        if isinstance(array, jax.core.Tracer) or not isinstance(array, (jax.Array, np.ndarray)):
            return None
        if isinstance(array, jax.Array) and not (array.is_fully_addressable or array.is_fully_replicated):
            return None
    return [np.asarray(array) for array in arrays]


def intact(values: Array, sound: Array) -> Array:
    """The values, or NaN if the arrays of the pattern are invalid: inside of jit no error can be raised."""
    if not jnp.issubdtype(values.dtype, jnp.inexact):
        return values
    return jnp.where(sound, values, jnp.full((), jnp.nan, values.dtype))
