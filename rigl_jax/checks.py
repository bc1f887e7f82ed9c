"""Checks of what public functions are given. An error is one line: who, which leaf, what was expected and given."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from rigl_jax import trees
from rigl_jax.base import Algorithm, Array, InPatterns, LayerPlan, Masks
from rigl_jax.messages import kind, shown

LARGEST = 2**31  # steps and counts are int32 on the devices
TRAINABLE = ("bfloat16", "float16", "float32", "float64")
"""The types of weights that can be ranked and set to 0 by an update; 8 bits and fewer can be held by masters only."""


def is_whole(value: Any, least: int = 0) -> bool:
    """Whether the value is an integer from `least` that fits into int32."""
    return isinstance(value, (int, np.integer)) and not isinstance(value, bool) and bool(least <= value < LARGEST)


def plain(value: Any) -> Any:
    """A NumPy number as the Python number it is: sums of narrow integers wrap. Anything else as it is.

    >>> plain(np.int8(100)) + 100
    200
    """
    return value.item() if isinstance(value, np.generic) else value


def real(value: Any) -> float:
    """The value as a float; NaN for what is no real number, or too large for float32."""
    try:
        found = math.nan if isinstance(value, (str, bytes)) else float(value)
    except (TypeError, ValueError, OverflowError):
        return math.nan
    return found if abs(found) < 3e38 else math.nan


def number(who: str, name: str, value: Any, expected: str, fits: Callable[[float], bool]) -> float:
    """The value as a float, if it is a finite real number that fits.

    Raises:
      ValueError: `expected` says what was.
    """
    found = real(value)
    if isinstance(plain(value), float) and math.isinf(value):
        raise ValueError(f"{who}: {name} must be finite, got {shown(value)}")
    if math.isnan(found) or not fits(found):
        raise ValueError(f"{who}: {name} {expected}, got {shown(value)}")
    return found


def steps(who: str, *, period: Any = 1, start: Any = 0, stop: Any = None) -> tuple[int, int, Any]:
    """Validates the rewiring schedule; returns period, start and stop as Python numbers.

    Raises:
      ValueError: names the one that is wrong.
    """
    if not is_whole(period, 1):
        raise ValueError(f"{who}: period must be a whole number of steps, at least 1, got {shown(period)}")
    if not is_whole(start):
        raise ValueError(f"{who}: start must be a step, 0 or later, got {shown(start)}")
    if stop is not None:
        number(who, "stop", stop, "must be a step below 2**31, or None", lambda found: found < LARGEST)
        number(who, "stop", stop, f"must not be before start={start}", lambda found: start <= found)
    return plain(period), plain(start), plain(stop)


def total(who: str, what: str, n: int) -> None:
    """Checks that int32 holds a count over many leaves.

    Raises:
      ValueError: `what` says what is counted.
    """
    if n >= LARGEST:
        raise ValueError(f"{who}: {what} must be fewer than 2**31 in all, got {n}")


def functions(who: str, **given: Any) -> None:
    """Checks that arguments can be called.

    Raises:
      ValueError: names the argument.
    """
    for name, value in given.items():
        if not callable(value):
            raise ValueError(f"{who}: {name} must be a function, got {shown(value)}")


def optional_functions(who: str, **given: Any) -> None:
    """`functions` for arguments that may be None."""
    functions(who, **{name: value for name, value in given.items() if value is not None})


def plan(who: str, plan: Any) -> None:
    """Checks that a plan is one of `make_plan`.

    Raises:
      ValueError: says what was given.
    """
    if not isinstance(plan, Mapping) or not plan or not all(isinstance(leaf, LayerPlan) for leaf in plan.values()):
        of = f" of {kind(next(iter(plan.values())))}" if isinstance(plan, Mapping) and plan else ""
        raise ValueError(f"{who}: plan must be what make_plan gives, a dict of LayerPlan, got {kind(plan)}{of}")


def algorithm(who: str, algorithm: Any) -> None:
    """Checks that an algorithm is one.

    Raises:
      ValueError: says what was given.
    """
    if not isinstance(algorithm, Algorithm):
        raise ValueError(f"{who}: algorithm must be one such as rx.rigl(plan, stop=...), got {kind(algorithm)}")


def has_masks(who: str, function: str, state: Any) -> None:
    """Checks what a function of an algorithm returned for its state.

    Raises:
      ValueError: it has no masks; names the function.
    """
    if not hasattr(state, "masks"):
        raise ValueError(
            f"{who}: {function} of the algorithm must return a state with a field masks, got {kind(state)}"
        )


def algorithm_state(who: str, algorithm: Algorithm, state: Any, masks: Masks = None) -> None:
    """Checks that a state is of this algorithm and of a plan with the same leaves. Counts are data and not checked.

    Args:
      who: for the message.
      algorithm: the algorithm.
      state: what may be its state.
      masks: in place of the state's own, for a packed run; only their names are read.

    Raises:
      ValueError: names the type, or the leaf.
    """
    expected: Any = algorithm.state
    if expected is not None and not isinstance(state, expected):
        raise ValueError(
            f"{who}: the state must be that of this algorithm, {expected.__name__}, got {kind(state)}; "
            "begin with that of tx.init, and give it the masks of another run by rx.replace_masks"
        )
    if algorithm.plan is not None:
        held = trees.named_leaves(state.masks if masks is None else masks)
        for name in [*(n for n in algorithm.plan if n not in held), *(n for n in held if n not in algorithm.plan)]:
            there = "a mask, which it lacks" if name in algorithm.plan else "no mask, but it has one"
            raise ValueError(
                f"{who}: the state must be of a plan with the same leaves; for leaf {name!r} the plan has {there}"
            )


def optimizer_state(who: str, expected: Any, state: Any) -> None:
    """Checks names and shapes of an optimizer state, which those of another optimizer or other params would not fit.

    Raises:
      ValueError: names the leaf of the state.
    """
    shapes, given = trees.named_shapes(expected), trees.named_shapes(state)
    for name in [*shapes, *given]:
        if shapes.get(name) != given.get(name):
            found = [f"shape {tree[name]}" if name in tree else "none" for tree in (shapes, given)]
            raise ValueError(
                f"{who}: the state must be of the same inner optimizer and params; its leaf {name!r} must have "
                f"{found[0]}, got {found[1]}"
            )


def optimizer(who: str, inner: Any) -> None:
    """Checks that an optimizer is one of optax's kind.

    Raises:
      ValueError: says what was given.
    """
    if not (hasattr(inner, "init") and hasattr(inner, "update")):
        raise ValueError(f"{who}: the inner optimizer must be one such as optax.adam(1e-3), got {kind(inner)}")


def key(who: str, key: Any) -> Array:
    """A single typed PRNG key; a raw one is wrapped.

    Raises:
      ValueError: says what was given.
    """
    if not hasattr(key, "dtype"):
        raise ValueError(f"{who}: key must be a PRNG key such as jax.random.key(0), got {kind(key)}")
    typed = key
    if not jnp.issubdtype(key.dtype, jax.dtypes.prng_key):
        try:
            typed = jax.random.wrap_key_data(jnp.asarray(key))
        except TypeError:
            typed = None
    if typed is None or typed.shape:
        raise ValueError(f"{who}: key must be a single PRNG key such as jax.random.key(0), got {kind(key)}")
    return typed


def masks(who: str, masks: Any, params: Any) -> Masks:
    """The masks as a tree parallel to params: bool[*shape], or None where a leaf is dense. They are found by name.

    Raises:
      ValueError: names the leaf that has no place in params, or no mask and no None; or these are of a packed state.
    """
    not_in_patterns(who, masks)
    leaves, given = trees.named_leaves(params), trees.named_leaves(masks)
    for name in given:
        if name not in leaves:
            raise ValueError(f"{who}: masks hold a leaf {name!r} that params do not have{trees.hint(name, leaves)}")
    if missing := trees.uncovered(masks, params):
        raise ValueError(
            f"{who}: masks must be a tree parallel to params, with None for a dense leaf, got {kind(masks)} "
            f"without leaf {missing[0]!r}"
        )
    for name, one in given.items():
        mask(who, name, one, leaves[name])
    return trees.aligned(masks, params)


def not_in_patterns(who: str, masks: Any) -> None:
    """Checks that masks are not those of a packed run's state, which holds none.

    Raises:
      ValueError: says where they are.
    """
    if isinstance(masks, InPatterns):
        raise ValueError(f"{who}: the state of a packed run holds no masks; they are rx.execution.masks_of(packed)")


def mask(who: str, name: str, mask: Any, leaf: Any) -> None:
    """Checks type and shape of a mask.

    Raises:
      ValueError: says what was given.
    """
    shape = jnp.shape(leaf)
    if getattr(mask, "dtype", None) != np.bool_ or mask.shape != shape:
        raise ValueError(f"{who}: the mask of leaf {name!r} must be bool{list(shape)}, got {kind(mask)}")


def of_plan(who: str, plan: Mapping[str, LayerPlan], **given: Any) -> None:
    """Checks that trees have the leaves of a plan in their shapes, and are parallel to each other.

    Raises:
      ValueError: names the argument and the leaf.
    """
    (first, tree), *_ = given.items()
    structure = jax.tree.structure(tree, is_leaf=lambda x: x is None)
    for argument, tree in given.items():
        leaves = trees.named_leaves(tree)
        for name, leaf in plan.items():
            shape = jnp.shape(leaves[name]) if hasattr(leaves.get(name), "dtype") else None
            if shape != tuple(leaf.shape):
                raise ValueError(
                    f"{who}: {argument} must have an array of shape {tuple(leaf.shape)} for leaf {name!r} of the plan, "
                    f"got {kind(leaves[name]) if name in leaves else 'none'}"
                )
        try:
            structure.flatten_up_to(tree)
        except (ValueError, TypeError) as error:
            raise ValueError(f"{who}: {argument} must be parallel to {first}: {str(error).splitlines()[0]}") from None


def gradients(who: str, grads: Any, params: Any, *, of: str = "params") -> None:
    """Checks that gradients are parallel to params, of their shapes, and real where these are.

    Raises:
      ValueError: names the leaf; `of` says what the gradients are parallel to.
    """
    expected, given = trees.named_leaves(params), trees.named_leaves(grads)
    for name in given:
        if name not in expected:
            raise ValueError(f"{who}: gradients must be parallel to {of}; they have a leaf {name!r} too many")
    for name, p in expected.items():
        if name not in given:
            raise ValueError(f"{who}: gradients must be parallel to {of}; leaf {name!r} is missing")
        dtype = jnp.result_type(given[name])
        if jnp.issubdtype(jnp.result_type(p), np.floating) and not jnp.issubdtype(dtype, np.floating):
            raise ValueError(f"{who}: the gradient of leaf {name!r} must be real floating-point, got {dtype}")
        if jnp.shape(given[name]) != jnp.shape(p):
            raise ValueError(
                f"{who}: the gradient of leaf {name!r} must have shape {jnp.shape(p)}, got {jnp.shape(given[name])}; "
                f"gradients are parallel to {of}"
            )
    try:
        jax.tree.structure(params).flatten_up_to(grads)
    except (ValueError, TypeError) as error:
        raise ValueError(f"{who}: gradients must be parallel to {of}: {str(error).splitlines()[0]}") from None


def same_shape(who: str, shape: tuple[int, ...], **given: Any) -> None:
    """Checks the shapes of arrays; None stands for an argument that was left out.

    Raises:
      ValueError: names the argument.
    """
    for name, array in given.items():
        if array is not None and getattr(array, "shape", None) != shape:
            raise ValueError(f"{who}: {name} must be an array of shape {shape}, got {kind(array)}")
