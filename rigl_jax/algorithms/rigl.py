"""RigL, its control, and SET: drop the smallest weights, grow by gradient or at random."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import optax

from rigl_jax import checks, schedules, scores, topology, trees
from rigl_jax.algorithms import reallocation
from rigl_jax.algorithms.static import MaskState
from rigl_jax.base import Algorithm, Array, LayerPlan, Masks, Plan, PyTree, Rewired, Score, Signals


def rigl(
    plan: Plan,
    *,
    period: int = 100,
    stop: int | None = None,
    fraction: float | optax.Schedule = 0.3,
    start: int = 0,
    include_stop: bool = True,
    skip_step: bool = True,
    count_skipped: bool = True,
    regrow_dropped: bool = True,
    keep_regrown: bool = True,
    grow_values: Score | None = None,
    drop: Score = scores.magnitude,
    grow: Score = scores.gradient,
    two_sided: bool = False,
) -> Algorithm:
    """RigL (Evci et al. 2020, Algorithm 1): every `period` steps drop the smallest |w|, grow the largest |dense
    gradient|.

    In each leaf, with n active weights, K = floor(fraction(step) * n) are dropped; then the K inactive ones with the
    largest |g| are grown, at zero. Counts never change. Ties go to the lower index. Training FLOPs a step:
    (3 f_S (period - 1) + 2 f_S + f_D) / period, for the dense gradient is read on rewirings only; with
    `count_skipped=False` it is appendix H of the paper, (3 f_S period + 2 f_S + f_D) / (period + 1).

    Defaults are the paper's, but for `start` and `include_stop`, which are those of the authors' code (TensorFlow 1).
    Where that or others differ, there is an option:

    Args:
      plan: from `make_plan`.
      period: steps between rewirings (delta T).
      stop: last step that may rewire (T_end); the paper takes three quarters of training. None: never stops. Steps
        are counted from `start`: `period=10, stop=6` rewires at step 0 only.
      fraction: the share of active weights moved (alpha), in [0, 1], annealed by a cosine from `start` on to 0 at
        `stop` (constant without a stop); or any schedule `step -> fraction`. The authors' code divides by stop -
        start without subtracting start, which is the same for start = 0.
      start: first step that rewires. 0 as in the authors' code, before any weight has trained. rigl-torch, SRigL and
        ITOP count a step before they test whether it is due, and their cosine runs from 0 to T_end, not from `start`:
        `start=period - 1, stop=T_end - 1, include_stop=False, fraction=lambda step: cosine(step + 1)`, where
        `cosine = rx.schedules.cosine(0.3, T_end)`. (ITOP has no T_end but the end of training.)
      include_stop: False for "t < T_end", as the paper's Algorithm 1 has it.
      skip_step: a rewiring step changes masks only and trains nothing (paper, TF1, jaxpruner). False trains in that
        step first, as in the authors' TF2 code and ITOP.
      count_skipped: a rewiring counts as a step (paper's Algorithm 1, jaxpruner). False: it does not, as in TF1,
        where the batch is extra: `period` weight updates lie between two rewirings, and `start`, `stop` and
        `fraction` are in weight updates.
      regrow_dropped: a weight just dropped may be grown in the same rewiring (all reference codes). False: only if no
        other inactive weight is left (as in DSR and DeepR).
      keep_regrown: such a weight keeps its value and moments (TF1, jaxpruner, rigl-torch, ITOP). False: it restarts
        from its grow value, as in FreeTickets and MEST.
      grow_values: value of fresh weights, a function of Signals (see `rx.regrow_init`). Default: zero, the best in
        the paper.
      drop: the score whose lowest active weights are dropped. `scores.noisy(scores.magnitude, 1e-5)` is the authors'.
      grow: the score whose highest inactive weights are grown.
      two_sided: drop as the original SET does: the fraction of the smallest positive weights and the same fraction of
        the largest negative weights, each rounded down; `drop` is not used. A weight of 0 counts as positive.

    >>> import rigl_jax as rx
    >>> algorithm = rigl(rx.make_plan({"w": jax.ShapeDtypeStruct((8, 8), "float32")}, 0.5), period=100, stop=300)
    >>> [step for step in range(1000) if algorithm.due(step)]
    [0, 100, 200, 300]
    """
    checks.plan("rigl", plan)
    period, start, stop = checks.steps("rigl", period=period, start=start, stop=stop)
    checks.functions("rigl", drop=drop, grow=grow, grow_values=grow if grow_values is None else grow_values)
    due, clock = schedules.every(period, start=start, stop=stop, include_stop=include_stop), lambda step: step
    fraction_at = fraction_schedule("rigl", fraction, start, stop)
    if not count_skipped:
        if not skip_step:
            raise ValueError("rigl: count_skipped=False needs skip_step=True, got skip_step=False: nothing is skipped")
        due, clock = schedules.uncounted(period, start=start, stop=stop, include_stop=include_stop)

    def init(key: Array, params: PyTree) -> MaskState:
        return MaskState(topology.random_masks(plan, key, params))

    def update(state: MaskState, signals: Signals) -> Rewired:
        share = fraction_at(clock(signals.step))
        if two_sided:
            dropped, n_drop = _both_sides(plan, state.masks, signals.params, share)
            growing = scores.ranked(grow, signals)
            new = topology.rewire_tree(plan, state.masks, dropped, growing, n_drop, regrow_dropped=regrow_dropped)
        else:
            dropping, growing = scores.ranked(drop, signals), scores.ranked(grow, signals)
            new = topology.drop_and_grow(plan, state.masks, dropping, growing, share, regrow_dropped=regrow_dropped)
        fresh = new.fresh if keep_regrown else new.restarted
        return Rewired(MaskState(new.mask), fresh, None if grow_values is None else grow_values(signals))

    return Algorithm(
        init,
        update,
        due,
        dense_grads=due,
        skip_step=skip_step,
        keeps_counts=True,
        plan=plan,
        state=MaskState,
        active_only=True,
    )


def set_(
    plan: Plan,
    *,
    period: int = 100,
    stop: int | None = None,
    fraction: float | optax.Schedule = 0.3,
    skip_step: bool = False,
    grow: Score = scores.random,
    **options: Any,
) -> Algorithm:
    """SET (Mocanu et al. 2018): drop the smallest |w|, grow uniformly at random among inactive positions, at zero.

    As in the RigL paper: RigL with random growth, where weights are trained in rewiring steps too (the authors'
    code skips the training for RigL only). The original rewires at the end of each epoch with a constant fraction of
    0.3, and drops positive and negative weights separately: `period=steps_per_epoch, start=steps_per_epoch - 1,
    two_sided=True, fraction=optax.constant_schedule(0.3)`. Its grown weights start from small random values
    (`grow_values=rx.regrow_init.normal(...)`). Training FLOPs: 3 f_S; no dense gradient is ever read.

    Args:
      plan: from `make_plan`.
      period: steps between rewirings.
      stop: last step that may rewire; None: never stops.
      fraction: as in `rigl`.
      skip_step: as in `rigl`, but False by default.
      grow: the score whose highest inactive weights are grown; it must not need gradients.
      **options: all other options of `rigl`.

    >>> import jax.numpy as jnp
    >>> import rigl_jax as rx
    >>> algorithm = set_(rx.make_plan({"w": jnp.ones((8, 8))}, 0.5), period=10, stop=30)
    >>> [step for step in range(100) if algorithm.due(step)]
    [0, 10, 20, 30]
    """
    algorithm = rigl(plan, period=period, stop=stop, fraction=fraction, skip_step=skip_step, grow=grow, **options)
    return algorithm._replace(dense_grads=schedules.never)


def rigl_inverted(
    plan: Plan,
    *,
    period: int = 100,
    stop: int | None = None,
    fraction: float | optax.Schedule = 0.3,
    **options: Any,
) -> Algorithm:
    """RigL's control experiment: grow the *smallest* |g|. If growth by gradient matters, this must do worse than SET.

    As in the authors' TF2 code, but with the gradient of the training batch. Training FLOPs as `rigl`.

    Args:
      plan: from `make_plan`.
      period: steps between rewirings.
      stop: last step that may rewire; None: never stops.
      fraction: as in `rigl`.
      **options: all other options of `rigl` except `grow`.

    >>> import jax.numpy as jnp
    >>> import rigl_jax as rx
    >>> algorithm = rigl_inverted(rx.make_plan({"w": jnp.ones((8, 8))}, 0.5), period=10, stop=30)
    >>> [step for step in range(100) if algorithm.due(step)]
    [0, 10, 20, 30]
    """
    return rigl(plan, period=period, stop=stop, fraction=fraction, grow=_least_gradient, **options)


def _least_gradient(signals: Signals) -> PyTree:
    return jax.tree.map(lambda g: jnp.where(jnp.isinf(g), jnp.nan, -jnp.abs(g)), signals.grads)  # -inf would be sound


def _both_sides(plan: Plan, masks: Masks, params: PyTree, share: Any) -> tuple[PyTree, dict[str, Array]]:
    """Drop scores, -1 for what goes and 0 for what stays, and how many go: `share` of either sign, nearest to 0."""

    def one(leaf: LayerPlan, mask: Array, p: Array) -> Array:
        value, active = leaf.structure.pool(p), leaf.active(mask)
        dropped, layer = jnp.zeros(value.shape, bool), leaf.layer_axes()
        for side in (active & (value >= 0), active & (value < 0)):
            n = topology.count(share, leaf.count_units(side))
            dropped = dropped | topology.select(-jnp.abs(value), n, axes=layer, among=side)
        return leaf.structure.expand(dropped, leaf.shape)

    dropped = trees.map_sparse(one, plan, masks, params)
    # Of other weights there is no side: they make the leaf unsound.
    scored = trees.map_sparse(
        lambda _, gone, p: jnp.where(jnp.isfinite(p), -gone.astype(jnp.float32), jnp.nan), plan, dropped, params
    )
    return scored, reallocation.n_active(plan, dropped)


def fraction_schedule(who: str, fraction: float | optax.Schedule, start: int, stop: int | None) -> optax.Schedule:
    """A number annealed by a cosine from `start` to `stop`, constant without a stop; a schedule as it is."""
    _, start, stop = checks.steps(who, start=start, stop=stop)
    if callable(fraction):
        return fraction
    expected = "is the share of active weights moved, in [0, 1], or a schedule of it"
    fraction = checks.number(who, "fraction", fraction, expected, lambda share: 0 <= share <= 1)
    if stop is None:
        return optax.constant_schedule(fraction)
    annealed = schedules.cosine(fraction, stop - start)
    return lambda step: annealed(step - start)
