"""Does an optimizer leave a weight alone, because it is 0 and gets no gradient, or whatever comes? Read off its jaxpr.

Most do: their moments of such a weight stay exactly 0, and nothing needs to be done to keep them there. Some do not:
Adabelief and Adafactor add an epsilon, `add_noise` adds noise. `sparsify` puts those back on every step, which costs a
pass over the state (and, with a donated state, a copy of it on CPU), so it asks first.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, TypeVar

import jax
import jax.numpy as jnp
import numpy as np
import optax

from rigl_jax import trees
from rigl_jax.base import PyTree
from rigl_jax.tracing.primitives import branches, called

T = TypeVar("T")

# Zero in, zero out: where all the operands are 0 at a position, so is the result.
_ALL = {"add", "sub", "add_any", "max", "min", "select_n", "concatenate"}
_ONE = {
    "neg",
    "sign",
    "abs",
    "sqrt",
    "cbrt",
    "square",
    "convert_element_type",
    "copy",
    "tanh",
    "reduce_precision",
}
# One operand that is 0 is enough, the others being finite.
_ANY = {"mul", "and"}


def remembered(ask: Callable[..., T]) -> Callable[..., T]:
    """`ask(params, **extra)`, which traces, asked once for params of a kind."""
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
    """Whether all that `inner` keeps for a weight is 0 at the start and stays 0 while weight and gradient are 0.

    Args:
      inner: the optimizer.
      params: arrays or shapes.
      **extra: keywords of its update.

    Returns:
      True only if that can be shown; False also where the jaxpr holds an operation of unknown effect.
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
        per_weight = jax.tree.leaves(marks)
        ones = [True] * len(jax.tree.leaves(params))
        starts = _zeros_out(inner.init, [params], ones)
        stays = _zeros_out(
            lambda g, s, p: inner.update(g, s, p, **extra)[1], [params, state, params], [*ones, *per_weight, *ones]
        )
    except Exception:  # an optimizer that cannot be traced like this is simply not shown to rest
        return False
    return all(a and b for a, b, mark in zip(starts, stays, per_weight, strict=True) if mark)


def frozen(inner: optax.GradientTransformationExtraArgs, params: PyTree, **extra: Any) -> frozenset[str]:
    """The names of the leaves whose update is 0 whatever comes in, as by `optax.set_to_zero`, while others train.

    A learning rate of 0 freezes nothing: there the update is a product with the gradient. Nor does an optimizer that
    trains no leaf at all: who runs that wants to see the masks.
    """
    state = jax.eval_shape(inner.init, params)
    closed = jax.make_jaxpr(lambda g, s, p: inner.update(g, s, p, **extra)[0])(params, state, params)
    arguments = [False] * len(closed.jaxpr.invars)
    consts = [_is_zero(c) for c in closed.consts]
    zero, fixed = _walk(closed.jaxpr, consts, arguments), _fixed(closed.jaxpr, arguments)
    names = trees.named_leaves(params)
    found = frozenset(name for name, *flags in zip(names, zero, fixed, strict=True) if all(flags))
    return found if len(found) < len(names) else frozenset()


def _fixed(jaxpr: Any, arguments: list[bool]) -> list[bool]:
    """For each output: does it depend on nothing but constants and the flagged arguments?"""
    known = dict(zip([*jaxpr.constvars, *jaxpr.invars], [*[True] * len(jaxpr.constvars), *arguments], strict=True))

    def read(atom: Any) -> bool:
        return hasattr(atom, "val") or known[atom]

    for eqn in jaxpr.eqns:
        flags = [read(atom) for atom in eqn.invars]
        inner = called(eqn)
        after = [all(flags)] * len(eqn.outvars) if inner is None else _fixed(inner.jaxpr, flags)
        known.update(zip(eqn.outvars, after, strict=True))
    return [read(atom) for atom in jaxpr.outvars]


def _zeros_out(f: Callable[..., Any], arguments: Sequence[PyTree], zero: list[bool]) -> list[bool]:
    closed = jax.make_jaxpr(f)(*arguments)
    return _walk(closed.jaxpr, [_is_zero(c) for c in closed.consts], zero)


def _walk(jaxpr: Any, consts: list[bool], arguments: list[bool]) -> list[bool]:
    """For each output: is it 0 wherever the flagged arguments are?"""
    known = dict(zip([*jaxpr.constvars, *jaxpr.invars], [*consts, *arguments], strict=True))

    def read(atom: Any) -> bool:
        return _is_zero(atom.val) if hasattr(atom, "val") else known[atom]

    for eqn in jaxpr.eqns:
        known.update(zip(eqn.outvars, _rule(eqn, [read(atom) for atom in eqn.invars]), strict=True))
    return [read(atom) for atom in jaxpr.outvars]


def _rule(eqn: Any, zero: list[bool]) -> list[bool]:
    name = eqn.primitive.name
    if name == "cond":
        chosen = [_walk(b.jaxpr, [_is_zero(c) for c in b.consts], zero[1:]) for b in branches(eqn)]
        return [all(flags) for flags in zip(*chosen, strict=True)]
    if (inner := called(eqn)) is not None:
        return _walk(inner.jaxpr, [_is_zero(c) for c in inner.consts], zero)
    if name == "select_n":
        return [all(zero[1:])]
    if name == "integer_pow":
        return [zero[0] and eqn.params["y"] > 0]
    if name == "div":
        return [zero[0]]
    if name in ("broadcast_in_dim", "reshape"):
        # Only a scalar 0 spread out, or a shape left as it was, keeps positions where they are.
        same = eqn.invars[0].aval.shape == eqn.outvars[0].aval.shape
        return [zero[0] and (same or eqn.invars[0].aval.shape == ())]
    flag = (name in _ALL and all(zero)) or (name in _ONE and zero[0]) or (name in _ANY and any(zero))
    return [flag] * len(eqn.outvars)


def _is_zero(value: Any) -> bool:
    if isinstance(value, jax.core.Tracer):
        return False
    return jnp.ndim(value) == 0 and jnp.issubdtype(jnp.result_type(value), np.number) and float(np.real(value)) == 0.0
