"""Finds from its jaxpr whether an optimizer leaves a weight unchanged, either always or if weight and gradient are 0.

For most optimizers the moments of such a weight stay exactly 0. Some change them: Adabelief and Adafactor add an
epsilon, `add_noise` adds noise. Then `sparsify` resets the state on every step, which costs a pass over the state (and,
with a donated state, a copy of it on CPU). Therefore it asks first.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar

import jax
import jax.numpy as jnp
import numpy as np
import optax

from rigl_jax import trees
from rigl_jax.base import PyTree
from rigl_jax.tracing import geometry
from rigl_jax.tracing.walk import Rule, Walker, branches

T = TypeVar("T")
UNTRACEABLE = (jax.errors.JAXTypeError, jax.errors.JAXIndexError)
"""What JAX raises where a function that is traced asks for concrete numbers."""


def shapes_of(function: Callable[..., T], *arguments: Any) -> T:
    """`jax.eval_shape`, or outside of jit the results themselves where a function asks for concrete numbers."""
    try:
        return jax.eval_shape(function, *arguments)
    except UNTRACEABLE:
        return function(*arguments)


def cached_by_shapes(ask: Callable[..., T]) -> Callable[..., T]:
    """Caches `ask(params, **extra)`, which traces, by shapes, types and shardings of params."""
    known: dict[Any, T] = {}

    def answer(params: PyTree, **extra: Any) -> T:
        if extra:  # whose values may be read
            return ask(params, **extra)
        leaves, treedef = jax.tree.flatten(params)
        kind = treedef, tuple(map(jax.typeof, leaves))
        if kind not in known:
            known[kind] = ask(params)
        return known[kind]

    return answer


def rests(inner: optax.GradientTransformationExtraArgs, params: PyTree, **extra: Any) -> bool:
    """Whether the optimizer state of a weight is 0 at the start and stays 0 while weight and gradient are 0.

    Args:
      inner: the optimizer.
      params: arrays or shapes.
      **extra: keywords of its update.

    Returns:
      True only if this can be proved; False also if the jaxpr contains an operation of unknown effect.
    """
    try:
        state = jax.eval_shape(inner.init, params)
        marks = optax.tree.map_params(
            inner.init,
            lambda s, p: s if isinstance(s, optax.MaskedNode) else s.shape == p.shape,
            state,
            params,
            is_leaf=lambda x: isinstance(x, optax.MaskedNode),
            transform_non_params=lambda _: False,
        )
        starting = jax.make_jaxpr(inner.init)(params)
        going_on = jax.make_jaxpr(lambda g, s, p: inner.update(g, s, p, **extra)[1])(params, state, params)
    except UNTRACEABLE:
        return False
    per_weight = jax.tree.leaves(marks)
    ones = [True] * len(jax.tree.leaves(params))
    starts, stays = ZERO(starting, ones), ZERO(going_on, [*ones, *per_weight, *ones])
    return all(a and b for a, b, mark in zip(starts, stays, per_weight, strict=True) if mark)


def frozen(inner: optax.GradientTransformationExtraArgs, params: PyTree, **extra: Any) -> frozenset[str]:
    """The names of the leaves whose update is 0 for any gradient, as by `optax.set_to_zero`, while others train.

    A learning rate of 0 freezes nothing: there the update is a product with the gradient. An optimizer that trains no
    leaf at all freezes nothing either, so that masks can be observed without training. An optimizer that cannot be
    traced freezes nothing.
    """
    try:
        state = jax.eval_shape(inner.init, params)
        program = jax.make_jaxpr(lambda g, s, p: inner.update(g, s, p, **extra)[0])(params, state, params)
    except UNTRACEABLE:
        return frozenset()
    arguments = [False] * len(program.jaxpr.invars)
    names = trees.named_leaves(params)
    flags = zip(names, ZERO(program, arguments), CONSTANT(program, arguments), strict=True)
    found = frozenset(name for name, zero, constant in flags if zero and constant)
    return found if len(found) < len(names) else frozenset()


def _is_zero(value: Any, aval: Any = None) -> bool:
    del aval
    if isinstance(value, jax.core.Tracer):
        return False
    return jnp.ndim(value) == 0 and jnp.issubdtype(jnp.result_type(value), np.number) and float(np.real(value)) == 0.0


def _in_place(walker: Walker, eqn: Any, zero: list[bool]) -> list[bool]:
    """Only a scalar 0 spread out, or a shape left as it was, keeps positions where they are."""
    (before, *_), after = geometry.shapes(eqn)
    return [zero[0] and before in (after, ())]


ZEROS: dict[str, Rule] = {
    # Where all the operands are 0 at a position, so is the result.
    **dict.fromkeys(("add", "sub", "add_any", "max", "min", "concatenate"), lambda walker, eqn, zero: [all(zero)]),
    **dict.fromkeys(
        ("neg", "sign", "abs", "sqrt", "cbrt", "square", "convert_element_type", "copy", "tanh", "reduce_precision"),
        lambda walker, eqn, zero: [zero[0]],
    ),
    # One operand that is 0 is enough, the others being finite.
    **dict.fromkeys(("mul", "and"), lambda walker, eqn, zero: [any(zero)]),
    "div": lambda walker, eqn, zero: [zero[0]],
    "select_n": lambda walker, eqn, zero: [all(zero[1:])],
    "integer_pow": lambda walker, eqn, zero: [zero[0] and eqn.params["y"] > 0],
    "broadcast_in_dim": _in_place,
    "reshape": _in_place,
    "cond": branches(all),
}
"""Whether the result of a primitive is 0 wherever the operands are that are said to be; not so for others."""

ZERO = Walker(ZEROS, lambda walker, eqn, zero: [False] * len(eqn.outvars), _is_zero)
CONSTANT = Walker({}, lambda walker, eqn, flags: [all(flags)] * len(eqn.outvars), lambda *_: True)
"""Does a value depend on nothing but constants and the flagged arguments?"""
