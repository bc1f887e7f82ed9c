"""GraSP: the product of Hessian and gradient against the whole Hessian, and what it keeps."""

import jax
import jax.flatten_util
import jax.numpy as jnp
import numpy as np
import pytest

import rigl_jax as rx
from rigl_jax import scores
from rigl_jax.base import Signals
from tests import oracles
from tests.errors import refused

X = jax.random.normal(jax.random.key(3), (7, 4))
Y = jax.random.normal(jax.random.key(4), (7, 2))
KEY = jax.random.key(0)


def network():
    a, b = jax.random.split(jax.random.key(1))
    return {"a": jax.random.normal(a, (4, 3)), "b": jax.random.normal(b, (3, 2))}


def loss(params):
    return jnp.mean((jnp.tanh(X @ params["a"]) @ params["b"] - Y) ** 2)


PLAN = rx.make_plan(network(), 0.5, rx.uniform)


@pytest.fixture(scope="module")
def exact():
    """The score from the whole Hessian, flat, and the score of the library in the same order."""
    params = network()
    flat, unravel = jax.flatten_util.ravel_pytree(params)
    slope = jax.grad(lambda v: loss(unravel(v)))
    expected = jax.jit(lambda flat: flat * (jax.jacfwd(slope)(flat) @ slope(flat)))(flat)
    found = jax.jit(lambda p: scores.gradient_flow(loss)(Signals(p, None, 0, KEY)))(params)
    return np.asarray(expected), found, unravel


def test_the_score_is_w_times_hessian_times_gradient(exact):
    expected, found, unravel = exact
    for name, value in unravel(jnp.asarray(expected)).items():
        np.testing.assert_allclose(found[name], value, rtol=2e-4, atol=1e-6)


def test_the_score_predicts_the_loss_of_gradient_norm():
    """Shrinking one weight by a little changes |g|^2 by -2 times that share of the score."""
    params = network()
    norm = lambda p: sum(jnp.vdot(g, g) for g in jax.tree.leaves(jax.grad(loss)(p)))  # noqa: E731
    slope = jax.jit(jax.grad(norm))(params)
    found = jax.jit(lambda p: scores.gradient_flow(loss)(Signals(p, None, 0, KEY)))(params)
    for name in params:
        np.testing.assert_allclose(slope[name] * params[name], 2 * found[name], rtol=2e-4, atol=1e-6)


def test_it_keeps_the_highest_in_each_layer_with_their_sign(exact):
    _, found, _ = exact
    masks = rx.grasp(PLAN, loss=loss).init(KEY, network()).masks
    for name, leaf in PLAN.items():
        np.testing.assert_array_equal(masks[name], oracles.top(found[name], leaf.n_active))
    assert any(bool((found[name] < 0).any()) for name in PLAN)


def test_jointly(exact):
    _, found, _ = exact
    masks = rx.grasp(PLAN, loss=loss, jointly=True).init(KEY, network()).masks
    flat = np.concatenate([np.ravel(found[name]) for name in "ab"])
    total = sum(leaf.n_active for leaf in PLAN.values())
    expected = oracles.top(flat, total)
    assert expected[:12].any()
    assert expected[12:].any()
    np.testing.assert_array_equal(np.concatenate([np.ravel(masks[name]) for name in "ab"]), expected)
    assert sum(int(mask.sum()) for mask in masks.values()) == total


def test_it_never_rewires_and_costs_as_static():
    algorithm = rx.grasp(PLAN, loss=loss)
    assert not any(algorithm.due(step) for step in range(10))
    assert rx.training_cost(algorithm, sparse=0.2, dense=1.0, steps=10) == pytest.approx(0.6)


def test_params_that_do_not_fit_are_told():
    with refused("a"):
        rx.grasp(PLAN, loss=loss).init(KEY, {"a": jnp.ones((2, 2)), "b": jnp.ones((3, 2))})
