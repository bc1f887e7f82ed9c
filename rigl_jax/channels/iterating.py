"""Channels removed in rounds, with training after each."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from rigl_jax import arguments as rules
from rigl_jax import checks, trees
from rigl_jax.arguments import arguments
from rigl_jax.base import Array, PyTree, Train, Trained
from rigl_jax.channels.grouping import arrays_of
from rigl_jax.channels.resizing import Kept
from rigl_jax.channels.shrinking import shrink
from rigl_jax.messages import kind


class Level(NamedTuple):
    """A model of one size.

    To save it, save params, kept and level. `shrink(apply, shapes, kept, *inputs)`, with the first model's apply and
    its params as `jax.ShapeDtypeStruct`, gives apply and the shapes of params again.

    Attributes:
      apply: `(params, *inputs) -> outputs`, the first model's at these shapes.
      params: the weights, trained.
      level: how often channels were removed.
      kept: what is left of every axis of the first model that shrank.
      weights: how many entries params have.
      macs: multiply-accumulates of one call.
      aux: that of the last training.
    """

    apply: Callable[..., Any]
    params: PyTree
    level: int
    kept: Kept
    weights: int
    macs: float
    aux: Any = None


@arguments(
    make_train=rules.function, apply=rules.function, prune=rules.function, levels=rules.whole(0), steps=rules.whole(0)
)
def iterative_shrinking(
    make_train: Callable[[Callable[..., Any]], Train],
    apply: Callable[..., Any],
    params: PyTree,
    prune: Callable[[Callable[..., Any], PyTree, int], Kept],
    *inputs: Any,
    levels: int,
    steps: int,
    key: Array,
    resume: Level | None = None,
) -> Iterator[Level]:
    """Removes channels of a trained model and trains what is left, level by level.

    The optimizer starts anew at every level, as its state has other shapes. Dense training of the first model is the
    caller's.

    Args:
      make_train: `apply -> train` for the model of a level; `train(params, masks, start, stop, key) -> Trained`, as
        recipes take it, is called with masks of None and steps 0 to `steps`.
      apply: `(params, *inputs) -> outputs`, as for `groups`.
      params: trained weights.
      prune: `(apply, params, level) -> keep`, from level 1 on: groups, scores and `select` of the model that it is
        given.
      *inputs: arrays or `jax.ShapeDtypeStruct`, for their shapes.
      levels: how often channels are removed.
      steps: of the training after each; 0: none.
      key: PRNG key; level L trains with `fold_in(key, L)`.
      resume: a level of this loop with the same arguments, of which params, level and kept are read: only the levels
        after it are done.

    Yields:
      `levels + 1` models; that of level 0 is the given one.

    Raises:
      ValueError: training returns something else than `Trained` with params of the shapes it was given, `resume` is of
        no such level, `keep` does not fit.

    Example:
      >>> import rigl_jax as rx
      >>> apply = lambda p, x: jax.nn.relu(x @ p["a"]) @ p["b"]
      >>> params = {"a": jnp.arange(8.0).reshape(1, 8), "b": jnp.ones((8, 1))}
      >>> def prune(apply, params, level):
      ...     groups = rx.channels.groups(apply, params, jnp.ones((1, 1)))
      ...     return rx.channels.select(groups, rx.channels.scores(groups, params), remove=0.5)
      >>> make_train = lambda apply: lambda params, masks, start, stop, key: rx.base.Trained(params)
      >>> run = iterative_shrinking(
      ...     make_train, apply, params, prune, jnp.ones((1, 1)), levels=2, steps=5, key=jax.random.key(0)
      ... )
      >>> [(model.weights, model.macs, model.params["a"].tolist()) for model in run][1:]
      [(8, 8.0, [[4.0, 5.0, 6.0, 7.0]]), (4, 4.0, [[6.0, 7.0]])]
    """
    who = "iterative_shrinking"
    key = checks.key(who, key)
    arrays_of(who, params)
    if resume is not None and (not isinstance(resume, Level) or not 0 <= int(resume.level) <= levels):
        raise ValueError(f"{who}: resume must be a Level from 0 to {levels}, got {kind(resume)}")
    shapes = jax.tree.map(lambda p: jax.ShapeDtypeStruct(jnp.shape(p), jnp.result_type(p)), params)

    def sized(level: int, params: PyTree, kept: Kept) -> Level:
        small = shrink(apply, shapes, kept, *inputs)
        assert small.macs is not None
        own = small.apply if small.kept else apply
        return Level(own, params, level, small.kept, small.weights[1], small.macs[1])

    def run() -> Iterator[Level]:
        if resume is None:
            model = sized(0, params, {})
            yield model
        else:
            model = sized(int(resume.level), resume.params, resume.kept)
        for level in range(model.level + 1, levels + 1):
            small = shrink(model.apply, model.params, prune(model.apply, model.params, level), *inputs)
            model = sized(level, small.params, _within(model.kept, small.kept, shapes))
            if steps:
                trained = make_train(model.apply)(model.params, None, 0, steps, jax.random.fold_in(key, level))
                model = model._replace(params=_checked(who, trained, model.params).params, aux=trained.aux)
            yield model

    return run()


def _within(before: Kept, now: Kept, shapes: PyTree) -> Kept:
    """Positions of the first model, of those that are left of what was left."""
    sizes = trees.named_shapes(shapes)
    out = {leaf: dict(axes) for leaf, axes in before.items()}
    for leaf, axes in now.items():
        for axis, at in axes.items():
            own = out.setdefault(leaf, {})
            own[axis] = np.asarray(own.get(axis, np.arange(sizes[leaf][axis])))[at]
    return out


def _checked(who: str, trained: Any, params: PyTree) -> Trained:
    if not isinstance(trained, Trained):
        raise ValueError(f"{who}: train must return rx.base.Trained(params, aux), got {kind(trained)}")
    if trees.named_shapes(trained.params) != trees.named_shapes(params):
        raise ValueError(f"{who}: train must return params with the leaves and shapes it was given")
    return trained
