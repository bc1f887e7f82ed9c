"""AC/DC: its phases, and what happens to weights and moments where they meet."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import rigl_jax as rx
from rigl_jax.base import Signals
from tests import draws, oracles
from tests.traces import jit_once

KEY = jax.random.key(0)
SHAPES = {"a": (8, 10), "b": (10, 2)}


drawn = functools.partial(draws.normal, SHAPES)


PARAMS = jax.device_put(drawn(1000))
PLAN = rx.make_plan(PARAMS, 0.75, rx.uniform)


def run(algorithm, steps):
    tx = rx.sparsify(optax.adam(0.3), algorithm, key=KEY)
    update = jit_once(tx.update)
    params, state, history = PARAMS, tx.init(PARAMS), []
    for step in range(steps):
        updates, state = update(drawn(step), state, params)
        params = optax.apply_updates(params, updates)
        rx.check_masked(params, state.masks)
        history.append(jax.device_get((params, state.masks, state.inner[0].mu)))
    return history


def test_phases():
    """Warm-up of 3, phases of 2, sparse from 10 on; masks are those that the next step runs with."""
    history = run(rx.ac_dc(PLAN, start=3, period=2, stop=10), 14)
    active = [int(masks["a"].sum()) for _, masks, _ in history]
    assert active == [80] * 3 + [20, 20, 80, 80, 20, 20, 80] + [20] * 4
    assert [int(masks["b"].sum()) for _, masks, _ in history][-1] == 5
    for _, masks, _ in history[11:]:
        np.testing.assert_array_equal(masks["a"], history[10][1]["a"])


def test_a_sparse_phase_keeps_the_largest_and_a_dense_one_brings_all_back_from_zero():
    history = run(rx.ac_dc(PLAN, start=1, period=2, stop=9), 6)
    trained = oracles.dense_adam(np.asarray(PARAMS["a"]), [np.asarray(drawn(i)["a"]) for i in range(2)], 0.3)
    mask = oracles.top(np.abs(trained), 20)
    params, masks, _ = history[1]
    np.testing.assert_array_equal(masks["a"], mask)
    np.testing.assert_allclose(params["a"], np.where(mask, trained, 0), atol=1e-5)
    params, masks, moments = history[3]  # the network is dense again; who was pruned starts at 0
    assert masks["a"].all()
    assert not params["a"][~mask].any()
    assert not moments["a"][~mask].any()
    assert moments["a"][mask].all()
    assert history[4][0]["a"][~mask].all()


def test_the_end_comes_on_time_in_a_dense_phase_too():
    due = rx.ac_dc(PLAN, start=0, period=4, stop=6).due
    assert [step for step in range(20) if due(step)] == [0, 4, 6]
    active = [int(masks["a"].sum()) for _, masks, _ in run(rx.ac_dc(PLAN, start=0, period=4, stop=6), 9)]
    assert active == [20] * 4 + [80] * 2 + [20] * 3


def test_pruning_a_sparse_network_again_changes_nothing():
    """Also where an active weight is 0, as all of them may be."""
    algorithm = rx.ac_dc(PLAN, start=0, period=4, stop=6)
    masks = {"a": jnp.arange(80).reshape(8, 10) % 4 == 3, "b": jnp.arange(20).reshape(10, 2) % 4 == 3}
    zeros = jax.tree.map(jnp.zeros_like, PARAMS)
    state = algorithm.init(KEY, PARAMS)._replace(masks=masks)
    after = algorithm.update(state, Signals(zeros, zeros, jnp.int32(6), KEY)).state.masks
    np.testing.assert_array_equal(after["a"], masks["a"])


def test_jointly_keeps_the_total():
    algorithm = rx.ac_dc(PLAN, start=0, period=2, stop=2, jointly=True)
    masks = algorithm.update(algorithm.init(KEY, PARAMS), Signals(PARAMS, PARAMS, jnp.int32(0), KEY)).state.masks
    flat = np.concatenate([np.ravel(np.abs(PARAMS[name])) for name in "ab"])
    np.testing.assert_array_equal(np.concatenate([np.ravel(masks[name]) for name in "ab"]), oracles.top(flat, 25))


def test_it_costs_the_phases():
    algorithm = rx.ac_dc(PLAN, start=0, period=5, stop=5)
    assert rx.training_cost(algorithm, np.repeat([0.2, 1.0], 5), 1.0, 10) == pytest.approx(1.8)
