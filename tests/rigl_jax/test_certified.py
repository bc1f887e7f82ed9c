"""Bounds against sampling, closed forms and a network that they prune; information against known values."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from rigl_jax import diagnostics
from rigl_jax.diagnostics import information
from rigl_jax.tracing.intervals import Interval
from tests.errors import refused

DRAW = np.random.default_rng(0)
SHAPES = {"conv": (3, 3, 2, 4), "scale": (4,), "mean": (4,), "skip": (3, 3, 4, 4), "w": (16, 6), "last": (6, 3)}
PARAMS = {name: jnp.asarray(DRAW.normal(size=shape), jnp.float32) for name, shape in SHAPES.items()}


def convolved(x, kernel):
    return jax.lax.conv_general_dilated(x, kernel, (1, 1), "SAME", dimension_numbers=("NHWC", "HWIO", "NHWC"))


def network(params, x):
    """Convolution, normalisation, ReLU, residual block, both poolings, dense layers."""
    x = convolved(x, params["conv"])
    x = (x - params["mean"]) * params["scale"] * jax.lax.rsqrt(params["mean"] ** 2 + 1e-3)
    x = jax.nn.relu(x)
    x = x + jax.nn.relu(convolved(x, params["skip"]))
    x = jax.lax.reduce_window(x, -jnp.inf, jax.lax.max, (1, 2, 2, 1), (1, 2, 2, 1), "VALID")
    x = jax.lax.reduce_window(x, 0.0, jax.lax.add, (1, 1, 2, 1), (1, 1, 1, 1), "VALID") / 2
    x = jnp.concatenate([x, -x], axis=-1).reshape(x.shape[0], -1)
    return jax.nn.relu(x @ params["w"]) @ params["last"]


PARAMS = {name: value[None, None, None] if value.ndim == 1 else value for name, value in PARAMS.items()}
X = jnp.asarray(DRAW.normal(size=(1, 4, 4, 2)), jnp.float32)
found = jax.jit(lambda params, x, eps: diagnostics.interval_bounds(network, params, x - eps, x + eps))
run = jax.jit(jax.vmap(lambda x: network(PARAMS, x)))


@pytest.fixture(scope="module")
def wide():
    return found(PARAMS, X, 0.05)


def test_nothing_leaves_the_bounds(wide):
    draw = np.random.default_rng(1)
    noise = jnp.asarray(draw.uniform(-0.05, 0.05, (500, *X.shape)), jnp.float32)
    corners = jnp.sign(noise) * 0.05
    values = run(jnp.concatenate([X[None] + noise, X[None] + corners]))
    slack = 1e-3 * (1 + jnp.abs(values))
    assert bool(jnp.all((values >= wide.outputs.low[None] - slack) & (values <= wide.outputs.high[None] + slack)))
    assert len(wide.relus) == 3


def test_a_box_of_one_point_has_the_output_as_bounds():
    point, exact = found(PARAMS, X, 0.0).outputs, network(PARAMS, X)
    np.testing.assert_allclose(point.low, exact, rtol=1e-4, atol=1e-4)
    np.testing.assert_allclose(point.high, exact, rtol=1e-4, atol=1e-4)


def test_an_affine_map_has_exact_bounds():
    draw = np.random.default_rng(1)
    w = draw.normal(size=(3, 2)).astype(np.float32)
    bounds = diagnostics.interval_bounds(lambda w, x: x @ w - 1, w, -np.ones((1, 3), "f"), np.ones((1, 3), "f"))
    values = np.array(list(itertools.product((-1, 1), repeat=3))) @ w - 1
    np.testing.assert_allclose(bounds.outputs.low[0], values.min(0), rtol=1e-5)
    np.testing.assert_allclose(bounds.outputs.high[0], values.max(0), rtol=1e-5)


def test_a_pruned_weight_narrows_the_interval_that_it_was_part_of(wide):
    """The other units of its layer keep theirs; those before the layer do, too."""
    pruned = found({**PARAMS, "w": PARAMS["w"].at[:8, 2].set(0)}, X, 0.05)
    for before, after in zip(wide.relus[:2], pruned.relus[:2], strict=True):
        np.testing.assert_array_equal(after.high - after.low, before.high - before.low)
    before, after = (bounds.relus[2].high - bounds.relus[2].low for bounds in (wide, pruned))
    kept = np.arange(6) != 2
    np.testing.assert_array_equal(after[:, kept], before[:, kept])
    assert float(after[0, 2]) < float(before[0, 2])


@pytest.mark.parametrize("apply", [lambda p, x: x @ x.T, lambda p, x: jax.nn.softmax(x), lambda p, x: jnp.sin(x)])
def test_what_has_no_rule_is_refused(apply):
    with refused("interval_bounds", "apply"):
        diagnostics.interval_bounds(apply, {}, np.zeros((2, 2), "f"), np.ones((2, 2), "f"))


def test_dead_units_can_go_without_any_change():
    draw = np.random.default_rng(1)
    params = {"a": draw.normal(size=(4, 30)), "b": draw.normal(size=30) - 2, "c": draw.normal(size=(30, 2))}
    params = {name: jnp.asarray(p, jnp.float32) for name, p in params.items()}
    apply = lambda p, x: jax.nn.relu(x @ p["a"] + p["b"][None]) @ p["c"]  # noqa: E731
    low, high = jnp.full((1, 4), -0.4), jnp.full((1, 4), 0.4)
    (dead,) = diagnostics.dead_units(diagnostics.interval_bounds(apply, params, low, high).relus)
    assert 3 < int(dead.sum()) < 27
    inside = jnp.asarray(draw.uniform(-0.4, 0.4, (1000, 4)), jnp.float32)
    smaller = {**params, "c": jnp.where(dead[:, None], 0, params["c"])}
    np.testing.assert_array_equal(apply(params, inside), apply(smaller, inside))


def test_certified_accuracy_falls_from_the_accuracy_to_nothing():
    draw = np.random.default_rng(1)
    x, w = jnp.asarray(draw.normal(size=(50, 4)), jnp.float32), jnp.asarray(draw.normal(size=(4, 3)), jnp.float32)
    labels = jnp.argmax(x @ w, axis=1).at[:10].add(1) % 3
    certified = jax.jit(lambda eps: diagnostics.certified_accuracy(lambda w, x: x @ w, w, x, labels, eps))
    values = [float(certified(eps)) for eps in (0.0, 0.05, 0.2, 10.0)]
    assert values[0] == pytest.approx(0.8)
    assert values[0] > values[1] > values[2] > values[3] == 0


def test_nrs_of_known_bounds():
    relus = [Interval(jnp.array([[-1.0, 1.0]]), jnp.array([[2.0, 2.0]]))]
    assert float(diagnostics.nrs(relus)) == pytest.approx((0.76159 - 0.99505) / 2, abs=1e-4)
    np.testing.assert_allclose(diagnostics.nrs_scores(relus)[0], [-0.76159, 0.99505], atol=1e-4)
    scaled = diagnostics.nrs_scores(relus, [jnp.array([2.0, 0.0])])[0]
    np.testing.assert_allclose(scaled, [np.tanh(1 - 2 / 4), 1], atol=1e-4)
    with refused("nrs", "gammas"):
        diagnostics.nrs(relus, [None, None])


# --- information


def test_effective_rank_and_mutual_information():
    draw = np.random.default_rng(1)
    matrix = draw.normal(size=(30, 5))
    rank = jax.jit(lambda m: diagnostics.effective_rank(m, 1.0 - 1e-5))
    assert int(rank(matrix)) == 5
    assert int(rank(matrix[draw.permutation(30)])) == 5
    twice = np.column_stack([matrix[:, :4], matrix[:, 0]])
    assert int(rank(twice)) == 4
    assert int(rank(0 * matrix)) == 0
    x, noise = draw.normal(size=(2, 20000))
    shared = diagnostics.mutual_information(x, 0.8 * x + 0.6 * noise, bins=30)
    assert shared == pytest.approx(-0.5 * np.log(1 - 0.64), abs=0.05)
    assert diagnostics.mutual_information(x, noise, bins=10) < 0.01


def test_o_information_in_closed_form_and_its_bias():
    draw = np.random.default_rng(1)
    s = 0.25
    total = [[1, 0, 1], [0, 1, 1], [1, 1, 2 + s]]
    assert diagnostics.o_information(total) == pytest.approx(0.5 * np.log((2 + s) * s / (1 + s) ** 2))
    copies = np.ones((3, 3)) + np.eye(3)
    assert diagnostics.o_information(copies) > 0
    assert diagnostics.o_information(np.diag([1.0, 2.0, 3.0])) == pytest.approx(0)
    assert diagnostics.o_information([[1.0, 0.5], [0.5, 1.0]]) == pytest.approx(0)
    covs = [np.cov(draw.normal(size=(20, 3)), rowvar=False) for _ in range(1500)]
    entropy = np.mean([np.linalg.slogdet(c)[1] / 2 for c in covs])  # of independent variables: truly 0
    assert information._bias(3, 20) == pytest.approx(-0.1677, abs=1e-3)
    assert entropy == pytest.approx(-0.1677, abs=0.03)
    many = [np.cov(draw.normal(size=(12, 8)), rowvar=False) for _ in range(800)]
    plain = np.mean([diagnostics.o_information(c) for c in many])
    correction = diagnostics.o_information(many[0], 12) - diagnostics.o_information(many[0])
    assert abs(plain + correction) < 0.1 * abs(correction)
    with refused("o_information", "cov"):
        diagnostics.o_information(np.ones((3, 3)))


def test_a_flow_that_no_node_has_alone():
    """M = X_0 xor X_1, and X_2 is noise."""
    bits = {(0,): 0, (1,): 0, (2,): 0, (0, 1): 1, (0, 2): 0, (1, 2): 0, (0, 1, 2): 1}
    assert diagnostics.m_flow(bits, 3).tolist() == [1, 1, 0]
    with refused("m_flow", "information"):
        diagnostics.m_flow({(0,): 1.0}, 2)
