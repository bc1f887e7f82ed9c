"""Types that plain optax takes: any float for weights and another for gradients, and leaves that are no floats."""

import itertools

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import rigl_jax as rx

FLOATS = ("float32", "bfloat16", "float16", "float64")
OPTIMIZERS = {
    "momentum": optax.sgd(0.1, momentum=0.9),
    "adam": optax.adam(0.1),
    "adam, short mu": optax.adam(0.1, mu_dtype=jnp.bfloat16),
    "masters": rx.with_masters(optax.adam(0.1)),
    "per weight": rx.per_weight_adam(0.1),
}
OTHERS = {
    "floats": {},
    "integers": {"n": jnp.arange(3)},
    "flags": {"n": jnp.array([True, False])},
    "a counter": {"n": jnp.zeros((), jnp.int32)},
}


def weights(dtype, others=None):
    return {
        "w": jnp.arange(1, 17, dtype=jnp.float32).reshape(4, 4).astype(dtype),
        "b": jnp.ones(3, dtype),
        **(others or {}),
    }


def gradients(params, dtype):
    floating = lambda p: jnp.issubdtype(p.dtype, jnp.floating)  # noqa: E731
    return jax.tree.map(lambda p: jnp.cos(p).astype(dtype) if floating(p) else jnp.zeros_like(p), params)


def train(tx, params, dtype, rewire=(None, None, None)):
    """Two steps, or as many as `rewire` says."""
    state, sparse = tx.init(params), len(rewire) > 0
    params = rx.apply_masks(params, state.masks) if sparse else params
    for i in range(len(rewire) or 2):
        extra = {"rewire": rewire[i]} if sparse else {}
        updates, state = tx.update(gradients(params, dtype), state, params, **extra)
        params = optax.apply_updates(params, updates)
    return params, state


def sparse(optimizer, sparsity=0.5):
    plan = rx.make_plan({"w": weights("float32")["w"]}, sparsity)
    return rx.sparsify(optimizer, rx.rigl(plan, period=2, start=1), key=jax.random.key(0))


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
@pytest.mark.parametrize("others", OTHERS)
def test_both_ways_to_rewire_take_what_plain_optax_takes(others, optimizer):
    inner, pairs = OPTIMIZERS[optimizer], [FLOATS[:2]]
    if others == "floats":  # all pairs of unlike types with one optimizer; in the others wider or narrower ones
        unlike = itertools.permutations(FLOATS, 2)
        pairs = unlike if optimizer == "adam" else [FLOATS[:2], FLOATS[1::-1], FLOATS[::3]]
    for of_weights, of_gradients in pairs:
        with jax.enable_x64("float64" in (of_weights, of_gradients)):
            params = weights(of_weights, OTHERS[others])
            outside, inside = (
                jax.eval_shape(lambda p: train(sparse(inner), p, of_gradients, rewire), params)
                for rewire in ((False, True), (None, None))
            )
            chex.assert_trees_all_equal_shapes_and_dtypes(outside, inside)
            chex.assert_trees_all_equal_shapes_and_dtypes(inside[0], params)


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_mixed_types_train_as_in_plain_optax(optimizer):
    """At sparsity 0 the three steps, of which the second moves nothing, are two of the inner optimizer."""
    params = weights("bfloat16", {"n": jnp.arange(3)})
    found, expected = (
        jax.jit(lambda p, tx=tx, rewire=rewire: train(tx, p, "float32", rewire)[0])(params)
        for tx, rewire in ((sparse(OPTIMIZERS[optimizer], 0.0), (None,) * 3), (OPTIMIZERS[optimizer], ()))
    )
    chex.assert_trees_all_equal(found, expected)
    assert not np.array_equal(np.asarray(found["w"], np.float32), np.asarray(params["w"], np.float32))


def test_masters_share_no_buffer_with_the_weights():
    """So that both can be donated; wider weights keep their precision, and what is no float has no master."""
    params = weights("float32", {"n": jnp.arange(3)})
    tx = rx.with_masters(optax.sgd(0.5))
    state = tx.init(params)
    step = jax.jit(lambda p, s: tx.update(p | {"n": jnp.zeros(3, int)}, s, p), donate_argnums=(0, 1))
    updates, state = step(params, state)
    np.testing.assert_array_equal(updates["w"], -jnp.arange(1, 17).reshape(4, 4) / 2)
    assert updates["n"].tolist() == [0, 0, 0]
    with jax.enable_x64(True):
        fine = {"w": jnp.ones(3) + 1e-12}
        updates, _ = tx.update({"w": jnp.full(3, 2e-12)}, tx.init(fine), fine)
        np.testing.assert_allclose(updates["w"], -1e-12, rtol=1e-3)


def test_one_ranking_over_leaves_of_several_types():
    """Scores are compared in a type that holds all of them."""
    params = {
        "a": jnp.array([[1.0, 3.0]], jnp.bfloat16),
        "b": jnp.array([[2.0, 2.5]]),
        "c": jnp.ones((1, 2), jnp.float16),
    }
    plan = rx.make_plan(params, 0.5, rx.uniform)
    masks = rx.topology.prune_jointly(plan, params, 3, min_active=0)
    assert {name: mask.tolist() for name, mask in masks.items()} == {
        "a": [[False, True]],
        "b": [[True, True]],
        "c": [[False, False]],
    }


def test_keys_of_other_generators_keep_their_kind():
    """In states too, which hold the data of a key: draws are those of the key itself. A key of rbg has data of the same
    shape, and splits as the default does.
    """
    key = jax.random.key(0, impl="unsafe_rbg")
    params = {"w": jnp.ones((4, 4))}
    noise = rx.algorithms.langevin(1.0, l1=0.0, temperature=0.5, key=key)
    updates, _ = noise.update({"w": jnp.zeros((4, 4))}, noise.init(params), params)
    expected = jax.random.normal(rx.trees.leaf_key(jax.random.fold_in(key, 0), "w"), (4, 4))
    np.testing.assert_allclose(updates["w"], expected, rtol=1e-6)
    tx = rx.sparsify(noise, rx.set_(rx.make_plan(params, 0.5), period=1), key=key)
    state = tx.init(params)
    updates, _ = tx.update(params, state, rx.apply_masks(params, state.masks), rewire=True)
    drawn = jax.random.uniform(rx.trees.leaf_key(jax.random.split(key)[0], "w"), (4, 4))
    np.testing.assert_array_equal(state.masks["w"], rx.topology.select(drawn, 8))
    gate = rx.gates.hard_concrete(key, jnp.zeros(5))
    assert len({*gate.tolist()}) > 1


@pytest.mark.parametrize("method", [rx.snip, rx.grasp, rx.synflow])
def test_losses_of_params_with_counters(method):
    """What is no float has no gradient and no mask, and changes none."""
    weights = {"w": jnp.array([[1.0, -2.0], [3.0, 4.0]])}
    plan = rx.make_plan(weights, 0.5)
    expected = method(plan, loss=lambda p: (p["w"] ** 3).sum()).init(jax.random.key(0), weights).masks
    counted = {**weights, "steps": jnp.arange(3), "flag": jnp.array(True)}
    masks = method(plan, loss=lambda p: (p["w"] ** 3).sum()).init(jax.random.key(0), counted).masks
    assert masks["w"].tolist() == expected["w"].tolist()
    assert masks["steps"] is masks["flag"] is None
