"""Step gates, and Gibbs pruning against enumerated probabilities."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import rigl_jax as rx
from tests.errors import refused

KEY = jax.random.key(0)
W = jax.random.normal(KEY, (4, 6))


def test_a_gate_learns_from_the_weight_behind_it_even_when_it_is_closed():
    tau = jax.random.normal(jax.random.key(1), W.shape)
    out, pull = jax.vjp(rx.gates.step_gate, tau, W)
    mask = np.asarray(tau) >= 0
    np.testing.assert_array_equal(out, np.where(mask, W, 0))
    g = jnp.cos(W)
    to_tau, to_w = pull(g)
    np.testing.assert_array_equal(to_tau, g * W)
    np.testing.assert_array_equal(to_w, np.where(mask, g, 0))


def test_the_penalty_alone_closes_every_gate_at_the_same_step():
    """From 0.05 by 0.1 * 0.01 a step."""
    with jax.enable_x64(True):
        tau, steps = jnp.full(3, 0.05 + 1e-12), 0
        while rx.gates.count_open(tau) > 0:
            tau = tau - 0.1 * jax.grad(lambda tau: 0.01 * rx.gates.count_open(tau))(tau)
            steps += 1
    assert steps == 51


def test_normalised_gradients_have_norm_1_in_every_unit():
    found = rx.gates.normalise_units(W * jnp.arange(6.0)[None], 0)
    np.testing.assert_allclose(np.linalg.norm(found, axis=0), [0, 1, 1, 1, 1, 1], rtol=1e-6)
    with refused("axes"):
        rx.gates.normalise_units(W, 2)
    with refused("tau"):
        rx.gates.step_gate(W[0], W)


def test_probabilities_of_open_hard_concrete_gates():
    found = rx.gates.probability_open(jnp.array([-2.0, 0.0, 0.3, 2.0]))
    np.testing.assert_allclose(found, [0.40098, 0.83182, 0.86973, 0.97337], atol=1e-5)


def test_gibbs_cools_from_one_half_to_magnitude():
    w = jax.random.normal(KEY, (300, 300))
    assert abs(float(jnp.mean(rx.gates.gibbs(KEY, w, 0.9, 0.0))) - 0.5) < 0.01
    cold = np.asarray(rx.gates.gibbs(KEY, w, 0.9, 1e4))
    assert abs(cold.mean() - 0.1) < 2e-3
    large = np.abs(w) > np.quantile(np.abs(w), 0.9)
    assert np.mean(cold != large) < 2e-3
    chance = jax.nn.sigmoid(3 * (w**2 - jnp.quantile(w**2, 0.9)))
    assert abs(float(jnp.mean(rx.gates.gibbs(KEY, w, 0.9, 3.0)) - jnp.mean(chance))) < 0.01


def enumerated(field, coupling, beta):
    """The probability of each state, the first spin slowest, and the states."""
    states = np.array(list(itertools.product((1, -1), repeat=len(field))))
    pairs = np.array([sum(x[i] * x[j] for i in range(len(x)) for j in range(len(x)) if i != j) for x in states])
    weights = np.exp(-beta * (states @ field - coupling * pairs))
    return weights / weights.sum(), states > 0


@pytest.mark.parametrize("coupling", [0.0, 0.3])
def test_kernels_and_units_are_drawn_from_their_distribution(coupling):
    n, beta, w = 20_000, 0.8, np.array([0.2, 0.9, 1.1, 0.7], np.float32)
    kernels = np.tile(w, (n, 1))
    chance, states = enumerated(np.mean(w**2) - w**2, coupling, beta)
    drawn = np.asarray(rx.gates.gibbs_kernels(KEY, jnp.asarray(kernels), 0.5, beta, (1,), coupling))
    found = np.array([np.mean((drawn == state).all(1)) for state in states])
    np.testing.assert_allclose(found, chance, atol=4 * np.sqrt(0.25 / n))
    chance, states = enumerated(np.quantile(w**2, 0.5) - w**2, coupling, beta)
    sample = lambda key: rx.gates.gibbs_units(key, jnp.asarray(w)[None], 0.5, beta, -1, coupling, 20)[0]  # noqa: E731
    drawn = np.asarray(jax.vmap(sample)(jax.random.split(KEY, n)))
    found = np.array([np.mean((drawn == state).all(1)) for state in states])
    np.testing.assert_allclose(found, chance, atol=4 * np.sqrt(0.25 / n))
    if coupling == 0:
        single = 1 / (1 + np.exp(-2 * beta * (w**2 - np.quantile(w**2, 0.5))))
        np.testing.assert_allclose(drawn.mean(0), single, atol=0.015)


def test_the_authors_sampler_of_units_is_another_chain():
    """Its probability of one spin, and how often it ends in each state; exact: enumeration, beta 0.8, coupling 0.7."""
    beta, coupling, field = 0.8, 0.7, 0.345574
    chance, states = enumerated(np.full(4, field), coupling, beta)
    given = (states[:, 1:] == [True, True, False]).all(1)
    assert float(chance[given & states[:, 0]].sum() / chance[given].sum()) == pytest.approx(0.84384, abs=5e-6)
    sigmoid = lambda x: 1 / (1 + np.exp(-x))  # noqa: E731
    assert sigmoid(-beta * (field - coupling)) == pytest.approx(0.57041, abs=1e-5)

    w, n = np.array([0.2, 0.9, 1.1, 0.7], np.float32), 20_000
    spins, fields = np.where(states, 1, -1), np.quantile(w**2, 0.5) - w**2
    move = np.ones((16, 16))  # of one sweep, from state to state
    for i, j in itertools.product(range(16), repeat=2):
        for unit in range(4):
            others = spins[i, 2:].sum() if unit < 2 else spins[j, :2].sum()
            p = sigmoid(-beta * (fields[unit] - coupling * others))
            move[i, j] *= p if states[j, unit] else 1 - p
    sample = lambda key: rx.gates.gibbs_units(  # noqa: E731
        key, jnp.asarray(w)[None], 0.5, beta, -1, coupling, 3, reference=True
    )[0]
    drawn = np.asarray(jax.vmap(sample)(jax.random.split(KEY, n)))
    found = np.array([np.mean((drawn == state).all(1)) for state in states])
    np.testing.assert_allclose(found, np.full(16, 1 / 16) @ np.linalg.matrix_power(move, 3), atol=4 * np.sqrt(0.25 / n))
    with refused("reference"):
        rx.gates.gibbs_units(KEY, W, 0.5, 1.0, reference=None)


def test_bad_arguments():
    for call, words in (
        (lambda: rx.gates.gibbs(KEY, W, 1.5, 1.0), "sparsity"),
        (lambda: rx.gates.gibbs(None, W, 0.5, 1.0), "key"),
        (lambda: rx.gates.gibbs_kernels(KEY, W, 0.5, 1.0, (0, 1)), "window"),
        (lambda: rx.gates.gibbs_units(KEY, W, 0.5, 1.0, sweeps=0), "sweeps"),
    ):
        with refused(words):
            call()
