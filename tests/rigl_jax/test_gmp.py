"""Gradual pruning: the cubic, its exact ends, and frozen and recovering masks."""

import functools

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import rigl_jax as rx
from rigl_jax import schedules
from rigl_jax.base import Signals
from tests import draws, oracles
from tests.traces import jit_once

KEY = jax.random.key(0)
SHAPES = {"a": (8, 10), "b": (10, 4)}


drawn = functools.partial(draws.normal, SHAPES)


PARAMS = jax.device_put(drawn(1000))
PLAN = rx.make_plan(PARAMS, 0.75, rx.uniform)


def run(algorithm, steps, rate=0.3):
    """Params and masks after each step."""
    tx = rx.sparsify(optax.adam(rate), algorithm, key=KEY)
    update = jit_once(tx.update)
    params, state, history = PARAMS, tx.init(PARAMS), []
    for step in range(steps):
        updates, state = update(drawn(step), state, params)
        params = optax.apply_updates(params, updates)
        history.append(jax.device_get((params, state.masks)))
    return history


def counts(masks):
    return {name: int(mask.sum()) for name, mask in masks.items()}


def test_the_cubic():
    s = schedules.cubic(0.2, 0.9, 100, 300)
    assert float(s(100)) == np.float32(0.2)
    assert float(s(0)) == np.float32(0.2)
    assert float(s(300)) == np.float32(0.9)
    assert float(s(10**6)) == np.float32(0.9)
    for step in (150, 200, 250):
        assert float(s(step)) == pytest.approx(0.9 + (0.2 - 0.9) * (1 - (step - 100) / 200) ** 3, rel=1e-6)


@pytest.mark.parametrize("length", [3, 6, 7, 11, 49, 1000])
def test_both_ends_are_exact_compiled_or_not(length):
    """XLA divides by a constant by multiplying with its inverse: 1 - 6 * (1 / 6) is below 0, and its floor is -1."""
    plan = {"w": rx.make_plan({"w": jnp.zeros((8, 5))}, 0.6)["w"]}
    params = {"w": jnp.arange(1.0, 41.0).reshape(8, 5)}
    algorithm = rx.gmp(plan, stop=length, period=1)
    state = algorithm.init(KEY, params)
    for update in (algorithm.update, jax.jit(algorithm.update)):
        ends = [update(state, Signals(params, params, jnp.int32(step), KEY)).state.masks for step in (0, length)]
        assert [int(mask["w"].sum()) for mask in ends] == [40, 16]
    s = schedules.cubic(0.1, 0.7, 5, 5 + length)
    for schedule in (s, jax.jit(s)):
        assert [float(schedule(jnp.int32(step))) for step in (5, 5 + length)] == [np.float32(0.1), np.float32(0.7)]


def test_worked_example():
    """8 weights to 2 in 4 steps: 6 (1 - p)^3 = 6, 2.53, 0.75, 0.09, 0 above the 2 that stay."""
    params = {"w": jnp.arange(1.0, 9.0)[None]}
    algorithm = rx.gmp(rx.make_plan(params, 0.75), period=1, stop=4)
    state, kept = algorithm.init(KEY, params), []
    for step in range(5):
        state = algorithm.update(state, Signals(params, params, jnp.int32(step), KEY)).state
        kept.append(state.masks["w"][0].astype(int).tolist())
    assert [sum(k) for k in kept] == [8, 4, 2, 2, 2]
    assert kept[1] == [0, 0, 0, 0, 1, 1, 1, 1]
    assert kept[4] == [0, 0, 0, 0, 0, 0, 1, 1]


def test_frozen_masks_are_nested_and_end_at_the_plan():
    algorithm = rx.gmp(PLAN, start=2, stop=11, period=2)
    assert [step for step in range(20) if algorithm.due(step)] == [2, 4, 6, 8, 10, 11]
    history = run(algorithm, 14)
    before = jax.tree.map(lambda p: np.ones(p.shape, bool), PARAMS)
    for step, (params, masks) in enumerate(history):
        if step < 3:  # dense until step 2, where the sparsity is still the initial one
            assert all(mask.all() for mask in masks.values())
        chex.assert_trees_all_equal(jax.tree.map(np.logical_and, masks, before), masks)
        rx.check_masked(params, masks)
        before = masks
        share = np.float32((1 - np.clip((step // 2 * 2 - 2) / 9, 0, 1)) ** 3)
        if 2 <= step < 11:
            expected = {n: v.n_active + int(share * np.float32(PARAMS[n].size - v.n_active)) for n, v in PLAN.items()}
            assert counts(masks) == expected
    assert counts(history[11][1]) == {name: leaf.n_active for name, leaf in PLAN.items()}
    chex.assert_trees_all_equal(history[11][1], history[13][1])


def test_an_update_keeps_the_exact_top_of_what_is_left():
    params, masks = PARAMS, {"a": jnp.arange(80).reshape(8, 10) % 2 == 0, "b": jnp.ones((10, 4), bool)}
    algorithm = rx.gmp(PLAN, start=0, stop=10, period=1)
    state = algorithm.init(KEY, params)._replace(masks=masks)
    after = algorithm.update(state, Signals(params, params, jnp.int32(10), KEY)).state.masks
    np.testing.assert_array_equal(after["a"], oracles.top(np.abs(params["a"]), 20, among=masks["a"]))


def test_the_initial_sparsity():
    algorithm = rx.gmp(PLAN, start=3, stop=9, period=3, initial=0.5)
    history = run(algorithm, 10)
    assert counts(history[2][1]) == {"a": 80, "b": 40}
    assert counts(history[3][1]) == {"a": 40, "b": 20}
    assert counts(history[9][1]) == {"a": 20, "b": 10}
    denser = rx.gmp(rx.make_plan(PARAMS, 0.25, rx.uniform), start=0, stop=9, initial=0.5)
    state = denser.update(denser.init(KEY, PARAMS), Signals(PARAMS, PARAMS, jnp.int32(0), KEY)).state
    assert counts(state.masks) == {"a": 60, "b": 30}  # never sparser than the plan


def test_recovering_weights_train_behind_the_mask_and_come_back():
    algorithm = rx.gmp(PLAN, start=0, stop=30, period=2, recover=True)
    history = run(algorithm, 32)
    params, masks = history[-1]
    assert counts(masks) == {name: leaf.n_active for name, leaf in PLAN.items()}
    for name, p in params.items():
        assert (p[~masks[name]] != 0).all()
    back = [(m["a"] & ~b["a"]).any() for (_, m), (_, b) in zip(history[1:], history, strict=False)]
    assert any(back)
    # all weights train with the gradients as they are: dense Adam
    expected = oracles.dense_adam(np.asarray(PARAMS["a"]), [np.asarray(drawn(i)["a"]) for i in range(32)], 0.3)
    np.testing.assert_allclose(params["a"], expected, atol=1e-4)


def test_jointly_keeps_the_total():
    algorithm = rx.gmp(PLAN, start=0, stop=4, period=2, jointly=True)
    history = run(algorithm, 5)
    assert sum(counts(history[4][1]).values()) == 30
    assert counts(history[4][1]) != {name: leaf.n_active for name, leaf in PLAN.items()}
    chex.assert_trees_all_equal(jax.tree.map(np.logical_and, history[4][1], history[2][1]), history[4][1])


def test_training_cost_follows_the_schedule():
    algorithm = rx.gmp(PLAN, start=0, stop=9)
    sparse = np.linspace(1.0, 0.1, 10)
    assert rx.training_cost(algorithm, sparse, 1.0, 10) == pytest.approx(3 * sparse.mean())
    recovering = rx.gmp(PLAN, start=0, stop=9, recover=True)
    assert rx.training_cost(recovering, sparse, 1.0, 10) == pytest.approx(2 * sparse.mean() + 1)
