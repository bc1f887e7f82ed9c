"""Training of the networks of the diagnostics study: any loss, fixed or moving masks, all seeds at once."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax import Array, lax

import rigl_jax as rx
from experiments.studies import data_training as training
from experiments.studies.data_training import SEEDS, Params, Problem
from experiments.studies.method_training import optimizer, segments

Loss = Callable[[Params, Array, Array, Array, Any], Array]
"""`(params, x, y, progress, option) -> scalar`; progress goes from 0 at the first step to 1."""


class Trained(NamedTuple):
    """Networks after training. All arrays have an axis of seeds, the first.

    Attributes:
      params: the weights, masked.
      masks: parallel to params, None for leaves that are dense.
    """

    params: Any
    masks: Any


def cross_entropy(params: Params, x: Array, y: Array, progress: Array, option: Any) -> Array:
    """The loss of plain training."""
    del progress, option
    return jnp.mean(training.losses(params, x, y))


def plan_of(problem: Problem, sparsity: float, distribution: rx.base.Distribution = rx.erk) -> rx.base.Plan:
    """Counts of the kernels at a sparsity; biases are dense."""
    shapes = jax.eval_shape(lambda: training.init(jax.random.key(0), problem.sizes))
    return rx.make_plan(shapes, sparsity, distribution, rules=[(".*kernel", rx.unstructured()), (".*", None)])


def rigl(plan: rx.base.Plan, steps: int) -> rx.Algorithm:
    """RigL as the study has it everywhere: 0.3 of the weights about 15 times, until 3/4 of the training."""
    return rx.rigl(plan, period=max(steps // 20, 1), stop=int(0.75 * steps), fraction=0.3)


class Fit(NamedTuple):
    """A training, compiled once for all that starts differently, lasts less long or has another option.

    Attributes:
      problem: that it trains on, whose steps are the most that there can be.
      algorithm: the sparse-training method; None: the masks that training starts with stay.
      init: `key data of seeds -> (params, state of the optimizer)`, the same networks in every call.
      advance: `(now, masks, batches, option, first, stop, steps, rewire=bool) -> now`, steps of one kind.
    """

    problem: Problem
    algorithm: rx.Algorithm | None
    init: Callable[[Array], Any]
    advance: Callable[..., Any]


def make_fit(problem: Problem, loss: Loss = cross_entropy, algorithm: rx.Algorithm | None = None) -> Fit:
    """Training that minimises the mean of a loss over batches by SGD, whose rate falls by a cosine."""

    def transform(rate: Any, key: Array) -> optax.GradientTransformationExtraArgs:
        inner = optimizer(rate)
        return optax.with_extra_args_support(inner) if algorithm is None else rx.sparsify(inner, algorithm, key=key)

    def begin(seed: Array) -> Any:
        weights, masks = jax.random.split(jax.random.wrap_key_data(seed))
        params = training.init(weights, problem.sizes)
        state: Any = transform(0.0, masks).init(params)
        return (params if algorithm is None else rx.apply_masks(params, state.masks)), state

    def step(now: Any, masks: Any, rows: Array, progress: Array, option: Any, rewire: bool) -> Any:
        def of(params: Any) -> Array:
            x, y = problem.train.x[rows], problem.train.y[rows]
            return loss(rx.apply_masks(params, masks), x, y, progress, option)

        params, state = now
        tx = transform(problem.rate * (1 + jnp.cos(jnp.pi * progress)) / 2, jax.random.key(0))
        extra = {} if algorithm is None else {"rewire": rewire}
        updates, state = tx.update(jax.grad(of)(params), state, params, **extra)
        return optax.apply_updates(params, updates), state

    @functools.partial(jax.jit, static_argnames="rewire")
    def advance(
        now: Any, masks: Any, batches: Array, option: Any, first: Any, stop: Any, steps: Any, *, rewire: bool
    ) -> Any:
        every = jax.vmap(functools.partial(step, rewire=rewire), in_axes=(0, 0, 0, None, None))
        body = lambda i, now: every(now, masks, batches[:, i], i / steps, option)  # noqa: E731
        return lax.fori_loop(first, stop, body, now)

    return Fit(problem, algorithm, jax.jit(jax.vmap(begin)), advance)


def train(
    fit: Fit, start: Trained | None = None, *, steps: int | None = None, option: Any = 0.0, order: int = 1,
    member: int = 0,
) -> Trained:  # fmt: skip
    """Networks of all seeds after training.

    Args:
      fit: the training.
      start: networks to go on with, whose masks stay if there is no algorithm; None: new ones.
      steps: fewer than those of the problem.
      option: of the loss.
      order: tells apart the orders of examples.
      member: tells apart the networks of an ensemble, each with its own start and order.
    """
    steps = steps or fit.problem.steps
    index, _ = training.everything(fit.problem, len(SEEDS))
    batches = training.shuffled(
        training.keys(order + 1000 * member), index, steps=fit.problem.steps, batch=fit.problem.batch
    )
    params, state = fit.init(jax.random.key_data(training.keys(1000 * member)))
    masks = jax.tree.map(lambda p: jnp.ones(p.shape, bool) if p.ndim > 2 else None, params)
    if start is not None:
        params, masks = start.params, masks if start.masks is None else start.masks
    now = params, state
    for rewire, first, stop in segments(fit.algorithm, steps):
        now = fit.advance(now, masks, batches, option, first, stop, float(steps), rewire=rewire)
    return Trained(now[0], masks if fit.algorithm is None else now[1].masks)


def pruned(dense: Trained, plan: rx.base.Plan) -> Trained:
    """All seeds pruned at once by magnitude over all layers together."""
    found = [rx.prune(plan, training.take(dense.params, i), scope="global") for i in range(len(SEEDS))]
    return Trained(*jax.tree.map(lambda *leaves: jnp.stack(leaves), *[(p.params, p.masks) for p in found]))


def accuracy(problem: Problem, params: Any) -> Array:
    """Share of right answers on the test images, float32[seeds]."""
    return _accuracy(params, problem.test)


_accuracy = jax.jit(jax.vmap(training.accuracy, in_axes=(0, None)))
