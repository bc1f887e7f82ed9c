"""GraNet: the cubic reaches its end exactly, pruning is global, regeneration is RigL's."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import rigl_jax as rx
from rigl_jax.algorithms import granet
from rigl_jax.base import Signals
from tests import oracles

PARAMS = {
    "a": jax.random.normal(jax.random.key(0), (8, 10)),
    "b": 0.3 * jax.random.normal(jax.random.key(1), (6, 5)),
    "bias": jnp.zeros(5),
}
PLAN = rx.make_plan(PARAMS, 0.8, rx.uniform)  # 16 and 6
OPTIONS = {"period": 10, "stop": 60, "distribution": rx.uniform}
GRADS = jax.tree.map(lambda p: jax.random.normal(jax.random.key(p.size), p.shape), PARAMS)


def run(algorithm, steps, update=None):
    update = update or jax.jit(algorithm.update)
    state = jax.jit(algorithm.init)(jax.random.key(2), PARAMS)
    history = [state.masks]
    for step in steps:
        params = rx.apply_masks(PARAMS, state.masks)
        state = update(state, Signals(params, GRADS, jnp.int32(step), jax.random.key(step))).state
        history.append(state.masks)
    return history


def total(masks):
    return sum(int(m.sum()) for m in jax.tree.leaves(masks))


def test_counts_follow_the_cubic_and_end_exactly():
    algorithm = granet(PLAN, **OPTIONS, prune_stop=47)  # no rewiring falls on 47: the cubic ends at 40
    steps = [step for step in range(100) if algorithm.due(step)]
    assert steps == [0, 10, 20, 30, 40, 50, 60]
    history = run(algorithm, steps)
    assert total(history[0]) == 55
    expected = [22 + round(33 * (1 - min(step / 40, 1)) ** 3) for step in steps]
    assert [total(masks) for masks in history[1:]] == expected
    assert expected[-3:] == [22, 22, 22]
    assert min(int(history[-1][name].sum()) for name in ("a", "b")) >= 1


def test_pruning_is_global_and_nested_without_exchange():
    algorithm = granet(PLAN, **OPTIONS, fraction=0.0)
    before, after = run(algorithm, [30])
    w = {name: np.where(before[name], np.abs(PARAMS[name]), 0) for name in ("a", "b")}
    flat = np.concatenate([w["a"].ravel(), w["b"].ravel()])
    among = np.concatenate([np.ravel(before["a"]), np.ravel(before["b"])])
    kept = oracles.top(flat, 22 + round(33 / 8), among)
    np.testing.assert_array_equal(np.concatenate([np.ravel(after["a"]), np.ravel(after["b"])]), kept)
    assert kept[:80].sum() / 80 > kept[80:].sum() / 30, "the layer of small weights loses more"


def test_regeneration_is_rigl_on_what_pruning_left():
    steady = optax.constant_schedule(0.5)
    pruned = run(granet(PLAN, **OPTIONS, fraction=0.0), [20])[-1]
    masks = run(granet(PLAN, **OPTIONS, fraction=steady), [20])
    before, after = masks
    for name in ("a", "b"):
        w = np.where(before[name], np.abs(PARAMS[name]), 0)
        expected = oracles.drop_and_grow(pruned[name], w, np.abs(GRADS[name]), int(pruned[name].sum()) // 2)
        np.testing.assert_array_equal(after[name], expected)


def test_from_a_dense_network():
    algorithm = granet(PLAN, **OPTIONS, initial_sparsity=0.0)
    masks = jax.jit(algorithm.init)(jax.random.key(0), PARAMS).masks
    assert total(masks) == 110


def test_no_layer_starts_sparser_than_it_ends():
    plan = rx.make_plan(PARAMS, 0.6, rx.uniform, sparsities={"b": 0.0})
    algorithm = granet(plan, **OPTIONS, initial_sparsity=0.5)
    masks = jax.eval_shape(algorithm.init, jax.random.key(0), PARAMS).masks
    assert masks["b"].shape == (6, 5)
    assert int(jax.jit(algorithm.init)(jax.random.key(0), PARAMS).masks["b"].sum()) == 30


@pytest.mark.parametrize(("wanted", "value", "moment"), [(4, 0.0, 0.0), (3, 5.0, 19.0)], ids=["pruned", "dropped"])
def test_a_weight_pruned_and_regrown_starts_anew_and_one_dropped_and_regrown_goes_on(wanted, value, moment):
    """Of 8 weights 4 are pruned, then the least of the others is dropped and the one of the largest gradient grown."""
    params = {"w": jnp.array([[8.0, 7.0, 6.0, 5.0], [4.0, 3.0, 2.0, 1.0]])}
    method = granet(
        rx.make_plan(params, 0.5), period=1, stop=1, initial_sparsity=0.0, fraction=optax.constant_schedule(0.25)
    )
    tx = rx.sparsify(optax.chain(optax.trace(0.9), optax.scale(0.0)), method, key=jax.random.key(0))
    state = tx.init(params)
    grads = {"w": jnp.ones(8).at[wanted].set(10.0).reshape(2, 4)}
    for _ in range(2):
        updates, state = tx.update(grads, state, params)
        params = optax.apply_updates(params, updates)
    expected = np.array([8.0, 7.0, 6.0, 0.0, 0.0, 0.0, 0.0, 0.0])
    expected[wanted] = value
    np.testing.assert_array_equal(np.ravel(params["w"]), expected)
    assert np.ravel(state.masks["w"])[wanted]
    assert float(np.ravel(state.inner[0].trace["w"])[wanted]) == moment


def test_a_gradient_that_is_not_finite_starts_no_weight_anew():
    params = {"w": jnp.arange(1.0, 9.0).reshape(2, 4)}
    tx = rx.sparsify(
        optax.chain(optax.apply_if_finite(optax.sgd(0.0), 9)),
        granet(rx.make_plan(params, 0.5), period=1, stop=2, initial_sparsity=0.0),
        key=jax.random.key(0),
    )
    state = tx.init(params)._replace(step=jnp.int32(1))
    updates, after = tx.update({"w": jnp.full((2, 4), jnp.nan)}, state, params)
    np.testing.assert_array_equal(optax.apply_updates(params, updates)["w"], params["w"])
    np.testing.assert_array_equal(after.masks["w"], state.masks["w"])
