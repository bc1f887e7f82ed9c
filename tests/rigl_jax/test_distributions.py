import functools
import math

import hypothesis
import hypothesis.strategies as st
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import rigl_jax as rx
from tests.errors import refused

LENET = {"layer1": (784, 300), "layer2": (300, 100), "layer3": (100, 10)}


def struct(shapes):
    return {name: jax.ShapeDtypeStruct(shape, jnp.float32) for name, shape in shapes.items()}


def resnet50():
    """ResNet-50's 54 kernels in HWIO, named as in the authors' tables."""
    shapes = {"conv1": (7, 7, 3, 64)}
    channels = 64
    for stage, (blocks, width) in enumerate(((3, 64), (4, 128), (6, 256), (3, 512)), start=2):
        for block in range(blocks):
            prefix = f"res{stage}{'abcdef'[block]}_branch"
            if block == 0:
                shapes[prefix + "1"] = (1, 1, channels, 4 * width)
            shapes[prefix + "2a"] = (1, 1, channels, width)
            shapes[prefix + "2b"] = (3, 3, width, width)
            shapes[prefix + "2c"] = (1, 1, width, 4 * width)
            channels = 4 * width
    return {**shapes, "fc1000": (2048, 1000)}


# Published and recomputed vectors: sparsity per layer.
VECTORS = [
    (rx.erdos_renyi, {"a": (8, 6), "b": (4, 3)}, 0.7, [0.736111, 0.472222]),
    (rx.erdos_renyi, {"a": (80, 4), "b": (20, 20)}, 0.8, [0.695161, 0.883871]),
    (rx.erk, {"b": (128,), "w": (128, 128)}, 0.9, [0.0, 0.906982]),
    (rx.erk, {"a": (2, 4), "b": (2, 3)}, 0.4, [0.386364, 0.318182]),
    (rx.erk, LENET, 0.8, [0.837759, 0.530638, 0.0]),
    (rx.erk, LENET, 0.9, [0.920432, 0.769811, 0.0]),
    (rx.erk, LENET, 0.95, [0.961516, 0.888666, 0.081493]),
    (rx.erk, LENET, 0.98, [0.984606, 0.955466, 0.632597]),
    (rx.erk, LENET, 0.99, [0.992303, 0.977733, 0.816299]),
]


@pytest.mark.parametrize(("distribution", "shapes", "sparsity", "expected"), VECTORS)
def test_vectors(distribution, shapes, sparsity, expected):
    np.testing.assert_allclose(list(distribution(shapes, sparsity).values()), expected, atol=6e-7)


CONVOLUTIONS = {"1": (3, 3, 3, 16), "2": (3, 3, 16, 32), "3": (3, 3, 32, 64), "4": (64, 10)}


@pytest.mark.parametrize(
    ("distribution", "densities"),
    [
        (rx.erk, [0.566298, 0.114675, 0.054152, 1.0]),
        (rx.erdos_renyi, [0.619360, 0.146691, 0.073345, 0.180918]),
    ],
)
def test_convolutions(distribution, densities):
    # These figures solve for the budget unrounded; the authors' loop floors the zeros of each layer in it.
    found = [1 - value for value in distribution(CONVOLUTIONS, 0.9).values()]
    np.testing.assert_allclose(found, densities, rtol=1.1e-3)


@pytest.mark.parametrize(
    ("sparsity", "zeros"),
    [
        (0.8, [197040, 15919, 0]),
        (0.9, [216485, 23094, 0]),
        (0.95, [226148, 26659, 81]),
        (0.98, [231579, 28663, 632]),
        (0.99, [233389, 29331, 816]),
    ],
)
def test_lenet_counts(sparsity, zeros):
    plan = rx.make_plan(struct(LENET), sparsity)
    assert [math.prod(leaf.shape) - leaf.n_active for leaf in plan.values()] == zeros


def test_mnist_script_with_custom_sparsities_outside_the_total():
    fixed = {"layer2": 0.9 * 0.98, "layer3": 0.0}
    plan = rx.make_plan(struct(LENET), 0.98, sparsities={"layer3": 0.0})
    assert math.prod(LENET["layer3"]) == plan["layer3"].n_active
    total = sum(leaf.n_active for leaf in plan.values())
    assert abs(total - 0.02 * 266_200) <= 2  # counted in the budget
    # The authors' rule: fixed layers are left out, so the others have the sparsity asked for.
    plan = rx.make_plan(struct(LENET), 0.98, sparsities=fixed, count_fixed=False)
    assert [math.prod(leaf.shape) - leaf.n_active for leaf in plan.values()] == [230496, 26460, 0]


RESNET50_ZEROS_AT_80 = {
    "conv1": 1343,
    "res2a_branch2a": 0,
    "res2a_branch2b": 23522,
    "res2a_branch2c": 0,
    "res2b_branch2a": 0,
    "res3a_branch2a": 0,
    "res3a_branch2b": 121370,
    "res3a_branch2c": 1617,
    "res3a_branch1": 54409,
    "res3b_branch2a": 1617,
    "res4a_branch2a": 54409,
    "res4a_branch2b": 538251,
    "res4a_branch2c": 134505,
    "res4a_branch1": 371162,
    "res4b_branch2a": 134505,
    "res5a_branch2a": 371162,
    "res5a_branch2b": 2256747,
    "res5a_branch2c": 793499,
    "res5a_branch1": 1791099,
    "res5b_branch2a": 793499,
    "fc1000": 1744536,
}


def test_resnet50_table():
    shapes = resnet50()
    assert len(shapes) == 54
    assert sum(math.prod(shape) for shape in shapes.values()) == 25_502_912
    plan = rx.make_plan(struct(shapes), 0.8)
    zeros = {name: math.prod(leaf.shape) - leaf.n_active for name, leaf in plan.items()}
    for name, expected in RESNET50_ZEROS_AT_80.items():
        assert zeros[name] == expected, name
    for name, shape in shapes.items():  # equal shapes get equal counts
        twin = next(other for other in RESNET50_ZEROS_AT_80 if shapes[other] == shape)
        assert zeros[name] == RESNET50_ZEROS_AT_80[twin], name


@hypothesis.given(
    st.lists(st.tuples(st.integers(1, 40), st.integers(1, 40)), min_size=1, max_size=6),
    st.floats(0, 0.99),
    st.sampled_from([rx.erk, rx.erdos_renyi, rx.uniform]),
)
def test_totals_are_within_a_unit_for_each_layer(layers, sparsity, distribution):
    shapes = {str(i): shape for i, shape in enumerate(layers)}
    total = sum(math.prod(shape) for shape in layers)
    if math.floor(sparsity * total + 1e-6) > total - len(layers):
        with refused("sparsity"):
            rx.make_plan(struct(shapes), sparsity, distribution)
        return
    shared = distribution(shapes, sparsity)
    assert all(0 <= value < 1 for value in shared.values())
    plan = rx.make_plan(struct(shapes), sparsity, distribution)
    total = sum(math.prod(shape) for shape in layers)
    active = sum(leaf.n_active for leaf in plan.values())
    assert abs(active - (1 - sparsity) * total) <= 2 * len(layers)
    assert all(1 <= leaf.n_active <= math.prod(leaf.shape) for leaf in plan.values())


def test_erk_power():
    flat = rx.erk(LENET, 0.9, power=0.0)
    np.testing.assert_allclose(list(flat.values()), 0.9, atol=2e-5)
    steep = rx.erk(LENET, 0.9, power=1.5)
    assert steep["layer1"] > rx.erk(LENET, 0.9)["layer1"]
    assert rx.make_plan(struct(LENET), 0.9, functools.partial(rx.erk, power=0.0))["layer1"].n_active == 23_520


def test_sparsity_0_is_dense_everywhere():
    assert set(rx.erk(resnet50(), 0.0).values()) == {0.0}
    plan = rx.make_plan(struct(LENET), 0.0)
    assert all(leaf.n_active == math.prod(leaf.shape) for leaf in plan.values())


@pytest.mark.parametrize("distribution", [rx.erk, rx.erdos_renyi, rx.uniform])
@pytest.mark.parametrize("sparsity", [1.0, -0.1, 1.2, float("nan")])
def test_sparsity_out_of_range(distribution, sparsity):
    with refused("sparsity"):
        distribution(LENET, sparsity)
    with refused("sparsity"):
        rx.make_plan(struct(LENET), sparsity, distribution)


def test_unreachable_target_names_the_largest():
    with refused("sparsity", "0.116446"):
        rx.make_plan(struct(LENET), 0.9, sparsities={"layer1": 0.0})
    with refused("sparsity", "0.5"):
        rx.make_plan(struct(LENET), 0.5, sparsities={"layer1": 0.99})


def test_every_layer_fixed():
    plan = rx.make_plan(struct(LENET), 0.9, sparsities={".*": 0.5})
    assert [leaf.n_active for leaf in plan.values()] == [117_600, 15_000, 500]


def test_at_least_one_connection():
    plan = rx.make_plan(struct({"w": (2, 2), "v": (100, 100)}), 0.9, rx.uniform, rounding=math.ceil)
    assert plan["w"].n_active == 1


@pytest.mark.parametrize(
    ("sparsity", "rounding", "active"),
    [(0.85, math.floor, 2), (0.95, math.floor, 1), (0.99, math.floor, 1), (0.94, round, 1)],
)
def test_what_rounding_reaches_is_planned(sparsity, rounding, active):
    plan = rx.make_plan(struct({"w": (2, 5)}), sparsity, rounding=rounding)
    assert plan["w"].n_active == active


@pytest.mark.parametrize(
    ("structure", "sparsity", "active"),
    [
        (rx.fan_in(), 0.8, 1),
        (rx.fan_in(), 0.95, 1),
        (rx.channel(), 0.9, 1),
        (rx.block(2, 2), 0.95, 1),
        (rx.fan_in(), 0.74, 2),
    ],
)
def test_what_rounding_reaches_is_planned_in_every_structure(structure, sparsity, active):
    plan = rx.make_plan(struct({"kernel": (4, 6)}), sparsity, rules=[(".*", structure)])
    assert plan["kernel"].n_active == active


def test_what_rounding_reaches_beside_a_fixed_layer_is_planned():
    shapes = struct({"fixed": (4, 5), "w": (2, 5)})
    assert rx.make_plan(shapes, 19.5 / 30, sparsities={"fixed": 0.5})["w"].n_active == 1
    with refused("0.333333", "0.5"):  # of two tiles one stays
        rx.make_plan(shapes, 21 / 30, sparsities={"fixed": 0.5}, rules=[("w", rx.block(1, 5)), (".*", rx.fan_in())])


@pytest.mark.parametrize("rounding", [round, math.ceil])
def test_what_rounding_does_not_reach_is_refused(rounding):
    with refused("sparsity", "0.9"):
        rx.make_plan(struct({"w": (2, 5)}), 0.96, rounding=rounding)


def test_a_product_next_to_an_integer_is_that_integer():
    plan = rx.make_plan(struct({"w": (10, 10)}), 0.57, rx.uniform)  # 0.57 * 100 is 56.99999999999999
    assert plan["w"].n_active == 43


@pytest.mark.parametrize(("rounding", "active"), [(math.floor, 7), (math.ceil, 6), (round, 6)])
def test_rounding(rounding, active):
    assert rx.make_plan(struct({"w": (9, 7)}), 0.9, rx.uniform, rounding=rounding)["w"].n_active == active


def test_rules_first_match_wins():
    params = struct({"conv1": (3, 3, 3, 8), "conv2": (3, 3, 8, 8), "bias": (8,)})
    plan = rx.make_plan(params, 0.9, rx.uniform, rules=[("conv1", None), ("conv.*", rx.unstructured()), (".*", None)])
    assert list(plan) == ["conv2"]
    assert plan["conv2"].n_active == 58


def test_a_leaf_too_large_to_count_is_refused():
    with refused("w"):
        rx.make_plan({"w": jax.ShapeDtypeStruct((2**16, 2**15), "float32")}, 0.9)


@pytest.mark.parametrize(
    "dtype", ["float8_e4m3fn", "float8_e5m2", "float4_e2m1fn", "int4", "int8", "complex64", "bool"]
)
def test_weights_of_a_type_that_cannot_be_trained_sparse_are_refused_by_name(dtype):
    params = {"a": jnp.ones((4, 4)), "b": jax.ShapeDtypeStruct((4, 4), jnp.dtype(dtype))}
    with refused("b", dtype):
        rx.make_plan(params, 0.5)
    assert list(rx.make_plan(params, 0.5, rules=[("a", rx.unstructured()), ("b", None)])) == ["a"]
