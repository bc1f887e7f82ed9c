"""A model as a flat list of operations: what `compact` and `export_onnx` read and run again."""

from __future__ import annotations

import dataclasses
import itertools
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.extend.core as jex
from jax.extend.core.primitives import copy_p

from rigl_jax.tracing.primitives import CUSTOM, called


@dataclasses.dataclass(frozen=True, eq=False)
class Custom:
    """A call of a function with derivatives of its own. `ins` and `outs` are numbers of values, each out made by it."""

    eqn: Any
    ins: tuple[int, ...]
    outs: tuple[int, ...]


class Step(NamedTuple):
    """One operation. `ins` and `outs` are numbers of values; `within` is the outermost such call that it is part of."""

    primitive: Any
    params: Mapping[str, Any]
    ins: tuple[int, ...]
    outs: tuple[int, ...]
    within: Custom | None = None

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


Around = Callable[[Custom, Sequence[int], Callable[..., list[Any]], Sequence[Any]], list[Any]]
"""`(custom, outs, run, operands) -> results`: how to do a call with derivatives of its own. `run(*operands)` does it
operation by operation, and gives the `outs` that are needed."""


def evaluate(program: Program, inputs: Iterable[Any], rules: Mapping[str, Rule], around: Around | None = None) -> Any:
    """Runs a program, operations that `rules` name by their rule, the others as they stand.

    Derivatives are those of the operations, and derivatives of a function's own are lost unless `around` keeps them.
    """
    known = {**program.constants, **dict(zip(program.inputs, inputs, strict=True))}
    for custom, steps in itertools.groupby(program.steps, key=lambda step: step.within):
        if custom is None or around is None:
            _run(steps, known, rules)
            continue
        inside = tuple(steps)
        made = {i for step in inside for i in step.outs}
        outs = [i for i in custom.outs if i in made]

        def run(*operands: Any, custom: Any = custom, inside: Any = inside, outs: Any = outs) -> list[Any]:
            local = {**program.constants, **dict(zip(custom.ins, operands, strict=True))}
            _run(inside, local, rules)
            return [local[i] for i in outs]

        known.update(zip(outs, around(custom, outs, run, [known[i] for i in custom.ins]), strict=True))
    return jax.tree.unflatten(program.tree, [known[i] for i in program.outputs])


def _run(steps: Iterable[Step], known: dict[int, Any], rules: Mapping[str, Rule]) -> None:
    """Adds the results of the steps to what is known."""
    for step in steps:
        operands = [known[i] for i in step.ins]
        if step.name in rules:
            known[step.outs[0]] = rules[step.name](step, operands)
            continue
        result = step.primitive.bind(*operands, **step.primitive.get_bind_params(step.params))
        known.update(zip(step.outs, result if step.primitive.multiple_results else [result], strict=True))


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
        if (inner := called(eqn)) is not None and eqn.primitive.name in CUSTOM:
            outs = _write_custom(writer, eqn, inner, ins)
        elif inner is not None:
            outs = tuple(_write(writer, inner.jaxpr, inner.consts, ins))
        else:
            outs = tuple(writer.new(v.aval) for v in eqn.outvars)
            writer.steps.append(Step(eqn.primitive, eqn.params, ins, outs))
        known.update(zip(eqn.outvars, outs, strict=True))
    return [read(atom) for atom in jaxpr.outvars]


def _write_custom(writer: _Writer, eqn: Any, inner: Any, ins: tuple[int, ...]) -> tuple[int, ...]:
    """The same for a call with derivatives of its own; a result that it only hands on becomes a copy."""
    own = writer._replace(steps=[])
    made = set()
    outs = []
    for i in _write(own, inner.jaxpr, inner.consts, ins):
        if i in made or not any(i in step.outs for step in own.steps):
            copied = writer.new(writer.avals[i])
            own.steps.append(Step(copy_p, {}, (i,), (copied,)))
            i = copied
        made.add(i)
        outs.append(i)
    custom = Custom(eqn, ins, tuple(outs))
    writer.steps.extend(step._replace(within=custom) for step in own.steps)
    return custom.outs


def _needed(steps: Sequence[Step], outputs: Iterable[int]) -> list[Step]:
    wanted, kept = set(outputs), []
    for step in reversed(steps):
        if wanted.intersection(step.outs):
            wanted.update(step.ins)
            kept.append(step)
    return kept[::-1]
