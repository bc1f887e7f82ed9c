"""MEST: the drop score by hand, no dense gradient, and a fresh start for what comes back."""

import jax
import jax.numpy as jnp
import numpy as np
import optax

import rigl_jax as rx
from rigl_jax.algorithms import mest
from rigl_jax.base import Signals

W = {"w": jnp.array([[0.5, -0.1, 0.3, 0.2, 0.0, 0.0, 0.0, 0.0]])}
M = {"w": jnp.array([[1, 1, 1, 1, 0, 0, 0, 0]], bool)}
G = {"w": jnp.array([[0.0, 2.0, 0.1, -0.2, 9.0, 9.0, 9.0, 9.0]])}
PLAN = rx.make_plan(W, 0.5)
QUARTER = optax.constant_schedule(0.25)


def survivors(algorithm, grads=G):
    """Of several draws: what all of them keep was not dropped."""
    state = algorithm.init(jax.random.key(0), W)._replace(masks=M)
    masks = jax.jit(jax.vmap(lambda key: algorithm.update(state, Signals(W, grads, 0, key)).state.masks["w"]))
    return np.flatnonzero(np.asarray(masks(jax.random.split(jax.random.key(1), 50))).all((0, 1))).tolist()


def test_worked_example():
    # |w| + 0.1 |g| = 0.5, 0.3, 0.31, 0.22: the last goes. By |w| alone the second would.
    assert survivors(mest(PLAN, fraction=QUARTER, gradient_weight=0.1)) == [0, 1, 2]
    assert survivors(mest(PLAN, fraction=QUARTER, gradient_weight=0.0)) == [0, 2, 3]


def test_no_gradient_of_an_inactive_weight_is_read():
    algorithm = mest(PLAN, fraction=QUARTER, gradient_weight=0.1)
    spoiled = {"w": jnp.where(M["w"], G["w"], jnp.nan)}
    assert survivors(algorithm, spoiled) == [0, 1, 2]
    assert not any(algorithm.dense_grads(step) for step in range(0, 3000, 100))
    assert not algorithm.skip_step


def test_a_weight_that_comes_back_starts_from_zero():
    algorithm = mest(PLAN, fraction=optax.constant_schedule(1.0))
    tx = rx.sparsify(optax.sgd(0.0), algorithm, key=jax.random.key(0))
    state = tx.init(W)
    state = state._replace(algorithm=state.algorithm._replace(masks=M))
    updates, state = jax.jit(tx.update, static_argnames="rewire")(G, state, W, rewire=True)
    assert (state.masks["w"] & M["w"]).any(), "some are drawn again"
    assert not optax.apply_updates(W, updates)["w"].any()
