"""What a plan does to a model, as a table."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

from rigl_jax import arguments as rules
from rigl_jax import checks, topology, trees
from rigl_jax.arguments import arguments
from rigl_jax.base import Axes, LayerPlan, Plan, PyTree, Shape
from rigl_jax.tables import html_table, table
from rigl_jax.tracing.roles import check_model, roles

_Row = tuple[str, str, str, str, str, str]
_HEAD: _Row = ("leaf", "shape", "axes", "structure", "active", "sparsity")
_WORDS = 4  # columns that hold words


class Description(NamedTuple):
    """What `describe` found: its `str` is a table, and a notebook shows it as one.

    Attributes:
      rows: the cells, `(leaf, shape, axes, structure, active, sparsity)`, in the order of the params; totals last.
    """

    rows: tuple[tuple[str, str, str, str, str, str], ...]

    def __str__(self) -> str:
        """Aligned lines, the head first."""
        return table([_HEAD, *self.rows], words=_WORDS)

    def _repr_html_(self) -> str:
        return html_table([_HEAD, *self.rows], words=_WORDS)


@arguments(apply=rules.optional(rules.function), inputs=rules.sequence)
def describe(
    plan: Plan,
    params: PyTree | None = None,
    *,
    apply: Callable[..., Any] | None = None,
    inputs: Sequence[Any] = (),
) -> Description:
    """A table of the plan, to be printed: name, shape, axes, structure, active weights, sparsity.

    Axes are a letter each: i input, o output, w window, s stack; `?` where they are not known.

    Args:
      plan: from `make_plan`.
      params: the weights, or their shapes. With them the table also holds the dense leaves, each with the reason, and
        the sparsity of the whole model beside that of the plan.
      apply: as in `make_plan`; needed again here to show reasons that come from a trace.
      inputs: of `apply`.

    >>> import jax, rigl_jax as rx
    >>> params = {"w": jax.ShapeDtypeStruct((8, 6), "float32"), "bias": jax.ShapeDtypeStruct((6,), "float32")}
    >>> plan = rx.make_plan(params, 0.9)
    >>> print(describe(plan))
    leaf   shape  axes  structure     active  sparsity
    w      8x6    io    unstructured       5    0.8958
    total                                  5    0.8958
    >>> print(describe(plan, params))
    leaf         shape  axes  structure             active  sparsity
    bias         6      ?     dense: bias or scale       6    0.0000
    w            8x6    io    unstructured               5    0.8958
    total                                                5    0.8958
    whole model                                         11    0.7963
    """
    checks.plan("describe", plan)
    rows: list[_Row] = []
    size = {name: leaf.size for name, leaf in plan.items()}
    kept = {name: leaf.active_weights for name, leaf in plan.items()}
    total = _row("total", None, "", "", sum(kept.values()), sum(size.values()))
    if params is None:
        return Description((*(_sparse(leaf, kept[name]) for name, leaf in plan.items()), total))
    topology.check_fit(plan, params)
    shapes = {name: tuple(p.shape) for name, p in trees.named_leaves(params).items() if hasattr(p, "shape")}
    check_model("describe", apply, inputs)
    found = roles(params, apply, inputs)
    for name, shape in shapes.items():
        if name in plan:
            rows.append(_sparse(plan[name], kept[name]))
            continue
        n, role = math.prod(shape), found[name]
        rows.append(_row(name, shape, letters(role.axes, shape), f"dense: {role.dense or 'by a rule'}", n, n))
    dense = sum(math.prod(shape) for name, shape in shapes.items() if name not in plan)
    whole = _row("whole model", None, "", "", sum(kept.values()) + dense, sum(size.values()) + dense)
    return Description((*rows, total, whole))


def letters(axes: Axes | None, shape: Shape) -> str:
    """A letter for each axis.

    >>> letters(Axes((1,), (0,), (2, 3)), (8, 4, 3, 3))
    'oiww'
    """
    if axes is None:
        return "?"
    found = {axis: kind[0] for kind, part in zip(Axes._fields, axes, strict=True) for axis in part}
    return "".join(found[axis] for axis in range(len(shape)))


def _sparse(leaf: LayerPlan, kept: int) -> _Row:
    layers = leaf.layers
    structure = leaf.structure.name if layers == 1 else f"{leaf.structure.name}, in each of {layers} layers"
    return _row(leaf.name, leaf.shape, letters(leaf.axes, leaf.shape), structure, kept, leaf.size)


def _row(name: str, shape: Shape | None, axes: str, structure: str, kept: int, size: int) -> _Row:
    shown = "" if shape is None else "x".join(map(str, shape))
    return name, shown, axes, structure, str(kept), f"{1 - kept / max(size, 1):.4f}"
