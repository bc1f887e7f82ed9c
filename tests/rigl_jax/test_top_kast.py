"""Top-KAST: two nested sets, what trains, what holds still, and the penalty."""

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import rigl_jax as rx
from rigl_jax.algorithms.top_kast import TopKastState
from tests import oracles
from tests.traces import jit_once

KEY = jax.random.key(0)


def drawn(seed):
    return {"w": np.random.default_rng(seed).normal(size=(8, 10)).astype(np.float32), "b": np.ones(10, np.float32)}


PARAMS = jax.device_put(drawn(1000))
PLAN = rx.make_plan(PARAMS, 0.8)


def test_both_sets_are_tops_of_all_magnitudes_every_period():
    tx = rx.sparsify(optax.adam(0.3), rx.top_kast(PLAN, period=3, extra=0.5), key=KEY)
    params, state = PARAMS, tx.init(PARAMS)
    update = jit_once(tx.update)
    moved = 0
    for step in range(8):
        before, held = state, params["w"]
        updates, state = update(drawn(step), state, params)
        params = optax.apply_updates(params, updates)
        outside = ~np.asarray(before.algorithm.backward["w"])
        np.testing.assert_array_equal(np.asarray(params["w"])[outside], np.asarray(held)[outside])
        assert (np.asarray(params["w"]) != np.asarray(held))[~outside].all()
        assert (np.asarray(params["w"])[outside] != 0).all()
        if step % 3 == 0:
            size = np.abs(params["w"])
            np.testing.assert_array_equal(state.masks["w"], oracles.top(size, 16))
            np.testing.assert_array_equal(state.algorithm.backward["w"], oracles.top(size, 24))
        else:
            chex.assert_trees_all_equal(state.algorithm, before.algorithm)
        moments = np.asarray(state.inner[0].mu["w"])
        assert not moments[~np.asarray(state.algorithm.backward["w"])].any()
        moved += int((state.masks["w"] & ~before.masks["w"]).sum())
    assert moved > 0


def test_worked_example():
    """A = {3}, B = {3, 2}: 2 grows to 4 and is used from the next rewiring on; 1 waits at its value."""
    params = {"w": jnp.array([[3.0, 2.0, 1.0, 0.5]])}
    tx = rx.sparsify(optax.sgd(1.0), rx.top_kast(rx.make_plan(params, 0.75), period=1), key=KEY)
    state = tx.init(params)
    updates, state = tx.update({"w": -jnp.array([[0.0, 2.0, 9.0, 9.0]])}, state, params)
    params = optax.apply_updates(params, updates)
    assert params["w"].tolist() == [[3.0, 4.0, 1.0, 0.5]]
    assert state.masks["w"].tolist() == [[False, True, False, False]]
    assert state.algorithm.backward["w"].tolist() == [[True, True, False, False]]


@pytest.mark.parametrize(("extra", "n_backward"), [(0.0, 16), (1.0, 32), (1.5, 40), (9.0, 80)])
def test_how_many_more_are_trained(extra, n_backward):
    state = rx.top_kast(PLAN, extra=extra).init(KEY, PARAMS)
    assert int(state.masks["w"].sum()) == 16
    assert int(state.backward["w"].sum()) == n_backward
    assert bool((state.backward["w"] | ~state.masks["w"]).all())


def test_the_penalty_against_its_definition():
    state = rx.top_kast(PLAN, extra=0.5).init(KEY, PARAMS)
    w, used, trained = (np.asarray(v, np.float64) for v in (PARAMS["w"], state.masks["w"], state.backward["w"]))
    expected = 0.01 / 2 * ((w**2 * used).sum() + (w**2 * (trained - used)).sum() / 0.2)
    penalty = lambda p: rx.exploration_penalty(p, state, 0.01)  # noqa: E731
    assert float(penalty(PARAMS)) == pytest.approx(expected, rel=1e-5)
    slope = jax.grad(penalty)(PARAMS)
    np.testing.assert_allclose(slope["w"], 0.01 * w * (used + (trained - used) / 0.2), rtol=1e-5)
    assert not np.asarray(slope["b"]).any()
    assert float(rx.exploration_penalty({"b": jnp.ones(3)}, TopKastState({"b": None}, {"b": None}))) == 0


def test_when_and_what_it_costs():
    algorithm = rx.top_kast(PLAN, period=5, start=5, stop=12)
    assert [step for step in range(30) if algorithm.due(step)] == [5, 10]
    assert rx.training_cost(algorithm, sparse=0.2, dense=1.0, steps=10) == pytest.approx(1.4)
