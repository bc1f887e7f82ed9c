"""A step that decides by itself: the memory that it takes on a CPU, its derivatives, and members that decide apart."""

import functools
import re

import chex
import jax
import jax.numpy as jnp
import optax
import pytest

import rigl_jax as rx
from rigl_jax import native
from rigl_jax.branches import either

WIDTH, LAYERS = 256, 3


def step(tx, params, state, x):
    def loss(params):
        return jnp.mean(functools.reduce(lambda h, name: jax.nn.relu(h @ params[name]), sorted(params), x) ** 2)

    updates, state = tx.update(jax.grad(loss)(params), state, params)
    return optax.apply_updates(params, updates), state


@pytest.mark.skipif(native.library() is None, reason=native.reason())
def test_it_copies_no_weight_and_rewires_leaf_by_leaf(monkeypatch):
    """XLA's CPU backend, left alone, works on all leaves at once, and takes memory for the branches in every step."""
    monkeypatch.setattr(jax, "device_count", lambda *backend: 1)  # these tests have eight
    params = {f"layer_{i}": jax.ShapeDtypeStruct((WIDTH, WIDTH), "float32") for i in range(LAYERS)}
    x = jax.ShapeDtypeStruct((8, WIDTH), "float32")
    dense = optax.with_extra_args_support(optax.sgd(0.1, momentum=0.9))
    sparse = rx.sparsify(dense, rx.rigl(rx.make_plan(params, 0.9)), key=jax.random.key(0))

    def compiled(tx):
        jitted = jax.jit(functools.partial(step, tx), donate_argnums=(0, 1))
        return jitted.lower(params, jax.eval_shape(tx.init, params), x).compile()

    plain, masked = compiled(dense), compiled(sparse)
    assert not re.findall(rf"= f32\[{WIDTH},{WIDTH}\]\S* copy\(", masked.as_text())
    beyond = masked.memory_analysis().temp_size_in_bytes - plain.memory_analysis().temp_size_in_bytes
    assert beyond / (4 * WIDTH * WIDTH) < 3  # with a conditional, and all leaves at once, 9.9


def test_either_has_derivatives_and_members_that_decide_apart():
    def f(x, due):
        return either(due, lambda x, by: (x[0] * by, x[1] + 1), lambda x, by: (x[0] + by, x[1]), (x, 0), 2 * x)

    x, due = jnp.array([3.0, 5.0]), jnp.array([True, False])
    values, steps = jax.jit(jax.vmap(f))(x, due)
    chex.assert_trees_all_equal((values, steps), (jnp.array([18.0, 15.0]), jnp.array([1, 0])))
    slopes = jax.jit(jax.vmap(jax.grad(lambda x, due: f(x, due)[0])))(x, due)
    chex.assert_trees_all_equal(slopes, jnp.array([12.0, 3.0]))
