"""DeepR: signs for life, exact counts at every step, plain SGD where nothing crosses zero."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import rigl_jax as rx
from rigl_jax.algorithms import deep_r, langevin
from rigl_jax.base import Signals
from tests.errors import refused

W = {"w": jax.random.normal(jax.random.key(0), (6, 8))}
PLAN = rx.make_plan(W, 0.5)


def started(inner):
    tx = rx.sparsify(inner, deep_r(PLAN), key=jax.random.key(1))
    state = jax.jit(tx.init)(W)
    return jax.jit(tx.update), state, rx.apply_masks(W, state.masks)


def test_counts_and_signs_at_every_step():
    update, state, params = started(optax.sgd(0.5))
    signs = np.where(np.asarray(state.algorithm.positive["w"]), 1, -1)
    moved = 0
    for step in range(25):
        grads = {"w": jax.random.normal(jax.random.key(step), (6, 8))}
        before, crossing = np.asarray(state.masks["w"]), np.asarray(params["w"] - 0.5 * grads["w"]) * signs < 0
        updates, state = update(grads, state, params)
        params = optax.apply_updates(params, updates)
        w, mask = np.asarray(params["w"]), np.asarray(state.masks["w"])
        assert mask.sum() == 24
        assert not w[~mask].any()
        assert (w * signs >= 0).all(), "an active weight never has the other sign"
        crossed = before & crossing
        assert not w[crossed].any()
        assert not (mask & crossed).any(), "there are free places, so none comes back at once"
        assert (mask & before)[before & ~crossing].all(), "no other is dropped"
        moved += crossed.sum()
    np.testing.assert_array_equal(np.where(np.asarray(state.algorithm.positive["w"]), 1, -1), signs)
    assert moved > 50


def test_it_is_sgd_on_theta_while_nothing_crosses():
    update, state, params = started(optax.sgd(0.1))
    first, masks = params, state.masks
    for _ in range(3):
        updates, state = update({"w": -jnp.sign(params["w"])}, state, params)  # away from zero
        params = optax.apply_updates(params, updates)
    np.testing.assert_array_equal(state.masks["w"], masks["w"])
    np.testing.assert_allclose(params["w"], first["w"] + 0.3 * jnp.sign(first["w"]), rtol=1e-5)


def test_signs_are_those_of_the_initial_weights_or_random():
    params = {"w": jnp.concatenate([jnp.full((4, 100), -0.1), jnp.zeros((4, 100))])}
    state = jax.jit(deep_r(rx.make_plan(params, 0.5)).init)(jax.random.key(0), params)
    assert not state.positive["w"][:4].any()
    assert 150 < int(state.positive["w"][4:].sum()) < 250


def test_growth_is_uniform_over_what_was_dormant():
    params = {"w": jnp.array([[-1.0] * 4 + [1.0] * 4 + [0.0] * 12])}
    algorithm = deep_r(rx.make_plan(params, 12 / 20))
    masks = {"w": jnp.arange(20)[None] < 8}
    state = algorithm.init(jax.random.key(0), params)._replace(masks=masks, positive={"w": jnp.ones((1, 20), bool)})
    grow = jax.jit(jax.vmap(lambda key: algorithm.update(state, Signals(params, params, 0, key)).state.masks["w"]))
    hits = np.asarray(grow(jax.random.split(jax.random.key(1), 2000)).sum((0, 1)))
    assert not hits[:4].any()
    assert (hits[4:8] == 2000).all()
    chi2 = ((hits[8:] - 2000 / 3) ** 2 / (2000 * 2 / 9)).sum() * 11 / 12
    assert chi2 < 31.3  # 11 degrees of freedom, p = 0.001


def test_the_drift_alone():
    tx = langevin(0.5, l1=0.1, key=jax.random.key(0))
    params = {"w": jnp.array([2.0, -3.0, 0.0])}
    updates, state = tx.update({"w": jnp.ones(3)}, tx.init(params), params)
    np.testing.assert_allclose(updates["w"], [0.95, 1.05, 1.0])
    assert int(state.count) == 1


def test_the_noise_has_the_right_size_and_changes_each_step():
    tx = langevin(optax.constant_schedule(0.5), l1=0.0, temperature=0.04, key=jax.random.key(0))
    params = {"a": jnp.zeros(4000), "b": jnp.zeros(4000)}
    update, state = jax.jit(tx.update), tx.init(params)
    one, state = update(params, state, params)
    two, _ = update(params, state, params)
    for noise in (one["a"], one["b"], two["a"]):
        assert float(noise.std()) == pytest.approx(0.2, rel=0.05)  # sqrt(2 * 0.5 * 0.04)
    assert abs(np.corrcoef(one["a"], one["b"])[0, 1]) < 0.08
    assert abs(np.corrcoef(one["a"], two["a"])[0, 1]) < 0.08


def test_inside_sparsify_noise_rewires_but_never_revives():
    update, state, params = started(optax.chain(optax.sgd(0.1), langevin(0.1, temperature=1.0, key=jax.random.key(5))))
    first = state.masks
    for _ in range(4):
        updates, state = update({"w": jnp.zeros((6, 8))}, state, params)
        params = optax.apply_updates(params, updates)
        rx.check_masked(params, state.masks)
        assert int(state.masks["w"].sum()) == 24
    assert (first["w"] != state.masks["w"]).any()


def test_langevin_needs_params():
    with refused("params"):
        langevin(0.1, key=jax.random.key(0)).update({}, None)
