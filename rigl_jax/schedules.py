"""When to rewire. How much to rewire, learning rates and the like are optax schedules: `step -> value`."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import optax

from rigl_jax import checks
from rigl_jax.messages import kind, shown


@dataclass(frozen=True)  # not a NamedTuple: `jax.jit` refers weakly to what it compiles
class Every:
    """True at `start`, `start + period`, ... up to `last` (None: without end). Made by `every`."""

    period: int
    start: int
    last: int | None

    def __call__(self, step: Any) -> Any:
        """Whether the step is due: an int is answered with a bool, an array or tracer elementwise.

        Raises:
          ValueError: for anything else, say a whole state.
        """
        if not isinstance(step, int) and not hasattr(step, "dtype"):
            raise ValueError(f"due: step must be an int or an array of them, got {kind(step)}")
        fires = (step >= self.start) & ((step - self.start) % self.period == 0)
        return fires if self.last is None else fires & (step <= self.last)

    def before(self, steps: int) -> int:
        """How many of the steps 0 ... steps - 1 are due.

        >>> every(100, stop=200).before(1000)
        3
        """
        last = steps - 1 if self.last is None else min(self.last, steps - 1)
        return max(0, (last - self.start) // self.period + 1)


def every(period: int, *, start: int = 0, stop: int | None = None, include_stop: bool = True) -> Every:
    """`due(step)`: true at start, start + period, ... up to `stop`.

    Args:
      period: steps between two rewirings, at least 1. The paper's delta T.
      start: the first step that is due. 0, as in the authors' code, rewires before any weight was trained. Most PyTorch
        ports count a step before they ask whether it is due, so that `start=period - 1, stop=T_end - 1,
        include_stop=False` is theirs.
      stop: the last step that may be due (T_end), or None for no end.
      include_stop: whether `stop` itself may be due. The authors' code includes it (with a cosine fraction nothing
        moves then, but the step is skipped); the paper's Algorithm 1 writes t < T_end.

    Returns:
      A function of an int (which answers with a bool) or of an array or tracer (elementwise).

    Raises:
      ValueError: for a period below 1, a negative start, or a stop before the start.

    >>> due = every(100, stop=200)
    >>> [step for step in range(400) if due(step)]
    [0, 100, 200]
    """
    period, start, stop = checks.steps("every", period=period, start=start, stop=stop)

    return Every(period, start, stop if stop is None or include_stop else stop - 1)


def every_and_last(period: int, *, start: int = 0, stop: int) -> Callable[[Any], Any]:
    """`every`, and at `stop` too where that is no multiple of the period: for methods that end exactly there.

    >>> due = every_and_last(100, stop=250)
    >>> [step for step in range(400) if due(step)]
    [0, 100, 200, 250]
    """
    due, stop = every(period, start=start, stop=stop), checks.plain(stop)
    return lambda step: due(step) | (step == stop)


def uncounted(
    period: int, *, start: int = 0, stop: int | None = None, include_stop: bool = True
) -> tuple[Callable[[Any], Any], Callable[[Any], Any]]:
    """`every` for a loop in which a rewiring does not count as a step, as in the authors' TF1 code.

    There a rewiring uses up a batch, but the global step stands still. Seen from the calls, which are what we count,
    rewirings are period + 1 apart.

    Returns:
      `(due, clock)`: `due(call)` as in `every`, and `clock(call)`, the weight updates made before that call.

    >>> due, clock = uncounted(100, stop=200)
    >>> [(call, clock(call)) for call in range(400) if due(call)]
    [(0, 0), (101, 100), (202, 200)]
    """
    period, start, stop = checks.steps("uncounted", period=period, start=start, stop=stop)
    if stop is not None and not checks.is_whole(stop):
        raise ValueError(f"uncounted: stop must be a whole step, got {shown(stop)}")
    rewirings = None if stop is None else max(0, (stop - (not include_stop) - start) // period + 1)
    last = None if rewirings is None else start + (rewirings - 1) * (period + 1)
    if rewirings == 0:
        return never, lambda call: call
    due = every(period + 1, start=start, stop=last)

    def clock(call: Any) -> Any:
        before = (call - start + period) // (period + 1)  # rewirings before this call
        if rewirings is not None:
            before = jnp.minimum(before, rewirings) if isinstance(call, jax.Array) else min(before, rewirings)
        return call - (call > start) * before

    return due, clock


def never(step: Any) -> Any:
    """The schedule of a method that does not rewire."""
    return step < 0


def always(step: Any) -> Any:
    """The schedule of a method that acts on every step."""
    return step >= 0


def _float(step: Any) -> Any:
    """The step, float32 where it is an array: under strict promotion an integer array takes no part in other sums."""
    return step.astype(jnp.float32) if isinstance(step, jax.Array) else step


def _of_floats(schedule: optax.Schedule) -> optax.Schedule:
    return lambda step: schedule(_float(step))


def cosine(fraction: float, stop: int | None) -> optax.Schedule:
    """Drop fraction of the paper: `fraction / 2 * (1 + cos(pi * step / stop))`; constant where there is no stop.

    >>> round(float(cosine(0.3, 1000)(500)), 6)
    0.15
    """
    fraction = checks.number("cosine", "fraction", fraction, "must be in [0, 1]", lambda f: 0 <= f <= 1)
    if stop is None or stop == 0:
        return optax.constant_schedule(fraction)
    stop = checks.plain(stop)
    checks.number("cosine", "stop", stop, "must be a step, 0 or later, or None", lambda found: found > 0)
    return _of_floats(optax.cosine_decay_schedule(fraction, stop))


def inverse_power(fraction: float, stop: int, power: float = 1.0) -> optax.Schedule:
    """Drop fraction `fraction * (1 - step / stop) ** power` (appendix G of the paper), 0 from `stop` on."""
    fraction = checks.number("inverse_power", "fraction", fraction, "must be in [0, 1]", lambda f: 0 <= f <= 1)
    power = checks.number("inverse_power", "power", power, "must be above 0", lambda found: found > 0)
    if not checks.is_whole(stop, 1):
        raise ValueError(f"inverse_power: stop must be a step, 1 or later, got {shown(stop)}")
    return _of_floats(optax.polynomial_schedule(fraction, 0.0, power, int(stop)))


def cubic(initial: float, final: float, start: int, stop: int) -> optax.Schedule:
    """Sparsity of gradual pruning (Zhu & Gupta 2017): `final + (initial - final) * (1 - p) ** 3`.

    p runs from 0 at `start` to 1 at `stop`, and stays there on both sides. Both ends are exact. Peers let p run from
    (step + 1) or never evaluate p = 1, and so end short of the target.

    Raises:
      ValueError: for a stop that is not after the start.

    >>> [round(float(cubic(0.0, 0.8, 100, 200)(step)), 6) for step in (0, 100, 150, 200, 300)]
    [0.0, 0.0, 0.7, 0.8, 0.8]
    """
    for name, value in (("initial", initial), ("final", final)):
        checks.number("cubic", name, value, "is a sparsity, in [0, 1]", lambda found: 0 <= found <= 1)
    checks.number("cubic", "start", start, "must be a step", lambda found: True)
    checks.number("cubic", "stop", stop, f"must be after start={start}", lambda found: found > start)
    start, stop = checks.plain(start), checks.plain(stop)

    def schedule(step: Any) -> Any:
        share = jnp.clip((stop - _float(step)) / (stop - start), 0, 1) ** 3
        # Compiled, a division by a constant is a product with its rounded inverse: the ends would be off by a bit.
        between = initial * share + final * (1 - share)
        return jnp.where(step >= stop, final, jnp.where(step <= start, initial, between))

    return schedule


def stretch(schedule: optax.Schedule, factor: float) -> optax.Schedule:
    """The schedule slowed down: what it did at `step` it now does at `factor * step`.

    For RigL_Mx, training M times longer, stretch what has anchors in time, which is the learning rate and the last
    rewiring, but not the period, so that M times as many topologies are tried:
    `rigl(plan, period=100, stop=M * 25_000)` with `optax.sgd(stretch(learning_rate, M))`. A drop fraction given as a
    number follows `stop` by itself; one given as a schedule is stretched like the learning rate.

    >>> warmed = stretch(optax.linear_schedule(0.0, 1.0, 10), 5)
    >>> [float(warmed(step)) for step in (0, 25, 50)]
    [0.0, 0.5, 1.0]
    """
    checks.functions("stretch", schedule=schedule)
    factor = checks.number("stretch", "factor", factor, "must be above 0", lambda found: found > 0)

    def slow(step: Any) -> Any:
        step = _float(step)
        position = step / factor
        whole = jnp.round(position)
        # Compiled, the division is a product with a rounded inverse, and an anchor could come a step late.
        return schedule(jnp.where(whole * factor == step, whole, position))

    return slow
