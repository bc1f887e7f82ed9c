"""A model as a flat list of operations: what `compact` and `export_onnx` read and run again."""

from __future__ import annotations

import itertools
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.extend.core as jex

from rigl_jax.jaxprs import called


class Step(NamedTuple):
    """One operation. `ins` and `outs` are numbers of values."""

    primitive: Any
    params: Mapping[str, Any]
    ins: tuple[int, ...]
    outs: tuple[int, ...]

    @property
    def name(self) -> str:
        """Of the primitive."""
        return self.primitive.name


class Program(NamedTuple):
    """Operations in order, calls written out, without those whose results nobody reads.

    Attributes:
      steps: the operations.
      inputs: one value for every array leaf of the arguments, in pytree order.
      outputs: one value for every leaf of the result.
      constants: `{value: array or number}`.
      avals: `{value: its abstract value}`.
      tree: pytree structure of the result.
    """

    steps: tuple[Step, ...]
    inputs: tuple[int, ...]
    outputs: tuple[int, ...]
    constants: dict[int, Any]
    avals: dict[int, Any]
    tree: Any

    @property
    def uses(self) -> Counter[int]:
        """How many operands and outputs each value is."""
        return Counter(itertools.chain(self.outputs, *(step.ins for step in self.steps)))


Rule = Callable[[Step, Sequence[Any]], Any]
"""`(step, operands) -> result`: how to do an operation with a single result."""


def trace(apply: Callable[..., Any], *args: Any) -> Program:
    """The program of `apply(*args)`, args being trees of arrays or `jax.ShapeDtypeStruct`."""
    shapes = jax.tree.map(lambda x: jax.ShapeDtypeStruct(jax.numpy.shape(x), jax.numpy.result_type(x)), args)
    closed, out = jax.make_jaxpr(apply, return_shape=True)(*shapes)
    writer = _Writer([], {}, {})
    inputs = tuple(writer.new(atom.aval) for atom in closed.jaxpr.invars)
    outputs = tuple(_write(writer, closed.jaxpr, closed.consts, inputs))
    steps = tuple(_needed(writer.steps, outputs))
    return Program(steps, inputs, outputs, writer.constants, writer.avals, jax.tree.structure(out))


def evaluate(program: Program, inputs: Iterable[Any], rules: Mapping[str, Rule]) -> Any:
    """Runs a program, operations that `rules` name by their rule, the others as they stand."""
    known = {**program.constants, **dict(zip(program.inputs, inputs, strict=True))}
    for step in program.steps:
        operands = [known[i] for i in step.ins]
        if step.name in rules:
            known[step.outs[0]] = rules[step.name](step, operands)
            continue
        result = step.primitive.bind(*operands, **step.primitive.get_bind_params(step.params))
        known.update(zip(step.outs, result if step.primitive.multiple_results else [result], strict=True))
    return jax.tree.unflatten(program.tree, [known[i] for i in program.outputs])


class _Writer(NamedTuple):
    steps: list[Step]
    constants: dict[int, Any]
    avals: dict[int, Any]

    def new(self, aval: Any) -> int:
        self.avals[len(self.avals)] = aval
        return len(self.avals) - 1

    def constant(self, aval: Any, value: Any) -> int:
        self.constants[(number := self.new(aval))] = value
        return number


def _write(writer: _Writer, jaxpr: Any, consts: Sequence[Any], inputs: Sequence[int]) -> list[int]:
    """Appends the equations of a jaxpr whose inputs have these numbers; returns those of its outputs."""
    known = dict(zip(jaxpr.invars, inputs, strict=True))
    known |= {v: writer.constant(v.aval, c) for v, c in zip(jaxpr.constvars, consts, strict=True)}

    def read(atom: Any) -> int:
        return writer.constant(atom.aval, atom.val) if isinstance(atom, jex.Literal) else known[atom]

    for eqn in jaxpr.eqns:
        ins = tuple(map(read, eqn.invars))
        if (inner := called(eqn)) is not None:
            outs = tuple(_write(writer, inner.jaxpr, inner.consts, ins))
        else:
            outs = tuple(writer.new(v.aval) for v in eqn.outvars)
            writer.steps.append(Step(eqn.primitive, eqn.params, ins, outs))
        known.update(zip(eqn.outvars, outs, strict=True))
    return [read(atom) for atom in jaxpr.outvars]


def _needed(steps: Sequence[Step], outputs: Iterable[int]) -> list[Step]:
    wanted, kept = set(outputs), []
    for step in reversed(steps):
        if wanted.intersection(step.outs):
            wanted.update(step.ins)
            kept.append(step)
    return kept[::-1]
