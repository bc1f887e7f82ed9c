"""The plan: which leaves are sparse, in which structure, and how many of their units stay, as exact integers."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

from rigl_jax import arguments as argument
from rigl_jax import checks, trees
from rigl_jax.arguments import arguments
from rigl_jax.base import Axes, Distribution, LayerPlan, Plan, PyTree, Role, Shape, Structure
from rigl_jax.distributions import check_sparsity, erk, share, whole
from rigl_jax.messages import kind, listed, shown
from rigl_jax.structures import resolve, unstructured
from rigl_jax.tracing.roles import check_model, roles

Rules = Sequence[tuple[str, Structure | None]]


@arguments(count_fixed=argument.flag)
def make_plan(
    params: PyTree,
    sparsity: float,
    distribution: Distribution = erk,
    *,
    rules: Rules | None = None,
    sparsities: Mapping[str, float] | None = None,
    count_fixed: bool = True,
    rounding: Callable[[float], int] = math.floor,
    axes: Mapping[str, Axes] | None = None,
    apply: Callable[..., Any] | None = None,
    inputs: Sequence[Any] = (),
) -> Plan:
    """Fixes which leaves are sparse, in which structure, and how many of their units stay active.

    Args:
      params: the weights (arrays or anything with a shape, such as `jax.eval_shape` gives).
      sparsity: fraction of zeros over all sparse leaves together, in [0, 1).
      distribution: how it is shared: `erk`, `erdos_renyi`, `uniform`, or a function of your own.
      rules: `((regex, structure or None), ...)`, matched against whole names such as "Dense_0/kernel"; the first match
        wins and None means dense. Every leaf must match. They are matched by Python's `re`, in which an expression such
        as `(a+)+b` may never end on a long name; use expressions that you trust. They are
        Python's, which has no time limit: nested repetitions such as `(a+)+b` take time exponential in a name's length.
        Default: kernels unstructured, the rest dense. A kernel is
        what the model multiplies its inputs with, except depthwise convolutions, which have few weights and lose most
        by pruning; the authors leave them dense.
      sparsities: `{regex: sparsity}` fixes single layers. They count in the total, and the others make up for them.
        Where every layer is fixed so, they alone decide and `sparsity` is not read. Where every layer is fixed and some
        by their structure, as by `n_of_m`, `sparsity` must be what comes out.
      count_fixed: False leaves those layers out of the total, as the authors' code does.
      rounding: makes the number of zeros of a layer an integer: `math.floor` (the authors'), `math.ceil` (the authors'
        first release), `round`. A product within 1e-6 of an integer is that integer.
      axes: `{regex: rx.Axes}`: which axes of a leaf are inputs, outputs and layers of a stack, for leaves of which
        neither a trace nor names tell it right. Whether a leaf is sparse is not theirs to say, but that of `rules`.
      apply: the model, `apply(params, *inputs)`. It is traced once, and the products it makes tell which leaves are
        kernels and which axes are what. Without it names, modules and biases tell (see `tracing.named_roles`).
      inputs: of `apply`, arrays or `jax.ShapeDtypeStruct`.

    Returns:
      `{name: LayerPlan}` for the sparse leaves. Dense leaves are not in it and do not count in the sparsity.
      At least one unit stays active in each group of each leaf. A leaf that stacks layers has the count of each layer.

    Raises:
      ValueError: a sparsity outside [0, 1), or out of reach with the fixed layers (the message gives the range);
        a rule that applies to nothing; a leaf without a rule; a shape that does not fit its structure; a structure that
        must know inputs and outputs on a leaf of which they are not known.

    >>> import jax
    >>> params = {"kernel": jax.ShapeDtypeStruct((8, 6), "float32"), "bias": jax.ShapeDtypeStruct((6,), "float32")}
    >>> {name: leaf.n_active for name, leaf in make_plan(params, 0.9).items()}
    {'kernel': 5}
    """
    check_sparsity("make_plan", sparsity)
    if not callable(distribution):
        raise ValueError(f"make_plan: distribution must be a function such as rx.erk, got {shown(distribution)}")
    checks.functions("make_plan", rounding=rounding)
    if not isinstance(sparsities, (Mapping, type(None))):
        raise ValueError(f"make_plan: sparsities must be {{regex: sparsity}}, got {shown(sparsities)}")
    shapes = {name: tuple(p.shape) for name, p in trees.named_leaves(params).items() if hasattr(p, "shape")}
    known = _known_roles(params, shapes, axes, apply, inputs)
    structures = _structures(shapes, rules, known)
    layers = {name: LayerPlan(name, shapes[name], s, 0, known[name].axes) for name, s in structures.items()}
    dtypes = {name: getattr(p, "dtype", np.dtype("float32")) for name, p in trees.named_leaves(params).items()}
    for name, layer in layers.items():
        if not 0 < layer.size < 2**31:
            raise ValueError(
                f"make_plan: leaf {name!r} must have at least 1 and fewer than 2**31 weights, got {layer.size}"
            )
        if str(dtypes[name]) not in checks.TRAINABLE:
            raise ValueError(
                f"make_plan: leaf {name!r} must hold weights of {', '.join(checks.TRAINABLE)} to be sparse, "
                f"got {dtypes[name]}"
            )
    for name, layer in layers.items():
        _units(name, layer.structure, layer.shape)  # names a shape that does not divide before any total is checked
    imposed = {name: s.sparsity for name, s in structures.items() if s.sparsity is not None}
    fixed = {
        **imposed,
        **trees.first_match("make_plan: sparsities", tuple((sparsities or {}).items()), list(layers)),
    }
    for name, value in fixed.items():
        check_sparsity(f"make_plan: sparsities[{name!r}]", value)
    if imposed and len(fixed) == len(layers):
        _check_imposed(layers, fixed, sparsity)
    free = {name: layer for name, layer in layers.items() if name not in fixed}
    if fixed and free and count_fixed:
        sparsity = _left(layers, free, fixed, sparsity, rounding)
    elif free:
        _check_reachable(free, sparsity, rounding)
    shape, axes_of = ({name: getattr(layer, key) for name, layer in free.items()} for key in ("shape", "axes"))
    shared = {**(share(shape, axes_of, sparsity, distribution) if free else {}), **fixed}
    return {name: _counted(layer, shared[name], rounding) for name, layer in layers.items()}


def _known_roles(
    params: PyTree,
    shapes: Mapping[str, Shape],
    axes: Mapping[str, Axes] | None,
    apply: Callable[..., Any] | None,
    inputs: Sequence[Any],
) -> dict[str, Role]:
    """What is known of every leaf; what is given goes first."""
    check_model("make_plan", apply, inputs)
    if not isinstance(axes, (Mapping, type(None))):
        raise ValueError(f"make_plan: axes must be {{regex: rx.Axes}}, got {kind(axes)}")
    found = roles(params, apply, inputs)
    for name, given in trees.first_match("make_plan: axes", tuple((axes or {}).items()), list(shapes)).items():
        found[name] = found[name]._replace(axes=resolve(f"make_plan: axes[{name!r}]", given, shapes[name]))
    return found


def _structures(shapes: Mapping[str, Shape], rules: Rules | None, known: Mapping[str, Role]) -> dict[str, Structure]:
    if rules is None:
        found: dict[str, Structure | None] = {name: unstructured() for name in shapes if known[name].dense is None}
    else:
        if not isinstance(rules, Sequence):
            what = "a dict; pass list(rules.items())" if isinstance(rules, Mapping) else shown(rules)
            raise ValueError(f"make_plan: rules must be a sequence of pairs, got {what}")
        for rule in rules:
            pair = isinstance(rule, (tuple, list)) and len(rule) == 2 and isinstance(rule[0], str)
            if not pair or not isinstance(rule[1], (Structure, type(None))):
                raise ValueError(
                    "make_plan: each rule must be a pair (regular expression, structure or None), such as "
                    f'(".*kernel", rx.unstructured()), got {shown(rule)}'
                )
        found = trees.first_match("make_plan: rules", tuple(rules), list(shapes))
        for name in shapes:
            if name not in found:
                raise ValueError(
                    f"make_plan: no rule matches leaf {name!r} of shape {shapes[name]}; "
                    'end the rules with (".*", None) to keep such leaves dense'
                )
    sparse = {name: structure for name, structure in found.items() if structure is not None}
    if not sparse:
        raise ValueError(f"make_plan: no leaf is sparse; leaves are {listed(shapes)}")
    return {name: _bound(name, structure, shapes[name], known[name].axes) for name, structure in sparse.items()}


def _bound(name: str, structure: Structure, shape: Shape, axes: Axes | None) -> Structure:
    """The structure along the axes of the leaf."""
    if axes is not None and structure.bind is not None:
        return structure.bind(axes)
    if structure.needs_axes:
        _units(name, structure, shape)  # too few axes for it, whichever they are
        raise ValueError(
            f"make_plan: leaf {name!r}: {structure.name} must know which axes of shape {shape} are inputs and outputs; "
            f"pass apply and inputs, to be traced, or axes={{{name!r}: rx.Axes(inputs=(...), outputs=(...))}}"
        )
    return structure


def _left(
    layers: Plan, free: Plan, fixed: Mapping[str, float], sparsity: float, rounding: Callable[[float], int]
) -> float:
    """The sparsity of the leaves that are not fixed at which the total comes out right."""
    total, size = _size(layers), _size(free)
    zeros = sum(value * layers[name].size for name, value in fixed.items())
    most = size - sum(_least(free))
    if sparsity * total < zeros - 1e-6 or _is_beyond(sparsity * total - zeros, free, rounding):
        raise ValueError(
            f"make_plan: with {len(fixed)} layers fixed by `sparsities` or by their structure, the total sparsity "
            f"can be {zeros / total:.6g} to {(zeros + most) / total:.6g}, the largest reachable; got {shown(sparsity)}"
        )
    return max(0.0, (sparsity * total - zeros) / size)


def _check_imposed(layers: Plan, fixed: Mapping[str, float], sparsity: float) -> None:
    """Where structures, and perhaps `sparsities`, fix every layer, nothing is left to ask for."""
    total = sum(fixed[name] * layer.size for name, layer in layers.items()) / _size(layers)
    if abs(sparsity - total) > 1e-6:
        raise ValueError(
            "make_plan: every sparse layer is fixed by its structure or by `sparsities`, and the total comes out as "
            f"{total:.6g}; pass that, got {shown(sparsity)}"
        )


def _check_reachable(layers: Plan, sparsity: float, rounding: Callable[[float], int]) -> None:
    """At least one unit stays in each group; a total that leaves no room for them cannot be reached."""
    total, least = _size(layers), sum(_least(layers))
    if _is_beyond(sparsity * total, layers, rounding):
        raise ValueError(
            f"make_plan: at least one connection of each of {len(layers)} leaves stays, so the largest reachable "
            f"sparsity is {1 - least / total:.6g}, got {shown(sparsity)}"
        )


def _is_beyond(zeros: float, layers: Plan, rounding: Callable[[float], int]) -> bool:
    """Whether so many zeros are more than there can be, after the rounding that the counts of a leaf have.

    A leaf rounds by a unit in each of its groups: 0.95 of 10 weights is 9 by floor, 0.8 of a fan-in of 4 is 3.
    """
    least = _least(layers)
    return whole((zeros - (_size(layers) - sum(least))) / max(least), rounding) > 0


def _size(layers: Plan) -> int:
    return sum(layer.size for layer in layers.values())


def _least(layers: Plan) -> list[int]:
    """How many weights of each leaf stay whatever is asked for: a unit of each group."""
    return [layer.groups * layer.unit_size for layer in layers.values()]


def _counted(layer: LayerPlan, sparsity: float, rounding: Callable[[float], int]) -> LayerPlan:
    size = layer.group_size
    return layer._replace(n_active=max(1, size - whole(sparsity * size, rounding)))


def _units(name: str, structure: Structure, shape: Shape) -> Shape:
    try:
        return structure.units(shape)
    except ValueError as error:
        raise ValueError(f"make_plan: leaf {name!r}: {error}") from None
