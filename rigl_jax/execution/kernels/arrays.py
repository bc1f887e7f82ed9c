"""Checks of the index arrays of patterns: their sizes whenever a kernel is traced, their content where it is known."""

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


def host(*arrays: Any) -> list[np.ndarray] | None:
    """The arrays as NumPy's; None where one is traced, or does not lie here as a whole."""
    for array in arrays:
        if isinstance(array, jax.core.Tracer) or not isinstance(array, (jax.Array, np.ndarray)):
            return None
        if isinstance(array, jax.Array) and not (array.is_fully_addressable or array.is_fully_replicated):
            return None
    return [np.asarray(array) for array in arrays]


def intact(values: Array, sound: Array) -> Array:
    """The values, or NaN where the pattern's arrays cannot be right: inside of jit nothing can be raised."""
    if not jnp.issubdtype(values.dtype, jnp.inexact):
        return values
    return jnp.where(sound, values, jnp.full((), jnp.nan, values.dtype))
