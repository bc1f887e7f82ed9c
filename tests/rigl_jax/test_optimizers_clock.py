"""A clock in every weight: Adam for those that stay, a fresh start for those that come."""

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import rigl_jax as rx
from rigl_jax.optimizers import PerWeightAdamState, scale_by_per_weight_adam

KEY = jax.random.key(0)
PARAMS = {"w": jax.random.normal(jax.random.key(1), (6, 5)), "b": jnp.ones(5)}


def gradients(step):
    key = jax.random.fold_in(jax.random.key(2), step)
    return jax.tree.map(lambda p: jax.random.normal(jax.random.fold_in(key, p.size), p.shape, p.dtype), PARAMS)


def run(tx, steps, params=PARAMS):
    state, update, history = tx.init(params), jax.jit(tx.update), []
    for step in range(steps):
        updates, state = update(gradients(step), state, params)
        params = optax.apply_updates(params, updates)
        history.append((params, updates, state))
    return history


RATES = {"constant": 0.1, "schedule": optax.cosine_decay_schedule(0.1, 20)}


@pytest.mark.parametrize("rate", RATES)
@pytest.mark.parametrize("weight_decay", [0.0, 0.1])
def test_weights_that_are_never_reset_get_adams_updates(rate, weight_decay):
    mine = rx.per_weight_adam(RATES[rate], weight_decay=weight_decay)
    adam = optax.adamw(RATES[rate], weight_decay=weight_decay) if weight_decay else optax.adam(RATES[rate])
    for (_, found, _), (_, expected, _) in zip(run(mine, 12), run(adam, 12), strict=True):
        chex.assert_trees_all_equal(found, expected)


def test_and_so_they_do_in_a_sparse_network():
    algorithm = rx.static(rx.make_plan(PARAMS, 0.5))
    one, two = (
        run(rx.sparsify(inner, algorithm, key=KEY), 6)[-1][0] for inner in (rx.per_weight_adam(0.1), optax.adam(0.1))
    )
    chex.assert_trees_all_equal(one, two)


def first_update(inner, late):
    """|update| / learning rate of weights grown after `late` steps, the step after they were grown."""
    params = {"w": jnp.linspace(1.0, 2.0, 20).reshape(4, 5)}
    algorithm = rx.rigl(rx.make_plan(params, 0.5), period=late, start=late, fraction=0.5)
    tx = rx.sparsify(inner, algorithm, key=KEY)
    state = tx.init(params)
    params = rx.apply_masks(params, state.masks)

    @jax.jit
    def body(carry, step):
        params, state = carry
        grads = {"w": jnp.where(step % 2 == 0, 0.7, -0.7) * jnp.ones((4, 5))}
        updates, after = tx.update(grads, state, params)
        fresh = after.masks["w"] & ~state.masks["w"]
        return (optax.apply_updates(params, updates), after), (updates["w"], fresh)

    _, (updates, fresh) = jax.lax.scan(body, (params, state), jnp.arange(late + 2))
    assert int(fresh[late].sum()) > 0
    return np.abs(np.asarray(updates[late + 1]))[np.asarray(fresh[late])] / 0.01


def test_a_regrown_weight_starts_as_at_step_1():
    np.testing.assert_allclose(first_update(rx.per_weight_adam(0.01), 10_000), 1.0, rtol=1e-4)
    leap = first_update(optax.adam(0.01), 10_000)  # sqrt(10) in the limit: (1 - b1) / sqrt(1 - b2)
    assert leap.min() > 3.15
    assert leap.max() < 3.17


def test_the_clock_counts_from_birth_and_stands_at_0_in_pruned_weights():
    algorithm = rx.rigl(rx.make_plan(PARAMS, 0.5), period=4, fraction=0.5, skip_step=False, keep_regrown=False)
    tx = rx.sparsify(rx.per_weight_adam(0.1), algorithm, key=KEY)
    age, masks = np.zeros((6, 5), int), np.asarray(tx.init(PARAMS).masks["w"])
    for step, (_, _, state) in enumerate(run(tx, 10)):
        after = np.asarray(state.masks["w"])
        count = np.asarray(state.inner[0].count["w"])
        stayed = masks & after & (count > 0)
        np.testing.assert_array_equal(count[stayed], age[stayed] + 1)
        assert not count[~after].any()
        assert (count[masks & after] > 0).all() or step % 4 == 0
        assert (count[after & ~masks] == 0).all()
        age, masks = count, after
    assert count.dtype == np.int32
    assert len(set(age[masks].tolist())) >= 2
    np.testing.assert_array_equal(state.inner[0].count["b"], 10)


def test_warm_up_scales_a_weights_first_updates():
    plain, warmed = (run(rx.per_weight_adam(0.1, warmup=warmup), 6) for warmup in (0, 4))
    for step, scale in enumerate([0.25, 0.5, 0.75, 1.0, 1.0, 1.0]):
        expected = jax.tree.map(lambda u, s=scale: s * u, plain[step][1])
        chex.assert_trees_all_close(warmed[step][1], expected, rtol=1e-6)
    np.testing.assert_allclose(first_update(rx.per_weight_adam(0.01, warmup=4), 50), 0.25, rtol=1e-4)


def test_in_chains_and_wrappers_with_exact_zeros():
    inners = {
        "chain": optax.chain(optax.clip(0.5), scale_by_per_weight_adam(), optax.scale(-0.1)),
        "inject": optax.inject_hyperparams(rx.per_weight_adam)(learning_rate=0.1),
        "partition": optax.partition(
            {True: rx.per_weight_adam(0.1), False: optax.sgd(0.1)}, lambda p: jax.tree.map(lambda x: x.ndim > 1, p)
        ),
    }
    for name, inner in inners.items():
        algorithm = rx.rigl(rx.make_plan(PARAMS, 0.5), period=2, fraction=0.5)
        params, _, state = run(rx.sparsify(inner, algorithm, key=KEY), 6)[-1]
        rx.check_masked(params, state.masks)
        is_clock = lambda x: isinstance(x, PerWeightAdamState)  # noqa: E731
        clocks = [x for x in jax.tree.leaves(state.inner, is_leaf=is_clock) if is_clock(x)]
        assert len(clocks) == 1, name
        assert not np.asarray(clocks[0].count["w"])[~np.asarray(state.masks["w"])].any(), name


def test_short_floats_keep_their_type():
    params = jax.tree.map(lambda p: p.astype(jnp.bfloat16), PARAMS)
    tx = rx.per_weight_adam(0.1)
    updates, state = tx.update(params, tx.init(params), params)
    assert updates["w"].dtype == state[0].mu["w"].dtype == jnp.bfloat16
    np.testing.assert_allclose(np.abs(updates["w"].astype(jnp.float32)), 0.1, rtol=0.02)
