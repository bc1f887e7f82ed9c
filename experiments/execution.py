"""The steps of a run on packed weights: an ordinary one on active weights only, a rewiring through the masked form."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import NamedSharding, PartitionSpec

from experiments import sharding
from experiments.step import Batch, Compiled, Task, TrainState, compile_task, eval_step, loss_of, stepped
from rigl_jax.base import Array, PyTree
from rigl_jax.execution import Packed, PackedTraining, run_packed


def compile_packed(task: Task) -> Compiled:
    """`compile_task` for a run on packed weights.

    Its state holds `Packed` weights and the optimizer state of `rx.packed_training`; the weights ever active are kept
    as bits. A rewiring is the masked step itself, between `leave` and `enter`, so masks are those of a masked run.
    """
    masked, training = compile_task(task), task.packed
    assert training is not None  # for the type checker: `build.training` made it
    whole = NamedSharding(task.mesh, PartitionSpec())
    split = NamedSharding(task.mesh, PartitionSpec(sharding.DATA))  # several devices share the batch
    apply = run_packed(task.model.apply, batch=split if task.mesh.size > 1 else None)

    def enter(state: TrainState, like: Packed | None = None) -> TrainState:
        params, opt_state = training.pack(state.params, state.opt_state, like)
        return state._replace(params=params, opt_state=opt_state, explored=jax.tree.map(jnp.packbits, state.explored))

    def leave(state: TrainState) -> TrainState:
        params, opt_state = training.unpack(state.params, state.opt_state)
        explored = jax.tree.map(_unpackbits, state.explored, opt_state.masks)
        return state._replace(params=params, opt_state=opt_state, explored=explored)

    def rewire(state: TrainState, batch: Batch) -> tuple[TrainState, Array | None]:
        after, counts = masked.steps[True](leave(state), batch)
        return enter(after, state.params), counts

    step = functools.partial(packed_step, task, training, apply)
    ordinary = jax.jit(step, out_shardings=whole, donate_argnums=0)
    evaluate = jax.jit(functools.partial(eval_step, task, apply))
    return masked._replace(steps={False: ordinary, True: rewire}, evaluate=evaluate, enter=enter, leave=leave)


def packed_step(
    task: Task, training: PackedTraining, apply: Callable[..., Any], state: TrainState, batch: Batch
) -> tuple[TrainState, None]:
    """An ordinary step on one batch; `apply` is the model on packed weights."""
    packed: Any = state.params

    def loss(values: PyTree) -> Any:
        return loss_of(task, apply, packed._replace(values=values), state, batch)

    grads, (metrics, batch_stats) = jax.grad(loss, has_aux=True)(packed.values)
    packed, opt_state = training.update(grads, state.opt_state, packed)
    new = {"params": packed, "opt_state": opt_state, "batch_stats": batch_stats}
    return stepped(task, state, grads, metrics, updates=True, **new), None


def _unpackbits(bits: Array, mask: Array) -> Array:
    return jnp.unpackbits(bits, count=math.prod(mask.shape)).reshape(mask.shape).astype(bool)
