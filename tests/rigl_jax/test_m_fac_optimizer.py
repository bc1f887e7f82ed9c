"""The optimizer M-FAC against the dense inverse of the Fisher matrix of its window, dense and sparse."""

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import rigl_jax as rx
from tests.errors import refused

RNG = np.random.default_rng(0)
GRADS = RNG.normal(size=(9, 10))
DAMPING, M = 1e-2, 4
KEY = jax.random.key(0)


def tree(flat):
    return {"b": jnp.asarray(flat[6:]), "a": jnp.asarray(flat[:6].reshape(2, 3))}


def flat(tree):
    return np.concatenate([np.ravel(tree["a"]), np.ravel(tree["b"])])


def dense_step(grads):
    """-F^-1 g of the last gradient, with the Fisher matrix of the last M; those before the first are 0."""
    window = grads[-M:]
    return -np.linalg.solve(window.T @ window / M + DAMPING * np.eye(10), grads[-1])


def steps(tx, grads, params):
    state, found = tx.init(params), []
    for g in grads:
        updates, state = jax.jit(tx.update)(tree(g), state, params)
        found.append(flat(updates))
    return found, state


@pytest.mark.parametrize(("wide", "rtol"), [(True, 1e-9), (False, 1e-3)])
def test_steps_are_those_of_the_dense_inverse_of_the_window(wide, rtol):
    with jax.enable_x64(wide):
        found, state = steps(rx.m_fac_optimizer(1.0, M, DAMPING), GRADS, tree(np.ones(10)))
        for k, step in enumerate(found):
            np.testing.assert_allclose(step, dense_step(GRADS[: k + 1]), rtol=rtol, atol=rtol)
        np.testing.assert_allclose(found[0], -GRADS[0] / (DAMPING + np.sum(GRADS[0] ** 2) / M), rtol=1e-5)
        assert state[0].gradients.shape == (M, 10)


def test_decay_enters_the_window_and_momentum_averages_the_steps():
    with jax.enable_x64(True):
        params = tree(RNG.normal(size=10))
        found, _ = steps(rx.m_fac_optimizer(0.1, M, DAMPING, b1=0.9, weight_decay=0.3), GRADS, params)
        decayed, average = GRADS + 0.3 * flat(params), np.zeros(10)
        for k, step in enumerate(found):
            average = 0.9 * average + 0.1 * dense_step(decayed[: k + 1])
            np.testing.assert_allclose(step, 0.1 * average, rtol=1e-8)


def test_with_the_damping_below_the_rounding_of_large_gradients_steps_are_finite():
    found, _ = steps(rx.m_fac_optimizer(1.0, M, 1e-5), 1e4 * np.ones((5, 10), np.float32), tree(np.ones(10)))
    assert np.all(np.isfinite(found))


def test_sparse_is_the_dense_run_on_the_active_weights():
    with jax.enable_x64(True):
        mask = np.arange(10) % 3 > 0
        params = rx.apply_masks(tree(np.ones(10)), tree(mask))
        plan = rx.make_plan(params, 0.5, rules=[(".*", rx.unstructured())])
        tx = rx.sparsify(rx.m_fac_optimizer(1.0, M, DAMPING), rx.static(plan, tree(mask)), key=KEY)
        found, _ = steps(tx, GRADS, params)
        for k, step in enumerate(found):
            np.testing.assert_allclose(step, dense_step(GRADS[: k + 1] * mask), rtol=1e-8)
        narrow = rx.m_fac_optimizer(1.0, M, DAMPING, masks=tree(mask) | {"b": None})
        held = mask | (np.arange(10) >= 6)  # a leaf without masks is dense
        alone, state = steps(narrow, GRADS, tree(np.where(held, 1.0, 0.0)))
        assert state[0].gradients.shape == (M, held.sum())
        for k, step in enumerate(alone):
            np.testing.assert_allclose(step, dense_step(GRADS[: k + 1] * held), rtol=1e-8)
        inside = rx.sparsify(
            rx.m_fac_optimizer(1.0, M, DAMPING, masks=tree(mask)), rx.static(plan, tree(mask)), key=KEY
        )
        for a, b in zip(steps(inside, GRADS, params)[0], found, strict=True):
            np.testing.assert_allclose(a, b, rtol=1e-8)
        with refused("masks"):
            rx.m_fac_optimizer(1.0, masks={"c": mask}).init(params)


def test_a_weight_that_is_pruned_takes_its_history_out_of_the_window():
    """As if it had never been there; later it starts anew."""
    with jax.enable_x64(True):
        tx, mask = rx.m_fac_optimizer(1.0, M, DAMPING), np.arange(10) != 7
        _, state = steps(tx, GRADS[:5], tree(np.ones(10)))
        pruned = tree(np.where(mask, 1.0, 0.0))
        updates, state = jax.jit(tx.update)(tree(GRADS[5] * mask), state, pruned)
        np.testing.assert_allclose(flat(updates), dense_step(GRADS[:6] * mask), rtol=1e-8)
        window = np.asarray(state[0].gradients)
        np.testing.assert_allclose(state[0].gram, window @ window.T, rtol=1e-8)


def test_it_trains_under_rigl():
    x = jax.random.normal(KEY, (64, 8))
    params = {"w": jax.random.normal(jax.random.key(1), (8, 4)) / 3}
    y = x @ rx.apply_masks(params, rx.prune(rx.make_plan(params, 0.75), params).masks)["w"]
    loss = lambda params: jnp.mean((x @ params["w"] - y) ** 2)  # noqa: E731
    plan = rx.make_plan(params, 0.5)
    tx = rx.sparsify(rx.m_fac_optimizer(0.3, 8, 0.3), rx.rigl(plan, period=5, stop=40), key=KEY)
    state = tx.init(params)
    params = start = rx.apply_masks(params, state.masks)

    @jax.jit
    def step(params, state):
        updates, state = tx.update(jax.grad(loss)(params), state, params)
        return optax.apply_updates(params, updates), state

    for _ in range(60):
        params, state = step(params, state)
    rx.check_masked(params, state.masks, plan)
    assert loss(params) < loss(start) / 20
    chex.assert_tree_all_finite(state.inner)
