"""Individual fairness of a small ReLU network, proven or refuted by an SMT solver."""

from __future__ import annotations

import importlib
from collections.abc import Sequence
from fractions import Fraction
from typing import Any, Literal, NamedTuple

import numpy as np

from rigl_jax import arguments as rules
from rigl_jax import checks
from rigl_jax.arguments import arguments
from rigl_jax.messages import shown

Layers = Sequence[tuple[np.ndarray, np.ndarray]]


class Fairness(NamedTuple):
    """What `individual_fairness` found.

    Attributes:
      verdict: "fair": proven for the whole box. "unfair": `pair` is a counterexample. "unknown": neither, see `why`.
      pair: two inputs, float64[features], that differ in protected features only and get different classes; or None.
      why: of "unknown": what the solver says, such as "timeout".
      classes: of the pair.
    """

    verdict: Literal["fair", "unfair", "unknown"]
    pair: tuple[np.ndarray, np.ndarray] | None = None
    why: str = ""
    classes: tuple[int, int] | None = None


_PLACES = rules.rule(
    "a list of positions, whole numbers",
    lambda value: (
        isinstance(value, Sequence) and not isinstance(value, str) and all(checks.is_whole(place) for place in value)
    ),
    lambda value: tuple(map(int, value)),
)


@arguments(layers=rules.sequence, low=rules.host_array(1), high=rules.host_array(1), protected=_PLACES, whole=_PLACES,
           seconds=rules.positive)  # fmt: skip
def individual_fairness(
    layers: Sequence[tuple[Any, Any]],
    low: Any,
    high: Any,
    protected: Sequence[int],
    *,
    whole: Sequence[int] = (),
    seconds: float = 60.0,
) -> Fairness:
    """Whether two inputs of a box that differ in protected features only ever get different classes (Fairify).

    Decided by the solver z3 (`pip install 'rigl_jax[verify]'`) in exact arithmetic on the given weights. First exact
    interval bounds settle the sign of as many ReLUs as they can: units that are dead on the box are left out, and
    those that are always active are linear, as in Biswas & Rajan (2023). Their heuristic pruning after a timeout, which
    proves nothing, is not here. The time grows exponentially with the number of unsettled ReLUs: some tens are
    feasible.

    A counterexample is run through the network in float64. If it gives equal classes there, the answer is "unknown".
    "fair" holds in exact arithmetic: computed with rounding, inputs at a boundary of classes may still differ.

    Args:
      layers: `((kernel [in, out], bias [out]), ...)`, with a ReLU after each but the last, whose outputs are the
        logits: two or more, of which the largest wins, or one, whose class is 1 where it is above 0.
      low: [features], the lower corner of the box.
      high: [features], at least low.
      protected: positions of the features in which the two inputs may differ, anywhere between low and high.
      whole: positions of features that are whole numbers, such as a binary one.
      seconds: the time limit of the solver.

    Returns:
      Fairness. A tie of logits is no class, and never part of a counterexample; a single logit of 0 is class 0.

    Raises:
      ValueError: layers that do not fit each other or the box; no protected feature.
      ImportError: z3 is not installed.

    >>> layers = [(np.array([[1.0, 0.0], [0.0, 1.0]]), np.zeros(2)), (np.array([[1.0], [-1.0]]), np.zeros(1))]
    >>> found = individual_fairness(layers, [0, 0], [1, 1], [1], whole=[1])  # doctest: +SKIP
    >>> found.verdict, found.classes  # doctest: +SKIP
    ('unfair', (1, 0))
    """
    net = _checked(layers, low, high, protected, whole)
    try:
        z3 = importlib.import_module("z3")
    except ImportError as error:
        raise ImportError("individual_fairness needs z3: pip install 'rigl_jax[verify]'") from error
    solver, signs = z3.Solver(), _signs(net, low, high)
    solver.set("timeout", max(int(1000 * seconds), 1))
    first = _inputs(z3, solver, low, high, whole, "x")
    second = [
        other if i in protected else own
        for i, (own, other) in enumerate(zip(first, _inputs(z3, solver, low, high, whole, "y"), strict=True))
    ]
    logits = [_run(z3, solver, net, signs, x, name) for x, name in ((first, "a"), (second, "b"))]
    solver.add(_differ(z3, *logits))
    answer = solver.check()
    if answer == z3.unsat:
        return Fairness("fair")
    if answer != z3.sat:
        return Fairness("unknown", why=solver.reason_unknown())
    model = solver.model()
    x, y = (np.array([_value(model, v) for v in values]) for values in (first, second))
    classes = class_of(net, x), class_of(net, y)
    if None in classes or classes[0] == classes[1]:
        return Fairness("unknown", why="the counterexample of exact arithmetic does not survive rounding")
    return Fairness("unfair", (x, y), classes=classes)  # pyrefly: ignore


def class_of(layers: Sequence[tuple[Any, Any]], x: Any) -> int | None:
    """The class that a network of `individual_fairness` gives an input in float64; None where the largest logits tie.

    >>> class_of([(np.array([[1.0, 2.0]]), np.zeros(2))], [3.0])
    1
    """
    x = np.asarray(x, np.float64)
    for i, (kernel, bias) in enumerate(layers):
        x = x @ np.asarray(kernel, np.float64) + np.asarray(bias, np.float64)
        x = x if i == len(layers) - 1 else np.maximum(x, 0)
    if len(x) == 1:
        return int(x[0] > 0)
    best = np.flatnonzero(x == x.max())
    return int(best[0]) if len(best) == 1 else None


def _checked(layers: Sequence[Any], low: np.ndarray, high: np.ndarray, protected: Any, whole: Any) -> Layers:
    who, width = "individual_fairness", len(low)
    if high.shape != low.shape or not np.isfinite([low, high]).all() or not (low <= high).all():
        raise ValueError(f"{who}: high must be finite, like low, {shown(low)}, and nowhere below, got {shown(high)}")
    for name, places in (("protected", protected), ("whole", whole)):
        if any(place >= width for place in places) or (name == "protected" and not places):
            raise ValueError(f"{who}: {name} must be positions among {width} features, got {shown(places)}")
    net = []
    for layer in layers:
        pair: Any = layer if isinstance(layer, Sequence) and len(layer) == 2 else (None, None)
        if not all(hasattr(part, "shape") and np.issubdtype(part.dtype, np.number) for part in pair):
            raise ValueError(f"{who}: layers must be pairs (kernel, bias) of arrays, got {shown(layer)}")
        kernel, bias = (np.asarray(part, np.float64) for part in pair)
        fits = kernel.ndim == 2 and kernel.shape[0] == width and bias.shape == kernel.shape[1:]
        if not fits or not (np.isfinite(kernel).all() and np.isfinite(bias).all()):
            raise ValueError(
                f"{who}: layers must have finite kernels [in, out] and biases [out], here with {width} inputs, "
                f"got {kernel.shape} and {bias.shape}"
            )
        width = len(bias)
        net.append((kernel, bias))
    if not net:
        raise ValueError(f"{who}: layers must be at least one, got {shown(layers)}")
    return net


def _signs(net: Layers, low: np.ndarray, high: np.ndarray) -> list[list[int]]:
    """Of each hidden unit: -1 dead on the box, 1 always active, 0 not settled. Exact."""
    box, found = [(Fraction(float(a)), Fraction(float(b))) for a, b in zip(low, high, strict=True)], []
    for kernel, bias in net[:-1]:
        after, signs = [], []
        for j, b in enumerate(bias):
            ends = [
                sorted((Fraction(float(w)) * lo, Fraction(float(w)) * hi)) for w, (lo, hi) in _terms(kernel, j, box)
            ]
            least, most = (Fraction(float(b)) + sum(end[side] for end in ends) for side in (0, 1))
            signs.append(-1 if most <= 0 else int(least >= 0))
            after.append((max(least, Fraction(0)), max(most, Fraction(0))))
        box = after
        found.append(signs)
    return found


def _terms(kernel: np.ndarray, j: int, values: Sequence[Any]) -> list[tuple[float, Any]]:
    return [(w, value) for w, value in zip(kernel[:, j], values, strict=True) if w != 0 and value is not None]


def _inputs(z3: Any, solver: Any, low: np.ndarray, high: np.ndarray, whole: Sequence[int], name: str) -> list[Any]:
    made = [z3.Int(f"{name}{i}") if i in whole else z3.Real(f"{name}{i}") for i in range(len(low))]
    for variable, lo, hi in zip(made, low, high, strict=True):
        solver.add(variable >= _exact(z3, lo), variable <= _exact(z3, hi))
    return [z3.ToReal(variable) if i in whole else variable for i, variable in enumerate(made)]


def _exact(z3: Any, number: float) -> Any:
    fraction = Fraction(float(number))
    return z3.Q(fraction.numerator, fraction.denominator)


def _run(z3: Any, solver: Any, net: Layers, signs: list[list[int]], x: list[Any], name: str) -> list[Any]:
    """The logits as variables; a unit that is dead is None."""
    values: list[Any] = x
    for i, (kernel, bias) in enumerate(net):
        after: list[Any] = []
        for j, b in enumerate(bias):
            sign = signs[i][j] if i < len(signs) else 1
            if sign < 0:
                after.append(None)
                continue
            total = z3.Real(f"{name}_{i}_{j}")
            products = [_exact(z3, w) * value for w, value in _terms(kernel, j, values)]
            solver.add(total == z3.Sum(_exact(z3, b), *products))
            after.append(total if sign > 0 else z3.If(total > 0, total, z3.RealVal(0)))
        values = after
    return values


def _differ(z3: Any, first: list[Any], second: list[Any]) -> Any:
    """Two classes that the runs get. The runs can be exchanged, so one order of the classes is enough."""
    if len(first) == 1:
        return z3.And(first[0] > 0, second[0] <= 0)
    wins = [[z3.And(*(y > z for z in run if z is not y)) for y in run] for run in (first, second)]
    return z3.Or(*(z3.And(wins[0][c], wins[1][d]) for c in range(len(first)) for d in range(c)))


def _value(model: Any, variable: Any) -> float:
    value = model.evaluate(variable, model_completion=True)
    return float(Fraction(value.numerator_as_long(), value.denominator_as_long()))
