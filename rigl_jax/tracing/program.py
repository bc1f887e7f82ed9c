"""A model as a flat list of equations, for `compact` and `export_onnx`."""

from __future__ import annotations

import itertools
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.extend.core as jex
import jax.numpy as jnp
from jax.extend.core.primitives import copy_p

from rigl_jax.tracing.primitives import CUSTOM, held
from rigl_jax.tracing.walk import Rule, Walker


class Program(NamedTuple):
    """Equations in order, with calls inlined, without those whose results are not used.

    Each variable (with its abstract value as `aval`) is one value, also in a function that is called several times.

    Attributes:
      equations: the operations, on variables.
      inputs: one variable for every array leaf of the arguments, in pytree order.
      outputs: one variable for every leaf of the result.
      constants: `{variable: array or number}`.
      within: `{first result of an equation: the outermost call of a function with derivatives of its own, that the
        equation is part of}`, where it is part of one. Such a call is an equation too; each of its results is made by
        an equation within it.
      tree: pytree structure of the result.
    """

    equations: tuple[Any, ...]
    inputs: tuple[Any, ...]
    outputs: tuple[Any, ...]
    constants: dict[Any, Any]
    within: dict[Any, Any]
    tree: Any

    @property
    def uses(self) -> Counter[Any]:
        """How often each variable is an operand or an output."""
        return Counter(itertools.chain(self.outputs, *(eqn.invars for eqn in self.equations)))


def trace_model(who: str, apply: Callable[..., Any], *args: Any) -> Program:
    """`trace` of a user's function.

    Raises:
      ValueError: it raises an error, whose first line is told.
    """
    try:
        return trace(apply, *args)
    except Exception as error:  # the model may raise anything
        raise untraceable(who, error) from error


def untraceable(who: str, error: Exception) -> ValueError:
    """What is raised where tracing a user's function raises an error."""
    why = str(error).splitlines()[0] if str(error) else type(error).__name__
    return ValueError(f"{who}: apply(params, *inputs) could not be traced: {why}")


def trace(apply: Callable[..., Any], *args: Any) -> Program:
    """The program of `apply(*args)`, args being trees of arrays or `jax.ShapeDtypeStruct`."""
    shapes = jax.tree.map(lambda x: jax.ShapeDtypeStruct(jnp.shape(x), jnp.result_type(x)), args)
    closed, out = jax.make_jaxpr(apply, return_shape=True)(*shapes)
    program = Program((), tuple(jex.Var(v.aval) for v in closed.jaxpr.invars), (), {}, {}, jax.tree.structure(out))
    equations: list[Any] = []
    outputs = _writer(equations, program)(closed, program.inputs)
    return program._replace(equations=_needed(equations, outputs, program.within), outputs=tuple(outputs))


def _writer(equations: list[Any], program: Program) -> Walker:
    """Walks on variables: appends equations on variables of their own."""

    def constant(value: Any, aval: Any) -> Any:
        variable = jex.Var(aval)
        program.constants[variable] = value
        return variable

    def custom(walker: Walker, eqn: Any, ins: list[Any]) -> list[Any]:
        own: list[Any] = []
        outs: list[Any] = []
        (inner,) = held(eqn)
        for out in _writer(own, program)(inner, ins):
            if out in outs or not any(out in made.outvars for made in own):  # a result that is handed on unchanged
                (copy,) = jax.make_jaxpr(copy_p.bind)(jax.ShapeDtypeStruct(out.aval.shape, out.aval.dtype)).eqns
                (out,) = _append(own, copy, [out])
            outs.append(out)
        call = eqn.replace(invars=ins, outvars=outs)
        program.within.update((made.outvars[0], call) for made in own if made.outvars)
        equations.extend(own)
        return outs

    return Walker(dict.fromkeys(CUSTOM, custom), lambda walker, eqn, ins: _append(equations, eqn, ins), constant)


def _append(equations: list[Any], eqn: Any, ins: list[Any]) -> list[Any]:
    outs = [jex.Var(v.aval) for v in eqn.outvars]
    equations.append(eqn.replace(invars=ins, outvars=outs))
    return outs


def _needed(equations: Sequence[Any], outputs: Iterable[Any], within: Mapping[Any, Any]) -> tuple[Any, ...]:
    wanted, kept = set(outputs), []
    for eqn in reversed(equations):
        if wanted.intersection(eqn.outvars):
            wanted.update(eqn.invars)
            if (call := within.get(eqn.outvars[0])) is not None:
                wanted.update(call.invars)  # its derivatives may read arguments that it does not
            kept.append(eqn)
    return tuple(kept[::-1])


Around = Callable[[Any, Sequence[Any], Callable[..., list[Any]], Sequence[Any]], list[Any]]
"""`(call, outs, run, operands) -> results`: evaluates a call with custom derivatives. `run(*operands)` evaluates it
operation by operation and returns the `outs` that are needed."""


def evaluate(program: Program, inputs: Iterable[Any], rules: Mapping[str, Rule], around: Around | None = None) -> Any:
    """Runs a program: operations in `rules` by their rule, the others unchanged.

    Derivatives are those of the operations; custom derivatives are lost unless `around` keeps them.
    """
    walker = Walker(rules, _as_it_stands, lambda value, aval: value)
    known = {**program.constants, **dict(zip(program.inputs, inputs, strict=True))}
    calls = [program.within.get(eqn.outvars[0]) for eqn in program.equations]
    for _, part in itertools.groupby(zip(calls, program.equations, strict=True), key=lambda pair: id(pair[0])):
        calls, inside = zip(*part, strict=True)
        if calls[0] is None or around is None:
            walker.follow(inside, known)
            continue
        made = {variable for eqn in inside for variable in eqn.outvars}
        outs = [variable for variable in calls[0].outvars if variable in made]

        def run(*operands: Any, call: Any = calls[0], inside: Any = inside, outs: Any = outs) -> list[Any]:
            local = {**program.constants, **dict(zip(call.invars, operands, strict=True))}
            walker.follow(inside, local)
            return walker.read(outs, local)

        known.update(zip(outs, around(calls[0], outs, run, walker.read(calls[0].invars, known)), strict=True))
    return jax.tree.unflatten(program.tree, walker.read(program.outputs, known))


def _as_it_stands(walker: Walker, eqn: Any, operands: list[Any]) -> Sequence[Any]:
    """The operation at the shapes of its operands, which may differ from the traced shapes."""
    del walker
    results = eqn.primitive.bind(*operands, **eqn.primitive.get_bind_params(eqn.params))
    return results if eqn.primitive.multiple_results else [results]
