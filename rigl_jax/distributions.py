"""How a total sparsity is shared among layers, and the plan that fixes it as integer counts.

A distribution is a host-side function `(shapes, sparsity) -> {name: sparsity}`. `make_plan` turns it once into exact
numbers of active units; past this file there are only integers.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence

import jax.numpy as jnp
import numpy as np

from rigl_jax import checks, trees
from rigl_jax.base import Distribution, Leaf, Plan, PyTree, Shape, Structure
from rigl_jax.structures import unstructured
from rigl_jax.tables import table

Rules = Sequence[tuple[str, Structure | None]]


def uniform(shapes: Mapping[str, Shape], sparsity: float) -> dict[str, float]:
    """The same sparsity in every layer.

    The paper's "uniform" also keeps the first layer dense. That is a rule of the plan, `("conv1/kernel", None)`, and
    not of the distribution: which layer comes first cannot be read off a pytree.

    >>> uniform({"a": (8, 6), "b": (4, 3)}, 0.7)
    {'a': 0.7, 'b': 0.7}
    """
    _check_sparsity("uniform", sparsity)
    _check_shapes("uniform", shapes)
    return dict.fromkeys(shapes, sparsity)


def erdos_renyi(shapes: Mapping[str, Shape], sparsity: float) -> dict[str, float]:
    """Erdos-Renyi (Mocanu et al. 2018): density in proportion to (n_in + n_out) / (n_in n_out).

    n_in and n_out are the last two axes, so kernels must be stored as (..., in, out); the kernel's spatial axes do
    not count. Layers whose density would pass 1 are dense and the others share what is left (see `erk`).

    Raises:
      ValueError: a leaf with fewer than 2 axes, or a sparsity outside [0, 1).

    >>> {k: round(v, 6) for k, v in erdos_renyi({"a": (8, 6), "b": (4, 3)}, 0.7).items()}
    {'a': 0.736111, 'b': 0.472222}
    """
    _check_shapes("erdos_renyi", shapes)
    for name, shape in shapes.items():
        if len(shape) < 2:
            raise ValueError(f"erdos_renyi: leaf {name!r} must have 2 axes or more, got shape {shape}")
    return _proportional("erdos_renyi", {name: shape[-2:] for name, shape in shapes.items()}, shapes, sparsity, 1)


def erk(shapes: Mapping[str, Shape], sparsity: float, *, power: float = 1.0) -> dict[str, float]:
    """Erdos-Renyi-Kernel (Evci et al. 2020, section 3): density in proportion to (sum of axes / product of axes) **
    power.

    Larger layers become sparser. A layer whose density would pass 1 is dense, with every layer tied with it, and the
    rest is solved again, so that the total comes out right: the authors' loop.

    Args:
      shapes: `{name: shape}`. The axes' order does not matter, but how they are split does: (512, 8, 64) is not (512,
        512).
      sparsity: fraction of zeros over all the leaves together, in [0, 1).
      power: 0 is uniform (apart from saturation), 1 the paper's, more is more extreme. The authors' `erk_power_scale`.

    Returns:
      `{name: sparsity}`, each in [0, 1). All zeros where the sparsity is 0.

    Raises:
      ValueError: a sparsity outside [0, 1).

    >>> shapes = {"1": (784, 300), "2": (300, 100), "3": (100, 10)}
    >>> {k: round(v, 6) for k, v in erk(shapes, 0.9).items()}
    {'1': 0.920432, '2': 0.769811, '3': 0.0}
    """
    _check_shapes("erk", shapes)
    power = checks.number("erk", "power", power, "must be from -100 to 100", lambda found: abs(found) <= 100)
    return _proportional("erk", shapes, shapes, sparsity, power)


def _proportional(
    who: str, scored: Mapping[str, Shape], shapes: Mapping[str, Shape], sparsity: float, power: float
) -> dict[str, float]:
    """Density `scale * raw` where that stays below 1, with `scale` such that the total fits."""
    _check_sparsity(who, sparsity)
    size = {name: math.prod(shape) for name, shape in shapes.items()}
    raw = {name: (sum(shape) / math.prod(shape)) ** power for name, shape in scored.items()}
    dense: set[str] = set()
    while len(dense) < len(shapes):
        free = [name for name in shapes if name not in dense]
        budget = sum(size[name] - _whole(sparsity * size[name], math.floor) for name in free)
        budget -= sum(_whole(sparsity * size[name], math.floor) for name in dense)
        scale = budget / sum(raw[name] * size[name] for name in free)
        highest = max(raw[name] for name in free)
        if scale * highest <= 1:
            return {name: 0.0 if name in dense else 1 - scale * raw[name] for name in shapes}
        dense |= {name for name in free if raw[name] == highest}
    return dict.fromkeys(shapes, 0.0)


def _check_sparsity(who: str, sparsity: float) -> None:
    if not isinstance(sparsity, (int, float, np.floating)) or not 0 <= sparsity < 1:
        raise ValueError(f"{who}: sparsity is a fraction of zeros, in [0, 1), got {sparsity}")


def _check_shapes(who: str, shapes: Mapping[str, Shape]) -> None:
    if not isinstance(shapes, Mapping):
        raise ValueError(f"{who}: shapes must be {{name: shape}}, got {type(shapes).__name__}")
    for name, shape in shapes.items():
        if not isinstance(shape, (tuple, list)) or not shape or not all(checks.is_whole(size, 1) for size in shape):
            raise ValueError(f"{who}: leaf {name!r} must have a shape of whole numbers, at least 1 each, got {shape!r}")


def is_maskable(name: str, shape: Shape) -> bool:
    """Which leaves are sparse where no rules are given: kernels, that is two axes or more with no exception below.

    Biases and norm scales have one axis, or a path that ends in `bias` or `scale` (attention's biases have two axes).
    Embedding tables (a path that ends in `embedding`) are looked up and not multiplied. Depthwise kernels, (..., 1, C),
    have few weights and lose most by pruning: the authors leave them dense.
    """
    depthwise = len(shape) > 2 and shape[-2] == 1
    added = name.rsplit("/", 1)[-1] in ("bias", "scale", "embedding")
    return len(shape) >= 2 and math.prod(shape) > 0 and not depthwise and not added


def make_plan(
    params: PyTree,
    sparsity: float,
    distribution: Distribution = erk,
    *,
    rules: Rules | None = None,
    sparsities: Mapping[str, float] | None = None,
    count_fixed: bool = True,
    rounding: Callable[[float], int] = math.floor,
) -> Plan:
    """Fixes which leaves are sparse, in which structure, and how many of their units stay active.

    Args:
      params: the weights (arrays or anything with a shape, such as `jax.eval_shape` gives).
      sparsity: fraction of zeros over all sparse leaves together, in [0, 1).
      distribution: how it is shared: `erk`, `erdos_renyi`, `uniform`, or a function of your own.
      rules: `((regex, structure or None), ...)`, matched against whole names such as "Dense_0/kernel"; the first match
        wins and None means dense. Every leaf must match. Default: kernels unstructured, the rest dense
        (`is_maskable`).
      sparsities: `{regex: sparsity}` fixes single layers. They count in the total, and the others make up for them.
        Where every layer is fixed so, they alone decide and `sparsity` is not read. Where every layer is fixed and some
        by their structure, as by `n_of_m`, `sparsity` must be what comes out.
      count_fixed: False leaves those layers out of the total, as the authors' code does.
      rounding: makes the number of zeros of a layer an integer: `math.floor` (the authors'), `math.ceil` (the authors'
        first release), `round`. A product within 1e-6 of an integer is that integer.

    Returns:
      `{name: Leaf}` for the sparse leaves. Dense leaves are not in it and do not count in the sparsity.
      At least one unit stays active in each group of each leaf.

    Raises:
      ValueError: a sparsity outside [0, 1), or out of reach with the fixed layers (the message gives the range);
        a rule that applies to nothing; a leaf without a rule; a shape that does not fit its structure.

    >>> import jax
    >>> params = {"kernel": jax.ShapeDtypeStruct((8, 6), "float32"), "bias": jax.ShapeDtypeStruct((6,), "float32")}
    >>> {name: leaf.n_active for name, leaf in make_plan(params, 0.9).items()}
    {'kernel': 5}
    """
    _check_sparsity("make_plan", sparsity)
    if not callable(distribution):
        raise ValueError(f"make_plan: distribution must be a function such as rx.erk, got {distribution!r}")
    checks.functions("make_plan", rounding=rounding)
    if not isinstance(sparsities, (Mapping, type(None))):
        raise ValueError(f"make_plan: sparsities must be {{regex: sparsity}}, got {sparsities!r}")
    shapes = {name: tuple(p.shape) for name, p in trees.named_leaves(params).items() if hasattr(p, "shape")}
    structures = _structures(shapes, rules)
    sparse = {name: shapes[name] for name in structures}
    dtypes = {name: getattr(p, "dtype", np.dtype("float32")) for name, p in trees.named_leaves(params).items()}
    for name, shape in sparse.items():
        if not 0 < math.prod(shape) < 2**31:
            raise ValueError(
                f"make_plan: leaf {name!r} must have at least 1 and fewer than 2**31 weights, got {math.prod(shape)}"
            )
        if not jnp.issubdtype(dtypes[name], np.floating):
            raise ValueError(f"make_plan: leaf {name!r} must hold real floating-point weights, got {dtypes[name]}")
    for name, shape in sparse.items():
        _units(name, structures[name], shape)  # what does not divide is told before a total that could not be
    imposed = {name: s.sparsity for name, s in structures.items() if s.sparsity is not None}
    fixed = {
        **imposed,
        **trees.first_match("make_plan: sparsities", tuple((sparsities or {}).items()), list(sparse)),
    }
    for name, value in fixed.items():
        _check_sparsity(f"make_plan: sparsities[{name!r}]", value)
    if imposed and len(fixed) == len(sparse):
        _check_imposed(sparse, fixed, sparsity)
    free = {name: shape for name, shape in sparse.items() if name not in fixed}
    if fixed and free and count_fixed:
        sparsity = _left(sparse, free, structures, fixed, sparsity, rounding)
    elif free:
        _check_reachable(free, structures, sparsity, rounding)
    shared = {**_share(free, sparsity, distribution), **fixed}
    return {name: _leaf(name, shape, structures[name], shared[name], rounding) for name, shape in sparse.items()}


def _structures(shapes: Mapping[str, Shape], rules: Rules | None) -> dict[str, Structure]:
    if rules is None:
        found: dict[str, Structure | None] = {
            name: unstructured() for name, shape in shapes.items() if is_maskable(name, shape)
        }
    else:
        if not isinstance(rules, Sequence):
            what = "a dict; pass list(rules.items())" if isinstance(rules, Mapping) else repr(rules)
            raise ValueError(f"make_plan: rules must be a sequence of pairs, got {what}")
        for rule in rules:
            pair = isinstance(rule, (tuple, list)) and len(rule) == 2 and isinstance(rule[0], str)
            if not pair or not isinstance(rule[1], (Structure, type(None))):
                raise ValueError(
                    "make_plan: each rule must be a pair (regular expression, structure or None), such as "
                    f'(".*kernel", rx.unstructured()), got {rule!r}'
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
        raise ValueError(f"make_plan: no leaf is sparse; leaves are {', '.join(shapes) or 'none'}")
    return sparse


def _left(
    shapes: Mapping[str, Shape],
    free: Mapping[str, Shape],
    structures: Mapping[str, Structure],
    fixed: Mapping[str, float],
    sparsity: float,
    rounding: Callable[[float], int],
) -> float:
    """The sparsity of the leaves that are not fixed at which the total comes out right."""
    total, size = _size(shapes), _size(free)
    zeros = sum(value * math.prod(shapes[name]) for name, value in fixed.items())
    most = size - _least(free, structures)
    if sparsity * total < zeros - 1e-6 or _whole(sparsity * total - zeros, rounding) > most:
        raise ValueError(
            f"make_plan: with {len(fixed)} layers fixed by `sparsities` or by their structure, the total sparsity "
            f"can be {zeros / total:.6g} to {(zeros + most) / total:.6g}, the largest reachable; got {sparsity}"
        )
    return max(0.0, (sparsity * total - zeros) / size)


def _share(shapes: Mapping[str, Shape], sparsity: float, distribution: Distribution) -> dict[str, float]:
    """What the distribution gives each leaf, checked."""
    if not shapes:
        return {}
    shared = distribution(shapes, sparsity)
    if not isinstance(shared, Mapping):
        raise ValueError(f"make_plan: the distribution must give {{name: sparsity}}, got {shared!r}")
    if missing := [name for name in shapes if name not in shared]:
        raise ValueError(f"make_plan: the distribution gave no sparsity for {', '.join(missing)}")
    for name in shapes:
        _check_sparsity(f"make_plan: the distribution, at leaf {name!r}", shared[name])
    return {name: shared[name] for name in shapes}


def _check_imposed(shapes: Mapping[str, Shape], fixed: Mapping[str, float], sparsity: float) -> None:
    """Where structures, and perhaps `sparsities`, fix every layer, nothing is left to ask for."""
    size = {name: math.prod(shape) for name, shape in shapes.items()}
    total = sum(fixed[name] * n for name, n in size.items()) / sum(size.values())
    if abs(sparsity - total) > 1e-6:
        raise ValueError(
            "make_plan: every sparse layer is fixed by its structure or by `sparsities`, and the total comes out as "
            f"{total:.6g}; pass that, got {sparsity}"
        )


def _check_reachable(
    shapes: Mapping[str, Shape],
    structures: Mapping[str, Structure],
    sparsity: float,
    rounding: Callable[[float], int],
) -> None:
    """At least one unit stays in each group; a total that leaves no room for them cannot be reached.

    What is asked for is a whole number of zeros, rounded as those of a leaf are: 0.95 of 10 weights is 9 by floor.
    """
    total, least = _size(shapes), _least(shapes, structures)
    if _whole(sparsity * total, rounding) > total - least:
        raise ValueError(
            f"make_plan: at least one connection of each of {len(shapes)} leaves stays, so the largest reachable "
            f"sparsity is {1 - least / total:.6g}, got {sparsity}"
        )


def _size(shapes: Mapping[str, Shape]) -> int:
    return sum(math.prod(shape) for shape in shapes.values())


def _least(shapes: Mapping[str, Shape], structures: Mapping[str, Structure]) -> int:
    """How many weights stay whatever is asked for: a unit of each group."""
    least = 0
    for name, shape in shapes.items():
        units = _units(name, structures[name], shape)
        least += math.prod(shape) // math.prod(units[axis] for axis in structures[name].axes(units))
    return least


def _units(name: str, structure: Structure, shape: Shape) -> Shape:
    try:
        return structure.units(shape)
    except ValueError as error:
        raise ValueError(f"make_plan: leaf {name!r}: {error}") from None


def _leaf(name: str, shape: Shape, structure: Structure, sparsity: float, rounding: Callable[[float], int]) -> Leaf:
    units = _units(name, structure, shape)
    in_group = math.prod(units[axis] for axis in structure.axes(units))
    return Leaf(name, shape, structure, max(1, in_group - _whole(sparsity * in_group, rounding)))


def _whole(product: float, rounding: Callable[[float], int]) -> int:
    """`rounding`, but a product that float error has put next to an integer (0.57 * 100) is that integer."""
    nearest = round(product)
    return nearest if abs(product - nearest) < 1e-6 else rounding(product)


def describe(plan: Plan) -> str:
    """A table of the plan: name, shape, structure, active weights, sparsity.

    >>> import jax
    >>> print(describe(make_plan({"w": jax.ShapeDtypeStruct((8, 6), "float32")}, 0.9)))
    leaf   shape  structure     active  sparsity
    w      8x6    unstructured       5    0.8958
    total                            5    0.8958
    """
    checks.plan("describe", plan)
    rows = [("leaf", "shape", "structure", "active", "sparsity")]
    total = active = 0
    for leaf in plan.values():
        size = math.prod(leaf.shape)
        units = leaf.structure.units(leaf.shape)
        in_group = math.prod(units[axis] for axis in leaf.structure.axes(units))
        kept = size * leaf.n_active // in_group
        rows.append(
            (
                leaf.name,
                "x".join(map(str, leaf.shape)),
                leaf.structure.name,
                str(kept),
                f"{1 - kept / size:.4f}",
            )
        )
        total, active = total + size, active + kept
    rows.append(("total", "", "", str(active), f"{1 - active / total:.4f}"))
    return table(rows, words=3)
