"""Criteria of channels from the first derivatives of a loss by their factors, and along the way to a factor of 0."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from rigl_jax import arguments as rules
from rigl_jax import checks
from rigl_jax.arguments import arguments
from rigl_jax.base import Array, PyTree
from rigl_jax.channels.gating import ChannelCriterion, Scores, Tapped, parted, sizes, tapped
from rigl_jax.channels.grouping import Group
from rigl_jax.criteria.losses import Loss, at, parts
from rigl_jax.messages import shown


@arguments(loss=rules.function, square=rules.flag, normalize=rules.flag)
def taylor_2016(loss: Loss, *, square: bool = False, normalize: bool = True) -> ChannelCriterion:
    """|dL/dz z| of what is read of a channel, on average over the examples (Molchanov et al. 2017, eq. 8).

    The products of activation and gradient are summed over all positions, and over all products that read the channel,
    before their absolute value is taken: this is |dL/dc| of one example, c being a factor on the channel. The paper
    takes the mean over positions, which differs by a constant and changes no score that is normalised. There is no
    term for FLOPs; the authors' code has none either.

    Args:
      loss: `(params, batch) -> scalar`, with normalisation layers in inference mode. It is called with one example at a
        time: arrays [1, ...].
      square: True: the mean of the squares, in place of absolute values.
      normalize: divides the scores of each group by their L2 norm (plus 1e-8), so that layers can be ranked together.

    Returns:
      `(groups, params, batch) -> scores`; float[size] for each group. Channels that no product reads have 0.

    Example:
      >>> import rigl_jax as rx
      >>> params = {"a": jnp.array([[1.0, 2.0]]), "b": jnp.array([[3.0], [-1.0]])}
      >>> apply = lambda p, x: x @ p["a"] @ p["b"]
      >>> groups = rx.channels.groups(apply, params, jnp.ones((1, 1)))
      >>> loss = lambda p, x: apply(p, x).sum()
      >>> scores = taylor_2016(loss, normalize=False)(groups, params, jnp.array([[1.0], [-1.0]]))
      >>> [s.tolist() for s in scores]
      [[3.0, 2.0]]
    """

    def criterion(groups: Sequence[Group], params: PyTree, batch: Any) -> Scores:
        grads = gradients("taylor_2016", loss, groups, params, batch, 1)
        scores = parted(groups, jnp.mean(jnp.square(grads) if square else jnp.abs(grads), 0))
        return tuple(s / (jnp.linalg.norm(s) + 1e-8) for s in scores) if normalize else scores

    return criterion


@arguments(loss=rules.function, size=rules.optional(rules.whole(1)))
def taylor_2019(loss: Loss, *, second: str | None = None, size: int | None = None) -> ChannelCriterion:
    """(dL/dc)^2 for a factor c on each channel: the loss that its removal costs, squared (Molchanov et al. 2019).

    Eq. 8 of the paper. As c multiplies the rows that read the channel, dL/dc is the sum of g w over them. The squares
    of several batches are averaged. Scores of all layers are ranked together, without normalisation. The authors divide
    the score of a factor by the number of blocks that share it along a residual stream; here it is the derivative by
    the one factor that all of them have.

    Args:
      loss: `(params, batch) -> scalar`, with normalisation layers in inference mode.
      second: None: first order, "FO". "diagonal": (dL/dc - d2L/dc2 / 2)^2, exact for a quadratic loss, by one product
        with the Hessian for each channel. "rows": (dL/dc - (H 1)_c / 2)^2, as in eq. 7, by one product in all; it adds
        what channels do together.
      size: the examples of a batch whose derivative is squared. None: all of them.

    Returns:
      `(groups, params, batch) -> scores`; float[size] for each group. Channels that no product reads have 0.

    Example:
      >>> import rigl_jax as rx
      >>> params = {"a": jnp.array([[1.0, 2.0]]), "b": jnp.array([[3.0], [-1.0]])}
      >>> apply = lambda p, x: x @ p["a"] @ p["b"]
      >>> x = jnp.ones((1, 1))
      >>> groups = rx.channels.groups(apply, params, x)
      >>> loss = lambda p, x: jnp.square(apply(p, x)).sum()  # (3 - 2)^2, without a channel 2^2 or 3^2
      >>> [s.tolist() for s in taylor_2019(loss, second="diagonal")(groups, params, x)]
      [[9.0, 64.0]]
    """
    if second is not None and (not isinstance(second, str) or second not in ("diagonal", "rows")):
        raise ValueError(f"taylor_2019: second must be None, 'diagonal' or 'rows', got {shown(second)}")

    def criterion(groups: Sequence[Group], params: PyTree, batch: Any) -> Scores:
        grads = gradients("taylor_2019", loss, groups, params, batch, size, second)
        return parted(groups, jnp.mean(jnp.square(grads), 0))

    return criterion


@arguments(before=rules.optional(rules.sequence), scores=rules.sequence)
def ema(before: Sequence[Array] | None, scores: Sequence[Array], decay: float = 0.9) -> Scores:
    """Scores smoothed from one pruning to the next: `decay * before + (1 - decay) * scores` (Molchanov et al. 2019).

    The authors use 0.9 and remark in their code that it does not help.

    Args:
      before: what this function returned last time, or None.
      scores: of the same groups.
      decay: in [0, 1].

    Returns:
      float[size] for each group.

    Raises:
      ValueError: scores of other groups than before, a decay out of its range.

    Example:
      >>> smooth = ema(None, [jnp.array([1.0, 2.0])])
      >>> [s.tolist() for s in ema(smooth, [jnp.array([3.0, 2.0])], 0.5)]
      [[2.0, 2.0]]
    """
    decay = checks.number("ema", "decay", decay, "must be in [0, 1]", lambda x: 0 <= x <= 1)
    if before is not None and [jnp.shape(s) for s in before] != [jnp.shape(s) for s in scores]:
        raise ValueError(f"ema: scores must be of the same groups as before, got {shown(scores)}")
    if before is None:
        return tuple(map(jnp.asarray, scores))
    return tuple(decay * jnp.asarray(a) + (1 - decay) * jnp.asarray(b) for a, b in zip(before, scores, strict=True))


_BETWEEN = rules.rule("between 0 and 1", lambda value: 0 < checks.real(value) < 1, checks.plain)


@arguments(loss=rules.function, steps=rules.whole(0), mu=rules.optional(_BETWEEN), signed=rules.flag, each=rules.flag)
def singe(
    loss: Loss, steps: int = 20, mu: float | None = 0.95, *, signed: bool = False, each: bool = False
) -> ChannelCriterion:
    """The derivative along the path on which channels are scaled to 0 (after SInGE, Yvinec et al. 2022).

    With factors a_s = mu^s, s = 0..steps, a channel scores

        sum_s (a_s - a_{s+1}) |dL/dc(a)|, a = (a_s + a_{s+1}) / 2, with a_{steps+1} = 0,

    while all channels of its group have the factor a. `rx.criteria.singe`, with `scores`, scales whole leaves and takes
    absolute values weight by weight; here the derivative is that of the channel. The text of the paper and its code
    were not at hand: this is in its style; see there for what is ours.

    Args:
      loss: `(params, batch) -> scalar`, with normalisation layers in inference mode.
      steps: how many intervals there are before the last one, which ends at 0.
      mu: ratio of the grid, in (0, 1). None: a uniform grid, a_s = 1 - s / (steps + 1).
      signed: True: -dL/dc in place of |dL/dc|. The sum over a group is then the rise of the loss if all of it goes, up
        to O(1 / steps^2) on a uniform grid; with `each` every score is the rise if its channel goes.
      each: True: one channel is scaled at a time, with steps + 1 gradients for each channel in place of each group.

    Returns:
      `(groups, params, batch) -> scores`; float[size] for each group. Channels that no product reads have 0.

    Example:
      >>> import rigl_jax as rx
      >>> params = {"a": jnp.array([[1.0, 2.0]]), "b": jnp.array([[3.0], [-1.0]])}
      >>> apply = lambda p, x: x @ p["a"] @ p["b"]
      >>> x = jnp.ones((1, 1))
      >>> groups = rx.channels.groups(apply, params, x)
      >>> loss = lambda p, x: jnp.square(apply(p, x)).sum()  # (3 - 2)^2, without a channel 2^2 or 3^2
      >>> [s.round(4).tolist() for s in singe(loss, signed=True, each=True)(groups, params, x)]
      [[3.0, 8.0]]
    """
    edges = np.arange(1, -1, -1 / (steps + 1))[: steps + 1] if mu is None else mu ** np.arange(steps + 1)
    edges = np.append(edges, 0.0).astype(np.float32)
    middles, widths = (edges[:-1] + edges[1:]) / 2, edges[:-1] - edges[1:]
    sign = (lambda x: -x) if signed else jnp.abs

    def criterion(groups: Sequence[Group], params: PyTree, batch: Any) -> Scores:
        model = tapped("singe", at("singe", loss), groups, params, batch)
        slope = model.slope(params, batch)
        starts = sizes(groups).tolist()
        scaled = np.eye(model.size) if each else np.zeros((len(groups), model.size))
        for g, (a, b) in enumerate(itertools.pairwise([] if each else starts)):
            scaled[g, a:b] = 1

        def path(which: Array) -> Array:
            def step(total: Array, interval: tuple[Array, Array]) -> tuple[Array, None]:
                place, width = interval
                return total + width * sign(slope(jnp.where(which > 0, place, 1.0))) * which, None

            return jax.lax.scan(step, jnp.zeros(model.size), (jnp.asarray(middles), jnp.asarray(widths)))[0]

        return parted(groups, jnp.sum(jax.lax.map(path, jnp.asarray(scaled, jnp.float32)), 0))

    return criterion


def gradients(
    who: str,
    loss: Loss,
    groups: Sequence[Group],
    params: PyTree,
    batch: Any,
    size: int | None,
    second: str | None = None,
) -> Array:
    """float[parts, channels]: the derivative of the loss by the factor of each channel, part by part of a batch."""
    divided = jax.tree.map(lambda x: jnp.asarray(x)[None], batch) if size is None else parts(who, batch, size)
    if divided is None:
        raise ValueError(f"{who}: batch must be arrays of examples, got None")
    first = jax.tree.map(lambda x: x[0], divided)
    model = tapped(who, at(who, loss), groups, params, first)
    return jax.vmap(lambda part: _slope(model, params, part, second))(divided)


def _slope(model: Tapped, params: PyTree, batch: Any, second: str | None) -> Array:
    ones = jnp.ones(model.size)
    if second == "rows":
        first, rows = model.curved(ones, params, batch)
        return first - rows / 2
    first = model.slope(params, batch)(ones)
    if second is None:
        return first
    curvature = jax.lax.map(lambda e: jnp.sum(e * model.curved(e, params, batch)[1]), jnp.eye(model.size))
    return first - curvature / 2
