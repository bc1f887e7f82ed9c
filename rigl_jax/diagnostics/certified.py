"""What holds for every input of a box: bounds, certified predictions, units that never fire, NRS."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from rigl_jax import arguments as rules
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


@arguments(apply=rules.function, low=rules.array(host=True), high=rules.array(host=True))
def interval_bounds(apply: Callable[[PyTree, Any], Any], params: PyTree, low: Any, high: Any) -> Bounds:
    """Bounds of the outputs and of what each ReLU reads, for all inputs between `low` and `high` (IBP).

    Rules exist for dense layers, convolutions, normalisation with fixed statistics, ReLU, tanh, sigmoid and other
    monotone functions, sums, residual connections, poolings and rearrangements. For anything else, such as attention or
    batch statistics of the input itself, the function raises: a bound is sound or none. To teach it an operation, put
    a rule into `rigl_jax.tracing.intervals.RULES`.

    Args:
      apply: `(params, inputs) -> outputs`, in inference mode.
      params: the weights; those of a masked network, masked.
      low: float[batch, ...], the lower corner of each box.
      high: of the same shape, at least low.

    Returns:
      Bounds, differentiable with respect to params, low and high.

    Raises:
      ValueError: low and high do not fit, or an operation has no rule; names it.

    >>> layer, w = lambda w, x: jax.nn.relu(x @ w), jnp.array([[1.0], [-2.0]])
    >>> found = interval_bounds(layer, w, jnp.zeros((1, 2)), jnp.ones((1, 2)))
    >>> found.relus[0].low.tolist(), found.outputs.low.tolist(), found.outputs.high.tolist()
    ([[-2.0]], [[0.0]], [[1.0]])
    """
    low, high = jnp.asarray(low), jnp.asarray(high)
    if low.shape != high.shape or low.dtype != high.dtype or not jnp.issubdtype(low.dtype, jnp.floating):
        raise ValueError(f"interval_bounds: high must be floats like low, {shown(low)}, got {shown(high)}")
    if not isinstance(low, jax.core.Tracer) and not isinstance(high, jax.core.Tracer) and bool(jnp.any(low > high)):
        raise ValueError("interval_bounds: high must nowhere be below low")
    program, shape = jax.make_jaxpr(apply, return_shape=True)(params, low)
    found: list[Interval] = []
    outs = bounds(program, [*map(fixed, jax.tree.leaves(params)), Interval(low, high)], lambda eqn, x: found.append(x))
    return Bounds(jax.tree.unflatten(jax.tree.structure(shape), outs), tuple(found))


@arguments(apply=rules.function, inputs=rules.array(host=True), labels=rules.array(1, host=True), eps=rules.scalar)
def certified_accuracy(
    apply: Callable[[PyTree, Any], Any], params: PyTree, inputs: Any, labels: Any, eps: float
) -> Array:
    """The share of examples whose prediction is right for every change of up to `eps` in each input, by IBP.

    A lower bound: where interval arithmetic is too wide to tell, an example counts as not certified. At `eps=0` it is
    the accuracy, ties counting as wrong.

    Args:
      apply: `(params, inputs) -> logits float[batch, classes]`.
      params: the weights.
      inputs: float[batch, ...].
      labels: int[batch].
      eps: radius in the maximum norm, at least 0; inputs are not clipped to a range.

    Raises:
      ValueError: as `interval_bounds`; labels do not fit.

    >>> apply, inputs = lambda w, x: x @ w, jnp.array([[1.0, 0.0], [0.1, 0.0]])
    >>> float(certified_accuracy(apply, jnp.eye(2), inputs, jnp.array([0, 0]), 0.25))
    0.5
    """
    inputs, labels = jnp.asarray(inputs), jnp.asarray(labels)
    if not isinstance(eps, jax.core.Tracer) and not eps >= 0:
        raise ValueError(f"certified_accuracy: eps must be at least 0, got {shown(eps)}")
    if labels.shape != inputs.shape[:1] or not jnp.issubdtype(labels.dtype, jnp.integer):
        raise ValueError(f"certified_accuracy: labels must be int{list(inputs.shape[:1])}, got {shown(labels)}")
    low, high = interval_bounds(apply, params, inputs - eps, inputs + eps).outputs
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
    if not relus or not all(isinstance(x, Interval) for x in relus):
        raise ValueError(f"{who}: relus must be those of interval_bounds, at least one, got {shown(relus)}")
    given: Sequence[Any] = [None] * len(relus) if gammas is None else gammas
    if not isinstance(given, Sequence) or len(given) != len(relus):
        raise ValueError(f"{who}: gammas must be one for each of {len(relus)} ReLUs, or None, got {shown(gammas)}")
    return [unstable(x, gamma, p) for x, gamma in zip(relus, given, strict=True)]


@arguments(relus=rules.sequence)
def dead_units(relus: Sequence[Interval]) -> tuple[Array, ...]:
    """The units that are 0 for every input of all boxes: they can be removed there without any change (Fairify).

    Proven by the upper bound of what the ReLU reads, `high <= 0`. Biswas & Rajan (2023) send the others to an SMT
    solver, and, if it takes too long, prune by a heuristic that proves nothing; neither is here.

    Args:
      relus: `Bounds.relus`; channels are the last axis.

    Returns:
      bool[channels] for each ReLU.

    Raises:
      ValueError: they are not those of `interval_bounds`.

    >>> [mask.tolist() for mask in dead_units([Interval(jnp.array([[-2.0, -1.0]]), jnp.array([[-1.0, 0.5]]))])]
    [[True, False]]
    """
    if not all(isinstance(x, Interval) for x in relus):
        raise ValueError(f"dead_units: relus must be those of interval_bounds, got {shown(relus)}")
    return tuple(jnp.all(x.high <= 0, axis=tuple(range(x.high.ndim - 1))) for x in relus)
