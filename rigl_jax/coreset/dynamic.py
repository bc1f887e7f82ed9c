"""Dynamic data pruning (Raju et al. 2021): every few epochs another part of the data is chosen for training."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from rigl_jax import arguments as rules
from rigl_jax import checks, topology
from rigl_jax.arguments import arguments
from rigl_jax.base import Array
from rigl_jax.coreset.scores import fits, indices, of_examples, written
from rigl_jax.messages import listed, shown


class SampleStats(NamedTuple):
    """What is known of the losses of n examples; a pytree, to be saved with the run.

    Attributes:
      mean: f32[n], moving average of the loss.
      var: f32[n], moving variance.
      seen: bool[n], whether an example had a loss yet.
    """

    mean: Array
    var: Array
    seen: Array


class Chosen(NamedTuple):
    """The examples of a period.

    Attributes:
      index: int32[keep], in ascending order.
      weight: f32[keep]. The mean of `weight * loss` over these examples is an unbiased estimate of the mean loss of
        all n, if the rule explores. See `dynamic_pruning`.
    """

    index: Array
    weight: Array


class Selector(NamedTuple):
    """Pure functions that choose examples.

    Attributes:
      init: `() -> SampleStats`.
      select: `(stats, key) -> Chosen`.
      update: `(stats, index int[b], losses float[b]) -> stats`, for examples that were seen, each once a call.
        A loss that is not finite changes nothing. Indices out of range and repeated ones are refused outside of jit.
        Under jit those out of range, such as -1 for padding, change nothing.
    """

    init: Callable[[], SampleStats]
    select: Callable[[SampleStats, Array], Chosen]
    update: Callable[[SampleStats, Array, Array], SampleStats]


class Rule(NamedTuple):
    """What tells the rules of `dynamic_pruning` apart.

    Attributes:
      score: `(stats, c) -> f32[n]`, the highest are kept.
      epsilon: the part that is drawn from the rest at random, unless the caller says.
    """

    score: Callable[[SampleStats, Any], Array]
    epsilon: float


RULES = {
    "random": Rule(lambda stats, c: jnp.zeros_like(stats.mean), 1.0),
    "epsilon_greedy": Rule(lambda stats, c: stats.mean, 0.1),
    "ucb": Rule(lambda stats, c: stats.mean + c * stats.var, 0.0),
}
"""The rules of the paper."""


@arguments(
    n=rules.whole(1), keep=rules.whole(1), rule=rules.word, epsilon=rules.optional(rules.scalar), c=rules.scalar,
    rate=rules.scalar,
)  # fmt: skip
def dynamic_pruning(
    n: int, keep: int, rule: str = "random", *, epsilon: float | None = None, c: float = 1.0, rate: float = 0.1
) -> Selector:
    """Chooses `keep` of n examples for the next period of training, by the losses so far.

    * `"random"`: uniformly. The paper's finding is that this is hard to beat.
    * `"epsilon_greedy"`: the highest mean losses; `epsilon keep`, rounded down but at least 1, are drawn
      uniformly from the rest.
    * `"ucb"`: the highest `mean + c var`.

    An example that had no loss yet comes before all others. Equal scores are put in random order by the key.

    The mean over chosen examples is biased towards hard ones. `Chosen.weight` undoes that (Horvitz-Thompson): 1 over
    the chance of being chosen, times keep / n, where the chance of those with the highest scores is 1, ties included.
    It needs every other example to have a chance, so `epsilon > 0`. With `epsilon=0`, the default of `"ucb"`, examples
    without a chance are missing, and weights are keep / n.

    No code of the authors is public; the values of epsilon, c, rate and the length of a period are not verified.

    Args:
      n: examples of the training set.
      keep: how many to choose.
      rule: one of `RULES`.
      epsilon: the random part, from 0 to 1. Default: 1, 0.1 and 0. `"random"` is always 1.
      c: how much variance counts for `"ucb"`, at least 0.
      rate: weight of a new loss in the moving averages, above 0 and up to 1:
        `mean' = (1 - rate) mean + rate l`, `var' = (1 - rate) var + rate (l - mean) (l - mean')`. A first loss is the
        mean.

    Raises:
      ValueError: keep is more than n, an unknown rule, an option out of range.

    >>> selector = dynamic_pruning(6, 3, "epsilon_greedy", epsilon=0.4)
    >>> stats = selector.update(selector.init(), jnp.arange(6), jnp.array([9.0, 1.0, 1.0, 1.0, 8.0, 1.0]))
    >>> chosen = selector.select(stats, jax.random.key(0))
    >>> {0, 4} < set(chosen.index.tolist()), chosen.weight.max().tolist()  # 1 of the 4 others: 4 times 3 / 6
    (True, 2.0)
    """
    fits("dynamic_pruning", keep, n, "keep")
    if rule not in RULES:
        raise ValueError(f"dynamic_pruning: rule must be one of {listed(RULES)}, got {shown(rule)}")
    usual = RULES[rule].epsilon
    epsilon = usual if epsilon is None else checks.number(
        "dynamic_pruning", "epsilon", epsilon, "must be from 0 to 1", lambda x: 0 <= x <= 1
    )  # fmt: skip
    if usual == 1 and epsilon != 1:
        raise ValueError(f"dynamic_pruning: epsilon must be 1 or left out for {rule!r}, got {shown(epsilon)}")
    checks.number("dynamic_pruning", "c", c, "must be at least 0", lambda x: x >= 0)
    checks.number("dynamic_pruning", "rate", rate, "must be above 0 and at most 1", lambda x: 0 < x <= 1)
    explored = max(int(epsilon * keep + 1e-9), 1) if epsilon > 0 else 0
    greedy = keep - explored

    def init() -> SampleStats:
        return SampleStats(jnp.zeros(n, jnp.float32), jnp.zeros(n, jnp.float32), jnp.zeros(n, bool))

    @arguments("dynamic_pruning: select", key=rules.key)
    def select(stats: SampleStats, key: Array) -> Chosen:
        of_examples("dynamic_pruning: select", "stats", SampleStats, stats, n)
        return _select(stats, key, c, rule, greedy, explored)

    @arguments("dynamic_pruning: update", index=rules.array(1), losses=rules.array(1))
    def update(stats: SampleStats, index: Array, losses: Array) -> SampleStats:
        of_examples("dynamic_pruning: update", "stats", SampleStats, stats, n)
        checks.same_shape("dynamic_pruning: update", index.shape, losses=losses)
        return _update(stats, written("dynamic_pruning: update", index, n), losses, float(rate))

    return Selector(init, select, update)


@functools.partial(jax.jit, static_argnames=("rule", "greedy", "explored"))
def _select(stats: SampleStats, key: Array, c: Any, rule: str, greedy: int, explored: int) -> Chosen:
    n, keep = stats.mean.shape[0], greedy + explored
    shuffle, draw = jax.random.split(key)
    order = jax.random.permutation(shuffle, n)
    worth = jnp.where(stats.seen, RULES[rule].score(stats, c), jnp.inf)
    first = jnp.zeros(n, bool).at[order].set(topology.select(worth[order], greedy))
    second = topology.select(jax.random.uniform(draw, (n,)), explored, among=~first)
    index = indices(first | second, keep)
    chance = jnp.where(first[index], 1.0, explored / max(n - greedy, 1))
    return Chosen(index, keep / n / chance)


@functools.partial(jax.jit, static_argnames="rate")
def _update(stats: SampleStats, index: Array, losses: Array, rate: float) -> SampleStats:
    fine = jnp.isfinite(losses)  # one NaN would stay in the averages for ever
    losses = losses.astype(jnp.float32)
    old = jnp.where(stats.seen[index], stats.mean[index], losses)
    new = (1 - rate) * old + rate * losses
    var = (1 - rate) * stats.var[index] + rate * (losses - new) * (losses - old)
    return SampleStats(
        stats.mean.at[index].set(jnp.where(fine, new, stats.mean[index]), mode="drop"),
        stats.var.at[index].set(jnp.where(fine, var, stats.var[index]), mode="drop"),
        stats.seen.at[index].max(fine, mode="drop"),
    )
