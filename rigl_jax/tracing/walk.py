"""The interpreter of jaxprs. Each analysis of a program is a table of rules for it.

    walker = Walker(rules={"neg": lambda walker, eqn, ins: [-ins[0]]}, unknown=..., constant=...)
    results = walker(jax.make_jaxpr(f)(*args), values)

The values may be anything: arrays (a packed run), bools (whether a value stays 0), names of weights (costs). The
interpreter handles variables and calls: it walks into `jit`, `jax.checkpoint` and functions with custom derivatives,
unless there is a rule for them. A rule gets the equation, with its shapes and parameters, and the values of its
operands. Rules of loops and branches walk the inner programs (which `primitives` reads) as often as they need. The
owner of the table decides what to do with a primitive that has no rule.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import jax.extend.core as jex

from rigl_jax.tracing import primitives

Rule = Callable[["Walker", Any, list[Any]], Sequence[Any]]
"""`(walker, equation, values of its operands) -> values of its results`."""


class Walker(NamedTuple):
    """An interpreter with its rules.

    Attributes:
      rules: by names of primitives. They take precedence over what the interpreter does itself.
      unknown: the rule of primitives that have no rule and are not calls.
      constant: `(number or array, its abstract value) -> value`, for the constants of the program.
      context: data that the rules share.
      shortcut: `(equation, values of its operands) -> values of its results`, or None to continue: called before any
        rule, so that equations of no interest are skipped.
    """

    rules: Mapping[str, Rule]
    unknown: Rule
    constant: Callable[[Any, Any], Any]
    context: Any = None
    shortcut: Callable[[Any, list[Any]], Sequence[Any] | None] | None = None

    def __call__(self, program: jex.ClosedJaxpr, operands: Sequence[Any]) -> list[Any]:
        """The values of a program's outputs, given those of its inputs."""
        jaxpr = program.jaxpr
        known = dict(zip(jaxpr.invars, operands, strict=True))
        for variable, array in zip(jaxpr.constvars, program.consts, strict=True):
            known[variable] = self.constant(array, variable.aval)
        self.follow(jaxpr.eqns, known)
        return self.read(jaxpr.outvars, known)

    def follow(self, equations: Iterable[Any], known: dict[Any, Any]) -> None:
        """Adds the values of the results of equations to what is known."""
        for eqn in equations:
            known.update(zip(eqn.outvars, self.results(eqn, self.read(eqn.invars, known)), strict=True))

    def read(self, atoms: Iterable[Any], known: Mapping[Any, Any]) -> list[Any]:
        """The values of variables and literals."""
        return [self.constant(a.val, a.aval) if isinstance(a, jex.Literal) else known[a] for a in atoms]

    def results(self, eqn: Any, operands: list[Any]) -> Sequence[Any]:
        """The values of the results of one equation."""
        if self.shortcut is not None and (found := self.shortcut(eqn, operands)) is not None:
            return found
        rule = self.rules.get(eqn.primitive.name)
        if rule is None and (inner := primitives.called(eqn)) is not None:
            return self(inner, operands)
        return (rule or self.unknown)(self, eqn, operands)


def branches(join: Callable[[Sequence[Any]], Any]) -> Rule:
    """The rule of `cond`: a value that may come from either branch is their join."""

    def rule(walker: Walker, eqn: Any, ins: list[Any]) -> list[Any]:
        chosen = [walker(branch, ins[1:]) for branch in primitives.branches(eqn)]
        return [join(values) for values in zip(*chosen, strict=True)]

    return rule
