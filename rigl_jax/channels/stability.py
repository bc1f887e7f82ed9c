"""Channels whose ReLUs are stable on a box around each input: NRS as a criterion."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp

from rigl_jax import arguments as given
from rigl_jax import checks
from rigl_jax.arguments import arguments
from rigl_jax.base import Array, PyTree
from rigl_jax.channels import rules
from rigl_jax.channels.gating import ChannelCriterion, Scores, inputs_of, numbered, parted, sizes
from rigl_jax.channels.grouping import Group, arrays_of, checked_groups
from rigl_jax.messages import shown
from rigl_jax.tracing.intervals import Interval, fixed, program_bounds, unstable
from rigl_jax.tracing.program import Program, trace

REMOVED = -2.0
"""The score of a channel that is 0 on all boxes, below all others."""


@arguments(apply=given.function, scales=given.word)
def nrs(
    apply: Callable[[PyTree, Any], Any], eps: float = 0.01, *, p: float = 2.0, scales: str = r"(scale|gamma)$"
) -> ChannelCriterion:
    """How stable the ReLUs of a channel are, minus its mean NRS: loose bounds go first (Li et al. 2022).

    A ReLU whose input is between `low` and `high` for every change of up to `eps` in each input has

        NRS = -tanh(1 + low high / |gamma|^p),

    gamma being the scale of a normalisation right before it (else 1). The score of a channel is minus the mean over
    examples, positions and all ReLUs that see the channel. Bounds are those of interval arithmetic (IBP).

    Departures: a channel that is 0 on all boxes was removed before and scores -2, below all others; in the authors'
    code it has score 0 and outranks unstable ones. A channel that no ReLU sees scores 1, as it loosens nothing.

    Args:
      apply: `(params, inputs) -> outputs`, in inference mode, of operations that have a rule (see
        `rx.diagnostics.interval_bounds`); the batch is inputs, or `(inputs, labels)`.
      eps: radius of the boxes in the maximum norm, above 0.
      p: the exponent, above 0.
      scales: a regular expression for the names of the scales of normalisations, vectors over channels.

    Returns:
      `(groups, params, batch) -> scores`; float[size] for each group, from -1 to 1, or -2.

    Raises:
      ValueError: `eps` or `p` not above 0, no regular expression; when called: inputs that are not floats, an
        operation without a rule; names it.

    Example:
      >>> import rigl_jax as rx
      >>> params = {"a": jnp.array([[1.0, 1.0]]), "bias": jnp.array([0.0, 5.0]), "b": jnp.array([[1.0], [1.0]])}
      >>> apply = lambda p, x: jax.nn.relu(x @ p["a"] + p["bias"][None]) @ p["b"]
      >>> groups = rx.channels.groups(apply, params, jnp.ones((1, 1)))
      >>> scores = rx.channels.nrs(apply, 2.0)(groups, params, jnp.zeros((1, 1)))  # in [-2, 2] and in [3, 7]
      >>> [round(float(s), 3) for s in scores[0]]
      [-0.995, 1.0]
    """
    eps, p = (
        checks.number("nrs", name, value, "must be above 0", lambda x: x > 0)
        for name, value in (("eps", eps), ("p", p))
    )
    try:
        pattern = re.compile(scales)
    except re.error as error:
        raise ValueError(f"nrs: scales must be a regular expression, got {shown(scales)} ({error})") from None

    def criterion(groups: Sequence[Group], params: PyTree, batch: Any) -> Scores:
        checked_groups("nrs", groups)
        inputs = jax.tree.map(jnp.asarray, inputs_of(batch))
        boxes = jax.tree.leaves(inputs)
        if not boxes or not all(jnp.issubdtype(x.dtype, jnp.floating) for x in boxes):
            raise ValueError(f"nrs: batch must have inputs of floats, got {shown(inputs)}")
        leaves = arrays_of("nrs", params)
        program = trace(apply, params, inputs)
        reading = rules.read(program, len(leaves))
        own = {name: reading.labels[v] for name, v in zip(leaves, program.inputs, strict=False)}
        number = numbered("nrs", reading, own, groups)
        relus: list[tuple[Any, Interval]] = []
        operands = [*map(fixed, leaves.values()), *(Interval(x - eps, x + eps) for x in boxes)]
        known = program_bounds(program, operands, lambda eqn, x: relus.append((eqn, x)))
        named = dict(zip(program.inputs, leaves, strict=False))
        totals = jnp.zeros((3, int(sizes(groups)[-1]) + 1))  # of NRS, of places, of places that are not 0
        for eqn, x in relus:
            (variable,) = [v for v in eqn.invars if not hasattr(v, "val") and known.get(v) is x] or [None]
            for axis, labels in enumerate(reading.labels.get(variable, ())):
                if labels is None:
                    continue
                index = number[reading.channels.find(labels)]
                gamma = jnp.ones(totals.shape[1])
                for name in _scales(program, known, variable, named):
                    if pattern.search(name) and jnp.ndim(leaves[name]) == 1 and own[name][0] is not None:
                        gamma = gamma.at[number[reading.channels.find(own[name][0])]].set(leaves[name])
                along = gamma[index].reshape([-1 if k == axis else 1 for k in range(x.low.ndim)])
                totals = totals.at[:, index].add(_summed(x, along, p, axis))
        nrs, count, live = totals[:, :-1]
        scores = jnp.where(count > 0, -nrs / jnp.maximum(count, 1), 1.0)
        return parted(groups, jnp.where((count > 0) & (live == 0), REMOVED, scores))

    return criterion


def _summed(x: Interval, gamma: Array, p: float, axis: int) -> Array:
    """float32[3, size of the axis]: NRS, how many places there are, and how many are not always 0."""
    others = [k for k in range(x.low.ndim) if k != axis]
    x = Interval(x.low.astype(jnp.float32), x.high.astype(jnp.float32))
    live = (x.low != 0) | (x.high != 0)
    return jnp.stack([jnp.sum(v, others) for v in (unstable(x, gamma, p), jnp.ones(live.shape), live)])


def _scales(program: Program, known: dict[Any, Interval], variable: Any, named: dict[Any, str]) -> set[str]:
    """The params that factors of a value depend on, back to the product or sum of data that made it."""
    makers = {v: eqn for eqn in program.equations for v in eqn.outvars}
    found: set[str] = set()
    while (eqn := makers.get(variable)) is not None:
        atoms = [v for v in eqn.invars if not hasattr(v, "val")]
        data = [v for v in atoms if not known[v].fixed]
        if len(data) != 1 or eqn.primitive.name in ("dot_general", "conv_general_dilated", "max"):
            break
        if eqn.primitive.name in ("mul", "div"):
            wanted = [v for v in atoms if v is not data[0]]
            while wanted:
                v = wanted.pop()
                if v in named:
                    found.add(named[v])
                wanted += [w for w in (makers[v].invars if v in makers else ()) if not hasattr(w, "val")]
        (variable,) = data
    return found
