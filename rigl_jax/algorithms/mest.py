"""MEST: drop by magnitude and gradient of the active weights, grow at random."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import optax

from rigl_jax import checks, schedules, scores
from rigl_jax.algorithms.rigl import rigl
from rigl_jax.base import Algorithm, Plan, PyTree, Score, Signals


def mest(
    plan: Plan,
    *,
    period: int = 1000,
    stop: int | None = None,
    fraction: float | optax.Schedule = 0.2,
    start: int = 0,
    gradient_weight: float = 0.01,
) -> Algorithm:
    """MEST with elastic mutation (Yuan et al. 2021): drop the lowest |w| + lambda |g|, grow at random, at zero.

    Only gradients of active weights are read, so memory stays sparse: training FLOPs are 3 f_S a step. As in the
    authors' code a dropped weight that is grown again starts from zero. They rewire every 5 epochs, dropping 20 % of
    the active weights until epoch 90 of 160 and 10 % until epoch 120 (sparsity bounds 0.92-0.91-0.90 over 0.90); here a
    number is annealed by a cosine as in `rigl`, and theirs is `fraction=optax.piecewise_constant_schedule(0.2, {t90:
    0.5, t120: 0.0})`. In their code the weight of the gradient is 0 by default, although the paper uses it in the
    score. The soft bound (EM&S), which grows first and so needs a higher count for a time, is not implemented.

    Args:
      plan: from `make_plan`.
      period: steps between rewirings.
      stop: last step that may rewire; None: never stops.
      fraction: the share of active weights moved, in [0, 1], or a schedule.
      start: first step that rewires.
      gradient_weight: the paper's lambda, at least 0; 0 drops by magnitude alone. 0.01 is our choice.

    >>> import rigl_jax as rx
    >>> plan = rx.make_plan({"w": jax.ShapeDtypeStruct((8, 8), "float32")}, 0.75)
    >>> [step for step in range(1000) if mest(plan, period=100, start=100, stop=300).due(step)]
    [100, 200, 300]
    """
    expected = "must be at least 0"
    gradient_weight = checks.number("mest", "gradient_weight", gradient_weight, expected, lambda found: found >= 0)
    algorithm = rigl(
        plan,
        period=period,
        stop=stop,
        fraction=fraction,
        start=start,
        skip_step=False,
        keep_regrown=False,
        drop=_magnitude_and_gradient(gradient_weight),
        grow=scores.random,
    )
    return algorithm._replace(dense_grads=schedules.never)


def _magnitude_and_gradient(weight: float) -> Score:
    def score(signals: Signals) -> PyTree:
        return jax.tree.map(
            lambda p, g: jnp.abs(p) + weight * jnp.abs(g).astype(p.dtype), signals.params, signals.grads
        )

    return score
