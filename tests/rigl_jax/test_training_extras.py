"""Short floats with masters, averages, surgery, and initialisation: what comes with sparse weights in practice."""

import itertools

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import rigl_jax as rx
from tests.errors import refused
from tests.traces import jit_once

KEY = jax.random.key(0)
DRAWN = np.random.default_rng(0).normal(size=(50, 7, 8)).astype(np.float32)  # gradients of w and b
PARAMS = {"w": jax.random.normal(KEY, (6, 8)), "b": jnp.zeros(8)}
PLAN = rx.make_plan(PARAMS, 0.75)
SHORT = jax.tree.map(lambda p: p.astype(jnp.bfloat16), PARAMS)


def gradients(step, dtype=jnp.float32):
    return {"w": DRAWN[step, :6].astype(dtype), "b": DRAWN[step, 6].astype(dtype)}


def run(tx, params, steps, dtype=jnp.float32, check=lambda params, state: None):
    state, update = tx.init(params), jit_once(tx.update)
    if hasattr(state, "masks"):
        params = rx.apply_masks(params, state.masks)
    for step in range(steps):
        updates, state = update(gradients(step, dtype), state, params)
        params = optax.apply_updates(params, updates)
        check(params, state)
    return params, state


def test_masters_train_as_float32_does():
    """bfloat16 params follow float32 training, to the last bit of their own type."""
    as_f32 = lambda tree: jax.tree.map(lambda p: p.astype(jnp.float32), tree)  # noqa: E731
    inner = optax.adam(1e-3)
    params, state = run(rx.with_masters(inner), SHORT, 40, jnp.bfloat16)
    expected, expected_state = as_f32(SHORT), inner.init(as_f32(SHORT))
    for step in range(40):
        updates, expected_state = inner.update(as_f32(gradients(step, jnp.bfloat16)), expected_state)
        expected = optax.apply_updates(expected, updates)
    chex.assert_trees_all_close(state.masters, expected, atol=1e-6)
    for name, p in params.items():
        assert p.dtype == jnp.bfloat16
        np.testing.assert_array_equal(p, state.masters[name].astype(jnp.bfloat16))


def test_masters_keep_what_short_floats_lose():
    params, grads = {"w": jnp.ones((), jnp.bfloat16)}, {"w": jnp.bfloat16(1.0)}
    moved = {}
    for name, tx in {"with": rx.with_masters(optax.sgd(1e-4)), "without": optax.sgd(1e-4)}.items():
        p, state = params, tx.init(params)
        for _ in range(100):
            updates, state = tx.update(grads, state, p)
            p = optax.apply_updates(p, updates)
        moved[name] = float(p["w"])
    assert moved == {"with": pytest.approx(0.99, abs=0.003), "without": 1.0}


@pytest.mark.parametrize("skip_step", [True, False])
def test_masters_of_pruned_weights_are_exactly_zero_too(skip_step):
    algorithm = rx.rigl(PLAN, period=3, fraction=0.5, skip_step=skip_step, keep_regrown=False)
    tx = rx.sparsify(rx.with_masters(optax.adamw(0.1)), algorithm, key=KEY)

    def check(params, state):
        rx.check_masked(params, state.masks)
        master = np.asarray(state.inner.masters["w"])
        assert master.dtype == np.float32
        assert not master[~np.asarray(state.masks["w"])].any()

    run(tx, SHORT, 8, jnp.bfloat16, check)


def test_masters_follow_values_that_others_set():
    """Grown at 0.5 and then trained with a gradient of 0: a fresh weight stays where it was put."""
    grow_values = lambda signals: jax.tree.map(lambda p: jnp.full_like(p, 0.5), signals.params)  # noqa: E731
    algorithm = rx.rigl(PLAN, period=100, fraction=0.5, grow_values=grow_values)
    tx = rx.sparsify(rx.with_masters(optax.sgd(0.1)), algorithm, key=KEY)
    state = tx.init(SHORT)
    before, params = state.masks["w"], rx.apply_masks(SHORT, state.masks)
    updates, state = tx.update(gradients(0, jnp.bfloat16), state, params, rewire=True)
    params = optax.apply_updates(params, updates)
    fresh = np.asarray(state.masks["w"] & ~before)
    assert fresh.any()
    assert (np.asarray(params["w"], np.float32)[fresh] == 0.5).all()
    updates, state = tx.update(jax.tree.map(jnp.zeros_like, params), state, params, rewire=False)
    params = optax.apply_updates(params, updates)
    assert (np.asarray(params["w"], np.float32)[fresh] == 0.5).all()


def test_masters_need_params():
    tx = rx.with_masters(optax.sgd(0.1))
    with refused("params"):
        tx.update(PARAMS, tx.init(PARAMS))


def test_an_average_stays_as_sparse_as_the_weights():
    algorithm = rx.rigl(PLAN, period=2, fraction=0.5)
    tx = rx.sparsify(optax.adam(0.1), algorithm, key=KEY)
    state = tx.init(PARAMS)
    params = average = plain = rx.apply_masks(PARAMS, state.masks)
    always = np.asarray(state.masks["w"])
    update = jax.jit(tx.update)
    for step in range(12):
        updates, state = update(gradients(step), state, params)
        params = optax.apply_updates(params, updates)
        average = rx.sparse_average(average, params, state.masks, 0.9)
        plain = optax.incremental_update(params, plain, 0.1)
        rx.check_masked(average, state.masks)
        always = always & np.asarray(state.masks["w"])
    assert int((plain["w"] != 0).sum()) > PLAN["w"].n_active  # the plain one fills up
    assert always.any()  # weights that were never dropped are averaged as ever
    np.testing.assert_allclose(np.asarray(average["w"])[always], np.asarray(plain["w"])[always], rtol=1e-5)
    np.testing.assert_allclose(average["b"], plain["b"], rtol=1e-6)


def test_the_average_in_numpy():
    masks = {"w": jnp.array([True, True, False])}
    average = rx.sparse_average({"w": jnp.array([1.0, 0.0, 4.0])}, {"w": jnp.array([3.0, 2.0, 0.0])}, masks, 0.75)
    assert average["w"].tolist() == [1.5, 0.5, 0.0]


def loaded(seed):
    return {"w": jax.random.normal(jax.random.key(seed), (6, 8)), "b": jnp.zeros(8)}


@pytest.mark.parametrize("accumulate", [False, True])
def test_surgery_on_masks(accumulate):
    algorithm = rx.rigl(PLAN, period=4, start=4, fraction=0.5)
    algorithm = rx.accumulate_growth(algorithm, 2) if accumulate else algorithm
    inner = optax.adam(0.1)
    tx = rx.sparsify(inner, algorithm, key=KEY)
    params, state = run(tx, PARAMS, 3)
    old = np.asarray(state.masks["w"])
    new = rx.topology.random_masks(PLAN, jax.random.key(9), PARAMS)
    params, state = rx.replace_masks(inner, state, params, new)
    rx.check_masked(params, new)
    chex.assert_trees_all_equal(state.masks, new)
    kept, born = old & np.asarray(new["w"]), np.asarray(new["w"]) & ~old
    before = np.asarray(state.inner[0].mu["w"])
    assert before[kept].all()
    assert not before[~kept].any()
    assert born.any()
    updates, state = jax.jit(tx.update)(gradients(3), state, params)
    params = optax.apply_updates(params, updates)
    rx.check_masked(params, new)
    now, g = np.asarray(state.inner[0].mu["w"]), np.asarray(gradients(3)["w"])
    assert not now[~np.asarray(new["w"])].any()
    np.testing.assert_allclose(now[born], 0.1 * g[born], rtol=1e-5)
    np.testing.assert_allclose(now[kept], 0.9 * before[kept] + 0.1 * g[kept], rtol=1e-4, atol=1e-6)
    updates, state = jax.jit(tx.update)(gradients(4), state, params)  # and it rewires from there
    params = optax.apply_updates(params, updates)
    rx.check_masked(params, state.masks)
    assert int(state.masks["w"].sum()) == PLAN["w"].n_active


def test_surgery_on_weights():
    tx = rx.sparsify(optax.adam(0.1), rx.static(PLAN), key=KEY)
    _, state = run(tx, PARAMS, 3)
    params = rx.apply_masks(loaded(5), state.masks)
    rx.check_masked(params, state.masks)
    updates, state = tx.update(gradients(3), state, params)
    rx.check_masked(optax.apply_updates(params, updates), state.masks)
    # forgotten apply_masks: the next update puts it right
    updates, state = tx.update(gradients(3), state, loaded(5))
    rx.check_masked(optax.apply_updates(loaded(5), updates), state.masks)


def test_sparse_initialisation_preserves_the_variance():
    """Through three layers at 90 %, outputs keep the variance that they lose without it."""
    widths = (400, 400, 400, 400)
    key = jax.random.key(3)
    params = {
        f"w{i}": jax.random.normal(jax.random.fold_in(key, i), (n, m)) / np.sqrt(n)
        for i, (n, m) in enumerate(itertools.pairwise(widths))
    }
    masks = rx.static(rx.make_plan(params, 0.9, rx.uniform)).init(key, params).masks
    x = jax.random.normal(key, (200, 400))

    def variance(params):
        y = x
        for name in sorted(params):
            y = y @ params[name]
        return float(jnp.var(y))

    assert variance(rx.rescale_init(params, masks)) == pytest.approx(1.0, abs=0.15)
    assert variance(rx.apply_masks(params, masks)) == pytest.approx(1e-3, rel=0.3)


def test_each_unit_is_scaled_by_its_own_fan_in():
    mask = jax.random.uniform(KEY, (3, 3, 4, 6)) < 0.3
    mask = mask.at[..., 5].set(False)
    params = {"k": jnp.ones((3, 3, 4, 6)), "b": jnp.ones(6)}
    scaled = rx.rescale_init(params, {"k": mask, "b": None})
    for unit in range(6):
        active = int(mask[..., unit].sum())
        found = np.asarray(scaled["k"][..., unit])
        np.testing.assert_allclose(found[np.asarray(mask[..., unit])], np.sqrt(36 / max(active, 1)), rtol=1e-6)
        assert not found[~np.asarray(mask[..., unit])].any()
    assert scaled["b"].tolist() == [1.0] * 6
    flipped = rx.rescale_init({"k": params["k"].T, "b": None}, {"k": mask.T, "b": None}, axis=0)
    np.testing.assert_allclose(flipped["k"].T, scaled["k"], rtol=1e-6)
