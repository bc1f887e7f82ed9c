"""Criteria of a loss against Hessians by finite loops and changes of the loss by removing weights."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import rigl_jax as rx
from tests.errors import refused

RNG = np.random.default_rng(0)
A = RNG.normal(size=(12, 12))
HESSIAN = A @ A.T / 12 + 0.1 * np.eye(12)
SLOPE = RNG.normal(size=12)
PARAMS = {"a": RNG.normal(size=(2, 3)), "b": RNG.normal(size=6), "steps": 3}


@pytest.fixture(autouse=True)
def wide():
    with jax.enable_x64(True):
        yield


def flat(tree):
    return np.concatenate([np.ravel(tree["a"]), np.ravel(tree["b"])])


def quadratic(hessian, slope=SLOPE):
    def loss(params, batch):
        w = jnp.concatenate([params["a"].ravel(), params["b"]])
        return w @ hessian @ w / 2 + slope @ w

    return loss


def scored(criterion, batch=None):
    found = jax.jit(criterion)({"a": jnp.asarray(PARAMS["a"]), "b": jnp.asarray(PARAMS["b"]), "steps": 3}, batch)
    assert np.all(found["steps"] == 0)
    return flat(found)


def test_taylor_is_the_squared_change_of_the_loss():
    """First order of a linear loss, second order of a quadratic one in which weights do not interact."""
    w = flat(PARAMS)
    np.testing.assert_allclose(scored(rx.criteria.taylor(quadratic(np.zeros((12, 12))))), (SLOPE * w) ** 2)
    diagonal = np.diag(np.linspace(-1, 2, 12))
    loss = quadratic(diagonal)
    for i, score in enumerate(scored(rx.criteria.taylor(loss, order=2))):
        without = {
            "a": np.where(np.arange(6) == i, 0, w[:6]).reshape(2, 3),
            "b": np.where(np.arange(6) + 6 == i, 0, w[6:]),
        }
        np.testing.assert_allclose(score, (loss(without, None) - loss(PARAMS, None)) ** 2, rtol=1e-8)
    g = HESSIAN @ w + SLOPE
    np.testing.assert_allclose(
        scored(rx.criteria.taylor(quadratic(HESSIAN), order=2)), (g * w - w * (HESSIAN @ w) / 2) ** 2
    )


def test_obd_is_the_rise_of_the_loss_at_a_minimum():
    w = flat(PARAMS)
    at_minimum = quadratic(HESSIAN, -HESSIAN @ w)
    for i, score in enumerate(scored(rx.criteria.obd(at_minimum))):
        away = np.where(np.arange(12) == i, 0, w) - w
        np.testing.assert_allclose(score, away @ HESSIAN @ away / 2)


def test_the_estimate_of_the_diagonal_is_unbiased_and_exact_where_the_hessian_is_diagonal():
    w, key = flat(PARAMS), jax.random.key(0)
    diagonal = np.diag(np.linspace(-1, 2, 12))
    np.testing.assert_allclose(scored(rx.criteria.obd(quadratic(diagonal), 2, key)), np.diag(diagonal) * w**2 / 2)
    n = 4000
    found = scored(rx.criteria.obd(quadratic(HESSIAN), n, key)) / (w**2 / 2)
    spread = np.sqrt((HESSIAN**2).sum(1) - np.diag(HESSIAN) ** 2)  # of one sample
    assert np.all(np.abs(found - np.diag(HESSIAN)) < 5 * spread / np.sqrt(n))


def test_fisher_is_the_mean_square_of_the_gradients_of_examples():
    batch, w = RNG.normal(size=(6, 12)), flat(PARAMS)

    def loss(params, x):
        return jnp.mean((x @ jnp.concatenate([params["a"].ravel(), params["b"]])) ** 2) / 2

    for size in (1, 3):
        grads = [np.mean((part @ w)[:, None] * part, axis=0) for part in np.split(batch, 6 // size)]
        found = scored(rx.criteria.fisher(loss, size), jnp.asarray(batch))
        np.testing.assert_allclose(found, w**2 * np.mean(np.square(grads), 0) / 2)
    with refused("batch"):
        scored(rx.criteria.fisher(loss, 4), jnp.asarray(batch))


@pytest.mark.parametrize("mu", [0.95, 0.5, None])
def test_the_signed_path_integral_is_the_change_of_the_loss_without_the_leaf(mu):
    """Exact for a quadratic loss, on any grid."""
    loss = quadratic(HESSIAN)
    found = scored(rx.criteria.singe(loss, 7, mu, signed=True))
    for leaf, part in (("a", slice(0, 6)), ("b", slice(6, 12))):
        rise = loss({**PARAMS, leaf: np.zeros_like(PARAMS[leaf])}, None) - loss(PARAMS, None)
        np.testing.assert_allclose(found[part].sum(), rise)


def test_the_path_integral_converges_with_the_square_of_the_steps_and_is_taylor_with_none():
    def loss(params, batch):
        return jnp.sum(jnp.cos(3 * params["a"])) * jnp.exp(params["b"][0])

    rise = loss({**PARAMS, "a": np.zeros((2, 3))}, None) - loss(PARAMS, None)
    errors = [abs(scored(rx.criteria.singe(loss, n - 1, None, signed=True))[:6].sum() - rise) for n in (10, 100, 1000)]
    np.testing.assert_allclose(np.divide(errors[:2], errors[1:]), 100, rtol=0.1)
    linear = quadratic(np.zeros((12, 12)))
    np.testing.assert_allclose(scored(rx.criteria.singe(linear, 0)) ** 2, scored(rx.criteria.taylor(linear)))


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda: rx.criteria.taylor(len, order=3), "order"),
        (lambda: rx.criteria.taylor(None), "loss"),
        (lambda: rx.criteria.singe(len, -1), "steps"),
        (lambda: rx.criteria.singe(len, mu=1.0), "mu"),
        (lambda: rx.criteria.obd(len, 0), "samples"),
        (lambda: rx.criteria.obd(len, 2), "key"),
        (lambda: rx.criteria.fisher(len, 0), "size"),
    ],
)
def test_arguments_are_checked(make, words):
    with refused(words):
        make()


def test_a_leaf_without_weights_has_scores_without_numbers():
    params = {"w": jnp.ones(3), "none": jnp.zeros((0, 2))}
    assert rx.criteria.obd(lambda p, batch: (p["w"] ** 2).sum())(params, None)["none"].shape == (0, 2)
