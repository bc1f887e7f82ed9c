"""What holds for every input of a box: bounds, certified predictions, units that never fire, NRS."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from rigl_jax import arguments as rules
from rigl_jax import checks, contents
from rigl_jax.arguments import arguments
from rigl_jax.base import Array, PyTree
from rigl_jax.messages import shown
from rigl_jax.tracing.intervals import Interval, bounds, fixed, unstable


class Bounds(NamedTuple):
    """What `interval_bounds` found.

    Attributes:
      outputs: `Interval(low, high)` in the tree of apply's result.
      relus: the interval of the input of each ReLU, in the order of execution; with the batch axis. A ReLU is
        `max(x, 0)` with a number 0, as `jax.nn.relu`; with an array of zeros made under jit it is not recognised.
    """

    outputs: Any
    relus: tuple[Interval, ...]


@arguments(apply=rules.function, low=rules.finite(host=True), high=rules.finite(host=True))
def interval_bounds(apply: Callable[[PyTree, Any], Any], params: PyTree, low: Any, high: Any) -> Bounds:
    """Bounds of the outputs and of what each ReLU reads, for all inputs between `low` and `high` (IBP).

    Rules exist for dense layers, convolutions, normalisation with fixed statistics, ReLU, ReLU6, tanh, sigmoid, exp,
    log and other primitives that rise everywhere, abs, squares, sums, residual connections, poolings, rearrangements.
    For anything else, such as attention or batch statistics of the input itself, the function raises. To teach it an
    operation, put a rule into `rigl_jax.tracing.intervals.RULES`. A choice by a comparison, as in `jax.nn.leaky_relu`,
    `elu`, `softplus` and `where(x > 0, x, 0)`, has no rule: take `jnp.maximum(x, 0.01 * x)` for leaky ReLU,
    `-jnp.log(jax.nn.sigmoid(-x))` for softplus, `jax.nn.relu(x)` for the last, whose bounds are exact.

    Bounds are sound in exact arithmetic. Computed in floating point, they are rounded, not outward: a value may leave
    them by rounding errors of the network, which are large where large terms cancel. For a proof on a computer compute
    in float64 with a margin, or take `individual_fairness`, which is exact.

    Args:
      apply: `(params, inputs) -> outputs`, in inference mode.
      params: the weights; those of a masked network, masked.
      low: float[batch, ...], the lower corner of each box; finite.
      high: of the same shape, at least low.

    Returns:
      Bounds, differentiable with respect to params, low and high.

    Raises:
      ValueError: low and high do not fit, or an operation has no rule; names it. Outside of jit also: low and high are
        not finite, high is below low, or a bound is NaN.

    >>> layer, w = lambda w, x: jax.nn.relu(x @ w), jnp.array([[1.0], [-2.0]])
    >>> found = interval_bounds(layer, w, jnp.zeros((1, 2)), jnp.ones((1, 2)))
    >>> found.relus[0].low.tolist(), found.outputs.low.tolist(), found.outputs.high.tolist()
    ([[-2.0]], [[0.0]], [[1.0]])
    """
    low, high = jnp.asarray(low), jnp.asarray(high)
    if not jnp.issubdtype(low.dtype, jnp.floating) or not low.ndim:
        raise ValueError(f"interval_bounds: low must be floats [batch, ...], got {shown(low)}")
    if low.shape != high.shape or low.dtype != high.dtype:
        raise ValueError(f"interval_bounds: high must be like low, {shown(low)}, got {shown(high)}")
    if (least := contents.known(low)) is not None:
        contents.every("interval_bounds", "high", "nowhere below low", high, lambda most: most >= least)
    return _bounds("interval_bounds", apply, params, low, high)


def _bounds(who: str, apply: Callable[[PyTree, Any], Any], params: PyTree, low: Array, high: Array) -> Bounds:
    program, shape = jax.make_jaxpr(apply, return_shape=True)(params, low)
    found: list[Interval] = []
    outs = bounds(program, [*map(fixed, jax.tree.leaves(params)), Interval(low, high)], lambda eqn, x: found.append(x))
    for bound in (end for out in outs for end in out):
        contents.every(who, "apply with these params", "free of NaN in its bounds", bound, lambda x: ~np.isnan(x))
    return Bounds(jax.tree.unflatten(jax.tree.structure(shape), outs), tuple(found))


@arguments(apply=rules.function, inputs=rules.finite(host=True), labels=rules.array(1, host=True), eps=rules.scalar)
def certified_accuracy(
    apply: Callable[[PyTree, Any], Any], params: PyTree, inputs: Any, labels: Any, eps: float
) -> Array:
    """The share of examples whose prediction is right for every change of up to `eps` in each input, by IBP.

    A lower bound, but for the rounding that `interval_bounds` tells of: where interval arithmetic is too wide to tell,
    an example counts as not certified. At `eps=0` it is the accuracy, ties counting as wrong.

    Args:
      apply: `(params, inputs) -> logits float[batch, classes]`.
      params: the weights.
      inputs: float[batch, ...].
      labels: int[batch].
      eps: radius in the maximum norm, at least 0; inputs are not clipped to a range.

    Raises:
      ValueError: as `interval_bounds`; labels do not fit, or one is no class (seen outside of jit only); apply gives no
        logits of two classes or more.

    >>> apply, inputs = lambda w, x: x @ w, jnp.array([[1.0, 0.0], [0.1, 0.0]])
    >>> float(certified_accuracy(apply, jnp.eye(2), inputs, jnp.array([0, 0]), 0.25))
    0.5
    """
    inputs, labels = jnp.asarray(inputs), jnp.asarray(labels)
    if not isinstance(eps, jax.core.Tracer):
        checks.number("certified_accuracy", "eps", eps, "must be at least 0", lambda value: value >= 0)
    if not jnp.issubdtype(inputs.dtype, jnp.floating) or not inputs.ndim:
        raise ValueError(f"certified_accuracy: inputs must be floats [batch, ...], got {shown(inputs)}")
    contents.labels("certified_accuracy", labels, len(inputs))
    outputs = _bounds("certified_accuracy", apply, params, inputs - eps, inputs + eps).outputs
    low, high = outputs if isinstance(outputs, Interval) else (outputs, outputs)
    contents.logits("certified_accuracy", "apply", low, len(inputs))
    contents.labels("certified_accuracy", labels, *low.shape)
    true = jax.nn.one_hot(labels, low.shape[1], dtype=bool)
    least = jnp.max(jnp.where(true, low, -jnp.inf), axis=1)
    return jnp.mean(least > jnp.max(jnp.where(true, -jnp.inf, high), axis=1), dtype=jnp.float32)


@arguments(relus=rules.sequence, p=rules.scalar)
def nrs(relus: Sequence[Interval], gammas: Sequence[Any] | None = None, p: float = 2.0) -> Array:
    """Loss of unstable ReLUs (Li et al. 2022, NRS): `-mean tanh(1 + low high / |gamma|^p)` over all units.

    A unit whose bounds have one sign is stable. The mean is over all units of all layers, so that wide layers count
    more, as in the authors' code. For pruning, `nrs_scores` has it for each channel.

    Args:
      relus: `Bounds.relus`.
      gammas: for each ReLU the scale of the normalisation before it, which broadcasts against its bounds, or None. No
        gradient flows into it. Default: none at all.
      p: the exponent.

    Returns:
      scalar; -1 where all is stable, up to 1.

    Raises:
      ValueError: no ReLU, or not as many gammas.

    >>> round(float(nrs([Interval(jnp.array([-1.0]), jnp.array([2.0]))])), 4)
    0.7616
    """
    units = _units("nrs", relus, gammas, p)
    return jnp.mean(jnp.concatenate([unit.ravel() for unit in units]))


@arguments(relus=rules.sequence, p=rules.scalar)
def nrs_scores(relus: Sequence[Interval], gammas: Sequence[Any] | None = None, p: float = 2.0) -> tuple[Array, ...]:
    """The stability of each channel, minus its mean NRS: low for channels that make bounds loose; prune those.

    Args:
      relus: of `nrs`; channels are the last axis.
      gammas: of `nrs`.
      p: of `nrs`.

    Returns:
      float[channels] for each ReLU, from -1 to 1. A channel that is already removed has bounds of 0, hence the
      score tanh(1) = 0.76, above unstable ones; rank it apart, at -inf. (In the authors' code it has score 0.)

    Raises:
      ValueError: as `nrs`.

    >>> [round(float(s), 4) for s in nrs_scores([Interval(jnp.array([[-1.0, 1.0]]), jnp.array([[2.0, 2.0]]))])[0]]
    [-0.7616, 0.9951]
    """
    units = _units("nrs_scores", relus, gammas, p)
    return tuple(-jnp.mean(unit, axis=tuple(range(unit.ndim - 1))) for unit in units)


def _units(who: str, relus: Sequence[Interval], gammas: Sequence[Any] | None, p: float) -> list[Array]:
    _checked(who, relus)
    if not relus:
        raise ValueError(f"{who}: relus must be at least one, got none")
    given: Sequence[Any] = [None] * len(relus) if gammas is None else gammas
    if not isinstance(given, Sequence) or len(given) != len(relus):
        raise ValueError(f"{who}: gammas must be one for each of {len(relus)} ReLUs, or None, got {shown(gammas)}")
    for i, (x, gamma) in enumerate(zip(relus, given, strict=True)):
        if gamma is not None and (np.ndim(gamma) > x.low.ndim or not _broadcasts(np.shape(gamma), x.low.shape)):
            raise ValueError(
                f"{who}: gammas[{i}] must broadcast against bounds of shape {x.low.shape}, got {shown(gamma)}"
            )
    return [unstable(x, gamma, p) for x, gamma in zip(relus, given, strict=True)]


def _broadcasts(small: tuple[int, ...], large: tuple[int, ...]) -> bool:
    return all(a in (1, b) for a, b in zip(small[::-1], large[::-1], strict=False))


def _checked(who: str, relus: Sequence[Interval]) -> None:
    if not all(isinstance(x, Interval) for x in relus):
        raise ValueError(f"{who}: relus must be those of interval_bounds, got {shown(relus)}")
    for bound in (end for x in relus for end in x):
        contents.not_nan(who, "relus", bound)


@arguments(relus=rules.sequence)
def dead_units(relus: Sequence[Interval]) -> tuple[Array, ...]:
    """The units that are 0 for every input of all boxes: they can be removed there without any change (Fairify).

    By the upper bound of what the ReLU reads, `high <= 0`: proven in exact arithmetic, while computed bounds are
    rounded, see `interval_bounds`. A unit whose bound is within rounding of 0 may fire a little. Biswas & Rajan (2023)
    send the others to an SMT solver, and, if it takes too long, prune by a heuristic that proves nothing; neither is
    here.

    Args:
      relus: `Bounds.relus`; channels are the last axis.

    Returns:
      bool[channels] for each ReLU, in the order of execution. `rx.channels.shrink` takes the units that are alive,
      `keep={leaf: {axis: ~dead}}`, if there is one.

    Raises:
      ValueError: they are not those of `interval_bounds`, or NaN (seen outside of jit only).

    >>> [mask.tolist() for mask in dead_units([Interval(jnp.array([[-2.0, -1.0]]), jnp.array([[-1.0, 0.5]]))])]
    [[True, False]]
    """
    _checked("dead_units", relus)
    return tuple(jnp.all(x.high <= 0, axis=tuple(range(x.high.ndim - 1))) for x in relus)
