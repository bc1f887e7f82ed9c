"""SRigL: RigL with a constant fan-in, which can remove whole neurons."""

from __future__ import annotations

from collections.abc import Sequence

import optax

from rigl_jax import checks, schedules, scores, topology, trees
from rigl_jax.algorithms.rigl import fraction_schedule
from rigl_jax.algorithms.static import MaskState
from rigl_jax.base import Algorithm, Array, LayerPlan, Plan, PyTree, Rewired, Score, Signals
from rigl_jax.messages import shown
from rigl_jax.topology.together import Selections


def srigl(
    plan: Plan,
    *,
    period: int = 100,
    stop: int | None = None,
    fraction: float | optax.Schedule = 0.3,
    start: int = 0,
    min_salient: float = 0.3,
    skip_step: bool = True,
    never_ablate: Sequence[str] = (),
    drop: Score = scores.magnitude,
    grow: Score = scores.gradient,
) -> Algorithm:
    """SRigL (Lasby et al. 2024): neurons have equal numbers of inputs, and those with few salient weights are removed.

    Plan leaves with `rx.structures.fan_in()`. Of N weights in a leaf (in a stack, in each layer), at each rewiring:

    1. The salient weights are those RigL would have: the N - K largest |w|, and the K largest |g| among the others.
    2. A neuron with fewer salient weights than max(1, int(`min_salient` times its fan-in)) is ablated: it loses all its
       inputs. The others share them: fan-in k = N // (neurons left). Enough neurons stay for k to be possible: those
       with the most salient weights. Ablated neurons are considered again in each rewiring.
    3. Each neuron left keeps its largest weights among those N - K, at most k, and grows to k by |g|.

    To reduce a neuron to k weights, the authors' code sorts a boolean mask, so that arbitrary weights survive; here the
    largest survive. While neurons are ablated, N - k * (neurons left) weights cannot be placed; these are fewer than
    the neurons left. The gradient is the mean over replicas and then |.|; the authors take the mean of |.|.

    With a structure of one group (unstructured, blocks, channels) nothing can be ablated and this is RigL; N:M keeps
    all its groups. Training FLOPs as `rigl`, without the additional saving by dead neurons.

    Args:
      plan: from `make_plan`.
      period: steps between rewirings.
      stop: last step that may rewire; None: never stops.
      fraction: the share of active weights moved, in [0, 1], annealed by a cosine; or a schedule.
      start: first step that rewires. The authors' code: `start=period - 1, stop=T_end - 1`, as `rigl` explains.
      min_salient: gamma, the share of the plan's fan-in that must be salient, in [0, 1], and at least 1 weight.
        0.3 in the paper for convolutional networks, 0.95 for vision transformers. 0 ablates only neurons without any.
      skip_step: a rewiring step trains nothing, as in `rigl` and in the authors' code.
      never_ablate: regular expressions; leaves whose whole name matches one keep all neurons. Name the output layer.
      drop: the score whose lowest active weights are dropped.
      grow: the score whose highest inactive weights are grown.

    >>> import jax.numpy as jnp, rigl_jax as rx
    >>> plan = rx.make_plan({"w": jnp.zeros((8, 8))}, 0.75, rules=[("w", rx.structures.fan_in())])
    >>> [step for step in range(1000) if srigl(plan, period=100, stop=300).due(step)]
    [0, 100, 200, 300]
    """
    checks.plan("srigl", plan)
    period, start, stop = checks.steps("srigl", period=period, start=start, stop=stop)
    checks.functions("srigl", drop=drop, grow=grow)
    expected = "is a share of the fan-in, in [0, 1]"
    min_salient = checks.number("srigl", "min_salient", min_salient, expected, lambda share: 0 <= share <= 1)
    fraction_at = fraction_schedule("srigl", fraction, start, stop)
    if isinstance(never_ablate, str):
        never_ablate = [never_ablate]
    if not isinstance(never_ablate, Sequence) or not all(isinstance(pattern, str) for pattern in never_ablate):
        raise ValueError(f"srigl: never_ablate must be regular expressions, got {shown(never_ablate)}")
    whole = trees.first_match("srigl: never_ablate", [(pattern, True) for pattern in never_ablate], list(plan))

    def init(key: Array, params: PyTree) -> MaskState:
        return MaskState(topology.random_masks(plan, key, params))

    def update(state: MaskState, signals: Signals) -> Rewired:
        share, weights, gradients = fraction_at(signals.step), drop(signals), grow(signals)

        def one(leaf: LayerPlan, mask: Array, weights: Array, gradients: Array) -> Selections[topology.Rewiring]:
            may_ablate = leaf.structure.sparsity is None and leaf.name not in whole
            least = max(1, int(min_salient * leaf.n_active)) if may_ablate else None
            return topology.rewire_ablating(leaf, mask, weights, gradients, share, least)

        new = topology.rewire_in_turn(plan, one, state.masks, weights, gradients)
        return Rewired(MaskState(new.mask), new.fresh)

    due = schedules.every(period, start=start, stop=stop)
    return Algorithm(
        init, update, due, dense_grads=due, skip_step=skip_step, plan=plan, state=MaskState, active_only=True
    )
