"""STE and DNW: all weights are trained, the network uses the largest."""

from __future__ import annotations

from rigl_jax import checks, schedules, scores, topology
from rigl_jax.algorithms.static import LatentState, all_weights
from rigl_jax.base import Algorithm, Array, Plan, PyTree, Rewired, Score, Signals


def ste(plan: Plan, *, period: int = 1, score: Score = scores.magnitude) -> Algorithm:
    """Straight-through magnitude pruning: the forward pass uses the largest |w|, its gradient trains every weight.

    The params are the dense latent weights: take the loss at `straight_through(params, state.masks)`, and use
    `apply_masks(params, state.masks)` after training. Do not call `apply_masks` before training. A weight that
    becomes larger than an active one replaces it and keeps its value; nothing is reset.

    As in jaxpruner's `SteMagnitudePruning` with a constant sparsity. For a sparsity that rises, see
    `gmp(recover=True)`. Training FLOPs a step: 2 f_S + f_D; memory is that of dense training.

    Args:
      plan: from `make_plan`.
      period: steps between new masks; 1 in the papers. New masks cost a selection over all weights.
      score: the highest are used.

    >>> import jax, jax.numpy as jnp, optax
    >>> import rigl_jax as rx
    >>> params = {"w": jnp.array([[1.0, 0.875]])}
    >>> tx = rx.sparsify(optax.sgd(0.25), ste(rx.make_plan(params, 0.5)), key=jax.random.key(0))
    >>> state = tx.init(params)
    >>> loss = lambda params: rx.straight_through(params, state.masks)["w"].sum() ** 2 / 2
    >>> updates, state = tx.update(jax.grad(loss)(params), state, params)
    >>> optax.apply_updates(params, updates)["w"].tolist()  # both moved by the gradient at [1, 0]
    [[0.75, 0.625]]
    """
    checks.plan("ste", plan)
    period, _, _ = checks.steps("ste", period=period)
    checks.functions("ste", score=score)

    def init(key: Array, params: PyTree) -> LatentState:
        topology.check_fit(plan, params)
        return choose(Signals(params, params, 0, key))

    def choose(signals: Signals) -> LatentState:
        return LatentState(topology.prune_tree(plan, score(signals)))

    def update(state: LatentState, signals: Signals) -> Rewired:
        ranked = score(signals)
        masks = topology.prune_tree(plan, ranked)
        return Rewired(LatentState(topology.hold(plan, topology.sound(plan, ranked), masks, state.masks)))

    return Algorithm(
        init,
        update,
        due=schedules.every(period),
        dense_grads=schedules.always,
        stored=all_weights,
        trained=all_weights,
        plan=plan,
        state=LatentState,
        latent=True,
    )


def dnw(plan: Plan) -> Algorithm:
    """Discovering neural wirings (Wortsman et al. 2019): `ste` with new masks at every step.

    The paper derives the same update from the side of wiring: an edge that is not used gets the gradient it would
    have if it were, so that its weight grows until it replaces one that is. Sparsity per layer, as in the RigL authors'
    `SparseDNWOptimizer`. Training FLOPs a step: 2 f_S + f_D.

    Args:
      plan: from `make_plan`.

    >>> import jax.numpy as jnp
    >>> import rigl_jax as rx
    >>> algorithm = dnw(rx.make_plan({"w": jnp.ones((8, 8))}, 0.5))
    >>> [algorithm.due(step) for step in range(3)]
    [True, True, True]
    """
    return ste(plan, period=1)
