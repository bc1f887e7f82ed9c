"""Random growth among the never active, and R_s; both sides of SET; RigL's inverted control."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import rigl_jax as rx
from rigl_jax.algorithms import explored, itop, rigl_inverted
from rigl_jax.base import Signals
from tests import oracles


def signals(params, grads=None, step=0, seed=0):
    grads = jax.tree.map(jnp.zeros_like, params) if grads is None else grads
    return Signals(params, grads, jnp.int32(step), jax.random.fold_in(jax.random.key(seed), step))


def test_growth_tries_what_was_never_active_first():
    params = {"w": jnp.arange(1.0, 21.0).reshape(4, 5)}  # magnitude says nothing of when a weight was grown
    plan = rx.make_plan(params, 0.8)
    algorithm = itop(plan, period=1, fraction=optax.constant_schedule(0.5))
    update = jax.jit(algorithm.update)
    state = algorithm.init(jax.random.key(0), params)
    assert float(explored(state)) == pytest.approx(0.2)
    seen = np.array(state.masks["w"])
    for step in range(8):  # 4 active, 2 moved each time, 16 untried: all of them within 8 rewirings
        before = np.asarray(state.masks["w"])
        state = update(state, signals(params, step=step)).state
        mask = np.asarray(state.masks["w"])
        kept = oracles.top(params["w"], 2, before)
        assert mask[kept].all()
        assert mask.sum() == 4
        assert not (mask & ~kept & seen).any(), "grown where a mask has been although others are free"
        seen |= mask
        np.testing.assert_array_equal(state.explored["w"], seen)
        assert float(explored(state)) == pytest.approx(0.2 + 0.1 * (step + 1))
    state = update(state, signals(params, step=9)).state  # nothing new is left: it goes on among the others
    assert int(state.masks["w"].sum()) == 4
    assert float(explored(state)) == 1


def test_growth_among_the_never_active_is_uniform():
    params = {"w": jnp.ones((3, 10))}
    plan = rx.make_plan(params, 0.8)
    algorithm = itop(plan, fraction=optax.constant_schedule(0.5))
    state = algorithm.init(jax.random.key(0), params)
    masks = {"w": jnp.asarray(oracles.top(np.ones((3, 10)), 6))}
    tried = {"w": jnp.asarray(oracles.top(np.ones((3, 10)), 10))}
    state = state._replace(masks=masks, explored=tried)

    def grown(key):
        return algorithm.update(state, Signals(params, params, jnp.int32(0), key)).state.masks["w"] & ~masks["w"]

    hits = np.asarray(jax.jit(jax.vmap(grown))(jax.random.split(jax.random.key(1), 2000)).sum(0)).ravel()
    assert not hits[:10].any()
    p = 3 / 20
    chi2 = ((hits[10:] - 2000 * p) ** 2 / (2000 * p * (1 - p))).sum() * 19 / 20
    assert chi2 < 43.8  # 19 degrees of freedom, p = 0.001


def test_inverted_grows_the_smallest_gradient():
    params = {"w": jnp.array([[0.5, -0.1, 0.3, 0.0, 0.0, 0.0]])}
    masks = {"w": jnp.array([[1, 1, 1, 0, 0, 0]], bool)}
    grads = {"w": jnp.array([[0.0, 2.0, 0.0, -0.7, 0.1, 0.2]])}
    algorithm = rigl_inverted(rx.make_plan(params, 0.5), fraction=optax.constant_schedule(0.4))
    state = algorithm.init(jax.random.key(0), params)._replace(masks=masks)
    result = jax.jit(algorithm.update)(state, signals(params, grads))
    assert result.state.masks["w"].astype(int).tolist() == [[1, 0, 1, 0, 1, 0]]
    assert algorithm.dense_grads(0)
    assert algorithm.skip_step


def test_both_sides_by_hand():
    """4 positive and 3 negative: half of either, by floor, is 2 and 1; by magnitude the 3 smallest would go."""
    params = {"w": jnp.array([[0.05, 0.1, 0.15, 9.0, -0.2, -0.3, -5.0, 0.0, 0.0, 0.0, 0.0, 0.0, 0.0]])}
    masks = {"w": jnp.arange(13)[None] < 7}
    algorithm = rx.set_(rx.make_plan(params, 6 / 13), fraction=optax.constant_schedule(0.5), two_sided=True)
    state = algorithm.init(jax.random.key(0), params)._replace(masks=masks)
    one_sided = rx.set_(rx.make_plan(params, 6 / 13), fraction=optax.constant_schedule(0.5), regrow_dropped=False)
    forbidden = rx.set_(
        rx.make_plan(params, 6 / 13), fraction=optax.constant_schedule(0.5), two_sided=True, regrow_dropped=False
    )
    survivors = lambda a: np.flatnonzero(np.asarray(jax.jit(a.update)(state, signals(params)).state.masks["w"])[0, :7])  # noqa: E731
    assert survivors(one_sided).tolist() == [3, 4, 5, 6]
    assert survivors(forbidden).tolist() == [2, 3, 5, 6]
    assert set(survivors(algorithm).tolist()) >= {2, 3, 5, 6}


@pytest.mark.parametrize("seed", range(3))
def test_both_sides_against_numpy(seed):
    rng = np.random.default_rng(seed)
    mask = oracles.top(rng.random((8, 12)), 40)
    w = np.where(mask, rng.normal(size=(8, 12)), 0).astype(np.float32)
    g = rng.normal(size=(8, 12)).astype(np.float32)
    params, grads = {"w": jnp.asarray(w)}, {"w": jnp.asarray(g)}
    algorithm = rx.rigl(rx.make_plan(params, 1 - 40 / 96), fraction=optax.constant_schedule(0.3), two_sided=True)
    state = algorithm.init(jax.random.key(0), params)._replace(masks={"w": jnp.asarray(mask)})
    new = jax.jit(algorithm.update)(state, signals(params, grads)).state.masks["w"]
    kept = np.zeros_like(mask)
    for side in (mask & (w >= 0), mask & (w < 0)):
        n = int(side.sum())
        kept |= oracles.top(np.abs(w), n - int(np.float32(0.3) * n), side)
    np.testing.assert_array_equal(new, kept | oracles.top(np.abs(g), 40 - int(kept.sum()), ~kept))
