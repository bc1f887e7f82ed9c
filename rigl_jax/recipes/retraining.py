"""Learning rates for training on after pruning: optax schedules, `retraining step -> learning rate`.

`original` is the schedule of the dense run, `steps` its length T, `retrain_steps` the length T_r of one retraining,
whose steps count from 0. All but `finetune` and `rewind` begin with a warm-up of `int(0.1 T_r)` steps: half a cosine
from 0 to the first value of what follows. From the last step on a schedule keeps its value.

Formulas are those of the authors' code of Zimmer, Spiegel and Pokutta (2023, "How I Learned to Stop Worrying and Love
Retraining"); SILO is Liu, Ghosh, Tan and Motani (2022). Schedules only: what the optimizer's state becomes is the
recipe's to say. In all of them it is reset.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from rigl_jax import checks, trees
from rigl_jax.base import PyTree
from rigl_jax.messages import kind, shown

WARM_UP = 0.1


def finetune(original: optax.Schedule, steps: int, retrain_steps: int, *, warmup: int = 0) -> optax.Schedule:
    """FT: constant, the smallest learning rate of the dense run after its warm-up.

    Args:
      original: schedule of the dense run.
      steps: its length.
      retrain_steps: not read: the same for every length.
      warmup: steps of the dense run's own warm-up.

    >>> round(float(finetune(optax.piecewise_constant_schedule(1.0, {50: 0.1}), 100, 10)(3)), 6)
    0.1
    """
    rates, _ = _run("finetune", original, steps, retrain_steps, warmup)
    return optax.constant_schedule(float(rates.min()))


def rewind(original: optax.Schedule, steps: int, retrain_steps: int) -> optax.Schedule:
    """LRW, learning-rate rewinding (Renda et al. 2020): the last T_r steps of the dense run once more.

    Args:
      original: schedule of the dense run.
      steps: its length.
      retrain_steps: at most `steps`; as many give the original itself.

    >>> schedule = rewind(optax.linear_schedule(1.0, 0.0, 100), 100, 20)
    >>> round(float(schedule(0)), 6), round(float(schedule(19)), 6)
    (0.2, 0.01)
    """
    _run("rewind", original, steps, retrain_steps, 0, evaluate=False)
    if retrain_steps > steps:
        raise ValueError(f"rewind: retrain_steps must be at most steps={steps}, got {shown(retrain_steps)}")
    first, last = steps - retrain_steps, retrain_steps - 1
    return lambda step: original(first + jnp.minimum(step, last))


def slr(original: optax.Schedule, steps: int, retrain_steps: int, *, warmup: int = 0) -> optax.Schedule:
    """SLR: the whole schedule of the dense run, compressed into the steps after the warm-up.

    With T_w = int(0.1 T_r), step T_w + j has the dense run's rate at `int(j T / (T_r - T_w))`. The dense run's own
    warm-up counts as its largest rate.

    Args:
      original: schedule of the dense run.
      steps: its length.
      retrain_steps: at least 1.
      warmup: steps of the dense run's own warm-up.

    >>> schedule = slr(lambda step: 100.0 - step, 100, 20)
    >>> [float(schedule(step)) for step in (0, 1, 2, 3, 4, 19)]
    [0.0, 50.0, 100.0, 95.0, 89.0, 6.0]
    """
    rates, n = _run("slr", original, steps, retrain_steps, warmup)
    whole = np.concatenate([np.full(warmup, rates.max(), rates.dtype), rates])
    return _warmed([whole[j * steps // n] for j in range(n)], retrain_steps)


def clr(original: optax.Schedule, steps: int, retrain_steps: int, *, warmup: int = 0) -> optax.Schedule:
    """CLR (Le & Hua 2021): half a cosine from the largest to the smallest rate of the dense run after its warm-up.

    Args:
      original: schedule of the dense run.
      steps: its length.
      retrain_steps: at least 1.
      warmup: steps of the dense run's own warm-up.

    >>> schedule = clr(optax.linear_schedule(1.0, 0.0, 100), 100, 20)
    >>> [round(float(schedule(step)), 4) for step in (0, 1, 2, 11, 20)]
    [0.0, 0.5, 1.0, 0.505, 0.01]
    """
    rates, n = _run("clr", original, steps, retrain_steps, warmup)
    low, high = float(rates.min()), float(rates.max())
    return _warmed([low + (high - low) * (1 + math.cos(math.pi * j / n)) / 2 for j in range(n + 1)], retrain_steps)


def llr(original: optax.Schedule, steps: int, retrain_steps: int) -> optax.Schedule:
    """LLR: linear from the largest rate of the dense run to 0 at step T_r.

    Args:
      original: schedule of the dense run.
      steps: its length.
      retrain_steps: at least 1.

    >>> schedule = llr(optax.linear_schedule(1.0, 0.0, 100), 100, 20)
    >>> [round(float(schedule(step)), 4) for step in (0, 1, 2, 11, 20)]
    [0.0, 0.5, 1.0, 0.5, 0.0]
    """
    rates, n = _run("llr", original, steps, retrain_steps, 0)
    return _linear(float(rates.max()), n, retrain_steps)


def allr(
    original: optax.Schedule, steps: int, retrain_steps: int, *, norm_drop: float, fraction: float
) -> optax.Schedule:
    """ALLR: LLR from an adaptive rate: the more of the norm a pruning took, the higher.

    It starts from `clip(max norm_drop / sqrt(fraction), max min(T_r / T, 1), max)`, max the dense run's largest rate.

    Args:
      original: schedule of the dense run.
      steps: its length.
      retrain_steps: at least 1.
      norm_drop: of `norm_drop(before, after)` for this pruning.
      fraction: the share of the remaining weights that it took, above 0; in n equal rounds to sparsity S it is
        `1 - (1 - S)^(1 / n)`.

    >>> schedule = allr(optax.linear_schedule(1.0, 0.0, 100), 100, 20, norm_drop=0.25, fraction=0.25)
    >>> [round(float(schedule(step)), 4) for step in (0, 1, 2, 11, 20)]
    [0.0, 0.25, 0.5, 0.25, 0.0]
    """
    rates, n = _run("allr", original, steps, retrain_steps, 0)
    norm_drop = checks.number("allr", "norm_drop", norm_drop, "must be in [0, 1]", lambda x: 0 <= x <= 1)
    fraction = checks.number("allr", "fraction", fraction, "must be above 0 and at most 1", lambda x: 0 < x <= 1)
    high = float(rates.max())
    start = min(max(high * norm_drop / math.sqrt(fraction), high * min(retrain_steps / steps, 1)), high)
    return _linear(start, n, retrain_steps)


def bimp(
    original: optax.Schedule,
    steps: int,
    budget: int,
    rounds: int,
    level: int,
    *,
    norm_drop: float,
    fraction: float,
) -> optax.Schedule:
    """BIMP: ALLR with a fixed number of retraining steps in all; of round `level` it has `split(budget, rounds)`.

    The authors also train the dense network shorter, with a schedule that is linear to 0; that is the caller's `train`.

    Args:
      original: schedule of the dense run.
      steps: its length.
      budget: retraining steps of all rounds together.
      rounds: how often the network is pruned.
      level: which pruning, from 1.
      norm_drop: see `allr`.
      fraction: see `allr`.

    >>> schedule = bimp(optax.linear_schedule(1.0, 0.0, 100), 100, 45, 2, 1, norm_drop=0.25, fraction=0.25)
    >>> round(float(schedule(2)), 6)
    0.5
    """
    lengths = split(budget, rounds)
    if not checks.is_whole(level, 1) or level > rounds:
        raise ValueError(f"bimp: level must be a round from 1 to {rounds}, got {shown(level)}")
    return allr(original, steps, lengths[level - 1], norm_drop=norm_drop, fraction=fraction)


def split(budget: int, rounds: int) -> list[int]:
    """A budget of steps shared among rounds: `budget // rounds` each, and the remainder to the last.

    >>> split(11, 3)
    [3, 3, 5]
    """
    if not checks.is_whole(rounds, 1):
        raise ValueError(f"split: rounds must be a whole number, at least 1, got {shown(rounds)}")
    if not checks.is_whole(budget, rounds):
        raise ValueError(f"split: budget must be a step for each of {rounds} rounds at least, got {shown(budget)}")
    return [budget // rounds] * (rounds - 1) + [budget // rounds + budget % rounds]


def silo_max_lr(pruned: float, *, eps: float, alpha: float, beta: float = 5.0) -> float:
    """The largest learning rate of a round of SILO: `eps + alpha / (1 + (x / (1 - x))^(-beta))`.

    It rises from `eps` at x = 0 to `eps + alpha` at x = 1, because pruning shrinks activations and gradients.

    Args:
      pruned: x, the fraction of weights that is pruned, in [0, 1].
      eps: the rate of the dense network; 0.03 for ResNet-20, 0.04 for VGG-19 (paper).
      alpha: how much it rises; 0.04 and 0.06 there.
      beta: how sharply.

    >>> [round(silo_max_lr(x, eps=0.03, alpha=0.04), 6) for x in (0.2, 0.36, 0.5, 0.8, 0.95)]
    [0.030039, 0.032132, 0.05, 0.069961, 0.07]
    """
    x = checks.number("silo_max_lr", "pruned", pruned, "must be in [0, 1]", lambda x: 0 <= x <= 1)
    for name, value in (("eps", eps), ("alpha", alpha), ("beta", beta)):
        checks.number("silo_max_lr", name, value, "must be at least 0", lambda found: found >= 0)
    if x in (0, 1):
        return eps + alpha * x
    return eps + alpha / (1 + (x / (1 - x)) ** -beta)


def silo(
    level: int,
    *,
    eps: float,
    alpha: float,
    warmup: int,
    drops: Sequence[int],
    rate: float = 0.2,
    beta: float = 5.0,
) -> optax.Schedule:
    """SILO: linear from 0 to the round's own largest rate, then a tenth of it after each drop.

    The rate lags by a round: rounds 0 and 1 have `eps`, round k that of x = 1 - (1 - rate)^(k - 1). For ResNet-20 the
    authors warm up for 20,000 steps, but drop at step 19,550 already, and again at epoch 32 of 50. Their VGG-19
    overshoots its rate by 9.5 % before the plateau; this schedule does not. Their scripts draw new weights every round
    by default; `lottery_ticket` rewinds.

    Args:
      level: the round; 0 trains the dense network.
      eps: see `silo_max_lr`.
      alpha: see `silo_max_lr`.
      warmup: steps to the largest rate.
      drops: steps from which the rate is a tenth, a hundredth, ...
      rate: the share of the remaining weights that each round prunes.
      beta: see `silo_max_lr`.

    >>> schedule = silo(3, eps=0.03, alpha=0.04, warmup=10, drops=(20, 30))  # x = 1 - 0.8^2 = 0.36
    >>> [round(float(schedule(step)), 6) for step in (0, 5, 10, 19, 20, 30)]
    [0.0, 0.016066, 0.032132, 0.032132, 0.003213, 0.000321]
    """
    if not checks.is_whole(level) or not checks.is_whole(warmup):
        name = "warmup" if checks.is_whole(level) else "level"
        raise ValueError(f"silo: {name} must be a whole number, got {shown(warmup if name == 'warmup' else level)}")
    if not isinstance(drops, Sequence) or not all(checks.is_whole(step) for step in drops):
        raise ValueError(f"silo: drops must be steps, got {shown(drops)}")
    rate = checks.number("silo", "rate", rate, "must be in [0, 1)", lambda x: 0 <= x < 1)
    high = silo_max_lr(1 - (1 - rate) ** max(0, level - 1), eps=eps, alpha=alpha, beta=beta)
    places = np.asarray(sorted(drops), np.int32)

    def schedule(step: Any) -> Any:
        up = jnp.minimum(jnp.asarray(step, jnp.float32) / max(warmup, 1), 1.0) if warmup else 1.0
        return high * up * 0.1 ** jnp.sum(jnp.asarray(step) >= places, dtype=jnp.float32)

    return schedule


def triangular(low: float, high: float, period: int) -> optax.Schedule:
    """Linear from `low` up to `high` in the middle of each period and back: the cycles of Sup-Tickets.

    >>> schedule = triangular(0.001, 0.005, 8)
    >>> [round(float(schedule(step)), 4) for step in (0, 2, 4, 6, 8)]
    [0.001, 0.003, 0.005, 0.003, 0.001]
    """
    for name, value in (("low", low), ("high", high)):
        checks.number("triangular", name, value, "must be at least 0", lambda found: found >= 0)
    if not checks.is_whole(period, 2):
        raise ValueError(f"triangular: period must be a whole number of steps, at least 2, got {shown(period)}")

    def schedule(step: Any) -> Any:
        place = jnp.asarray(jnp.asarray(step) % period, jnp.float32) / period
        return low + (high - low) * (1 - jnp.abs(2 * place - 1))

    return schedule


def norm_drop(before: PyTree, after: PyTree) -> float:
    """How much of the norm a pruning took: `sqrt(| |w|^2 - |w_p|^2 |) / |w|`, over all floating-point leaves.

    For magnitude pruning of one ranking, `norm_drop / sqrt(fraction)` is at most 1: the smallest p of the weights hold
    at most p of the squares.

    Args:
      before: params; give weights without batch statistics to get the authors' number, which covers all weights,
        biases and normalisation scales.
      after: the same, pruned.

    >>> norm_drop({"w": jnp.array([3.0, 4.0])}, {"w": jnp.array([0.0, 4.0])})
    0.6
    """
    squares = []
    for name, tree in (("before", before), ("after", after)):
        leaves = [x for x in jax.tree.leaves(tree) if jnp.issubdtype(getattr(x, "dtype", bool), jnp.floating)]
        if not leaves:
            raise ValueError(f"norm_drop: {name} must be a tree of weights, got {kind(tree)}")
        squares.append(math.fsum(float(np.sum(np.square(np.asarray(x, np.float64)))) for x in leaves))
    if trees.named_shapes(before) != trees.named_shapes(after):
        raise ValueError("norm_drop: after must be parallel to before, with the same shapes")
    return math.sqrt(abs(squares[0] - squares[1]) / squares[0]) if squares[0] else 0.0


def _run(
    who: str, original: Any, steps: Any, retrain_steps: Any, warmup: Any, *, evaluate: bool = True
) -> tuple[np.ndarray, int]:
    """The dense run's rates after its own warm-up, float32[steps - warmup], and how many steps follow ours."""
    checks.functions(who, original=original)
    for name, value in (("steps", steps), ("retrain_steps", retrain_steps)):
        if not checks.is_whole(value, 1):
            raise ValueError(f"{who}: {name} must be a whole number, at least 1, got {shown(value)}")
    if not checks.is_whole(warmup) or warmup >= steps:
        raise ValueError(f"{who}: warmup must be a number of steps below {steps}, got {shown(warmup)}")
    after = retrain_steps - int(WARM_UP * retrain_steps)
    if not evaluate:
        return np.zeros(0), after
    rates = jax.vmap(lambda step: jnp.asarray(original(step), jnp.float32))(jnp.arange(warmup, steps))
    if rates.shape != (steps - warmup,) or not np.isfinite(rates).all():
        raise ValueError(f"{who}: original must give one finite learning rate a step, got {shown(rates)}")
    return np.asarray(rates), after


def _linear(start: float, n: int, retrain_steps: int) -> optax.Schedule:
    return _warmed([start * (1 - j / n) for j in range(n + 1)], retrain_steps)


def _warmed(values: Sequence[float], retrain_steps: int) -> optax.Schedule:
    """The values from the end of the warm-up on, after half a cosine from 0 to the first."""
    n = int(WARM_UP * retrain_steps)
    ramp = [values[0] * (1 - math.cos(math.pi * s / n)) / 2 for s in range(n)]
    table = np.asarray([*ramp, *values], np.float32)
    return functools.partial(_at, table)


def _at(table: np.ndarray, step: Any) -> Any:
    return jnp.asarray(table)[jnp.clip(jnp.asarray(step, jnp.int32), 0, len(table) - 1)]
