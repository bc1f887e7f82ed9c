"""What must hold of a run while it goes: exact counts, zeros off the masks, masks that change by rewirings alone.

A check is one small program. Its result stays on the device until a line or checkpoint is due, so nothing waits for it.
`experiments/records/benchmarks/guard.json` has its cost.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from experiments.execution import State
from experiments.feeding import open_feed
from experiments.io import digests
from experiments.step import TrainState
from experiments.task import Task
from rigl_jax import trees
from rigl_jax.base import Algorithm, Array, PyTree


class Guard(NamedTuple):
    """The checks of one run.

    Attributes:
      check: `(step, state, rewired)`, after every step: starts a check where one is due, and returns at once.
      verify: waits for the checks so far. ValueError names the step and the leaf that is wrong.
    """

    check: Callable[[int, State, bool], None]
    verify: Callable[[], None]


def open_guard(task: Task, state: TrainState) -> Guard:
    """The guard of a run that starts or resumes from a state; it does nothing if `check_every` is 0."""
    every, algorithm, execution = task.config["check_every"], task.algorithm, task.execution
    if not every or algorithm is None:
        return Guard(lambda step, state, rewired: None, lambda: None)
    measure = jax.jit(functools.partial(measure_masks, algorithm))
    planned = planned_counts(task)
    names = list(trees.named_leaves(execution.masks(state)))
    expected = digests.digest(execution.masks(state))
    pending: list[tuple[int, Array, Array, Array]] = []

    def check(step: int, state: State, rewired: bool) -> None:
        nonlocal expected
        if not rewired and step % every:
            return
        whole = execution.to_masked(state)
        if rewired:
            expected = digests.digest(execution.masks(whole))
        if step % every == 0:
            table, digest = measure(whole.params, whole.opt_state.algorithm)
            pending.append((step, table, digest, expected))

    def verify() -> None:
        found = jax.device_get(pending)
        pending.clear()
        for step, table, digest, before in found:
            verify_counts(names, planned, step, table)
            if digest != before:
                raise ValueError(
                    f"guard: the masks changed without a rewiring before step {step} (digest {before:08x} became "
                    f"{digest:08x}); is memory at fault? The last checkpoint holds them as they were"
                )

    return Guard(check, verify)


def planned_counts(task: Task) -> dict[str, int]:
    """Active weights of each leaf by the plan; {} for methods that change counts, of which the rest is checked."""
    plan = task.plan if task.plan is not None and task.algorithm is not None and task.algorithm.keeps_counts else {}
    return {name: leaf.active_weights for name, leaf in plan.items()}


def measure_masks(algorithm: Algorithm, params: PyTree, state: Any) -> tuple[Array, Array]:
    """`(int32[leaves, 2], uint32)`: for each sparse leaf, in pytree order, the number of active weights and of weights
    that should be 0 and are not; the digest of the masks. Jit it.
    """
    stored, arrays = trees.named_leaves(algorithm.stored(state)), trees.named_leaves(params)
    rows = []
    for name, mask in trees.named_leaves(state.masks).items():
        stray = (arrays[name] != 0) & ~stored[name] if name in stored else jnp.zeros((), bool)
        rows.append(jnp.stack([jnp.sum(mask, dtype=jnp.int32), jnp.sum(stray, dtype=jnp.int32)]))
    return jnp.stack(rows), digests.digest(state.masks)


def verify_counts(names: list[str], planned: Mapping[str, int], step: int, table: np.ndarray) -> None:
    """Checks the counts of `measure_masks`.

    Raises:
      ValueError: names the first leaf with another count than `planned` gives it, or with weights off its mask.
    """
    for name, (active, stray) in zip(names, table.tolist(), strict=True):
        if active != planned.get(name, active):
            raise ValueError(
                f"guard: leaf {name!r} must have {planned[name]} active weights at step {step}, got {active}; "
                "nothing was saved since the last checkpoint"
            )
        if stray:
            raise ValueError(
                f"guard: leaf {name!r} must be 0 off its mask at step {step}, got {stray} other weights; "
                "nothing was saved since the last checkpoint"
            )


def diagnose(task: Task, state: TrainState, until: int) -> str | None:
    """Repeats the steps after a good state, and returns the first thing that is not finite; None if there is none.

    Steps are exact, so the failure comes again; the run itself need not look at every gradient.
    """
    execution, names = task.execution, list(trees.named_leaves(state.params))
    first = int(state.step)
    feed, running = open_feed(task), execution.from_masked(state)
    for done in range(first + 1, until + 1):
        running, batch = feed(done - 1, running)
        loss, gradient = execution.gradient(execution.to_masked(running), batch)
        loss, fine = jax.device_get((loss, _finite_leaves(gradient)))
        if not fine.all():
            leaf = names[int(np.argmin(fine))]
            return f"the loss is {loss} at step {done}, the first gradient that is not finite is that of leaf {leaf!r}"
        if not math.isfinite(loss):
            return f"the loss is {loss} at step {done}, with finite gradients"
        running, _ = execution.train(done - 1, running, batch)
        fine = jax.device_get(_finite_leaves(execution.to_masked(running).params))
        if not fine.all():
            leaf = names[int(np.argmin(fine))]
            return f"the first weights that are not finite are those of leaf {leaf!r} after step {done}"
    return None


@jax.jit
def _finite_leaves(tree: PyTree) -> Array:
    """`bool[leaves]`: is every number of the leaf finite?"""
    return jnp.stack([jnp.all(jnp.isfinite(x)) for x in jax.tree.leaves(tree)])
