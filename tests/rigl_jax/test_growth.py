"""Growth by the mean gradient of several batches, and what that means under optax.MultiSteps."""

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import rigl_jax as rx
from tests import oracles
from tests.traces import jit_once

KEY = jax.random.key(0)
DRAWN = np.random.default_rng(0).normal(size=(50, 7, 8)).astype(np.float32)  # gradients of w and b
PARAMS = {"w": jax.random.normal(KEY, (6, 8)), "b": jnp.zeros(8)}
PLAN = rx.make_plan(PARAMS, 0.75)


def gradients(step):
    return {"w": DRAWN[step, :6], "b": DRAWN[step, 6]}


def mean(steps):
    return jax.tree.map(lambda *g: sum(g) / len(g), *map(gradients, steps))


def run(algorithm, steps, inner=None, at=gradients):
    tx = rx.sparsify(inner or optax.sgd(0.1), algorithm, key=KEY)
    params, state, history = PARAMS, tx.init(PARAMS), []
    update = jit_once(tx.update)
    params = rx.apply_masks(params, state.masks)
    for step in range(steps):
        updates, state = update(at(step), state, params)
        params = optax.apply_updates(params, updates)
        history.append((params, state))
    return history


@pytest.mark.parametrize("skip_step", [True, False])
def test_the_mean_of_the_window_decides(skip_step):
    """As if the step that rewires had been given the mean to grow by, and its own gradient to train with."""
    options = {"period": 5, "start": 4, "fraction": 0.5, "skip_step": skip_step}
    found = run(rx.accumulate_growth(rx.rigl(PLAN, **options), 3), 10)
    before, plain = found[3], rx.rigl(PLAN, **options)
    masks, params = before[1].masks, before[0]
    trained = params["w"] if skip_step else found_weights(params, masks, gradients(4))
    signals = rx.Signals({**params, "w": trained}, mean([2, 3, 4]), jnp.int32(4), KEY)
    expected = plain.update(plain.init(KEY, PARAMS)._replace(masks=masks), signals).state.masks
    np.testing.assert_array_equal(found[4][1].masks["w"], expected["w"])
    alone = plain.update(plain.init(KEY, PARAMS)._replace(masks=masks), signals._replace(grads=gradients(4)))
    assert bool((alone.state.masks["w"] != expected["w"]).any())


def found_weights(params, masks, grads):
    return params["w"] - 0.1 * jnp.where(masks["w"], grads["w"], 0)


def test_one_batch_is_the_algorithm_itself():
    options = {"period": 3, "fraction": 0.5}
    plain, wrapped = run(rx.rigl(PLAN, **options), 8), run(rx.accumulate_growth(rx.rigl(PLAN, **options), 1), 8)
    for (a, s), (b, t) in zip(plain, wrapped, strict=True):
        chex.assert_trees_all_equal(a, b)
        chex.assert_trees_all_equal(s.masks, t.masks)


def test_only_the_window_is_summed():
    history = run(rx.accumulate_growth(rx.rigl(PLAN, period=5, start=5), 2), 11)
    for step, (_, state) in enumerate(history):
        total, seen = state.algorithm.total, int(state.algorithm.seen)
        assert total["b"] is None
        if step in (4, 9):
            np.testing.assert_allclose(total["w"], gradients(step)["w"], rtol=1e-6)
            assert seen == 1
        else:
            assert not np.asarray(total["w"]).any()
            assert seen == 0


def test_a_window_longer_than_the_period_begins_at_the_last_rewiring():
    history = run(rx.accumulate_growth(rx.rigl(PLAN, period=3), 10), 6)
    assert [int(state.algorithm.seen) for _, state in history] == [0, 1, 2, 0, 1, 2]


def test_when_dense_gradients_are_read():
    algorithm = rx.accumulate_growth(rx.rigl(PLAN, period=10, start=10, stop=20), 4)
    expected = [7, 8, 9, 10, 17, 18, 19, 20]
    assert [step for step in range(40) if algorithm.dense_grads(step)] == expected
    assert np.flatnonzero(algorithm.dense_grads(np.arange(40))).tolist() == expected
    assert [step for step in range(40) if algorithm.due(step)] == [10, 20]


def test_accumulators_are_float32_for_short_gradients():
    params = jax.tree.map(lambda p: p.astype(jnp.bfloat16), PARAMS)
    algorithm = rx.accumulate_growth(rx.rigl(PLAN, period=3, start=3), 3)
    tx = rx.sparsify(optax.sgd(0.1), algorithm, key=KEY)
    state = tx.init(params)
    for step in range(4):
        grads = jax.tree.map(lambda g: g.astype(jnp.bfloat16), gradients(step))
        updates, state = tx.update(grads, state, params, rewire=step == 3)
        params = optax.apply_updates(params, updates)
    assert state.algorithm.total["w"].dtype == jnp.float32
    rx.check_masked(params, state.masks)


def test_a_forced_rewiring_outside_of_a_window_takes_the_gradient_at_hand():
    algorithm = rx.accumulate_growth(rx.rigl(PLAN, period=100, start=50, fraction=0.5), 2)
    plain = rx.rigl(PLAN, period=100, start=50, fraction=0.5)
    forced, expected = (
        tx.update(gradients(0), tx.init(PARAMS), PARAMS, rewire=True)[1].masks
        for tx in (rx.sparsify(optax.sgd(0.1), a, key=KEY) for a in (algorithm, plain))
    )
    chex.assert_trees_all_equal(forced, expected)


def test_snip_over_several_batches():
    state = run(rx.accumulate_growth(rx.snip(PLAN, start=2), 3), 3, inner=optax.set_to_zero())[-1][1]
    score = np.abs(np.asarray(PARAMS["w"]) * np.asarray(mean([0, 1, 2])["w"]))
    np.testing.assert_array_equal(state.masks["w"], oracles.top(score, PLAN["w"].n_active))


@pytest.mark.parametrize("k", [1, 3])
def test_multi_steps_trains_as_with_the_large_batch(k):
    """k calls make one weight update: rewiring every k * period calls by their mean gradient is RigL on big batches."""
    period, stop, steps = 2, 12, 9
    big = rx.rigl(PLAN, period=period, stop=stop, fraction=0.5, skip_step=False)
    small = rx.rigl(PLAN, period=period * k, start=k - 1, stop=stop * k + k - 1, fraction=0.5, skip_step=False)
    expected = run(big, steps, optax.adam(0.1), lambda step: mean(range(step * k, step * k + k)))
    found = run(rx.accumulate_growth(small, k), steps * k, optax.MultiSteps(optax.adam(0.1), k))
    rewired = 0
    for step, (params, state) in enumerate(expected):
        after, now = found[step * k + k - 1]
        chex.assert_trees_all_equal(now.masks, state.masks)
        chex.assert_trees_all_close(after, params, atol=1e-5)
        rewired += step > 0 and bool((state.masks["w"] != expected[step - 1][1].masks["w"]).any())
    assert rewired > 1
    for params, state in found:
        rx.check_masked(params, state.masks)


def test_multi_steps_with_a_skipped_step_updates_weights_a_call_later():
    algorithm = rx.rigl(PLAN, period=100, start=1, fraction=0.5)
    history = run(rx.accumulate_growth(algorithm, 2), 5, optax.MultiSteps(optax.sgd(0.1), 2))
    assert [int(state.inner.mini_step) for _, state in history] == [1, 1, 0, 1, 0]
    for params, state in history:
        rx.check_masked(params, state.masks)
        assert not np.asarray(state.inner.acc_grads["w"])[~np.asarray(state.masks["w"])].any()
