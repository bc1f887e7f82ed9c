"""STE and DNW: dense training of what the network uses the largest of."""

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import rigl_jax as rx
from tests import oracles

KEY = jax.random.key(0)
X = jax.random.normal(jax.random.key(1), (9, 8))
Y = jax.random.normal(jax.random.key(2), (9, 5))
PARAMS = {"w": jax.random.normal(jax.random.key(3), (8, 5))}
PLAN = rx.make_plan(PARAMS, 0.75)


def loss(params, masks):
    return jnp.mean((X @ rx.straight_through(params, masks)["w"] - Y) ** 2)


def run(algorithm, steps, rate=0.5):
    tx = rx.sparsify(optax.sgd(rate), algorithm, key=KEY)
    params, state, history = PARAMS, tx.init(PARAMS), []
    update = jax.jit(lambda s, p: tx.update(jax.grad(loss)(p, s.masks), s, p))
    for _ in range(steps):
        updates, state = update(state, params)
        params = optax.apply_updates(params, updates)
        history.append(jax.device_get((params["w"], state.masks["w"])))
    return history


def test_the_loop_in_numpy():
    """The gradient at the masked weights moves all weights; the next mask is the top of all of them."""
    x, y, w = (np.asarray(v, np.float64) for v in (X, Y, PARAMS["w"]))
    mask = oracles.top(np.abs(w), 10)
    swaps = 0
    for found, found_mask in run(rx.ste(PLAN), 12):
        w = w - 0.5 * 2 / y.size * x.T @ (x @ (w * mask) - y)
        new = oracles.top(np.abs(w), 10)
        swaps += (new & ~mask).sum()
        mask = new
        np.testing.assert_allclose(found, w, atol=1e-5)
        np.testing.assert_array_equal(found_mask, mask)
    assert swaps > 0
    assert (w != 0).all()


def test_worked_example():
    """[1, .9] with one in use and a gradient of 1 on both: sgd of 1/4 keeps the order, and nothing is reset."""
    params = {"w": jnp.array([[1.0, -0.9]])}
    tx = rx.sparsify(optax.sgd(1.0), rx.ste(rx.make_plan(params, 0.5)), key=KEY)
    state = tx.init(params)
    assert state.masks["w"].tolist() == [[True, False]]
    updates, state = tx.update({"w": jnp.array([[0.25, 0.25]])}, state, params)
    params = optax.apply_updates(params, updates)
    np.testing.assert_allclose(params["w"], [[0.75, -1.15]], rtol=1e-6)
    assert state.masks["w"].tolist() == [[False, True]]


def test_masks_hold_for_a_period():
    masks = [mask for _, mask in run(rx.ste(PLAN, period=4), 9, rate=3.0)]
    chex.assert_trees_all_equal(masks[0], masks[3])
    chex.assert_trees_all_equal(masks[4], masks[7])
    assert (masks[3] != masks[4]).any()


def test_dnw_is_ste_at_every_step():
    for (a, m), (b, n) in zip(run(rx.dnw(PLAN), 4), run(rx.ste(PLAN), 4), strict=True):
        np.testing.assert_array_equal(a, b)
        np.testing.assert_array_equal(m, n)


def test_without_sparsity_it_is_dense_training():
    plan = rx.make_plan(PARAMS, 0.0)
    tx, inner = rx.sparsify(optax.adam(0.1), rx.ste(plan), key=KEY), optax.adam(0.1)
    state, dense = tx.init(PARAMS), inner.init(PARAMS)
    params = expected = PARAMS
    for _ in range(3):
        updates, state = tx.update(jax.grad(loss)(params, state.masks), state, params)
        params = optax.apply_updates(params, updates)
        updates, dense = inner.update(jax.grad(loss)(expected, {"w": None}), dense)
        expected = optax.apply_updates(expected, updates)
    chex.assert_trees_all_close(params, expected, atol=1e-6)


def test_it_costs_dense_weight_gradients():
    assert rx.training_cost(rx.ste(PLAN), sparse=0.2, dense=1.0, steps=10) == pytest.approx(1.4)
