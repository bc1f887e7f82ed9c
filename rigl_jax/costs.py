"""What training and storing a sparse network cost, by the conventions of the papers, from counted products."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np

from rigl_jax import arguments as rules
from rigl_jax import checks, schedules
from rigl_jax.arguments import arguments
from rigl_jax.base import Algorithm, Shape
from rigl_jax.messages import kind, shown
from rigl_jax.tracing.flops import Flops

PIECE = 1 << 16
"""Steps asked about at once: what a cache holds."""


def training_cost(algorithm: Algorithm, sparse: Any, dense: float, steps: int) -> float:
    """Mean cost of a training step: forward, gradient of the activations, gradient of the weights.

    The first two cost the sparse forward pass each, and so does the third unless the step reads gradients of inactive
    weights; then it costs the dense one (RigL, appendix H: `(3 f_S ΔT + 2 f_S + f_D) / (ΔT + 1)`, where `ΔT + 1` steps
    lie from one rewiring to the next). Dense training costs `3 * dense`. In closed form for `schedules.every`
    and one value of `sparse`; otherwise some 30 nanoseconds a step, and little memory.

    Args:
      algorithm: its `dense_grads` is asked about the steps `0 ... steps - 1`, in NumPy arrays of many.
      sparse: cost of the sparse forward pass, any unit; or one value a step, `[steps]`, where the sparsity changes.
      dense: cost of the dense forward pass, same unit.
      steps: length of training, from 1 to below 2**31, as steps are int32.

    Returns:
      The mean over all steps, in the unit of `sparse` and `dense`.

    Raises:
      ValueError: `steps` is not from 1 to below 2**31, or `sparse` is neither one value nor one a step.

    Example:
      >>> from rigl_jax.base import Algorithm
      >>> snfs = Algorithm(None, None, None, dense_grads=lambda step: True)
      >>> round(training_cost(snfs, sparse=0.2, dense=1.0, steps=10) / 3, 4)
      0.4667
    """
    checks.algorithm("training_cost", algorithm)
    if not checks.is_whole(steps, 1):
        raise ValueError(f"training_cost: steps must be a whole number from 1 to below 2**31, got {shown(steps)}")
    steps = int(steps)
    dense = checks.number("training_cost", "dense", dense, "must be a number, at least 0", lambda found: found >= 0)
    try:
        forward = np.asarray(sparse, np.float64)
    except (TypeError, ValueError):
        forward = np.full((), np.nan)
    if forward.shape not in ((), (steps,)) or not (forward >= 0).all() or not np.isfinite(forward).all():
        what = f"one number of at least 0, or [{steps}] of them"
        raise ValueError(f"training_cost: sparse must be {what}, got {shown(sparse)}")
    forward_mean = float(np.mean(forward))
    reads = _dense_steps(algorithm.dense_grads, steps)
    if reads is not None and (reads in (0, steps) or not forward.ndim):
        return 2 * forward_mean + (reads * dense + (steps - reads) * forward_mean) / steps
    total = 0.0  # of the third product; a piece of the steps at a time, however many there are
    for first in range(0, steps, PIECE):
        piece = np.arange(first, min(first + PIECE, steps))
        reads_dense = np.asarray(algorithm.dense_grads(piece), bool)
        own = forward[piece] if forward.ndim else forward
        total += float(np.sum(np.where(np.broadcast_to(reads_dense, piece.shape), dense, own)))
    return 2 * forward_mean + total / steps


def micronet_flops(counted: Flops) -> float:
    """FLOPs by the MicroNet challenge's rules, which the sparse training papers print.

    A product of dense fan-in `v`, density `d` and `n` outputs costs `2 v d n + n`: multiplications, additions, a bias
    and a ReLU an output. Trace with a batch of one. The challenge's counter takes the output size of ResNet-50's first
    convolution from the padded image (115x115; the network computes 112x112): edit `products` to match its figures.

    >>> import jax.numpy as jnp
    >>> import rigl_jax as rx
    >>> micronet_flops(rx.flops(lambda p, x: x @ p["w"], {"w": jnp.ones((10, 4))}, jnp.ones((1, 10))))
    84.0
    """
    if not isinstance(counted, Flops):
        raise ValueError(f"micronet_flops: expected what rx.flops gives, got {kind(counted)}")
    density = {**counted.density, None: 1.0}
    return math.fsum(2 * p.macs * density[p.name] + p.outputs for p in counted.products)


@arguments(shapes=rules.shapes, density=rules.one_of(Mapping, "{name: fraction of active weights}"))
def micronet_bits(shapes: Mapping[str, Shape], density: Mapping[str, float]) -> float:
    """Bits to store a network by the MicroNet challenge's rules; 8e6 bits are a megabyte.

    32 bits for each active weight, one a position for the mask of a sparse kernel, and 32 for one bias an output
    channel (a normalisation counts as the bias of the layer before it).

    Args:
      shapes: kernel shapes by name, output channels last.
      density: fraction of active weights by name; absent means 1.

    >>> micronet_bits({"w": (10, 4)}, {"w": 0.25})  # 32 for each of 10 weights and 4 biases, 1 for each of 40 positions
    488.0
    """
    kept = {name: density.get(name, 1.0) for name in shapes}
    for name, value in kept.items():
        checks.number("micronet_bits", f"density of {name!r}", value, "must be in [0, 1]", lambda d: 0 <= d <= 1)
    return math.fsum(math.prod(s) * (32 * kept[name] + (kept[name] < 1)) + 32 * s[-1] for name, s in shapes.items())


def _dense_steps(due: Callable[[Any], Any], steps: int) -> int | None:
    """How many steps are due where that has a closed form, else None."""
    if isinstance(due, schedules.Every):
        return due.before(steps)
    if due is schedules.never:
        return 0
    return steps if due is schedules.always else None
