"""The diagnostics study: its measures on networks that can be read off, and the page of its records."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from experiments.models.downsampling import pool_filters
from experiments.studies import (
    data_training,
    diagnostics,
    diagnostics_certified,
    diagnostics_dead,
    diagnostics_flow,
    diagnostics_layers,
    diagnostics_page,
    diagnostics_resolution,
    diagnostics_ternary,
    diagnostics_training,
)
from experiments.studies.data_training import Images, Problem

DRAW = np.random.default_rng(0)


@pytest.fixture(scope="module")
def problem():
    x = DRAW.normal(size=(40, 4))
    images = Images(jnp.asarray(x, jnp.float32), jnp.asarray(x[:, 0] > 0, jnp.int32))
    return Problem(images, images, x, (4, 6, 2), batch=10, epochs=5, rate=0.1)


def test_pruned_weights_stay_pruned_while_the_others_learn(problem):
    fit = diagnostics_training.make_fit(problem)
    mask = DRAW.integers(0, 2, (5, 4, 6)).astype(bool)
    mask[:, 0] = True
    masks = {"dense_0": {"kernel": mask, "bias": None}, "dense_1": {"kernel": None, "bias": None}}
    params, _ = fit.init(jax.random.key_data(data_training.keys(0)))
    start = {**params, "dense_0": {**params["dense_0"], "kernel": params["dense_0"]["kernel"] * mask}}
    found = diagnostics_training.train(fit, diagnostics_training.Trained(start, masks))
    before, after = (p["dense_0"]["kernel"] for p in (start, found.params))
    np.testing.assert_array_equal(after[~mask], 0)
    assert (after != before)[mask].all()
    accuracy = lambda params: float(diagnostics_training.accuracy(problem, params).mean())  # noqa: E731
    assert accuracy(found.params) > max(accuracy(start), 0.7)


def test_removed_units_and_certified_accuracy(problem):
    params = data_training.init(jax.random.key(1), problem.sizes)

    @jax.jit
    def run(params):
        small = diagnostics_certified._without_units(diagnostics_certified._norms, 0.5, params).params
        return small, diagnostics_certified.facts(params, problem.test, 10.0)

    small, found = run(params)
    norms = np.linalg.norm(params["dense_0"]["kernel"], axis=0)
    left = np.sort(np.argsort(norms)[3:])
    np.testing.assert_array_equal(np.flatnonzero(small["dense_0"]["kernel"].any(0)), left)
    np.testing.assert_array_equal(np.flatnonzero(small["dense_1"]["kernel"].any(1)), left)
    radii = list(found["radii"].values())
    for now in radii:
        assert now["certified"] <= now["attacked"] <= found["test"]
    for a, b in itertools.pairwise(radii):
        assert a["certified"] >= b["certified"]
        assert a["unstable"] <= b["unstable"]


def test_flow_of_a_message_that_two_nodes_carry_together():
    message = DRAW.integers(0, 2, diagnostics_flow.KNOWN + diagnostics_flow.JUDGED)
    first = DRAW.integers(0, 2, len(message))
    nodes = np.stack([first, first ^ message], axis=1) + 0.05 * DRAW.normal(size=(len(message), 2))
    np.testing.assert_allclose(diagnostics_flow.flows(nodes, message), [1, 1], atol=0.1)


def test_a_decision_by_the_protected_bit_alone():
    net = [
        (np.array([[1.0, -1.0], [0.0, 0.0]]), np.array([0.0, 1.0])),
        (np.array([[0.0, 1.0], [1.0, 0.0]]), np.zeros(2)),
    ]
    z = DRAW.integers(0, 2, 500)
    x = np.stack([z, DRAW.normal(size=500)], axis=1)
    assert diagnostics_flow.measured(net, x, z, z) == pytest.approx({"accuracy": 1, "gap": 1, "bits": 1}, abs=0.01)
    cut = diagnostics_flow.scaled(net, [(0, (0, 0)), (0, (0, 1))], 0.0)
    assert diagnostics_flow.measured(cut, x, z, z)["gap"] == 0
    assert net[0][0][0, 0] == 1
    assert len(diagnostics_flow.edges(net)) == 4


def test_layers_are_measured_by_themselves(problem):
    params = {"dense_0": {"kernel": jnp.arange(1.0, 41.0).reshape(2, 4, 5), "bias": jnp.zeros((2, 5))}}
    left = diagnostics_layers._without(params, "dense_0")["dense_0"]["kernel"]
    np.testing.assert_array_equal(left[:, -1, -2:], params["dense_0"]["kernel"][:, -1, -2:])
    assert (left != 0).sum() == 4
    copies = np.tile(DRAW.normal(size=(4, 1)), (1, 8)) + 0.1 * DRAW.normal(size=(4, 8))
    layer = {"kernel": jnp.asarray(copies, jnp.float32)[None], "bias": jnp.zeros((1, 8))}
    found = diagnostics_layers._redundancy(problem, {"dense_0": layer, "dense_1": layer}, 0)
    assert len(found) == 1
    assert found[0] > 0.5


def test_a_sweep_lowers_the_loss_and_keeps_weights_ternary(problem):
    params = diagnostics_ternary._random(problem, jax.random.key(0))
    after = jax.jit(lambda p: diagnostics_ternary._sweep(problem, p, jax.random.key(1)))(params)
    loss = lambda p: float(jnp.mean(data_training.losses(p, *problem.train)))  # noqa: E731
    assert loss(after) < loss(params)
    for name, layer in after.items():
        assert len(np.unique(np.abs(layer["kernel"]))) <= 2
        assert float(jnp.abs(layer["kernel"]).max()) == pytest.approx(float(jnp.abs(params[name]["kernel"]).max()))


def test_the_last_weights_of_a_round_go_by_how_far_they_moved(problem, monkeypatch):
    """Of 16 weights 13 stay; of the 3 that go, one goes by the second rule: the least moved, if negative for AP."""
    monkeypatch.setattr(diagnostics_dead, "AP", 0.4)
    index = np.arange(24).reshape(4, 6)

    def net(kernel):
        return {
            "dense_0": {"kernel": jnp.asarray(kernel, jnp.float32), "bias": jnp.zeros(6)},
            "dense_1": {"kernel": jnp.ones((6, 2)), "bias": jnp.zeros(2)},
        }

    end = (index + 1) / 24 * np.where(index % 2, -1, 1)
    moved = np.where(index == 22, 0.1, np.where(index == 23, 0.2, 0.5))  # a positive weight, and a negative one
    held = {"kernel": index >= 8, "bias": None}
    masks = {"dense_0": held, "dense_1": {"kernel": np.ones((6, 2), bool), "bias": None}}
    gone = {}
    for method in diagnostics_dead.METHODS:
        found = diagnostics_dead.pruned(problem, method, 3, net(end - moved), masks, net(end))["dense_0"]["kernel"]
        gone[method] = np.flatnonzero(held["kernel"] & ~np.asarray(found)).tolist()
    assert gone == {"magnitude": [8, 9, 10], "ap": [8, 9, 23], "moved": [8, 9, 22]}
    one = {"dense_0": {"kernel": -jnp.ones((4, 2)), "bias": jnp.array([0.0, 99.0])}, "dense_1": {}}
    np.testing.assert_array_equal(diagnostics_dead.hidden(one, jnp.ones((5, 4))) > 0, [[False, True]] * 5)


def test_pooled_filters_lie_on_pooled_pixels():
    """On images of constant 2 x 2 blocks, zeros at the edges included, nothing is lost."""
    kernel, small = (jnp.asarray(DRAW.normal(size=size), jnp.float32) for size in ((5, 5, 2, 3), (2, 4, 4, 6)))

    @jax.jit
    def run(kernel, small):  # channels, height, width, images
        layer = {"kernel": kernel, "bias": jnp.zeros(3)}
        large = jnp.repeat(jnp.repeat(small, 2, 1), 2, 2)
        axes = ("CHWN", "HWIO", "CHWN")
        xla = jax.lax.conv_general_dilated(large, kernel, (1, 1), "SAME", dimension_numbers=axes)
        ours = [diagnostics_resolution._convolved(layer, large, stride) for stride in (1, 2)]
        return xla, *ours, diagnostics_resolution._convolved(pool_filters(layer, 2), small, 1)

    xla, whole, strided, pooled = run(kernel, small)
    np.testing.assert_allclose(whole, xla, rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(strided, xla[:, ::2, ::2], rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(pooled, strided, rtol=1e-4, atol=1e-5)


def test_small_steps_are_as_many_as_asked_for():
    steps = diagnostics_resolution.small_steps
    assert steps("first", 0.25, 8, 0).tolist() == [True] * 2 + [False] * 6
    assert not steps("short", 0.5, 8, 0).any()
    drawn = [steps("random", 0.75, 4000, seed) for seed in (0, 1)]
    np.testing.assert_allclose([each.mean() for each in drawn], 0.75, atol=0.03)
    assert (drawn[0] != drawn[1]).any()


def test_the_page_of_diagnostics_is_up_to_date():
    records = diagnostics.read()
    assert diagnostics_page.PAGE.read_text() == diagnostics_page.page(records)
    assert records.keys() <= set(diagnostics.cells())
