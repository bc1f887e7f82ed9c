"""Paths between two solutions: is there a barrier of loss between them, and does it need dense space to get around it?

Section 4.4 of Evci et al. (2020): between a static sparse solution and a better one they find no path without a
barrier in the sparse subspace, but one through dense space. A path is a Bezier curve, given by its control points, the
ends among them; two points are a straight line.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import optax

from rigl_jax import arguments as rules
from rigl_jax import checks, trees
from rigl_jax.arguments import arguments
from rigl_jax.base import Array, Masks, PyTree
from rigl_jax.messages import shown

Loss = Callable[[PyTree], Array]


@arguments(points=rules.sequence, t=rules.scalar)
def bezier(points: Sequence[PyTree], t: Any) -> PyTree:
    """The place on a Bezier curve: `sum_i C(n, i) (1 - t)^(n - i) t^i points[i]`.

    Args:
      points: n + 1 trees of one structure; the first and the last are the ends. Two are a straight line.
      t: scalar; 0 and 1 are the ends, exactly. A line goes on beyond them.

    >>> bezier([{"w": jnp.array(0.0)}, {"w": jnp.array(4.0)}, {"w": jnp.array(2.0)}], 0.5)["w"].tolist()
    2.5
    """
    n = len(points) - 1
    t = jnp.asarray(t, jnp.float32)
    shares = [math.comb(n, i) * (1 - t) ** (n - i) * t**i for i in range(n + 1)]
    return jax.tree.map(lambda *p: sum(s.astype(x.dtype) * x for s, x in zip(shares, p, strict=True)), *points)


@arguments(loss=rules.function, points=rules.sequence, ts=rules.array(1, host=True))
def path_losses(loss: Loss, points: Sequence[PyTree], ts: Any) -> Array:
    """The loss at places on a Bezier curve, one forward pass each.

    Args:
      loss: `params -> scalar`, over data that do not change.
      points: see `bezier`.
      ts: float[n].

    Returns:
      float[n].
    """
    checks.functions("path_losses", loss=loss)
    return jax.lax.map(lambda t: loss(bezier(points, t)), jnp.asarray(ts, jnp.float32))


@arguments(loss=rules.function, ts=rules.array(1, host=True))
def interpolate(loss: Loss, a: PyTree, b: PyTree, ts: Any) -> Array:
    """The loss on the straight line `(1 - t) a + t b`.

    Args:
      loss: `params -> scalar`.
      a: params at t = 0.
      b: params at t = 1, parallel to `a`.
      ts: float[n]; the paper looks a little beyond the ends, say `jnp.linspace(-0.2, 1.2, 50)`.

    Returns:
      float[n].

    Raises:
      ValueError: `b` is not parallel to `a`; names the leaf.

    >>> a, b = {"w": jnp.array(-1.0)}, {"w": jnp.array(1.0)}
    >>> losses = interpolate(lambda p: (p["w"] ** 2 - 1) ** 2, a, b, [0, 0.5, 1])
    >>> losses.tolist(), barrier(losses).item()
    ([0.0, 1.0, 0.0], 1.0)
    """
    _check_parallel("interpolate", a, b)
    return path_losses(loss, (a, b), ts)


@arguments(losses=rules.array(1, host=True))
def barrier(losses: Array) -> Array:
    """How much higher the loss gets on the way than at the worse of its ends; 0 where it does not.

    Args:
      losses: float[n], from end to end.
    """
    return jnp.max(losses) - jnp.maximum(losses[0], losses[-1])


def bezier_path(
    loss: Loss,
    a: PyTree,
    b: PyTree,
    masks: Masks | None = None,
    *,
    steps: int,
    key: Array,
    degree: int = 2,
    optimizer: optax.GradientTransformation | None = None,
) -> list[PyTree]:
    """Bends the line from `a` to `b` so that the mean loss along it falls (Garipov et al. 2018; RigL, section 4.4).

    Control points start on the line and descend the loss at a place drawn uniformly on the curve at every step.

    Args:
      loss: `params -> scalar`, over data that do not change.
      a: params at one end, fixed.
      b: params at the other, fixed, parallel to `a`.
      masks: where control points may move, bool[*shape] or None (everywhere) for a leaf: those of a static solution, or
        the union of both ends' for the sparse subspace. None: through dense space.
      steps: of the optimizer, at least 1.
      key: typed PRNG key, for the places.
      degree: 2 or more: quadratic, cubic, ...
      optimizer: of the control points. Default: `optax.adam(1e-2)`.

    Returns:
      `degree + 1` points for `bezier` and `path_losses`; the first and the last are `a` and `b`.

    Raises:
      ValueError: `b` or `masks` are not parallel to `a` (names the leaf); steps or degree out of range.

    >>> loss = lambda p: (p["w"][0] ** 2 + p["w"][1] ** 2 - 1) ** 2  # zero on a circle
    >>> a, b = {"w": jnp.array([-1.0, 0.1])}, {"w": jnp.array([1.0, 0.1])}
    >>> points, ts = bezier_path(loss, a, b, steps=300, key=jax.random.key(0)), jnp.linspace(0, 1, 21)
    >>> bool(barrier(path_losses(loss, points, ts)) < 0.2 * barrier(interpolate(loss, a, b, ts)))
    True
    """
    checks.functions("bezier_path", loss=loss)
    _check_parallel("bezier_path", a, b)
    key = checks.key("bezier_path", key)
    if masks is not None:
        masks = checks.masks("bezier_path", masks, a)
    for name, value, least in (("steps", steps, 1), ("degree", degree, 2)):
        if not checks.is_whole(value, least):
            raise ValueError(f"bezier_path: {name} must be a whole number, at least {least}, got {shown(value)}")
    steps, degree = int(steps), int(degree)
    inner = optax.adam(1e-2) if optimizer is None else optimizer
    checks.optimizer("bezier_path", inner)
    start = [bezier((a, b), i / degree) for i in range(1, degree)]

    def mean_loss(middle: list[PyTree], t: Array) -> Array:
        return loss(bezier([a, *middle, b], t))

    def still(updates: PyTree) -> PyTree:
        return updates if masks is None else trees.map_masked(lambda m, u: jnp.where(m, u, 0), masks, updates)

    def step(carry: tuple[list[PyTree], Any], k: Array) -> tuple[tuple[list[PyTree], Any], None]:
        middle, state = carry
        grads = jax.grad(mean_loss)(middle, jax.random.uniform(k, dtype=jnp.float32))
        found, state = inner.update(grads, state, middle)
        updates: Any = found
        moved: Any = optax.apply_updates(middle, [still(u) for u in updates])
        return (moved, state), None

    (middle, _), _ = jax.lax.scan(step, (start, inner.init(start)), jax.random.split(key, steps))
    return [a, *middle, b]


def _check_parallel(who: str, a: PyTree, b: PyTree) -> None:
    first, second = trees.named_leaves(a), trees.named_leaves(b)
    for name in first | second:
        shapes = [getattr(leaves.get(name), "shape", None) for leaves in (first, second)]
        if None in shapes or shapes[0] != shapes[1]:
            raise ValueError(
                f"{who}: b must be parallel to a; leaf {name!r} has shape {shapes[0]} in a, {shapes[1]} in b"
            )
