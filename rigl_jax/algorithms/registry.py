"""The table of the methods. What tells them apart by name, in pages, figures, configs and tests, is here."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any, NamedTuple

from rigl_jax.algorithms.ac_dc import ac_dc
from rigl_jax.algorithms.deep_r import deep_r
from rigl_jax.algorithms.dsr import dsr
from rigl_jax.algorithms.gmp import gmp
from rigl_jax.algorithms.granet import granet
from rigl_jax.algorithms.grasp import grasp
from rigl_jax.algorithms.itop import itop
from rigl_jax.algorithms.mest import mest
from rigl_jax.algorithms.rigl import rigl, rigl_inverted, set_
from rigl_jax.algorithms.snfs import snfs
from rigl_jax.algorithms.snip import snip
from rigl_jax.algorithms.srigl import srigl
from rigl_jax.algorithms.static import static
from rigl_jax.algorithms.ste import dnw, ste
from rigl_jax.algorithms.synflow import synflow
from rigl_jax.algorithms.top_kast import top_kast
from rigl_jax.base import Algorithm, Plan, Structure
from rigl_jax.structures import fan_in, unstructured

FIXED = "masks fixed before training"
DYNAMIC = "dynamic sparse training"
GRADUAL = "pruning while training"
LATENT = "pruned weights live on"


class Entry(NamedTuple):
    """A method.

    Attributes:
      name: what configs and the command line call it.
      label: what tables and figures call it.
      family: `FIXED`, `DYNAMIC`, `GRADUAL` or `LATENT`.
      constructor: `(plan, **options) -> Algorithm`.
      structure: that of the sparse leaves in an example; the method takes others too.
    """

    name: str
    label: str
    family: str
    constructor: Callable[..., Algorithm]
    structure: Structure = unstructured()

    @property
    def options(self) -> dict[str, inspect.Parameter]:
        """The options by name; those that it hands on (`**options`) are not listed."""
        _, *options = inspect.signature(self.constructor).parameters.values()
        return {option.name: option for option in options if option.kind is not option.VAR_KEYWORD}

    @property
    def required(self) -> tuple[str, ...]:
        """The options that have no default, such as the loss of GraSP."""
        return tuple(name for name, option in self.options.items() if option.default is option.empty)

    def example(self, plan: Plan, **options: Any) -> Algorithm:
        """The method with those of the options that it has.

        A set that serves all methods: `period`, `stop` and `loss` (`params -> scalar`).

        >>> import jax.numpy as jnp, rigl_jax as rx
        >>> plan = rx.make_plan({"w": jnp.ones((4, 4))}, 0.5)
        >>> METHODS["static"].example(plan, period=10, stop=100).due(10)
        False
        """
        return self.constructor(plan, **{name: value for name, value in options.items() if name in self.options})


METHODS = {
    entry.name: entry
    for entry in (
        Entry("static", "Static", FIXED, static),
        Entry("set", "SET", DYNAMIC, set_),
        Entry("rigl", "RigL", DYNAMIC, rigl),
        Entry("rigl_inverted", "RigL inverted", DYNAMIC, rigl_inverted),
        Entry("itop", "ITOP", DYNAMIC, itop),
        Entry("mest", "MEST", DYNAMIC, mest),
        Entry("snfs", "SNFS", DYNAMIC, snfs),
        Entry("dsr", "DSR", DYNAMIC, dsr),
        Entry("deep_r", "Deep R", DYNAMIC, deep_r),
        Entry("granet", "GraNet", GRADUAL, granet),
        Entry("srigl", "SRigL", DYNAMIC, srigl, fan_in()),
        Entry("snip", "SNIP", FIXED, snip),
        Entry("grasp", "GraSP", FIXED, grasp),
        Entry("synflow", "SynFlow", FIXED, synflow),
        Entry("gmp", "GMP", GRADUAL, gmp),
        Entry("ste", "STE", LATENT, ste),
        Entry("dnw", "DNW", LATENT, dnw),
        Entry("top_kast", "Top-KAST", LATENT, top_kast),
        Entry("ac_dc", "AC/DC", GRADUAL, ac_dc),
    )
}
"""`{name: Entry}`, in the order of pages and tables."""

ALGORITHMS: dict[str, Callable[..., Algorithm]] = {name: entry.constructor for name, entry in METHODS.items()}
"""`{name: constructor}`."""
