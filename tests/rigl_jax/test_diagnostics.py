"""Measures against closed forms, NumPy and each other."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import rigl_jax as rx
from rigl_jax import diagnostics
from tests.errors import refused

KEY = jax.random.key(0)
PROBS = jax.nn.softmax(2 * jax.random.normal(KEY, (200, 5)))
LABELS = jax.random.randint(jax.random.key(1), (200,), 0, 5)


def apply(params, x):
    x = jax.lax.conv_general_dilated(x, params["conv"], (1, 1), "SAME", dimension_numbers=("NHWC", "HWIO", "NHWC"))
    return x.reshape(x.shape[0], -1) @ params["w"] + params["b"]


PARAMS = {"conv": jnp.ones((3, 3, 2, 4)), "w": jnp.ones((6 * 6 * 4, 10)), "b": jnp.zeros((1, 10))}
X = jnp.ones((1, 6, 6, 2))


@pytest.mark.parametrize("wanted", [1.0, 2.0, 7.5, 20.0])
def test_density_and_compression_are_inverse(wanted):
    sizes = {name: p.size for name, p in PARAMS.items()}
    prunable = sizes["conv"] + sizes["w"]
    density = diagnostics.density_for(wanted, prunable, prunable + 10)
    plan = rx.make_plan(PARAMS, 1 - density, rx.uniform, rules=[("b", None), (".*", rx.unstructured())])
    found = diagnostics.compression(PARAMS, rx.topology.random_masks(plan, KEY, PARAMS))
    assert found == pytest.approx(wanted, rel=0.02)


def test_a_compression_out_of_reach_is_refused():
    assert diagnostics.density_for(20 / 4, 16, 20) == 0.0
    with refused("density_for", "compression"):
        diagnostics.density_for(5.1, 16, 20)
    for given in ((0.5, 16, 20), (2.0, 0, 20), (2.0, 16, 15), (2.0, True, 20)):
        with refused("density_for"):
            diagnostics.density_for(*given)
    with refused("compression", "masks"):
        diagnostics.compression({"w": jnp.ones(3)}, {"w": jnp.zeros(3, bool)})


def test_the_speedup_of_a_small_convolution_in_closed_form():
    masks = {"conv": jnp.zeros((3, 3, 2, 4), bool).at[0].set(True), "w": jnp.ones((144, 10), bool), "b": None}
    dense, sparse = 36 * 3 * 3 * 2 * 4 + 144 * 10, 36 * 3 * 2 * 4 + 144 * 10
    assert diagnostics.speedup(rx.flops(apply, PARAMS, X, masks=masks)) == pytest.approx(dense / sparse)
    assert diagnostics.speedup(rx.flops(apply, PARAMS, X)) == 1.0
    with refused("speedup", "cost"):
        diagnostics.speedup(2.0)


def test_predictions_against_numpy():
    probs, labels = np.asarray(PROBS, np.float64), np.asarray(LABELS)
    assert float(diagnostics.nll(PROBS, LABELS)) == pytest.approx(-np.log(probs[range(200), labels]).mean(), rel=1e-5)
    expected = ((probs - np.eye(5)[labels]) ** 2).sum(1).mean()
    assert float(diagnostics.brier(PROBS, LABELS)) == pytest.approx(expected, rel=1e-5)
    confidence, right, gap = probs.max(1), probs.argmax(1) == labels, 0.0
    for low in np.arange(10) / 10:
        inside = (confidence > low) & (confidence <= low + 0.1)
        if inside.any():
            gap += inside.mean() * abs(right[inside].mean() - confidence[inside].mean())
    assert float(diagnostics.ece(PROBS, LABELS, bins=10)) == pytest.approx(gap, rel=1e-4)


def test_closed_cases_of_predictions():
    """Sure and right: all is 0. Sure and wrong: the worst there is. Uniform: calibrated where 1 / classes are right."""
    sure = jnp.eye(4)
    right, wrong = jnp.arange(4), (jnp.arange(4) + 1) % 4
    assert [float(f(sure, right)) for f in (diagnostics.nll, diagnostics.brier, diagnostics.ece)] == [0, 0, 0]
    assert [float(f(sure, wrong)) for f in (diagnostics.nll, diagnostics.brier, diagnostics.ece)] == [np.inf, 2, 1]
    uniform = jnp.full((4, 4), 0.25)
    assert float(diagnostics.ece(uniform, jnp.arange(4))) == 0
    assert float(diagnostics.nll(uniform, right)) == pytest.approx(np.log(4))
    assert float(diagnostics.disagreement(sure, sure)) == 0
    assert float(diagnostics.disagreement(sure, sure[::-1])) == 1


def test_masks_overlap():
    full, half = {"w": jnp.ones((4, 4), bool), "b": None}, {"w": jnp.zeros((4, 4), bool).at[:2].set(True), "b": None}
    other = {"w": ~half["w"], "b": None}
    assert float(diagnostics.mask_overlap(full, full)) == 1
    assert float(diagnostics.mask_overlap(full, half)) == 0.5
    assert float(diagnostics.mask_overlap(half, other)) == 0
    assert float(diagnostics.mask_overlap({"w": jnp.zeros(2, bool)}, {"w": jnp.zeros(2, bool)})) == 1
    with refused("mask_overlap", "w"):
        diagnostics.mask_overlap(full, {"w": None})
    with refused("mask_overlap", "a"):
        diagnostics.mask_overlap({}, full)


@pytest.mark.parametrize("name", ["nll", "brier", "ece"])
def test_odd_predictions(name):
    measure = getattr(diagnostics, name)
    with refused(name, "labels"):
        measure(PROBS, LABELS[:5])
    with refused(name, "labels"):
        measure(PROBS, PROBS[:, 0])
    with refused(name, "probs"):
        measure(LABELS, LABELS)
    with refused(name, "probs"):
        measure(jnp.ones((200, 5), int), LABELS)
    assert float(jax.jit(measure)(PROBS, LABELS)) == pytest.approx(float(measure(PROBS, LABELS)), rel=1e-5)
