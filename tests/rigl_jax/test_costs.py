"""Costs of training and of storage, against the figures of the papers and by hand."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from rigl_jax import make_plan, rigl, snfs, static
from rigl_jax.base import Algorithm
from rigl_jax.costs import micronet_bits, micronet_flops, training_cost
from rigl_jax.tracing.flops import flops


def algorithm(dense_grads):
    return Algorithm(init=None, update=None, due=None, dense_grads=dense_grads)


@pytest.mark.parametrize(
    ("dense_grads", "expected"),
    [
        (lambda step: False, 0.2),
        (lambda step: step % 101 == 100, 0.20264),  # the paper's 100 ordinary steps and one that rewires
        (lambda step: True, 0.46667),
    ],
    ids=["static", "rigl", "snfs"],
)
def test_training_cost_of_the_paper(dense_grads, expected):
    cost = training_cost(algorithm(dense_grads), sparse=0.2, dense=1.0, steps=101 * 7)
    assert cost / 3 == pytest.approx(expected, abs=5e-6)


def test_training_cost_follows_a_sparsity_that_changes():
    # Gradual pruning of ResNet-50 to 80 % (.2254 of the FLOPs), cubic from step 10k to 25k of 32k, every 1k steps. The
    # reference figure is the mean over the 33 points 0, 1k, ... 32k; over the 32,000 steps it is a little more.
    def forward(step):
        return 1 - (1 - 0.2254) * (1 - (1 - np.clip((step // 1000 - 10) / 15, 0, 1)) ** 3)

    static = algorithm(lambda step: False)
    assert training_cost(static, forward(1000 * np.arange(33)), 1.0, 33) / 3 == pytest.approx(0.5603, abs=5e-5)
    assert training_cost(static, forward(np.arange(32_000)), 1.0, 32_000) / 3 == pytest.approx(0.5707, abs=5e-5)


@pytest.mark.parametrize(
    ("make", "dense"),
    [(static, 0), (partial(rigl, period=100, start=100, stop=None), 2)],  # steps 100 and 200
    ids=["static", "rigl"],
)
def test_training_cost_of_our_algorithms(make, dense):
    made = make(make_plan({"w": jnp.zeros((8, 8))}, sparsity=0.5))
    assert training_cost(made, 0.5, 1.0, 250) == pytest.approx((250 * 1.5 + dense * 0.5) / 250)


def test_micronet_convention_by_hand():
    shapes = {"k": (3, 3, 2, 5), "w": (5, 4)}
    params = {name: jax.ShapeDtypeStruct(shape, jnp.float32) for name, shape in shapes.items()}

    def apply(p, x):
        numbers = ("NHWC", "HWIO", "NHWC")
        y = jax.lax.conv_general_dilated(x, p["k"], (1, 1), "SAME", dimension_numbers=numbers)
        return y.mean((1, 2)) @ p["w"]

    counted = flops(apply, params, jax.ShapeDtypeStruct((1, 6, 6, 2), jnp.float32))
    outputs = 6 * 6 * 5
    assert micronet_flops(counted) == (2 * 18 * outputs + outputs) + (2 * 5 * 4 + 4)
    half = counted._replace(density={"k": 0.5, "w": 1.0})
    assert micronet_flops(half) == (2 * 9 * outputs + outputs) + (2 * 5 * 4 + 4)
    assert micronet_bits(shapes, {}) == 32 * (90 + 5 + 20 + 4)
    assert micronet_bits(shapes, {"k": 0.5}) == 32 * (45 + 5 + 20 + 4) + 90


def test_training_cost_of_billions_of_steps_takes_little_memory_and_by_closed_forms_no_time():
    plan = make_plan({"w": np.ones((8, 8))}, 0.75)
    asked = []

    def watched(step):
        asked.append(len(step))
        return step % 100 == 0

    assert training_cost(static(plan), 0.2, 1.0, 2**31 - 1) == pytest.approx(0.6)
    assert training_cost(snfs(plan), 0.2, 1.0, 2**31 - 1) == pytest.approx(1.4)
    assert training_cost(rigl(plan, period=100), 0.2, 1.0, 2**31 - 1) == pytest.approx(0.4 + 0.99 * 0.2 + 0.01)
    n = 5_000_000
    watching = static(plan)._replace(dense_grads=watched)
    assert training_cost(watching, 0.2, 1.0, n) == pytest.approx(0.4 + 0.99 * 0.2 + 0.01)
    assert training_cost(watching, np.linspace(0, 1, n), 1.0, n) == pytest.approx(1 + 0.99 * 0.5 + 0.01)
    assert max(asked) < n / 2
    assert sum(asked) == 2 * n
