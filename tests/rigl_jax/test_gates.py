"""L0 gates and variational dropout against sampling."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from rigl_jax import gates
from tests.errors import refused

N = 400_000


@pytest.mark.parametrize("log_alpha", [-2.0, 0.3, 2.5])
def test_the_probability_of_an_open_gate(log_alpha):
    drawn = np.asarray(gates.hard_concrete(jax.random.key(0), jnp.full(N, log_alpha)))
    assert drawn.min() >= 0
    assert drawn.max() <= 1
    p = float(gates.probability_open(jnp.float32(log_alpha)))
    assert (drawn > 0).mean() == pytest.approx(p, abs=4 * np.sqrt(p * (1 - p) / N))
    # the mass at 1, from the same formula seen from the other end
    full = 1 / (1 + np.exp(-(log_alpha - 2 / 3 * np.log((1 - gates.GAMMA) / (gates.ZETA - 1)))))
    assert (drawn == 1).mean() == pytest.approx(full, abs=4 * np.sqrt(full * (1 - full) / N))


def test_published_value():
    assert float(gates.probability_open(jnp.float32(0.3))) == pytest.approx(0.8697, abs=5e-5)
    tree = {"a": jnp.full((3, 2), 0.3), "b": jnp.full(4, 0.3)}
    assert float(gates.expected_l0(tree)) == pytest.approx(8.697, abs=5e-4)


def test_draws_have_the_distribution_of_the_definition():
    """Quantiles of the stretched sigmoid are monotone in those of the uniform."""
    drawn = np.quantile(np.asarray(gates.hard_concrete(jax.random.key(1), jnp.full(N, 0.5))), [0.2, 0.4, 0.6])
    u = np.array([0.2, 0.4, 0.6])
    s = 1 / (1 + np.exp(-(np.log(u / (1 - u)) + 0.5) / (2 / 3)))
    np.testing.assert_allclose(drawn, np.clip(s * 1.2 - 0.1, 0, 1), atol=5e-3)


def test_gates_learn_and_stay_finite():
    slope = jax.grad(lambda a: gates.hard_concrete(jax.random.key(2), a).sum())(jnp.zeros(1000))
    assert np.isfinite(slope).all()
    assert (np.asarray(slope) >= 0).all()
    assert (np.asarray(slope) > 0).any()
    assert (jax.grad(gates.expected_l0)(jnp.array([-3.0, 0.0, 3.0])) > 0).all()
    short = gates.hard_concrete(jax.random.key(3), jnp.zeros(1000, jnp.bfloat16))
    assert short.dtype == jnp.bfloat16
    assert np.isfinite(np.asarray(short, np.float32)).all()


def test_the_trained_gate():
    found = gates.hard_concrete_mean(jnp.array([-9.0, -1.0, 1.0, 9.0]))
    s = 1 / (1 + np.exp(np.array([1.0, -1.0])))
    np.testing.assert_allclose(found, [0, *(s * 1.2 - 0.1), 1], rtol=1e-5)


def test_the_divergence_against_its_integral():
    """The exact values are by quadrature; the authors' fit is within 0.01 of them."""
    table = {-4: 2.6258, -2: 1.5442, 0: 0.4267, 1: 0.1732, 2: 0.0662, 3: 0.0247, 5: 0.0034, 8: 0.0002}
    fit = {-4: 2.6342, -2: 1.5405, 0: 0.4312, 1: 0.1780, 2: 0.0684, 3: 0.0254, 5: 0.0034}
    found = np.array([float(gates.variational_kl(jnp.float32(a))) for a in table])
    np.testing.assert_allclose(found, list(table.values()), atol=0.01)
    np.testing.assert_allclose(found[: len(fit)], list(fit.values()), atol=6e-5)


def test_a_gate_costs_by_the_number_and_the_squares_of_its_weights():
    rng = np.random.default_rng(0)
    weights = {"dense": rng.normal(size=(4, 3)), "conv": rng.normal(size=(3, 3, 2, 5))}
    log_alphas = {"dense": rng.normal(size=(4, 1)), "conv": rng.normal(size=(1, 1, 1, 5))}
    expected = 0.0
    for name, axes in (("dense", 1), ("conv", (0, 1, 2))):
        w, n = weights[name], weights[name].size / log_alphas[name].size
        opens = 1 / (1 + np.exp(-(log_alphas[name].ravel() + 2 / 3 * np.log(11))))
        expected += np.sum(opens * (0.7 * n + 0.3 * np.sum(w**2, axis=axes) / 2))
    given = jax.tree.map(jnp.asarray, (log_alphas, weights))
    assert float(gates.l0_penalty(*given, 0.7, precision=0.3)) == pytest.approx(expected, rel=1e-5)
    single = {"w": jnp.array([0.3, -2.0])}
    assert gates.l0_penalty(single, single, 1.0) == gates.expected_l0(single)
    for call, words in (
        (lambda: gates.l0_penalty(log_alphas, {"dense": weights["dense"]}, 1.0), "weights"),
        (lambda: gates.l0_penalty({"w": jnp.zeros(3)}, {"w": jnp.zeros((3, 4))}, 1.0), "log_alphas"),
        (lambda: gates.l0_penalty(single, single, -1.0), "strength"),
    ):
        with refused("l0_penalty", words):
            call()


def test_the_divergence_vanishes_and_falls():
    values = [float(gates.variational_kl(jnp.float32(a))) for a in (-8, -3, 0, 3, 8, 30)]
    assert values == sorted(values, reverse=True)
    assert abs(values[-1]) < 1e-5
    tree = {"a": jnp.zeros((2, 3)), "b": jnp.zeros(2)}
    assert float(gates.variational_kl(tree)) == pytest.approx(8 * values[2], rel=1e-5)


def test_log_alpha():
    found = gates.log_alpha(jnp.array([2.0, 0.0, 1e3]), jnp.array([0.0, -4.0, -9.0]))
    np.testing.assert_allclose(found, [-np.log(4.0), 8.0, -8.0], rtol=1e-5)


def test_outputs_have_the_moments_of_noisy_weights():
    x = jax.random.normal(jax.random.key(4), (1, 5))
    w, log_sigma2 = jax.random.normal(jax.random.key(5), (5, 2)), jnp.linspace(-2.0, 0.0, 10).reshape(5, 2)
    by_outputs = np.asarray(gates.variational_matmul(jax.random.key(6), jnp.tile(x, (N, 1)), w, log_sigma2))
    mean, variance = x @ w, x**2 @ jnp.exp(log_sigma2)
    np.testing.assert_allclose(by_outputs.mean(0), mean[0], atol=0.02)
    np.testing.assert_allclose(by_outputs.var(0), variance[0], rtol=0.02)


def test_an_example_of_zeros_has_gradients():
    f = lambda s: gates.variational_matmul(jax.random.key(0), jnp.zeros((2, 3)), jnp.ones((3, 2)), s).sum()  # noqa: E731
    assert np.isfinite(jax.grad(f)(jnp.zeros((3, 2)))).all()
