"""Loops and branches: their programs are read, and run at smaller shapes, like the program around them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.extend.core as jex

from rigl_jax.channels import splits
from rigl_jax.channels.numbers import read_numbers
from rigl_jax.tracing import primitives
from rigl_jax.tracing.channels import Labels, Reading, follow
from rigl_jax.tracing.program import Program, trace
from rigl_jax.tracing.walk import Rule, Walker


def scan(walker: Walker, eqn: Any, ins: list[Labels]) -> list[Labels]:
    """The labels of what a scan carries, and of what it stacks. The axis that it runs over stays."""
    channels, loop = walker.context.channels, primitives.scan(eqn)
    first = loop.consts + loop.carry
    ins = [splits.settle(channels, axes) for axes in ins]
    stack = [axes[0] for axes in ins[first:] if axes[0] is not None]
    channels.fix([channels.join(*stack)] if stack else (), "layers or steps of a scan")
    inside = [*ins[:first], *(axes[1:] for axes in ins[first:])]
    program = _traced(loop.body)
    walker.context.notes.bodies[eqn.outvars[0]] = [program]
    outs = _inside(walker, program, inside, eqn.params["length"])
    carry = [_joined(walker, pair) for pair in zip(ins[loop.consts : first], outs, strict=False)]
    return [*carry, *((None, *axes) for axes in outs[loop.carry :])]


def cond(walker: Walker, eqn: Any, ins: list[Labels]) -> list[Labels]:
    """Both branches give the same channels."""
    ins = [splits.settle(walker.context.channels, axes) for axes in ins]
    programs = [_traced(branch) for branch in primitives.branches(eqn)]
    walker.context.notes.bodies[eqn.outvars[0]] = programs
    outs = [_inside(walker, program, ins[1:], 1) for program in programs]
    return [_joined(walker, values) for values in zip(*outs, strict=True)]


def _traced(body: jex.ClosedJaxpr) -> Program:
    """The program of a loop, on variables of its own."""
    return trace(jex.jaxpr_as_fun(body), *(jax.ShapeDtypeStruct(a.shape, a.dtype) for a in body.in_avals))


def _inside(walker: Walker, program: Program, ins: Sequence[Labels], trips: int) -> list[Labels]:
    reading: Reading = walker.context
    notes = reading.notes._replace(trips=reading.notes.trips * trips)
    notes.numbers.update(read_numbers(program))
    reading.labels.update(zip(program.inputs, ins, strict=True))
    reading.labels.update((v, reading.channels.new(v.aval.shape)) for v in program.constants)
    follow(program, reading._replace(notes=notes), walker.rules, walker.unknown)
    return [splits.settle(reading.channels, reading.labels[variable]) for variable in program.outputs]


def _joined(walker: Walker, values: Sequence[Labels]) -> Labels:
    channels = walker.context.channels
    return tuple(None if all(a is None for a in axes) else channels.join(*axes) for axes in zip(*values, strict=True))


Run = Callable[[Program, Sequence[Any]], list[Any]]
"""`(program, inputs) -> outputs`, at the smaller shapes."""


def resized(bodies: dict[Any, list[Program]], run: Run) -> dict[str, Rule]:
    """Rules that run loops and branches at smaller shapes."""

    def run_scan(walker: Walker, eqn: Any, xs: list[Any]) -> list[Any]:
        (program,), loop = bodies[eqn.outvars[0]], primitives.scan(eqn)
        first, given = loop.consts + loop.carry, eqn.params

        def step(carry: list[Any], x: list[Any]) -> tuple[list[Any], list[Any]]:
            outs = run(program, [*xs[: loop.consts], *carry, *x])
            return outs[: loop.carry], outs[loop.carry :]

        carry, stacked = jax.lax.scan(
            step, xs[loop.consts : first], xs[first:], given["length"], given["reverse"], given["unroll"]
        )
        return [*carry, *stacked]

    def run_cond(walker: Walker, eqn: Any, xs: list[Any]) -> list[Any]:
        choices = [lambda *ops, program=program: run(program, ops) for program in bodies[eqn.outvars[0]]]
        return jax.lax.switch(xs[0], choices, *xs[1:])

    return {"scan": run_scan, "cond": run_cond}
