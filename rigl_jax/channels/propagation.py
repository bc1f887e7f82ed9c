"""Importance of the outputs, propagated back through the network of absolute weights: NISP."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from rigl_jax import arguments as rules
from rigl_jax import checks
from rigl_jax.arguments import arguments
from rigl_jax.base import Array, PyTree
from rigl_jax.channels.gating import ChannelCriterion, Scores, inputs_of, parted, tapped
from rigl_jax.channels.grouping import Group
from rigl_jax.tracing.program import evaluate, trace
from rigl_jax.tracing.walk import Rule, Walker


@arguments(apply=rules.function, final=rules.optional(rules.array(1, host=True)))
def nisp(apply: Callable[[PyTree, Any], Any], final: Any = None) -> ChannelCriterion:
    """Scores of the outputs, propagated back through |W| (NISP, Yu et al. 2018, eq. 11).

    They bound what removal does: with scores s of the outputs y and s_j of what is read of the channels,
    sum s |change of y| <= sum of s_j |x_j| over what is removed, if activations have a slope of at most 1 and f(0) = 0.
    For that a maximum over a window hands the score on to all of its inputs, an average divides it, and a normalisation
    multiplies it by its scale. Biases have no part. It is one derivative of the network with |W| and no activations.

    Known are products, sums and differences, factors and divisors that do not depend on the data, maxima and minima,
    ReLU, leaky ReLU, tanh, the logistic function, pooling, and whatever moves entries. Not: products of activations
    (GELU, SiLU, attention, LayerNorm), softmax, loops.

    Args:
      apply: `(params, inputs) -> outputs`, such as logits, in inference mode; the batch is inputs, or `(inputs,
        labels)`. Only its shapes are read.
      final: number[outputs]: scores of the last axis of the outputs, such as those of `inf_fs`, at least 0. None: 1.

    Returns:
      `(groups, params, batch) -> scores`; float[size] for each group, summed over all positions that are read of one
      example. Channels that no product reads have 0.

    Raises:
      ValueError: when called: the network has an operation that has no bound; names it.

    Example:
      >>> import rigl_jax as rx
      >>> params = {"a": jnp.array([[1.0, 2.0]]), "b": jnp.array([[3.0, -1.0], [-1.0, 0.5]])}
      >>> apply = lambda p, x: jax.nn.relu(x @ p["a"]) @ p["b"]
      >>> groups = rx.channels.groups(apply, params, jnp.ones((1, 1)))
      >>> [s.tolist() for s in nisp(apply, jnp.array([1.0, 2.0]))(groups, params, jnp.ones((1, 1)))]
      [[5.0, 2.0], [0.0, 0.0]]
    """
    weights = None if final is None else jnp.asarray(final)

    def criterion(groups: Sequence[Group], params: PyTree, batch: Any) -> Scores:
        inputs = inputs_of(batch)
        one = jax.tree.map(lambda x: jnp.asarray(x)[:1], inputs)
        twin = _twin(apply, params, one)
        model = tapped("nisp", twin, groups, params, one)

        def total(shift: Array) -> Array:
            outputs = jax.tree.leaves(model.shifted(shift, params, one))
            if weights is not None and any(y.shape[-1:] != weights.shape for y in outputs):
                raise ValueError(f"nisp: final must hold {outputs[0].shape[-1:]} scores, got {weights.shape}")
            parts = (jnp.sum(y if weights is None else y * jnp.broadcast_to(weights, y.shape)) for y in outputs)
            return sum(parts, jnp.zeros(()))

        return parted(groups, jax.grad(total)(jnp.zeros(model.size)))

    return criterion


@arguments(responses=rules.host_array(2))
def inf_fs(responses: Any, alpha: float = 0.5, r: float = 0.9) -> Array:
    """How much each output is worth among the others, by Inf-FS (Roffo et al. 2015), as NISP uses it.

    Of outputs i and j: A = alpha max(s_i, s_j) + (1 - alpha) (1 - |rank correlation|), s being standard deviations
    divided by the largest. Scores are the row sums of (I - r A / rho(A))^-1 - I, with the spectral radius rho: paths of
    all lengths. The rank correlation of an output that does not vary counts as 0.

    Args:
      responses: number[examples, outputs].
      alpha: weight of the deviations, in [0, 1].
      r: weight of long paths, between 0 and 1.

    Returns:
      float[outputs], at least 0.

    Raises:
      ValueError: no matrix of 2 examples or more, numbers out of their range.

    Example:
      >>> x = np.array([[0.0, 0.0, 1.0], [1.0, 1.0, 1.0], [2.0, 2.0, 1.0], [3.0, 3.0, 1.0]])
      >>> np.asarray(inf_fs(x), float).round(1).tolist()  # the first two say the same
      [8.4, 8.4, 10.0]
    """
    x = np.asarray(responses, np.float64)
    if len(x) < 2:
        raise ValueError(f"inf_fs: responses must be [examples, outputs], 2 examples at least, got {x.shape}")
    for name, value in (("alpha", alpha), ("r", r)):
        checks.number("inf_fs", name, value, "must be in [0, 1]", lambda v: 0 <= v <= 1)
    spread = x.std(0)
    spread = spread / max(float(spread.max()), 1e-30)
    ranks = np.stack([_ranks(column) for column in x.T])
    ranks = ranks - ranks.mean(1, keepdims=True)
    norms = np.sqrt((ranks**2).sum(1))
    correlation = ranks @ ranks.T / np.maximum(np.outer(norms, norms), 1e-30)
    pairs = alpha * np.maximum.outer(spread, spread) + (1 - alpha) * (1 - np.abs(correlation))
    radius = max(float(np.abs(np.linalg.eigvalsh(pairs)).max()), 1e-30)
    eye = np.eye(len(pairs))
    return jnp.asarray((np.linalg.inv(eye - min(r, 1 - 1e-9) / radius * pairs) - eye).sum(1))


def _ranks(column: np.ndarray) -> np.ndarray:
    """Ranks from 0; of equal numbers their mean."""
    _, which, counts = np.unique(column, return_inverse=True, return_counts=True)
    last = np.cumsum(counts)
    return (last - (counts + 1) / 2)[which.reshape(-1)]


# --- the network of absolute weights ---------------------------------------------------------------------------------


def _twin(apply: Callable[..., Any], params: PyTree, *inputs: Any) -> Callable[..., Any]:
    """`apply` with |W| for W, no biases and no activations: linear in its inputs."""
    program = trace(apply, params, *inputs)
    n = len(jax.tree.leaves(params))
    data = set(program.inputs[n:])
    for eqn in program.equations:
        if any(not hasattr(atom, "val") and atom in data for atom in eqn.invars):
            data.update(eqn.outvars)

    def run(params: PyTree, *inputs: Any) -> Any:
        leaves = [*jax.tree.leaves(params), *(x * 1.0 for x in jax.tree.leaves(inputs))]
        table = {eqn.primitive.name: _absolute(data) for eqn in program.equations}
        return evaluate(program, leaves, table)

    return run


def _absolute(data: set[Any]) -> Rule:
    def rule(walker: Walker, eqn: Any, xs: list[Any]) -> Sequence[Any]:
        given = [not hasattr(atom, "val") and atom in data for atom in eqn.invars]
        if not any(given):
            return walker.unknown(walker, eqn, xs)
        name = eqn.primitive.name
        if name not in _TWINS:
            raise ValueError(f"nisp: apply must have operations with a bound only, got {name}")
        return [_TWINS[name](walker, eqn, xs, given)]

    return rule


def _bound(walker: Walker, eqn: Any, xs: list[Any]) -> Any:
    (out,) = walker.unknown(walker, eqn, xs)
    return out


def _own(walker: Walker, eqn: Any, xs: list[Any], given: list[bool]) -> Any:
    """The operation itself: it moves entries or sums them. Numbers beside the data (of a padding) are 0."""
    return _bound(walker, eqn, [x if one else jnp.zeros_like(x) for x, one in zip(xs, given, strict=True)])


def _gathered(walker: Walker, eqn: Any, xs: list[Any], given: list[bool]) -> Any:
    if not given[0] or any(given[1:]):
        raise ValueError(f"nisp: apply must have operations with a bound only, got {eqn.primitive.name} by data")
    return _bound(walker, eqn, xs)


def _product(walker: Walker, eqn: Any, xs: list[Any], given: list[bool]) -> Any:
    if all(given[:2]):
        raise ValueError(f"nisp: apply must have operations with a bound only, got {eqn.primitive.name} of activations")
    return _bound(walker, eqn, [x if one else jnp.abs(x) for x, one in zip(xs, given, strict=True)])


def _quotient(walker: Walker, eqn: Any, xs: list[Any], given: list[bool]) -> Any:
    if given[1]:
        raise ValueError("nisp: apply must have operations with a bound only, got div by activations")
    return _product(walker, eqn, xs, given)


def _sum(walker: Walker, eqn: Any, xs: list[Any], given: list[bool]) -> Any:
    """Also of a difference, and of an extreme: |max(a, b) - max(a', b')| <= |a - a'| + |b - b'|."""
    terms = [x for x, one in zip(xs, given, strict=True) if one and jnp.issubdtype(x.dtype, jnp.floating)]
    out = eqn.outvars[0].aval
    return sum(
        (jnp.broadcast_to(x, jnp.broadcast_shapes(*map(jnp.shape, xs))) for x in terms), jnp.zeros((), out.dtype)
    )


def _selected(walker: Walker, eqn: Any, xs: list[Any], given: list[bool]) -> Any:
    return _sum(walker, eqn, xs[1:], given[1:])


def _compared(walker: Walker, eqn: Any, xs: list[Any], given: list[bool]) -> Any:
    return jnp.zeros(jnp.broadcast_shapes(*map(jnp.shape, xs)), bool)


def _largest(walker: Walker, eqn: Any, xs: list[Any], given: list[bool]) -> Any:
    return jnp.sum(xs[0], eqn.params["axes"])


def _window(walker: Walker, eqn: Any, xs: list[Any], given: list[bool]) -> Any:
    p = eqn.params
    sizes = p["window_dimensions"], p["window_strides"], p["padding"], p["base_dilation"], p["window_dilation"]
    return jax.lax.reduce_window(xs[0], np.zeros((), xs[0].dtype), jax.lax.add, *sizes)


_TWINS: dict[str, Callable[[Walker, Any, list[Any], list[bool]], Any]] = {
    **dict.fromkeys(("add", "add_any", "sub", "max", "min", "clamp"), _sum),
    **dict.fromkeys(("neg", "abs", "tanh", "logistic", "sin"), _sum),
    **dict.fromkeys(("mul", "dot_general", "conv_general_dilated"), _product),
    "div": _quotient,
    "select_n": _selected,
    **dict.fromkeys(("eq", "ne", "lt", "le", "gt", "ge", "is_finite"), _compared),
    **dict.fromkeys(("reduce_max", "reduce_min"), _largest),
    **dict.fromkeys(("reduce_window_max", "reduce_window_min"), _window),
    **dict.fromkeys(("pad", "concatenate"), _own),
    **dict.fromkeys(
        ("reshape", "broadcast_in_dim", "transpose", "squeeze", "slice", "rev", "reduce_sum", "reduce_window_sum",
         "convert_element_type", "copy", "stop_gradient", "reduce_precision"),
        _own,
    ),
    **dict.fromkeys(("gather", "dynamic_slice", "dynamic_update_slice"), _gathered),
}  # fmt: skip
"""What stands for an operation on data: `(walker, equation, operands, which of them are data) -> result`."""
