"""Checks of what arrays hold: finite numbers, probabilities, labels, positions.

Types and shapes are always checked, values only where they are known: not of what jit, vmap or grad traces, nor of an
array that lies on several hosts. An error shows the first entry that does not fit, and where it is.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from rigl_jax.messages import shown

ROUNDING = 0.01
"""How far the sum of probabilities may be from 1: that of a softmax in bfloat16 is within half of it."""


def known(array: Any) -> np.ndarray | None:
    """The array on the host, or None where its values are not known."""
    if isinstance(array, jax.core.Tracer | jax.ShapeDtypeStruct) or not getattr(array, "is_fully_addressable", True):
        return None
    return np.asarray(array)


def every(who: str, name: str, expected: str, array: Any, fits: Callable[[np.ndarray], Any]) -> Any:
    """Checks each known entry; `fits` gives a bool for each, or for each of the first axes. Returns the array.

    Raises:
      ValueError: one does not fit; shows it.

    >>> every("f", "x", "at least 0", np.array([[1, -2]]), lambda x: x >= 0)
    Traceback (most recent call last):
    ValueError: f: x must be at least 0, got -2 at [0, 1]
    """
    host = known(array)
    if host is not None and not np.all(good := fits(host)):
        at = [int(i) for i in np.argwhere(~np.asarray(good))[0]]
        found = host[tuple(at)]
        text = f"{found}" if found.ndim == 0 else shown(found.tolist())
        raise ValueError(f"{who}: {name} must be {expected}, got {text}{f' at {at}' if at else ''}")
    return array


def filled(who: str, name: str, array: Any) -> Any:
    """Checks that an array holds real numbers, at least one. Returns it.

    Raises:
      ValueError: it is empty, or complex.
    """
    dtype, shape = jnp.result_type(array) if hasattr(array, "dtype") else np.asarray(array).dtype, np.shape(array)
    if 0 in shape or jnp.issubdtype(dtype, jnp.complexfloating):
        raise ValueError(f"{who}: {name} must hold real numbers, at least one, got {dtype}{list(shape)}")
    return array


def finite(who: str, name: str, array: Any, dtype: Any = np.float32) -> Any:
    """Checks that an array is not empty, and holds no NaN and no infinity, once converted to `dtype`. Returns it.

    Raises:
      ValueError: it is empty, or an entry is not finite.
    """
    with np.errstate(over="ignore"):
        return every(
            who, name, f"finite in {np.dtype(dtype)}", filled(who, name, array), lambda x: np.isfinite(x.astype(dtype))
        )


def not_nan(who: str, name: str, array: Any) -> Any:
    """Checks that an array is not empty and holds no NaN; infinities may be. Returns it.

    Raises:
      ValueError: it is empty, or an entry is NaN.
    """
    return every(who, name, "without NaN", filled(who, name, array), lambda x: ~np.isnan(x))


def classes(who: str, name: str, array: Any) -> Any:
    """Checks that the last axis is of two classes or more. Returns the array.

    Raises:
      ValueError: it is shorter.
    """
    shape = np.shape(array)
    if not shape or shape[-1] < 2:
        raise ValueError(f"{who}: {name} must have at least two classes along the last axis, got shape {shape}")
    return array


def probabilities(who: str, name: str, array: Any) -> Any:
    """Checks that the last axis holds probabilities, not logits: at least 0, in sum 1 to within `ROUNDING`.

    Raises:
      ValueError: no floats, an empty array, fewer than two classes; a row that is no distribution, shows it.

    >>> probabilities("f", "probs", np.array([[0.5, 0.5], [3.0, -1.0]]))
    Traceback (most recent call last):
    ValueError: f: probs must be probabilities that add up to 1 over the last axis, not logits, got [3.0, -1.0] at [1]
    """
    classes(who, name, filled(who, name, array))
    dtype = array.dtype if hasattr(array, "dtype") else np.asarray(array).dtype
    if not jnp.issubdtype(dtype, jnp.floating):
        raise ValueError(f"{who}: {name} must be floating-point probabilities, got {dtype}{list(np.shape(array))}")
    return every(
        who,
        name,
        "probabilities that add up to 1 over the last axis, not logits",
        array,
        lambda p: np.all(p >= 0, axis=-1) & (np.abs(np.sum(p, axis=-1, dtype=np.float64) - 1) <= ROUNDING),
    )


def whole(who: str, name: str, array: Any, n: int | None = None) -> Any:
    """Checks that an array holds whole numbers, from 0 to n - 1 where n is given. Returns it.

    Raises:
      ValueError: it is of another type, or an entry is out of range.
    """
    if not jnp.issubdtype(array.dtype, jnp.integer):
        raise ValueError(f"{who}: {name} must be whole numbers, got {shown(array)}")
    if n is None:
        return array
    return every(who, name, f"from 0 to {n - 1}", array, lambda x: (x >= 0) & (x < n))


def distinct(who: str, name: str, array: Any) -> Any:
    """Checks that no entry is there twice. Returns the array.

    Raises:
      ValueError: one is; shows it.
    """

    def first(x: np.ndarray) -> np.ndarray:
        new = np.zeros(x.shape, bool)
        new[np.unique(x, return_index=True)[1]] = True
        return new

    return every(who, name, "different from each other", array, first)


def labels(who: str, labels: Any, n: int, classes: int | None = None) -> Any:
    """Checks that labels are a whole number for each of n examples, from 0, and below the number of classes if given.

    Raises:
      ValueError: shape or type differ; or one is no class, shows it.

    >>> labels("f", np.array([0, 3]), 2, 3)
    Traceback (most recent call last):
    ValueError: f: labels must be from 0 to 2, got 3 at [1]
    """
    if not jnp.issubdtype(labels.dtype, jnp.integer) or labels.shape != (n,):
        raise ValueError(f"{who}: labels must be int[{n}], a whole number for each example, got {shown(labels)}")
    return whole(who, "labels", labels, classes)


def logits(who: str, name: str, array: Any, n: int) -> Any:
    """Checks that what a model gave is `[n, classes]`, of two classes or more and without NaN. Returns it.

    Raises:
      ValueError: it is not; `name` is the model's.
    """
    shape = getattr(array, "shape", None)
    if shape is None or len(shape) != 2 or shape[0] != n or shape[1] < 2:
        raise ValueError(f"{who}: {name} must return logits [{n}, classes], of two classes or more, got {shown(array)}")
    return every(who, f"what {name} returns", "without NaN", array, lambda x: ~np.isnan(x))


Content = Callable[[str, str, Any], Any]
"""`(who, name, array) -> array`."""


def all_of(*checks: Content) -> Content:
    """One check after the other."""

    def check(who: str, name: str, value: Any) -> Any:
        for each in checks:
            value = each(who, name, value)
        return value

    return check
