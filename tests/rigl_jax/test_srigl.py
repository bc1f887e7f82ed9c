"""SRigL against a slow version of its three steps, and its cases by hand."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import rigl_jax as rx
from rigl_jax import structures
from rigl_jax.algorithms import srigl
from rigl_jax.base import Signals
from tests import oracles

FAN_IN = [("w", structures.fan_in())]


def plan_for(shape, k):
    plan = rx.make_plan({"w": jnp.zeros(shape)}, 1 - k / np.prod(shape[:-1]), rx.uniform, rules=FAN_IN)
    assert plan["w"].n_active == k
    return plan


def one_update(algorithm, mask, w, g, step=0):
    params = {"w": jnp.asarray(w, jnp.float32)}
    state = algorithm.init(jax.random.key(0), params)._replace(masks={"w": jnp.asarray(mask, bool)})
    signals = Signals(params, {"w": jnp.asarray(g, jnp.float32)}, jnp.int32(step), jax.random.key(0))
    return np.asarray(jax.jit(algorithm.update)(state, signals).state.masks["w"])


def oracle(mask, w, g, fraction, k, min_salient):
    """Neurons are columns. Inactive weights are 0."""
    w, g, inputs, neurons = np.abs(w), np.abs(g), w.shape[0], w.shape[1]
    n, total = int(mask.sum()), k * neurons
    n_drop = int(np.float32(fraction) * n)
    kept = oracles.top(w, n - n_drop, mask)
    salient = (kept | oracles.top(g, n_drop, ~kept)).sum(0)
    fewest = -(-total // inputs)
    alive = (salient >= max(1, int(min_salient * k))) | oracles.top(salient, fewest)
    each = total // int(alive.sum())
    new = np.zeros_like(mask)
    for i in np.flatnonzero(alive):
        survivors = oracles.top(w[:, i], each, kept[:, i])
        new[:, i] = survivors | oracles.top(g[:, i], each - int(survivors.sum()), ~survivors)
    return new


@pytest.mark.parametrize("seed", range(6))
@pytest.mark.parametrize("min_salient", [0.3, 1.0])
def test_it_is_the_slow_version(seed, min_salient):
    rng = np.random.default_rng(seed)
    mask = np.stack([oracles.top(column, 4) for column in rng.random((8, 12))], 1)
    scale = 10.0 ** rng.uniform(-1.5, 1, 8)  # some neurons matter less than others
    w, g = np.where(mask, rng.normal(size=(12, 8)), 0) * scale, rng.normal(size=(12, 8)) * scale
    w, g = w.astype(np.float32), g.astype(np.float32)
    new = one_update(ALGORITHMS[min_salient], mask, w, g)
    np.testing.assert_array_equal(new, oracle(mask, w, g, 0.4, 4, min_salient))
    assert len(set(new.sum(0)[new.any(0)].tolist())) == 1
    again = one_update(ALGORITHMS[min_salient], new, np.where(new, w, 0), g[:, ::-1])  # ablated ones may come back
    np.testing.assert_array_equal(again, oracle(new, np.where(new, w, 0), g[:, ::-1], 0.4, 4, min_salient))


ALGORITHMS = {
    gamma: srigl(plan_for((12, 8), 4), fraction=optax.constant_schedule(0.4), min_salient=gamma) for gamma in (0.3, 1.0)
}


def test_ablation_by_hand():
    # 3 neurons of 4 inputs, fan-in 2. The third neuron's weights and gradients are the smallest of all.
    mask = np.array([[1, 0, 1], [1, 0, 1], [0, 1, 0], [0, 1, 0]], bool)
    w = np.array([[5.0, 0, 0.1], [4, 0, 0.2], [0, 3, 0], [0, 2, 0]])
    g = np.array([[0.0, 6, 0.1], [0, 8, 0.1], [7, 0, 0.1], [9, 0, 0.1]])
    algorithm = srigl(plan_for((4, 3), 2), fraction=optax.constant_schedule(0.34))  # 2 of 6 are dropped
    new = one_update(algorithm, mask, w, g)
    # Its 0.1 and 0.2 go, nothing of it is salient: 6 // 2 = 3 inputs for either of the others.
    assert new.astype(int).tolist() == [[1, 0, 0], [1, 1, 0], [0, 1, 0], [1, 1, 0]]
    kept = srigl(plan_for((4, 3), 2), fraction=optax.constant_schedule(0.34), never_ablate=["w"])
    assert one_update(kept, mask, w, g).sum(0).tolist() == [2, 2, 2]


def test_a_neuron_cut_to_its_fan_in_keeps_the_largest():
    # After the drop of the 4 smallest, the first neuron holds 3 where 2 may stay: 7, 9, 8 in this order.
    mask = np.array([[1, 1, 0, 0], [1, 1, 1, 0], [1, 0, 0, 1], [0, 0, 0, 1], [0, 0, 1, 0]], bool)
    w = np.array([[7.0, 0.1, 0, 0], [9, 6, 0.3, 0], [8, 0, 0, 5], [0, 0, 0, 0.2], [0, 0, 4, 0]])
    mask[0, 1], w[0, 1] = True, 0.1
    g = np.zeros((5, 4))
    algorithm = srigl(plan_for((5, 4), 2), fraction=optax.constant_schedule(0.34), min_salient=0.0)
    new = one_update(algorithm, mask, w, g)
    assert new[:, 0].astype(int).tolist() == [0, 1, 1, 0, 0]
    assert new.sum(0).tolist() == [2, 2, 2, 2]


def test_so_many_neurons_stay_as_hold_all_weights():
    rng = np.random.default_rng(0)
    mask = np.stack([oracles.top(column, 6) for column in rng.random((5, 8))], 1)
    w = np.where(mask, 1.0, 0) * np.array([100.0, 10, 1, 0.1, 0.01])
    algorithm = srigl(plan_for((8, 5), 6), fraction=optax.constant_schedule(0.9), min_salient=1.0)
    new = one_update(algorithm, mask, w, np.where(mask, 0, 1.0) * np.array([9.0, 8, 7, 6, 5]))
    counts = new.sum(0)
    assert (counts > 0).sum() >= 4, "30 weights need 4 neurons of 8 inputs"
    assert set(counts.tolist()) <= {0, 30 // int((counts > 0).sum())}


def test_convolutions_and_the_optimizer():
    scale = 10.0 ** jnp.arange(-3.0, 3.0).reshape(1, 1, 1, 6)
    params = {"w": jax.random.normal(jax.random.key(0), (3, 3, 4, 6)) * scale}
    plan = rx.make_plan(params, 0.75, rx.uniform, rules=FAN_IN)
    tx = rx.sparsify(optax.adam(0.1), srigl(plan, period=1, min_salient=0.9), key=jax.random.key(1))
    update, state = jax.jit(tx.update), tx.init(params)
    params = rx.apply_masks(params, state.masks)
    for step in range(6):
        grads = {"w": jax.random.normal(jax.random.key(step), (3, 3, 4, 6)) * scale}
        updates, state = update(grads, state, params)
        params = optax.apply_updates(params, updates)
        rx.check_masked(params, state.masks)
        counts = np.asarray(state.masks["w"].sum((0, 1, 2)))
        live = counts[counts > 0]
        assert set(live.tolist()) == {54 // len(live)}
    assert len(live) < 6, "neurons whose weights are a million times smaller are given up"


def test_unstructured_leaves_are_rigl():
    rng = np.random.default_rng(3)
    mask = oracles.top(rng.random((8, 12)), 40)
    w, g = np.where(mask, rng.normal(size=(8, 12)), 0).astype(np.float32), rng.normal(size=(8, 12)).astype(np.float32)
    plan = rx.make_plan({"w": jnp.zeros((8, 12))}, 1 - 40 / 96)
    new = one_update(srigl(plan, fraction=optax.constant_schedule(0.3)), mask, w, g)
    np.testing.assert_array_equal(new, oracles.drop_and_grow(mask, np.abs(w), np.abs(g), int(np.float32(0.3) * 40)))


def test_one_name_is_a_list_of_one():
    plan = rx.make_plan({"head": jnp.zeros((8, 5))}, 0.5, rules=[("head", structures.fan_in())])
    assert srigl(plan, never_ablate="head").skip_step


def test_a_rewiring_trains_nothing_unless_asked_to():
    params = {"w": jnp.arange(1.0, 33.0).reshape(8, 4), "b": jnp.ones(4)}
    plan = rx.make_plan(params, 0.5, rx.uniform, rules=[("w", structures.fan_in()), ("b", None)])
    for skip_step in (True, False):
        tx = rx.sparsify(optax.sgd(0.1), srigl(plan, skip_step=skip_step), key=jax.random.key(0))
        updates, _ = jax.jit(tx.update, static_argnames="rewire")(params, tx.init(params), params, rewire=True)
        assert bool((updates["b"] == 0).all()) == skip_step


@pytest.mark.parametrize(
    ("gamma", "k", "threshold"), [(0.3, 4, 1), (0.3, 10, 3), (0.49, 4, 1), (0.5, 4, 2), (0.95, 20, 19)]
)
def test_the_threshold_is_that_of_the_authors(gamma, k, threshold):
    """max(1, int(gamma k)): of two neurons one has just so many salient weights, another one fewer."""
    algorithm = srigl(plan_for((3 * k, 3), k), fraction=optax.constant_schedule(0.0), min_salient=gamma)
    active = np.zeros((3 * k, 3), bool)
    for neuron, n in enumerate((threshold, threshold - 1, 3 * k - 2 * threshold + 1)):
        active[:n, neuron] = True
    new = one_update(algorithm, active, np.where(active, 1.0, 0.0), np.ones_like(active, float))
    assert np.asarray(new).any(axis=0).tolist() == [True, False, True]
