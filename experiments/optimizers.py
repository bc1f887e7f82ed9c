"""The optimizers and learning rates that a config can name."""

from __future__ import annotations

from collections.abc import Callable

import jax
import optax

from experiments.rules import number, share, sizes
from rigl_jax.arguments import arguments, flag, whole
from rigl_jax.base import PyTree


def kernels(params: PyTree) -> PyTree:
    """Which leaves weight decay touches: those with 2 axes or more, so neither biases nor normalisation."""
    return jax.tree.map(lambda p: p.ndim >= 2, params)


@arguments(momentum=share, nesterov=flag, weight_decay=number)
def sgd(
    rate: optax.Schedule,
    decayed: PyTree,
    *,
    momentum: float = 0.9,
    nesterov: bool = True,
    weight_decay: float = 0.0,
) -> optax.GradientTransformation:
    """SGD whose decay joins the gradient before the momentum: the L2 term `weight_decay / 2 * |w|^2` of the papers."""
    return optax.chain(
        optax.add_decayed_weights(weight_decay, mask=decayed),
        optax.sgd(rate, momentum=momentum or None, nesterov=nesterov),
    )


@arguments(b1=share, b2=share, eps=number, weight_decay=number)
def adam(
    rate: optax.Schedule,
    decayed: PyTree,
    *,
    b1: float = 0.9,
    b2: float = 0.999,
    eps: float = 1e-8,
    weight_decay: float = 0.0,
) -> optax.GradientTransformation:
    """Adam with an L2 term in the gradient."""
    return optax.chain(optax.add_decayed_weights(weight_decay, mask=decayed), optax.adam(rate, b1=b1, b2=b2, eps=eps))


@arguments(b1=share, b2=share, eps=number, weight_decay=number)
def adamw(
    rate: optax.Schedule,
    decayed: PyTree,
    *,
    b1: float = 0.9,
    b2: float = 0.999,
    eps: float = 1e-8,
    weight_decay: float = 0.0,
) -> optax.GradientTransformation:
    """Adam with decoupled weight decay."""
    return optax.adamw(rate, b1=b1, b2=b2, eps=eps, weight_decay=weight_decay, mask=decayed)


@arguments(peak=number, warmup=whole(0))
def constant(*, peak: float, warmup: int = 0) -> optax.Schedule:
    """`peak` after a linear warm-up of `warmup` steps from 0."""
    return _warmed(optax.constant_schedule(peak), peak, warmup)


@arguments(peak=number, steps=whole(1), warmup=whole(0))
def cosine(*, peak: float, steps: int, warmup: int = 0) -> optax.Schedule:
    """Linear warm-up to `peak`, then half a cosine down to 0 at `steps`."""
    if steps <= warmup:
        raise ValueError(f"cosine: steps must be more than warmup={warmup}, got {steps}")
    return _warmed(optax.cosine_decay_schedule(peak, steps - warmup), peak, warmup)


@arguments(peak=number, boundaries=sizes, factor=number, warmup=whole(0))
def piecewise(*, peak: float, boundaries: tuple[int, ...], factor: float, warmup: int = 0) -> optax.Schedule:
    """`peak`, multiplied by `factor` at each of the boundaries (steps, counted from the start of the run)."""
    steps = {int(b) - warmup: factor for b in boundaries}
    return _warmed(optax.piecewise_constant_schedule(peak, steps), peak, warmup)


def _warmed(schedule: optax.Schedule, peak: float, warmup: int) -> optax.Schedule:
    if not warmup:
        return schedule
    return optax.join_schedules([optax.linear_schedule(0.0, peak, warmup), schedule], [warmup])


OPTIMIZERS: dict[str, Callable[..., optax.GradientTransformation]] = {"sgd": sgd, "adam": adam, "adamw": adamw}
SCHEDULES: dict[str, Callable[..., optax.Schedule]] = {
    "constant": constant,
    "cosine": cosine,
    "piecewise": piecewise,
}
