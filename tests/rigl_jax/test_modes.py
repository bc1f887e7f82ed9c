"""JAX's strict modes: nothing here depends on what they refuse."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import rigl_jax as rx
from rigl_jax import schedules, structures
from rigl_jax.algorithms import METHODS

pytestmark = pytest.mark.eight_devices

SHAPES = {"a": (8, 6), "b": (8, 6), "n": (8, 4), "f": (6, 5), "k": (4, 6)}
RULES = [
    ("n", structures.n_of_m(2, 4)),
    ("f", structures.fan_in()),
    ("k", structures.block(2, 2)),
    (".*", rx.unstructured()),
]
PARAMS = {name: jnp.ones(shape) for name, shape in SHAPES.items()}


def loss(params):
    return sum(jnp.sum(jnp.sin(p)) for p in params.values())


def transformation(algorithm, wrap=lambda method: method):
    plan = rx.make_plan(PARAMS, 0.5, rx.uniform, rules=RULES)
    common = {"period": 2, "stop": 6, "fraction": 0.5, "loss": loss, "rounds": 3}
    return rx.sparsify(optax.sgd(0.1), wrap(METHODS[algorithm].example(plan, **common)), key=jax.random.key(0))


@pytest.mark.parametrize("algorithm", [*rx.ALGORITHMS, "accumulate_growth"])
def test_strict_promotion(algorithm):
    """No method mixes types; optimizers are optax's (its Adam does)."""
    with jax.numpy_dtype_promotion("strict"):
        if algorithm == "accumulate_growth":
            tx = transformation("rigl", lambda method: rx.accumulate_growth(method, 2))
        else:
            tx = transformation(algorithm)
        state = jax.eval_shape(tx.init, PARAMS)
        _, after = jax.eval_shape(tx.update, PARAMS, state, PARAMS)
    assert jax.tree.structure(after) == jax.tree.structure(state)


@pytest.mark.parametrize(
    "schedule",
    [
        schedules.cosine(0.3, 10),
        schedules.cubic(0.0, 0.9, 0, 10),
        schedules.inverse_power(0.3, 10),
        schedules.stretch(schedules.cosine(0.3, 10), 2),
    ],
)
def test_schedules_under_strict_promotion(schedule):
    expected = float(schedule(5))
    with jax.numpy_dtype_promotion("strict"):
        assert float(schedule(jnp.int32(5))) == pytest.approx(expected, rel=1e-6)


def test_measures_under_strict_promotion():
    masks = {name: p.at[0].set(0) > 0 for name, p in PARAMS.items()}
    weights = sum(p.size for p in PARAMS.values())
    zeros = sum(p.shape[1] for p in PARAMS.values())
    with jax.numpy_dtype_promotion("strict"):
        assert float(jax.jit(rx.sparsity)(masks)) == pytest.approx(zeros / weights, rel=1e-6)
        shares = jax.jit(rx.topology.redistribute)(10, jnp.array([3.0, 1.0, 0.0]), jnp.array([5, 9, 9]))
    assert shares.tolist() == [5, 5, 0]


@pytest.mark.parametrize(
    ("inner", "dtype"),
    [
        (rx.per_weight_adam(0.1, warmup=3, weight_decay=0.1), jnp.float32),
        (rx.with_masters(optax.sgd(0.1)), jnp.bfloat16),
        (rx.with_masters(rx.per_weight_adam(0.1)), jnp.bfloat16),
    ],
)
def test_optimizers_under_strict_promotion(inner, dtype):
    params = {"w": jnp.array([1.0, -2.0], dtype)}
    expected, _ = inner.update(params, inner.init(params), params)
    with jax.numpy_dtype_promotion("strict"):
        updates, _ = inner.update(params, inner.init(params), params)
    assert updates["w"].tolist() == expected["w"].tolist()


def test_selection_without_jit():
    scores = jax.random.normal(jax.random.key(0), (4, 24))
    k = jnp.array([[1], [3], [0], [24]])
    expected = rx.topology.select(scores, k, axes=(1,))
    with jax.disable_jit():
        found = rx.topology.select(scores, k, axes=(1,))
    np.testing.assert_array_equal(found, expected)


def test_packed_weights_without_jit():
    """A product and a convolution on packed weights, and their gradients."""
    params = {
        "w": jax.random.normal(jax.random.key(0), (8, 6)),
        "c": jax.random.normal(jax.random.key(1), (3, 3, 2, 8)),
    }
    masks = {name: p > 0 for name, p in params.items()}
    x = jax.random.normal(jax.random.key(2), (2, 5, 5, 2))

    def objective(p, x):
        layout = ("NHWC", "HWIO", "NHWC")
        y = jax.lax.conv_general_dilated(x, p["c"], (1, 1), "SAME", dimension_numbers=layout)
        return jnp.sum(jnp.sin(y.mean((1, 2)) @ p["w"]))

    packed = rx.pack(params, masks, choose=lambda name, mask: rx.execution.kernels.make_pattern(mask))
    run = rx.run_packed(objective)
    gradient = jax.grad(lambda values: run(packed._replace(values=values), x))
    expected = jax.tree.leaves(gradient(packed.values))
    with jax.disable_jit():
        found = jax.tree.leaves(gradient(packed.values))
        assert float(run(packed, x)) == pytest.approx(float(objective(rx.apply_masks(params, masks), x)), rel=1e-4)
    for one, other in zip(found, expected, strict=True):
        assert jnp.allclose(one, other, rtol=1e-4, atol=1e-5)
