"""How a total sparsity is shared among layers.

A distribution is a host-side function `(shapes, sparsity) -> {name: sparsity}`. `make_plan` turns it once into exact
numbers of active units; past that there are only integers.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping

import numpy as np

from rigl_jax import checks
from rigl_jax.base import Axes, Distribution, Shape
from rigl_jax.messages import kind, listed, shown
from rigl_jax.structures import n_stacked


def uniform(shapes: Mapping[str, Shape], sparsity: float) -> dict[str, float]:
    """The same sparsity in every layer.

    The paper's "uniform" also keeps the first layer dense. That is a rule of the plan, `("conv1/kernel", None)`, and
    not of the distribution: which layer comes first cannot be read off a pytree.

    >>> uniform({"a": (8, 6), "b": (4, 3)}, 0.7)
    {'a': 0.7, 'b': 0.7}
    """
    check_sparsity("uniform", sparsity)
    shapes = _check_shapes("uniform", shapes)
    return dict.fromkeys(shapes, sparsity)


def erdos_renyi(shapes: Mapping[str, Shape], sparsity: float) -> dict[str, float]:
    """Erdos-Renyi (Mocanu et al. 2018): density in proportion to (n_in + n_out) / (n_in n_out).

    n_in and n_out are the last two axes, (..., in, out); the kernel's spatial axes do not count. `make_plan` turns the
    leaves whose axes it knows that way round. Layers whose density would pass 1 are dense and the others share what is
    left (see `erk`).

    Raises:
      ValueError: a leaf with fewer than 2 axes, or a sparsity outside [0, 1).

    >>> {k: round(v, 6) for k, v in erdos_renyi({"a": (8, 6), "b": (4, 3)}, 0.7).items()}
    {'a': 0.736111, 'b': 0.472222}
    """
    shapes = _check_shapes("erdos_renyi", shapes)
    for name, shape in shapes.items():
        if len(shape) < 2:
            raise ValueError(f"erdos_renyi: leaf {name!r} must have 2 axes or more, got shape {shape}")
    scored = {name: shape[-2:] for name, shape in shapes.items()}
    return _proportional("erdos_renyi", lambda free: _raw({name: scored[name] for name in free}, 1), shapes, sparsity)


def erk(shapes: Mapping[str, Shape], sparsity: float, *, power: float = 1.0) -> dict[str, float]:
    """Erdos-Renyi-Kernel (Evci et al. 2020, section 3): density in proportion to (sum of axes / product of axes) **
    power.

    Larger layers become sparser. A layer whose density would pass 1 is dense, with every layer tied with it, and the
    rest is solved again, so that the total comes out right: the authors' loop.

    Args:
      shapes: `{name: shape}`. The axes' order does not matter, but how they are split does: (512, 8, 64) is not (512,
        512). `make_plan` merges several input or output axes that it knows, so that a network's densities do not depend
        on the framework.
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
    shapes = _check_shapes("erk", shapes)
    power = checks.number("erk", "power", power, "must be from -100 to 100", lambda found: abs(found) <= 100)
    raw = lambda free: _raw({name: shapes[name] for name in free}, power)  # noqa: E731
    return _proportional("erk", raw, shapes, sparsity)


def proportional(numbers: Mapping[str, float]) -> Distribution:
    """Density in proportion to a number for each layer that was measured: its effective rank, its sensitivity.

    `rx.diagnostics.gradient_ranks` and `rx.diagnostics.noise_tolerance` measure such numbers. As in `erk`, layers whose
    density would pass 1 are dense, and the others share what is left. Layers at 0 get what none of the others can take.

    Args:
      numbers: `{name: number of at least 0}` for every leaf that `make_plan` asks about, not all 0; that of a leaf
        which stacks layers is the number of each of them. More names may be there.

    Returns:
      `(shapes, sparsity) -> {name: sparsity}`, for `make_plan`.

    Raises:
      ValueError: no numbers; from the distribution, a leaf without one.

    >>> {k: round(v, 3) for k, v in proportional({"a": 2, "b": 1})({"a": (10, 10), "b": (10, 20)}, 0.8).items()}
    {'a': 0.7, 'b': 0.85}
    """
    if not isinstance(numbers, Mapping) or not numbers:
        raise ValueError(f"proportional: numbers must be {{name: number}}, got {shown(numbers)}")
    given = {
        name: checks.number(
            "proportional", f"numbers[{name!r}]", number, "must be at least 0", lambda found: found >= 0
        )
        for name, number in numbers.items()
    }

    def distribution(shapes: Mapping[str, Shape], sparsity: float) -> dict[str, float]:
        shapes = _check_shapes("proportional", shapes)
        of = {name: name if name in given else name.rpartition("[")[0] for name in shapes}
        if missing := [name for name in shapes if of[name] not in given]:
            raise ValueError(f"proportional: numbers must have one for leaf {missing[0]!r}, got {listed(given)}")
        least = 1e-9 * max(given[of[name]] for name in shapes)  # 0 still takes what no other layer can
        raw = {name: max(given[of[name]], least) or 1.0 for name in shapes}
        return _proportional("proportional", lambda free: {name: raw[name] for name in free}, shapes, sparsity)

    return distribution


def _proportional(
    who: str, raw_of: Callable[[list[str]], dict[str, float]], shapes: Mapping[str, Shape], sparsity: float
) -> dict[str, float]:
    """Density `scale * raw` where that stays below 1, with `scale` such that the total fits."""
    check_sparsity(who, sparsity)
    size = {name: math.prod(shape) for name, shape in shapes.items()}
    dense: set[str] = set()
    while len(dense) < len(shapes):
        free = [name for name in shapes if name not in dense]
        raw = raw_of(free)
        budget = sum(size[name] - whole(sparsity * size[name], math.floor) for name in free)
        budget -= sum(whole(sparsity * size[name], math.floor) for name in dense)
        scale = budget / sum(raw[name] * size[name] for name in free)
        highest = max(raw[name] for name in free)
        if scale * highest <= 1:
            most = math.nextafter(1, 0)  # a density below the rounding of 1
            return {name: 0.0 if name in dense else min(1 - scale * raw[name], most) for name in shapes}
        dense |= {name for name in free if raw[name] == highest}
    return dict.fromkeys(shapes, 0.0)


def _raw(shapes: Mapping[str, Shape], power: float) -> dict[str, float]:
    """(sum of axes / product of axes) ** power, up to a common factor where such powers leave the range of floats."""
    ratio = {name: sum(shape) / math.prod(shape) for name, shape in shapes.items()}
    log = {name: power * math.log(r) for name, r in ratio.items()}
    if max(map(abs, log.values())) < 500:
        return {name: r**power for name, r in ratio.items()}
    highest = max(log.values())
    return {name: math.exp(x - highest) for name, x in log.items()}


def check_sparsity(who: str, sparsity: float) -> None:
    """Checks that a sparsity is in [0, 1).

    Raises:
      ValueError: says what was given.
    """
    if not isinstance(sparsity, (int, float, np.floating)) or not 0 <= sparsity < 1:
        raise ValueError(f"{who}: sparsity is a fraction of zeros, in [0, 1), got {shown(sparsity)}")


def _check_shapes(who: str, shapes: Mapping[str, Shape]) -> dict[str, Shape]:
    if not isinstance(shapes, Mapping):
        raise ValueError(f"{who}: shapes must be {{name: shape}}, got {kind(shapes)}")
    for name, shape in shapes.items():
        if not isinstance(shape, (tuple, list)) or not shape or not all(checks.is_whole(size, 1) for size in shape):
            raise ValueError(f"{who}: leaf {name!r} must have a shape of whole numbers from 1 on, got {shown(shape)}")
    return {name: tuple(map(int, shape)) for name, shape in shapes.items()}


def share(
    shapes: Mapping[str, Shape], axes: Mapping[str, Axes | None], sparsity: float, distribution: Distribution
) -> dict[str, float]:
    """What a distribution gives each leaf. It is asked about layers in one orientation, (*window, in, out).

    Each layer of a stack is asked about, `"a/kernel[0]"` and so on. A leaf whose axes are not known is one layer as it
    is.

    Raises:
      ValueError: an answer that is no sparsity, or not one for all layers of a stack.
    """
    layers = {name: _layer_names(name, shape, axes[name]) for name, shape in shapes.items()}
    asked = {layer: _oriented(shapes[name], axes[name]) for name, own in layers.items() for layer in own}
    shared = distribution(asked, sparsity)
    if not isinstance(shared, Mapping):
        raise ValueError(f"make_plan: the distribution must give {{name: sparsity}}, got {shown(shared)}")
    if missing := [layer for layer in asked if layer not in shared]:
        raise ValueError(f"make_plan: the distribution gave no sparsity for {listed(missing)}")
    for layer in asked:
        check_sparsity(f"make_plan: the distribution, at leaf {layer!r}", shared[layer])
    for name, own in layers.items():
        if any(shared[layer] != shared[own[0]] for layer in own):
            raise ValueError(
                f"make_plan: the distribution must give all layers of the stack {name!r} one sparsity, "
                f"got {', '.join(str(shared[layer]) for layer in own[:4])}"
            )
    return {name: shared[own[0]] for name, own in layers.items()}


def _layer_names(name: str, shape: Shape, axes: Axes | None) -> list[str]:
    n = n_stacked(shape, axes)
    return [name] if n == 1 else [f"{name}[{i}]" for i in range(n)]


def _oriented(shape: Shape, axes: Axes | None) -> Shape:
    if axes is None:
        return shape
    fans = (math.prod(shape[axis] for axis in part) for part in (axes.inputs, axes.outputs))
    return (*(shape[axis] for axis in axes.window), *fans)


def whole(product: float, rounding: Callable[[float], int]) -> int:
    """`rounding`, but a product that float error has put next to an integer (0.57 * 100) is that integer."""
    nearest = round(product)
    return nearest if abs(product - nearest) < 1e-6 else rounding(product)
