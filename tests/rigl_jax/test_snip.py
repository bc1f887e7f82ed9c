"""SNIP: the score against its definition, and both ways to prune by it."""

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import rigl_jax as rx
from rigl_jax import scores
from rigl_jax.base import Signals
from tests import oracles

X = jax.random.normal(jax.random.key(3), (7, 6))
Y = jax.random.normal(jax.random.key(4), (7, 3))


def network(seed=0):
    a, b = jax.random.split(jax.random.key(seed))
    return {"a": jax.random.normal(a, (6, 5)), "b": jax.random.normal(b, (5, 3))}


def loss(params):
    return jnp.mean((jax.nn.relu(X @ params["a"]) @ params["b"] - Y) ** 2)


def score(params):
    return scores.snip(Signals(params, jax.grad(loss)(params), 0, jax.random.key(0)))


def test_the_score_is_the_gradient_of_a_switch_on_each_weight():
    params = network()
    switches = jax.tree.map(jnp.ones_like, params)
    slope = jax.grad(lambda c: loss(jax.tree.map(jnp.multiply, c, params)))(switches)
    chex.assert_trees_all_close(score(params), jax.tree.map(jnp.abs, slope), rtol=1e-5)


def test_rescaling_a_relu_layer_changes_magnitudes_but_no_scores():
    params = network()
    rescaled = {"a": params["a"] * 8, "b": params["b"] / 8}
    chex.assert_trees_all_close(score(params), score(rescaled), rtol=1e-5)
    init = rx.snip(PLAN, loss=loss, jointly=True).init
    chex.assert_trees_all_equal(init(KEY, params).masks, init(KEY, rescaled).masks)


KEY = jax.random.key(0)
PLAN = rx.make_plan(network(), 0.7, rx.uniform)


def test_with_a_loss_it_prunes_in_init_and_never_again():
    params = network()
    algorithm = rx.snip(PLAN, loss=loss)
    masks = jax.jit(algorithm.init)(KEY, params).masks
    for name, leaf in PLAN.items():
        np.testing.assert_array_equal(masks[name], oracles.top(score(params)[name], leaf.n_active))
    assert not any(algorithm.due(step) for step in range(10))
    assert not algorithm.skip_step


def test_jointly_ranks_all_layers_and_keeps_the_total():
    params = network()
    masks = rx.snip(PLAN, loss=loss, jointly=True).init(KEY, params).masks
    flat = np.concatenate([np.ravel(score(params)[name]) for name in "ab"])
    total = sum(leaf.n_active for leaf in PLAN.values())
    # every layer is entitled to its best weight, which here is among the best anyway
    np.testing.assert_array_equal(np.concatenate([np.ravel(masks[name]) for name in "ab"]), oracles.top(flat, total))


def test_no_layer_is_cut_off():
    params = {"a": jnp.ones((6, 5)), "b": jnp.ones((5, 3))}
    lopsided = lambda p: p["a"].sum()  # noqa: E731  # b has no gradient at all
    masks = rx.snip(PLAN, loss=lopsided, jointly=True, min_active=2).init(KEY, params).masks
    assert masks["b"].ravel().tolist() == [True] * 2 + [False] * 13
    assert int(masks["a"].sum()) == sum(leaf.n_active for leaf in PLAN.values()) - 2


def test_in_the_loop_the_first_gradient_decides_and_trains_nothing():
    params = network()
    algorithm = rx.snip(PLAN)
    tx = rx.sparsify(optax.sgd(0.1, momentum=0.9), algorithm, key=KEY)
    state = tx.init(params)
    assert all(bool(mask.all()) for mask in jax.tree.leaves(state.masks))
    update = jax.jit(tx.update)
    updates, state = update(jax.grad(loss)(params), state, params)
    pruned = optax.apply_updates(params, updates)
    chex.assert_trees_all_equal(state.masks, rx.snip(PLAN, loss=loss).init(KEY, params).masks)
    chex.assert_trees_all_equal(pruned, rx.apply_masks(params, state.masks))
    masks = state.masks
    for _ in range(3):
        updates, state = update(jax.grad(loss)(pruned), state, pruned)
        pruned = optax.apply_updates(pruned, updates)
    chex.assert_trees_all_equal(state.masks, masks)
    rx.check_masked(pruned, masks)


def test_a_later_start_trains_the_dense_network_until_then():
    algorithm = rx.snip(PLAN, start=2)
    assert [step for step in range(5) if algorithm.due(step)] == [2]
    assert np.flatnonzero(algorithm.dense_grads(np.arange(5))).tolist() == [2]
    tx = rx.sparsify(optax.sgd(0.1), algorithm, key=KEY)
    params, state = network(), tx.init(network())
    for step in range(3):
        assert bool(state.masks["a"].all())
        updates, state = tx.update(jax.grad(loss)(params), state, params, rewire=step == 2)
        params = optax.apply_updates(params, updates)
    assert {name: int(mask.sum()) for name, mask in state.masks.items()} == {n: v.n_active for n, v in PLAN.items()}


def test_it_costs_one_dense_gradient():
    assert rx.training_cost(rx.snip(PLAN), sparse=0.2, dense=1.0, steps=10) == pytest.approx((10 * 0.6 + 0.8) / 10)


def test_taylor_squares():
    params = network()
    grads = jax.grad(loss)(params)
    expected = jax.tree.map(lambda g, p: (g * p) ** 2, grads, params)
    chex.assert_trees_all_close(scores.taylor(Signals(params, grads, 0, KEY)), expected)
