"""Arguments of public functions, checked by kind at the boundary: `@arguments(scores=array, k=count)`.

A rule checks one argument and raises an error of one line: who, which argument, what was expected, what was given.
The function gets what the rule returns: the argument, with sizes as Python's integers, because NumPy's narrow integers
overflow. The function itself checks what depends on several arguments (a mask and its weight). docs/architecture.md
says why annotations are not checked instead.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Mapping, Sequence
from typing import Any, ParamSpec, TypeVar

import jax
import jax.numpy as jnp
import numpy as np

from rigl_jax import checks, contents
from rigl_jax.base import Axes, LayerPlan, Structure
from rigl_jax.messages import shown

P = ParamSpec("P")
R = TypeVar("R")
Rule = Callable[[str, str, Any], Any]
"""`(function, argument, value) -> value`: raises a ValueError for a value of another kind."""


def arguments(who: str | None = None, /, **rules: Rule) -> Callable[[Callable[P, R]], Callable[P, R]]:
    """Checks arguments by their rules before a function is called. One left out is not checked.

    Args:
      who: what errors call the function, if not by its name: such as the name of one that returned it.
      **rules: for each argument.

    >>> @arguments(n=whole(1))
    ... def half(n): return n // 2
    >>> half(0)
    Traceback (most recent call last):
    ValueError: half: n must be a whole number, at least 1, got 0
    """

    def wrap(function: Callable[P, R]) -> Callable[P, R]:
        signature = inspect.signature(function)
        if unknown := rules.keys() - signature.parameters.keys():
            raise ValueError(f"arguments: {function.__name__} has no {sorted(unknown)}")

        @functools.wraps(function)
        def checked(*args: P.args, **kwargs: P.kwargs) -> R:
            try:
                bound = signature.bind(*args, **kwargs)
            except TypeError:
                return function(*args, **kwargs)  # Python says what is wrong with the call
            for name, check in rules.items():
                if name in bound.arguments:
                    bound.arguments[name] = check(who or function.__name__, name, bound.arguments[name])
            return function(*bound.args, **bound.kwargs)

        return checked

    return wrap


def rule(expected: str, fits: Callable[[Any], bool], handed: Callable[[Any], Any] = lambda value: value) -> Rule:
    """A rule for a value that fits; the error says what was expected. The function gets `handed(value)`."""

    def check(who: str, name: str, value: Any) -> Any:
        if not fits(value):
            raise ValueError(f"{who}: {name} must be {expected}, got {shown(value)}")
        return handed(value)

    return check


def optional(check: Rule) -> Rule:
    """None, or what the rule takes."""
    return lambda who, name, value: None if value is None else check(who, name, value)


def whole(least: int) -> Rule:
    """An integer of at least so much."""
    return rule(f"a whole number, at least {least}", lambda value: checks.is_whole(value, least), checks.plain)


share = rule("above 0, at most 1", lambda value: 0 < checks.real(value) <= 1, checks.plain)
"""A part of a whole that is not empty."""

positive = rule("a finite number above 0", lambda value: checks.real(value) > 0, checks.plain)
"""One number, such as a rate or seconds."""


def one_of(kinds: Any, expected: str) -> Rule:
    """An instance of a type, or of one of several."""
    return rule(expected, lambda value: isinstance(value, kinds))


def array(rank: int | None = None, *, host: bool = False) -> Rule:
    """An array, traced or not; `host`: or what NumPy makes a numeric array of that rank of."""
    return rule(f"an array{_axes(rank)}", lambda value: _is_array(value, rank, host))


def host_array(rank: int | None = None) -> Rule:
    """An array that is not traced, or what NumPy converts to one; passed on as a NumPy array."""
    return rule(
        f"an array{_axes(rank)} with known values, not traced by jit",
        lambda value: not isinstance(value, jax.core.Tracer) and _is_array(value, rank, True),
        np.asarray,
    )


def finite(rank: int | None = None, *, host: bool = False) -> Rule:
    """`array` of real numbers, not empty; known values are finite, in float32 too."""
    return contents.all_of(array(rank, host=host), contents.finite)


def finite_host_array(rank: int | None = None) -> Rule:
    """`host_array` of real numbers, not empty, all finite in float64."""
    return contents.all_of(host_array(rank), lambda who, name, value: contents.finite(who, name, value, np.float64))


def not_nan(rank: int | None = None, *, host: bool = False) -> Rule:
    """`array` of real numbers, not empty; no known value is NaN."""
    return contents.all_of(array(rank, host=host), contents.not_nan)


def logits(rank: int, *, host: bool = False) -> Rule:
    """`not_nan` with two classes or more along the last axis; probabilities are welcome, too."""
    return contents.all_of(not_nan(rank, host=host), contents.classes)


def probabilities(rank: int, *, host: bool = False) -> Rule:
    """`array` of floats, not empty, two classes or more along the last axis; known values add up to 1 over it."""
    return contents.all_of(array(rank, host=host), contents.probabilities)


def _axes(rank: int | None) -> str:
    return "" if rank is None else f" of {rank} {'axis' if rank == 1 else 'axes'}"


def _is_array(value: Any, rank: int | None, host: bool) -> bool:
    found: Any = value
    if host and isinstance(value, Sequence) and not isinstance(value, str):
        try:
            found = np.asarray(value)
        except (ValueError, TypeError):  # rows of unequal length, or something traced
            return False
    numeric = hasattr(found, "shape") and hasattr(found, "dtype") and jnp.issubdtype(found.dtype, jnp.generic)
    return numeric and found.dtype != object and (rank is None or len(found.shape) == rank)


def _is_scalar(value: Any, kind: Any) -> bool:
    if isinstance(value, (str, bytes, type(None))) or not hasattr(value, "dtype"):
        return isinstance(value, kind) and not isinstance(value, bool)
    return value.shape == () and jnp.issubdtype(value.dtype, jnp.number)


scalar = rule("one number", lambda value: _is_scalar(value, (int, float)))
"""A real number, traced or not."""


numbers = rule(
    "a number, or an array of them",
    lambda value: (
        jnp.issubdtype(value.dtype, jnp.number) if hasattr(value, "dtype") else _is_scalar(value, (int, float))
    ),
)
"""Real numbers, traced or not: one for all, or one a layer."""


def _is_count(value: Any) -> bool:
    if hasattr(value, "dtype"):
        return jnp.issubdtype(value.dtype, jnp.integer)
    return isinstance(value, int) and not isinstance(value, bool)


count = rule("a whole number, or an array of them", _is_count)
"""An integer or integers, traced or not."""

counts = rule("{name: whole number}", lambda value: isinstance(value, Mapping) and all(map(_is_count, value.values())))
"""Counts by name."""

flag = rule("True or False", lambda value: isinstance(value, (bool, np.bool_)))
"""A bool, known on the host."""

word = one_of(str, "a word")
function = rule("a function", callable)
axes = one_of(Axes, "an rx.base.Axes")
structure = one_of(Structure, "one such as rx.unstructured()")
leaf = one_of(LayerPlan, "a layer of a plan")
sequence = rule("a list or tuple", lambda value: isinstance(value, Sequence) and not isinstance(value, str))


def _plain_sizes(sizes: Sequence[Any]) -> tuple[int, ...]:
    return tuple(map(checks.plain, sizes))


shape = rule(
    "a shape, a tuple of whole numbers",
    lambda value: isinstance(value, Sequence) and all(checks.is_whole(n) for n in value),
    _plain_sizes,
)
shapes = rule(
    "{name: shape}",
    lambda value: (
        isinstance(value, Mapping)
        and all(isinstance(s, Sequence) and all(checks.is_whole(n) for n in s) for s in value.values())
    ),
    lambda value: {name: _plain_sizes(sizes) for name, sizes in value.items()},
)
pair = rule(
    "a pair of whole numbers, at least 1",
    lambda value: isinstance(value, Sequence) and len(value) == 2 and all(checks.is_whole(n, 1) for n in value),
    _plain_sizes,
)

steps = rule(
    "one whole number for each axis of an image, at least 1",
    lambda value: isinstance(value, Sequence) and all(checks.is_whole(n, 1) for n in value),
    _plain_sizes,
)


def plan(who: str, name: str, value: Any) -> Any:
    """What `make_plan` gives."""
    del name
    checks.plan(who, value)
    return value


def key(who: str, name: str, value: Any) -> Any:
    """A single PRNG key, passed on as a typed key."""
    del name
    return checks.key(who, value)
