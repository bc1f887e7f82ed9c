"""DeepR, deep rewiring: every weight has a fixed sign, and becomes inactive when it would cross zero."""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp
import optax

from rigl_jax import checks, schedules, scores, topology, trees
from rigl_jax.base import Algorithm, Array, LayerPlan, Masks, Plan, PyTree, Rewired, Signals


class DeepRState(NamedTuple):
    """Masks, and the sign of each position (True: positive), which never changes."""

    masks: Masks
    positive: Masks


def deep_r(plan: Plan, *, start: int = 0, stop: int | None = None) -> Algorithm:
    """Deep rewiring (Bellec et al. 2018): a weight whose update takes it across zero is replaced at random.

    Weights are s theta with a fixed random sign s and theta > 0. After every step, those with theta < 0 become dormant
    and as many dormant positions of the leaf, drawn uniformly, become active at theta = 0: counts never change. Signs
    are those of the initial weights, random where these are 0.

    The paper's gradient step has an L1 drift and Gaussian noise on theta, which decide how much is rewired: chain
    `langevin` into the inner optimizer, after it.

        inner = optax.chain(optax.sgd(0.5), langevin(0.5, l1=1e-5, temperature=1e-10, key=key))
        tx = rx.sparsify(inner, rx.algorithms.deep_r(plan), key=key)

    Departures: fresh weights are 0 and not 1e-12; a position that was just dropped is not drawn in the same step unless
    no other is free (as in DSR's version; the authors' code allows it); the drift of a fresh weight starts when it is
    no longer 0. A unit of several weights is dropped when the mean of its theta is negative; single weights in a kept
    unit may have crossed zero.

    Training FLOPs: 3 f_S a step, and a selection every step. No dense gradient is ever read.

    Args:
      plan: from `make_plan`.
      start: first step that rewires.
      stop: last step that rewires; None: never stops.

    >>> import rigl_jax as rx
    >>> plan = rx.make_plan({"w": jax.ShapeDtypeStruct((8, 8), "float32")}, 0.75)
    >>> [step for step in range(1000) if deep_r(plan, start=2, stop=5).due(step)]
    [2, 3, 4, 5]
    """
    checks.plan("deep_r", plan)
    _, start, stop = checks.steps("deep_r", start=start, stop=stop)

    def init(key: Array, params: PyTree) -> DeepRState:
        masks = topology.random_masks(plan, key, params)

        def sign(leaf: LayerPlan, p: Array) -> Array:
            out = trees.explicit_sharding(p)
            half = jnp.float32(0.5)  # its type is that of the draws, which so do not depend on `jax_enable_x64`
            drawn = jax.random.bernoulli(trees.leaf_key(key, f"sign:{leaf.name}"), half, p.shape, out_sharding=out)
            return jnp.where(p == 0, drawn, p > 0)

        return DeepRState(masks, trees.map_sparse(sign, plan, params))

    def update(state: DeepRState, signals: Signals) -> Rewired:
        theta = trees.map_masked(_theta, state.positive, signals.params)
        active, signed = trees.named_leaves(state.masks), trees.named_leaves(theta)
        n_drop = {name: _crossed(leaf, active[name], signed[name]) for name, leaf in plan.items()}
        new = topology.rewire_tree(plan, state.masks, theta, scores.Draws(signals.key), n_drop, regrow_dropped=False)
        return Rewired(state._replace(masks=new.mask), new.restarted)

    due = schedules.every(1, start=start, stop=stop)
    return Algorithm(
        init,
        update,
        due,
        dense_grads=schedules.never,
        keeps_counts=True,
        plan=plan,
        state=DeepRState,
        active_only=True,
    )


def _theta(positive: Array, p: Array) -> Array:
    return jnp.where(jnp.isinf(p), jnp.nan, jnp.where(positive, p, -p))  # minus infinity would be dropped first


def _crossed(leaf: LayerPlan, mask: Array, theta: Array) -> Array:
    active = leaf.active(mask)
    return leaf.count_units(active & (leaf.structure.pool(theta) < 0))


class LangevinState(NamedTuple):
    """Steps so far (int32 scalar), and the data of the key they fold into (uint32)."""

    count: Array
    key: Array


def langevin(
    learning_rate: float | optax.Schedule,
    *,
    l1: float = 1e-5,
    temperature: float | optax.Schedule = 0.0,
    key: Array,
) -> optax.GradientTransformation:
    """DeepR's drift and noise: adds `-learning_rate * l1 * sign(w) + sqrt(2 * learning_rate * temperature) * normal`.

    It acts on updates, so it comes after the optimizer in `optax.chain`, inside `sparsify`, which masks its noise. It
    acts on all params: `optax.masked` keeps it off biases. The authors' MNIST script has l1 = 1e-5 and noise of
    standard deviation learning_rate * 1e-5, which is a temperature of learning_rate * 5e-11.

    Args:
      learning_rate: the inner optimizer's, a number or a schedule.
      l1: the coefficient alpha of the L1 drift, at least 0.
      temperature: T, at least 0, a number or a schedule (the paper decreases it).
      key: typed PRNG key; it is copied.

    Raises:
      ValueError: a negative l1 or temperature (its root would be NaN), or an invalid key.

    >>> import jax.numpy as jnp
    >>> tx = langevin(0.5, l1=0.5, key=jax.random.key(0))
    >>> params = {"w": jnp.array([2.0, -2.0])}
    >>> updates, _ = tx.update({"w": jnp.zeros(2)}, tx.init(params), params)
    >>> updates["w"].tolist()
    [-0.25, 0.25]
    """
    for name, value in (("l1", l1), ("temperature", temperature)):
        if not callable(value) and not isinstance(value, jax.Array):
            checks.number("langevin", name, value, "must be at least 0", lambda found: found >= 0)
    if not callable(learning_rate) and not isinstance(learning_rate, jax.Array):
        checks.number("langevin", "learning_rate", learning_rate, "must be a number or a schedule", lambda found: True)
    key = checks.key("langevin", key)

    def init(params: PyTree) -> LangevinState:
        del params
        return LangevinState(jnp.zeros((), jnp.int32), trees.stored_key(key))

    def update(updates: PyTree, state: LangevinState, params: PyTree | None = None) -> tuple[PyTree, LangevinState]:
        if params is None:
            raise ValueError("langevin: update needs the params: tx.update(updates, state, params)")
        rate = learning_rate(state.count) if callable(learning_rate) else learning_rate
        heat = temperature(state.count) if callable(temperature) else temperature
        now = jax.random.fold_in(trees.typed_key(state.key, key), state.count)
        scale = jnp.sqrt(2.0 * jnp.asarray(rate, jnp.float32) * heat)

        def one(name: str, u: Array, p: Array) -> Array:
            noise = scale.astype(u.dtype) * jax.random.normal(trees.leaf_key(now, name), u.shape, u.dtype)
            return u - jnp.asarray(rate * l1, u.dtype) * jnp.sign(p).astype(u.dtype) + noise

        return jax.tree.map(one, trees.names(updates), updates, params), state._replace(count=state.count + 1)

    return optax.GradientTransformation(init, update)  # pyrefly: ignore[bad-argument-type]
