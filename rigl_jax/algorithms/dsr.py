"""DSR, dynamic sparse reparameterisation: one threshold for all layers, regrowth where weights survive."""

from __future__ import annotations

import functools
import math
from typing import NamedTuple

import jax.numpy as jnp

from rigl_jax import checks, schedules, scores, topology, trees
from rigl_jax.algorithms import reallocation
from rigl_jax.base import Algorithm, Array, Masks, Plan, PyTree, Rewired, Signals
from rigl_jax.messages import shown


class DsrState(NamedTuple):
    """Masks, and the threshold (f32 scalar)."""

    masks: Masks
    threshold: Array


def dsr(
    plan: Plan,
    *,
    period: int = 1000,
    stop: int | None = None,
    start: int = 0,
    threshold: float = 1e-3,
    target: float = 0.01,
    tolerance: float = 0.1,
) -> Algorithm:
    """Dynamic sparse reparameterisation (Mostafa & Wang 2019): drop |w| < H everywhere, grow at random, at zero.

    H is one number for all layers. If a rewiring dropped fewer weights than (1 - tolerance) of the target, H doubles;
    more than (1 + tolerance), it halves; the change acts at the next rewiring, as in the authors' code. What was
    dropped is grown again in proportion to the weights that survive in each layer, at random positions, not where a
    weight was just dropped unless no layer has another place. The total is exact; counts move between leaves with
    units of one size (`reallocation.pools`), N:M and constant fan-in keep theirs. A unit of several weights is
    dropped by its mean |w|.

    At least one unit of each layer stays, so no layer is lost for good. The authors give what rounding leaves over to
    a random layer and repeat until all is placed, which never ends if every layer is full; here shares are exact in
    closed form (`topology.redistribute`).

    Training FLOPs: 3 f_S a step, f_S changing as weights move to other layers. No dense gradient is ever read.

    Args:
      plan: from `make_plan`; its counts are where training starts.
      period: steps between rewirings. The authors double it three times in training: 100 to 800 for a WRN-28-2, 1000 to
        8000 for a ResNet-50.
      stop: last step that may rewire; None: never stops.
      start: first step that rewires.
      threshold: H at the start, above 0.
      target: how many weights a rewiring should drop, as a share of all weights of the sparse leaves, zeros included.
        The authors fix a number: 20,000 for a WRN-28-2 (0.014), 400,000 for a ResNet-50 (0.016), 600 for LeNet-300-100
        (0.002).
      tolerance: how far from the target H is left alone, in [0, 1).

    >>> import jax
    >>> import rigl_jax as rx
    >>> plan = rx.make_plan({"w": jax.ShapeDtypeStruct((8, 8), "float32")}, 0.75)
    >>> [step for step in range(1000) if dsr(plan, period=100, stop=300).due(step)]
    [0, 100, 200, 300]
    """
    checks.plan("dsr", plan)
    period, start, stop = checks.steps("dsr", period=period, start=start, stop=stop)
    reallocation.check_totals("dsr", plan)
    if not (checks.real(threshold) > 0 and 0 < checks.real(target) < 1 and 0 <= checks.real(tolerance) < 1):
        raise ValueError(
            "dsr: threshold must be above 0 and finite, target in (0, 1) and tolerance in [0, 1), "
            f"got {shown(threshold)}, {shown(target)} and {shown(tolerance)}"
        )
    sizes = {name: leaf.unit_size for name, leaf in plan.items()}
    wanted = target * sum(math.prod(leaf.shape) for leaf in plan.values())

    def init(key: Array, params: PyTree) -> DsrState:
        return DsrState(topology.random_masks(plan, key, params), jnp.float32(threshold))

    def update(state: DsrState, signals: Signals) -> Rewired:
        magnitude = scores.magnitude(signals)
        before = reallocation.n_active(plan, state.masks)
        below = _below(plan, state.masks, magnitude, state.threshold)
        dropped = {name: jnp.minimum(n, before[name] - 1) for name, n in below.items()}
        new = reallocation.drop_and_reallocate(
            plan,
            state.masks,
            magnitude,
            scores.Draws(signals.key),
            dropped,
            {name: before[name] - dropped[name] for name in plan},
            regrow_dropped=False,
        )
        n = sum(jnp.sum(dropped[name]).astype(jnp.float32) * float(sizes[name]) for name in plan)
        factor = jnp.where(n > (1 + tolerance) * wanted, 0.5, jnp.where(n < (1 - tolerance) * wanted, 2.0, 1.0))
        moved = functools.reduce(jnp.logical_and, topology.sound(plan, magnitude, state.masks).values())
        factor = jnp.where(moved, factor, 1.0)  # a rewiring that was skipped says nothing about the threshold
        # A weight that had to be grown where it was dropped is reset too.
        return Rewired(DsrState(new.mask, state.threshold * factor), new.restarted)

    due = schedules.every(period, start=start, stop=stop)
    return Algorithm(init, update, due, dense_grads=schedules.never, plan=plan, state=DsrState, active_only=True)


def _below(plan: Plan, masks: Masks, magnitude: PyTree, threshold: Array) -> dict[str, Array]:
    """How many active units of each leaf (in a stack, of each layer) are below the threshold; NaN counts as below."""
    found, scored = trees.named_leaves(masks), trees.named_leaves(magnitude)
    below = {}
    for name, leaf in plan.items():
        active = leaf.active(found[name])
        pooled = leaf.structure.pool(scored[name])
        below[name] = leaf.count_units(active & ~(pooled >= threshold.astype(pooled.dtype)))
    return below
