"""The control of every pruner: the pruned network, trained from scratch."""

from __future__ import annotations

import math
from collections.abc import Callable

import jax.numpy as jnp

from rigl_jax import checks, trees
from rigl_jax.arguments import flag
from rigl_jax.base import Array, Masks, PyTree, Train
from rigl_jax.masking import apply_masks
from rigl_jax.messages import shown
from rigl_jax.recipes.tickets import Ticket, level_key, run, ticket_of, whole_number


def scratch_control(
    train_for: Callable[[int], Train],
    init: Callable[[Array], PyTree],
    masks: Masks,
    *,
    steps: int,
    key: Array,
    costs: tuple[float, float] | None = None,
    cap: float | None = None,
    rescale: bool = True,
) -> Ticket:
    """Scratch-E and Scratch-B (Liu et al. 2019, "Rethinking the Value of Network Pruning").

    The masks of a pruned network on fresh weights: trained for as many steps as the dense network (E), or for as many
    as the dense network's FLOPs allow (B, where `costs` are given). If it does as well as the pruned and fine-tuned
    network, pruning found no more than an architecture.

    Nothing of the pruned network but its masks is used: batch statistics and the optimizer's state start anew.

    Args:
      train_for: `steps -> training function` whose schedule is that of a run of so many steps: with B the authors keep
        the drops of the learning rate at their share of the run, such as 50 % and 75 %.
      init: `key -> params`.
      masks: of the pruned network.
      steps: of the dense run.
      key: PRNG key; weights are drawn from `fold_in(key, 0)`, training gets `fold_in(key, 1)`.
      costs: FLOPs of the dense and of the pruned network, see `rx.flops`; None: Scratch-E.
      cap: see `scratch_steps`.
      rescale: each masked leaf is scaled by sqrt(size / active), so that the variance is that of its active fan. The
        authors draw unstructured layers from N(0, 2 / n), n active weights an input channel: the same in distribution
        for an `init` that draws from N(0, 2 / fan-out).

    Returns:
      A ticket of level 0; `carry` holds the weights that it was trained from.

    >>> import jax, rigl_jax as rx
    >>> train_for = lambda steps: lambda params, masks, start, stop, key: rx.base.Trained(params, stop)
    >>> init = lambda key: {"w": jnp.ones((2, 2))}
    >>> masks = {"w": jnp.array([[True, False], [False, False]])}
    >>> ticket = scratch_control(train_for, init, masks, steps=10, key=jax.random.key(0), costs=(3.0, 1.0))
    >>> ticket.params["w"].tolist(), ticket.aux
    ([[2.0, 0.0], [0.0, 0.0]], 30)
    """
    who = "scratch_control"
    checks.functions(who, train_for=train_for, init=init)
    key, steps = checks.key(who, key), whole_number(who, "steps", steps, 1)
    rescale = flag(who, "rescale", rescale)
    if costs is not None:
        if not isinstance(costs, tuple) or len(costs) != 2:
            raise ValueError(f"{who}: costs must be a pair (dense, pruned), got {shown(costs)}")
        steps = scratch_steps(steps, *costs, cap=cap)
    params = init(level_key(key, 0))
    masks = checks.masks(who, masks, params)
    start = apply_masks(params, masks)
    if rescale:
        start = trees.map_masked(_rescaled, masks, start)
    train = train_for(steps)
    checks.functions(f"{who}: what train_for returns", train=train)
    return ticket_of(run(who, train, start, masks, 0, steps, level_key(key, 1)), 0, start)


def _rescaled(mask: Array, p: Array) -> Array:
    active = jnp.maximum(jnp.sum(mask, dtype=jnp.float32), 1)
    return p * jnp.sqrt(math.prod(mask.shape) / active).astype(p.dtype)


def scratch_steps(steps: int, dense: float, pruned: float, *, cap: float | None = None) -> int:
    """Steps of Scratch-B: `int(steps * (dense / pruned))`, as in the authors' code, in float64 without rounding.

    Args:
      steps: of the dense run.
      dense: FLOPs of the dense network.
      pruned: of the pruned one.
      cap: at most so many times `steps`; the authors take 2 for ImageNet and none for CIFAR.

    >>> scratch_steps(160, 1.52, 1.0), scratch_steps(90, 1.4, 1.0, cap=2), scratch_steps(90, 2.3, 1.0, cap=2)
    (243, 125, 180)
    """
    who = "scratch_steps"
    steps = whole_number(who, "steps", steps, 1)
    dense = checks.number(who, "dense", dense, "must be above 0", lambda found: found > 0)
    pruned = checks.number(who, "pruned", pruned, f"must be above 0, at most dense={dense}", lambda x: 0 < x <= dense)
    ratio = dense / pruned
    if cap is not None:
        ratio = min(ratio, checks.number(who, "cap", cap, "must be at least 1", lambda found: found >= 1))
    return int(steps * ratio)
