"""Ranks, noise, dead units and fairness against counting, sampling and enumeration."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import rigl_jax as rx
from rigl_jax import diagnostics
from rigl_jax.diagnostics.fairness import class_of
from tests.errors import refused

DRAW = np.random.default_rng(0)


def test_a_distribution_in_proportion():
    shapes = {"a": (10, 10), "b": (10, 20), "c[0]": (5, 4), "c[1]": (5, 4)}
    density = lambda found: {name: 1 - share for name, share in found.items()}  # noqa: E731
    found = density(rx.proportional({"a": 3, "b": 1.0, "c": 2})(shapes, 0.8))
    assert found["a"] / found["b"] == pytest.approx(3)
    assert found["c[0]"] == found["c[1]"] == pytest.approx(2 * found["b"])
    assert sum(found[name] * np.prod(shape) for name, shape in shapes.items()) == pytest.approx(0.2 * 340)
    full = density(rx.proportional({"a": 1000, "b": 1, "c": 0})(shapes, 0.5))
    assert full["a"] == 1
    assert full["b"] * 200 == pytest.approx(70)
    assert full["c[0]"] < 1e-6
    only = density(rx.proportional({"a": 1, "b": 0, "c": 0})(shapes, 0.5))  # the others share what a cannot take
    assert only["a"] == 1
    assert only["b"] == pytest.approx(only["c[1]"])
    plan = rx.make_plan({"w": jnp.ones((4, 4)), "v": jnp.ones((4, 4))}, 0.5, rx.proportional({"w": 0.0, "v": 1.0}))
    assert [plan[name].n_active for name in ("w", "v")] == [1, 16]  # no leaf is left empty
    with refused("proportional", "numbers"):
        rx.proportional({"a": 1})(shapes, 0.8)
    with refused("proportional", "numbers"):
        rx.proportional({"a": -1})


def test_dead_units_are_counted():
    images = np.maximum(DRAW.normal(size=(20, 3, 3, 6)), 0)
    images[:, 0, 0] = 1  # none is dead by chance
    images[..., 0] = 0
    images[:7, ..., 1] = 0
    assert [float(share) for share in diagnostics.dead_rate(images)] == pytest.approx([1 / 6, 7 / 20 / 6])


X = jnp.asarray(DRAW.normal(size=(40, 8)), jnp.float32)
A = jnp.asarray(DRAW.normal(size=(8, 6)), jnp.float32)


def loss(params, x):
    return jnp.mean(jnp.square(jnp.tanh(x @ params["a"]) @ params["b"]))


def test_a_unit_that_is_there_twice_adds_no_rank():
    b = jnp.asarray(DRAW.normal(size=(6, 3)), jnp.float32)
    params = {"a": A, "b": b}
    twice = {"a": A.at[:, 5].set(A[:, 0]), "b": b.at[5].set(b[0])}
    found = diagnostics.gradient_ranks(loss, twice, X, energy=1.0)
    assert found == pytest.approx({"a": 3 / 6, "b": 1.0}) or found == pytest.approx({"a": 5 / 6, "b": 1.0})
    full = diagnostics.gradient_ranks(loss, params, X, energy=1.0)
    assert full["a"] - found["a"] == pytest.approx(1 / 6)
    assert diagnostics.gradient_ranks(loss, twice, X[::-1], energy=1.0) == pytest.approx(found)
    assert list(diagnostics.gradient_ranks(loss, params, X, leaves=["b"])) == ["b"]


def test_noise_of_sigma_is_relative():
    y = jnp.asarray(DRAW.normal(3, 2, size=4000), jnp.float32)
    noise = diagnostics.agn(jax.random.key(0), y, -0.5) - y
    assert float(jnp.std(noise)) == pytest.approx(0.5 * float(jnp.std(y)), rel=0.05)


def test_the_layer_that_matters_tolerates_less():
    """Products of variance 1: the optimum is where the slopes of loss and reward meet, 2 c sigma = weight share."""
    params, x = {"a": jnp.eye(4), "b": jnp.eye(4)}, jnp.asarray(DRAW.choice([-1.0, 1.0], (400, 4)), jnp.float32)

    def quadratic(params, x):
        return jnp.mean(jnp.square(x @ params["a"]) + 4 * jnp.square(x @ params["b"]))

    found = diagnostics.noise_tolerance(quadratic, params, x, jax.random.key(0), weight=1.0, largest=2.0)
    assert found == pytest.approx({"a": 1 / 4, "b": 1 / 16}, abs=0.02)


def test_error_of_a_multiplier_by_sampling():
    error, p_x, p_w = DRAW.normal(2, 3, size=(16, 16)), DRAW.dirichlet(np.ones(16)), DRAW.dirichlet(np.ones(16))
    x, w = (DRAW.choice(16, (20_000, 27), p=p) for p in (p_x, p_w))
    told = diagnostics.error_std(error, p_x, p_w, 27)
    assert np.std(error[x, w].sum(axis=1)) == pytest.approx(told, rel=0.03)
    with refused("error_std", "p_w"):
        diagnostics.error_std(error, p_x, 2 * p_w, 27)


def test_edges_that_carry_bias():
    found = diagnostics.biased_edges([[1.0, 0.0], [2.0, -1.0]], [0.5, 0.1], [0.0, 0.2])
    np.testing.assert_allclose(found, [[np.inf, 0], [1, 0.5]])
    with refused("biased_edges", "accuracy"):
        diagnostics.biased_edges(np.ones((2, 2)), [1, 1], [1, -1])


def small_net(seed, outputs):
    draw = np.random.default_rng(seed)
    sizes = (3, 4, 3, outputs)
    return [(draw.integers(-4, 5, (a, b)) / 4, draw.integers(-4, 5, b) / 4) for a, b in itertools.pairwise(sizes)]


@pytest.mark.parametrize("outputs", [1, 3])
def test_fairness_is_what_enumeration_says(outputs):
    """All features are whole, so that every pair can be tried; both answers come up."""
    pytest.importorskip("z3")
    low, high, verdicts = [0, -1, 0], [2, 1, 1], set()
    for seed in range(8):
        net = small_net(seed, outputs)
        points = itertools.product(*(range(a, b + 1) for a, b in zip(low, high, strict=True)))
        classes = {x: class_of(net, x) for x in points}
        pairs = [(classes[x], classes[(*x[:2], 1)]) for x in classes if x[2] == 0]
        unfair = any(None not in pair and pair[0] != pair[1] for pair in pairs)
        found = diagnostics.individual_fairness(net, low, high, [2], whole=[0, 1, 2])
        assert found.verdict == ("unfair" if unfair else "fair"), seed
        verdicts.add(found.verdict)
        if unfair:
            a, b = found.pair
            assert (a[:2] == b[:2]).all()
            assert tuple(map(int, a)) in classes
            assert found.classes == (classes[tuple(map(int, a))], classes[tuple(map(int, b))])
            assert found.classes[0] != found.classes[1]
    assert verdicts == {"fair", "unfair"}


def test_fairness_does_not_guess():
    """A feature that nothing reads is fair on a real box; without time nothing is known."""
    pytest.importorskip("z3")
    net = [(np.array([[1.0, -1.0], [0.0, 0.0]]), np.zeros(2)), (np.array([[1.0, 0.5], [-1.0, 2.0]]), np.zeros(2))]
    assert diagnostics.individual_fairness(net, [-1, 0], [1, 1], [1]).verdict == "fair"
    draw = np.random.default_rng(0)
    wide = [(draw.integers(-8, 9, (a, b)) / 8, np.zeros(b)) for a, b in itertools.pairwise((9, 24, 24, 2))]
    found = diagnostics.individual_fairness(wide, -np.ones(9), np.ones(9), [0], seconds=0.001)
    assert (found.verdict, found.pair) == ("unknown", None)
    assert found.why


def test_fairness_refuses_before_it_needs_the_solver():
    with refused("individual_fairness", "layers"):
        diagnostics.individual_fairness([(np.ones((3, 2)), np.zeros(2))], [0, 0], [1, 1], [1])
    with refused("individual_fairness", "protected"):
        diagnostics.individual_fairness([(np.ones((2, 2)), np.zeros(2))], [0, 0], [1, 1], [2])
