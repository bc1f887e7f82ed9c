"""The role of each leaf: whether it is a kernel, and which of its axes are inputs and outputs.

If the model is given, it is traced and its products decide (`uses`): axes that are summed over are inputs; axes with
a separate product for each index (scan, vmap, experts) are a stack. Layers that read one input look like outputs in a
trace, unless a later weight treats them separately. In this case, and for leaves without a visible use, the params
decide. Without a model only the params decide, by the rules at the head of `named_roles`.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from rigl_jax import checks, messages, trees
from rigl_jax.base import Axes, PyTree, Role, Shape
from rigl_jax.tracing.named_roles import named_roles
from rigl_jax.tracing.program import untraceable
from rigl_jax.tracing.uses import INPUT, OUTPUT, STACK, Data, Use, traced, weights

FEW_AXES = "fewer than two axes"


def roles(params: PyTree, apply: Callable[..., Any] | None = None, inputs: Sequence[Any] = ()) -> dict[str, Role]:
    """The role of every leaf, which `make_plan` uses unless a rule or `axes` state another.

    Args:
      params: the weights, or their shapes.
      apply: the model, `apply(params, *inputs)`; it is traced, not run. None: names and modules decide, by the rules at
        the head of `rigl_jax.tracing.named_roles`.
      inputs: of the model, arrays or shapes.

    Returns:
      `{name: Role}`, in the order of the leaves.

    >>> import jax.numpy as jnp
    >>> params = {"w": jnp.ones((6, 8))}  # outputs first
    >>> roles(params, lambda p, x: x @ p["w"].T, (jnp.ones((2, 8)),))["w"].axes
    Axes(inputs=(1,), outputs=(0,), window=(), stack=())
    """
    check_model("roles", apply, inputs)
    found = named_roles(params)
    if apply is not None:
        try:
            shapes, program, _ = traced(params, apply, tuple(inputs))
        except Exception as error:  # the model may raise anything
            raise untraceable("roles", error) from error
        for name, role in _traced_roles(shapes, program).items():
            found[name] = _with_stack(role, found[name])
    shapes = {name: tuple(p.shape) for name, p in trees.named_leaves(params).items() if hasattr(p, "shape")}
    return {name: _settled(role, shapes[name]) for name, role in found.items()}


def check_model(who: str, apply: Any, inputs: Any) -> None:
    """Checks that a model and its inputs can be traced.

    Raises:
      ValueError: names the argument.
    """
    checks.optional_functions(who, apply=apply)
    if not isinstance(inputs, (tuple, list)):
        raise ValueError(f"{who}: inputs must be a tuple of apply's inputs, got {messages.kind(inputs)}")


def _with_stack(traced: Role, named: Role) -> Role:
    """The roles by the trace. It cannot distinguish layers with one common input from outputs; the names may."""
    if traced.axes is None or named.axes is None or not named.axes.stack:
        return traced
    apart = traced.axes._replace(
        outputs=tuple(axis for axis in traced.axes.outputs if axis not in named.axes.stack), stack=named.axes.stack
    )
    return traced._replace(axes=apart) if apart == named.axes else traced


def _settled(role: Role, shape: Shape) -> Role:
    """A kernel has at least two axes and is not empty; a stack is not an axis of its layers."""
    within = len(shape) - (len(role.axes.stack) if role.axes else 0)
    if role.dense is None and (within < 2 or not math.prod(shape)):
        return role._replace(dense=FEW_AXES if within < 2 else "empty")
    return role


def _traced_roles(shapes: Mapping[str, Sequence[int]], program: Any) -> dict[str, Role]:
    """The roles of the leaves whose use is visible in a program; the leaves are its first inputs."""
    walker, owned = weights(shapes)
    walker(program, [*owned, *[Data({})] * (len(program.jaxpr.invars) - len(owned))])
    seen = walker.context
    found = {
        name: _role([_layered(use, seen.apart[name]) for use in uses], shapes[name]) for name, uses in seen.uses.items()
    }
    return {name: role for name, role in found.items() if role is not None}


def _role(uses: list[Use], shape: Sequence[int]) -> Role | None:
    """The decisive one of several uses: a lookup if there is one, else the first product of a stack, else the first."""
    by_kind = {use.kind: use for use in reversed(uses)}
    if use := by_kind.get("lookup"):
        return Role(_axes(use.parts, shape), "embedding")
    if "product" in by_kind or "depthwise" in by_kind:
        products = [(use.kind, _axes(use.parts, shape)) for use in uses if use.kind in ("product", "depthwise")]
        kind, axes = next((found for found in products if found[1] and found[1].stack), products[0])
        return None if axes is None else Role(axes, None if kind == "product" else kind)
    return Role(None, "bias or scale") if uses and "unknown" not in by_kind else None


def _layered(use: Use, apart: set[int]) -> Use:
    """Outputs that later weights treat separately are layers, if there are other outputs."""
    outputs = {axis for axis, kind in use.parts.items() if kind == OUTPUT}
    if use.kind != "product" or not outputs - apart:
        return use
    return use._replace(parts={**use.parts, **dict.fromkeys(outputs & apart, STACK)})


def _axes(parts: Mapping[int, str], shape: Sequence[int]) -> Axes | None:
    """The axes by a use, completed.

    An axis from which one index was taken is a stack. An axis that was summed over with another weight is the missing
    one of inputs and outputs.
    """
    kinds = dict(parts)
    missing = [axis for axis in range(len(shape)) if axis not in kinds]
    for kind in (INPUT, OUTPUT):
        if missing and kind not in kinds.values() and STACK not in kinds.values():
            kinds |= dict.fromkeys(missing, kind)
            missing = []
    kinds |= dict.fromkeys(missing, STACK)
    if not {INPUT, OUTPUT} <= set(kinds.values()):
        return None
    found = {kind: tuple(axis for axis in range(len(shape)) if kinds[axis] == kind) for kind in Axes._fields}
    return Axes(**found)
