"""MIMO, downsampling and coordinate descent against closed forms."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import rigl_jax as rx
from experiments.coordinates import coordinate_sweep
from experiments.models.downsampling import downsampled, pool_filters, pool_input
from experiments.models.mimo import mimo, mimo_batch, mimo_loss, mimo_predict
from tests.errors import refused

DRAW = np.random.default_rng(0)


def test_members_see_other_examples_but_for_rho():
    x, y = jnp.arange(50.0)[:, None], jnp.arange(50)
    batch, labels = (np.asarray(part) for part in mimo_batch(jax.random.key(0), x, y, members=3, rho=0.6, repeats=2))
    np.testing.assert_array_equal(batch[..., 0], labels)
    for member in labels.T:  # each sees every example as often
        np.testing.assert_array_equal(np.bincount(member), 2)
    same = (labels == labels[:, :1]).all(axis=1)
    assert same[40:].all()
    assert same[:40].sum() < 5
    with refused("mimo_batch", "rho"):
        mimo_batch(jax.random.key(0), x, y, members=3, rho=1.5)


def test_one_member_is_the_network():
    w, x, y = DRAW.normal(size=(4, 3)), DRAW.normal(size=(5, 4)), np.array([0, 1, 2, 0, 1])
    apply = mimo(lambda w, x: x @ w, 1)
    run = jax.jit(lambda w, x, y: (mimo_predict(apply, w, x, 1), mimo_loss(apply(w, x[:, None]), y[:, None])))
    found, loss = run(w, x, y)
    np.testing.assert_allclose(found, x @ w - np.log(np.exp(x @ w).sum(1, keepdims=True)), rtol=1e-4)
    assert float(loss) == pytest.approx(float(-np.mean(np.asarray(found)[range(5), y])), rel=1e-5)


def test_members_have_their_own_channels_and_logits():
    """A block-diagonal weight is two networks side by side; the prediction is the mean of their probabilities."""
    a, b = DRAW.normal(size=(2, 4, 3))
    w = np.block([[a, np.zeros_like(a)], [np.zeros_like(b), b]])
    x = DRAW.normal(size=(5, 2, 4))
    apply = mimo(lambda w, x: x @ w, 2)
    logits, log_probs = jax.jit(lambda w, x: (apply(w, x), mimo_predict(apply, w, x[:, 0], 2)))(w, x)
    np.testing.assert_allclose(logits, np.stack([x[:, 0] @ a, x[:, 1] @ b], axis=1), rtol=1e-4, atol=1e-5)
    probs = np.mean([e / e.sum(1, keepdims=True) for e in (np.exp(x[:, 0] @ m) for m in (a, b))], axis=0)
    np.testing.assert_allclose(np.exp(log_probs), probs, rtol=1e-4)


def convolved(x, kernel, stride):
    return jax.lax.conv_general_dilated(x, kernel, (stride,) * 2, "VALID", dimension_numbers=("NHWC", "HWIO", "NHWC"))


def test_pooled_filters_on_pooled_images():
    """On images of constant 2 x 2 blocks nothing is lost, and the derivative by a pooled tap goes to all its taps."""
    kernel, small = (jnp.asarray(DRAW.normal(size=size), jnp.float32) for size in ((4, 4, 2, 3), (1, 5, 5, 2)))
    image = jnp.repeat(jnp.repeat(small, 2, 1), 2, 2)
    np.testing.assert_allclose(pool_input(image, 2), small, rtol=1e-6)
    np.testing.assert_allclose(convolved(small, pool_filters(kernel, 2), 1), convolved(image, kernel, 2), rtol=1e-4)
    pulled = jax.vjp(lambda k: pool_filters(k, 2), kernel)[1](jnp.ones((2, 2, 2, 3)))[0]
    np.testing.assert_array_equal(pulled, 1)
    apply = lambda k, x: convolved(x, k, 1).mean((1, 2))  # noqa: E731
    np.testing.assert_array_equal(downsampled(apply, False)(kernel, image), apply(kernel, image))
    whole, little = (rx.flops(apply, *at).total for at in ((kernel, image), (pool_filters(kernel, 2), small)))
    assert whole / little == (7 * 7 * 4 * 4) / (4 * 4 * 2 * 2)


def test_sweeps_end_where_no_single_change_helps():
    a, b = jnp.asarray(DRAW.normal(size=(9, 5)), jnp.float32), jnp.asarray(DRAW.normal(size=9), jnp.float32)
    values = jnp.array([-1.0, 0.0, 1.0])
    loss = lambda w: jnp.sum((jnp.tanh(a @ w) - b) ** 2)  # noqa: E731
    sweep = jax.jit(lambda w: coordinate_sweep(loss, w, values, jnp.arange(5)))
    w, losses = jnp.zeros(5), [float(loss(jnp.zeros(5)))]
    for _ in range(8):
        before, (w, now) = w, sweep(w)
        losses.append(float(now))
    assert losses == sorted(losses, reverse=True)
    assert losses[-1] < losses[0]
    np.testing.assert_array_equal(w, before)
    neighbours = jnp.stack([w.at[i].set(value) for i, value in itertools.product(range(5), values)])
    assert float(jax.jit(jax.vmap(loss))(neighbours).min()) >= losses[-1] - 1e-5
