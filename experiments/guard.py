"""What must hold of a run, looked at while it goes: exact counts, zeros off the masks, masks that stay as they were.

A look is one small program; its numbers stay on the device until the next line or checkpoint is due, so nothing waits
for it. What it costs is in `experiments/records/benchmarks/guard.json`.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from experiments.io import digests
from experiments.step import Batch, Compiled, Task, TrainState, loss_of, masks, weights
from rigl_jax import trees
from rigl_jax.base import Algorithm, Array, PyTree


class Guard(NamedTuple):
    """Checks of one run.

    Attributes:
      looked: `(step, state, rewired)`, after every step; looks where one is due and returns at once.
      settle: fetches the looks since the last call; ValueError names the step and the leaf that is wrong.
    """

    looked: Callable[[int, TrainState, bool], None]
    settle: Callable[[], None]


def open_guard(task: Task, compiled: Compiled, state: TrainState) -> Guard:
    """The guard of a run that starts, or goes on, from a masked state; it does nothing where `check_every` is 0."""
    every, algorithm = task.config["check_every"], task.algorithm
    if not every or algorithm is None:
        return Guard(lambda step, state, rewired: None, lambda: None)
    # Other methods move weights between leaves or change their number; of theirs, zeros and digests are checked.
    plan = (task.plan or {}) if algorithm.keeps_counts else {}
    planned = {name: leaf.active_weights for name, leaf in plan.items()}
    take, names = jax.jit(functools.partial(look, algorithm)), list(trees.named_leaves(masks(state)))
    expected = digests.digest(masks(state))
    pending: list[tuple[int, Array, Array, Array]] = []

    def looked(step: int, state: TrainState, rewired: bool) -> None:
        nonlocal expected
        if not rewired and step % every:
            return
        whole = compiled.leave(state)
        if rewired:
            expected = digests.digest(masks(whole))
        if step % every == 0:
            table, digest = take(whole.params, whole.opt_state.algorithm)
            pending.append((step, table, digest, expected))

    def settle() -> None:
        found = jax.device_get(pending)
        pending.clear()
        for step, table, digest, before in found:
            judge(names, planned, step, table)
            if digest != before:
                raise ValueError(
                    f"guard: the masks changed without a rewiring before step {step} (digest {before:08x} became "
                    f"{digest:08x}); is memory at fault? The last checkpoint holds them as they were"
                )

    return Guard(looked, settle)


def look(algorithm: Algorithm, params: PyTree, state: Any) -> tuple[Array, Array]:
    """`(int32[leaves, 2], uint32)`: active weights, and weights that should be 0 and are not, for each sparse leaf in
    pytree order; the digest of the masks. Jit it.
    """
    stored, arrays = trees.named_leaves(algorithm.stored(state)), trees.named_leaves(params)
    rows = []
    for name, mask in trees.named_leaves(state.masks).items():
        stray = (arrays[name] != 0) & ~stored[name] if name in stored else jnp.zeros((), bool)
        rows.append(jnp.stack([jnp.sum(mask, dtype=jnp.int32), jnp.sum(stray, dtype=jnp.int32)]))
    return jnp.stack(rows), digests.digest(state.masks)


def judge(names: list[str], planned: dict[str, int], step: int, table: np.ndarray) -> None:
    """Refuses a look that shows what must not be.

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


def diagnose(task: Task, compiled: Compiled, state: TrainState, until: int) -> str | None:
    """Repeats the steps from a good masked state and says what was the first thing that is not finite, None if nothing.

    Steps are exact, so the failure comes again; the run itself need not look at every gradient.
    """
    names = list(trees.named_leaves(state.params))
    first, step = int(state.step), jax.jit(functools.partial(_gradients_fine, task))
    batches, state = task.data.train(first), compiled.enter(state)
    for done in range(first + 1, until + 1):
        batch = compiled.place(next(batches))
        loss, fine = jax.device_get(step(compiled.leave(state), batch))
        if not fine.all():
            leaf = names[int(np.argmin(fine))]
            return f"the loss is {loss} at step {done}, the first gradient that is not finite is that of leaf {leaf!r}"
        if not math.isfinite(loss):
            return f"the loss is {loss} at step {done}, with finite gradients"
        rewire = task.algorithm is not None and bool(task.algorithm.due(done - 1))
        state, _ = compiled.steps[rewire](state, batch)
        fine = jax.device_get(_fine(compiled.leave(state).params))
        if not fine.all():
            leaf = names[int(np.argmin(fine))]
            return f"the first weights that are not finite are those of leaf {leaf!r} after step {done}"
    return None


def _gradients_fine(task: Task, state: TrainState, batch: Batch) -> tuple[Array, Array]:
    def loss(params: PyTree) -> Any:
        value, _ = loss_of(task, task.model.apply, weights(task, state, params), state, batch)
        return value

    value, grads = jax.value_and_grad(loss)(state.params)
    return value, _fine(grads)


@jax.jit
def _fine(tree: PyTree) -> Array:
    """`bool[leaves]`: is every number of the leaf finite?"""
    return jnp.stack([jnp.all(jnp.isfinite(x)) for x in jax.tree.leaves(tree)])
