"""The models' shapes, names and weight counts, the paper's FLOPs of ResNet-50; mostly without compiling."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from configs import fashion_mnist_lenet5
from experiments import build
from experiments.models import MODELS
from rigl_jax.costs import micronet_flops
from rigl_jax.tracing.flops import flops
from tests.errors import refused

IMAGES = {
    "mlp": (28, 28, 1),
    "lenet5": (28, 28, 1),
    "wide_resnet": (32, 32, 3),
    "resnet50": (224, 224, 3),
    "mobilenet": (224, 224, 3),
}
SMALL = {
    "mlp": {"features": (5,)},
    "lenet5": {"features": (2, 3, 5, 4)},
    "wide_resnet": {"depth": 10, "width": 1},
    "resnet50": {"stage_sizes": (1, 1), "num_filters": 2},
    "mobilenet": {"width": 0.25, "blocks": 2},
}


def shapes(name, num_classes=10, image=None, **options):
    """Abstract variables of a model."""
    image = jax.ShapeDtypeStruct((2, *(image or IMAGES[name])), jnp.float32)
    return jax.eval_shape(MODELS[name](num_classes, **options).init, jax.random.key(0), image)


def kernels(params):
    """Shapes of the kernels by name."""
    flat = {"/".join(k.key for k in path): leaf.shape for path, leaf in jax.tree.leaves_with_path(params)}
    return {name: shape for name, shape in flat.items() if name.endswith("kernel")}


def weights(params):
    return sum(math.prod(shape) for shape in kernels(params).values())


def test_every_model_has_its_row():
    assert set(MODELS) == set(IMAGES) == set(SMALL)


@pytest.mark.parametrize("name", MODELS)
def test_logits_are_float32_in_every_precision_and_mode(name):
    x = jax.ShapeDtypeStruct((2, *IMAGES[name]), jnp.float32)
    for dtype in (None, "bfloat16"):
        model = MODELS[name](10, dtype=dtype, **SMALL[name])
        variables = jax.eval_shape(model.init, jax.random.key(0), x)
        assert {leaf.dtype for leaf in jax.tree.leaves(variables)} == {np.dtype("float32")}

        def train(variables, x):
            rngs = {"dropout": jax.random.key(1)}
            return model.apply(variables, x, train=True, rngs=rngs, mutable=["batch_stats"])

        logits = jax.eval_shape(lambda v, x: model.apply(v, x, train=False), variables, x)
        trained, state = jax.eval_shape(train, variables, x)
        assert logits.shape == trained.shape == (2, 10)
        assert logits.dtype == trained.dtype == jnp.float32
        assert jax.tree.structure(state.get("batch_stats", {})) == jax.tree.structure(variables.get("batch_stats", {}))


@pytest.mark.parametrize("name", MODELS)
def test_bfloat16_computes_in_bfloat16(name):
    model = MODELS[name](10, dtype="bfloat16", **SMALL[name])
    x = jax.ShapeDtypeStruct((2, *IMAGES[name]), jnp.float32)
    variables = jax.eval_shape(model.init, jax.random.key(0), x)
    text = str(jax.make_jaxpr(lambda v, x: model.apply(v, x, train=False))(variables, x))
    products = [line for line in text.splitlines() if "= dot_general" in line or "= conv_general_dilated" in line]
    assert products
    assert all(":bf16[" in line for line in products)


def test_lenet_300_100():
    params = shapes("mlp")["params"]
    assert kernels(params) == {
        "Dense_0/kernel": (784, 300),
        "Dense_1/kernel": (300, 100),
        "Dense_2/kernel": (100, 10),
    }
    assert weights(params) == 266_200
    assert kernels(shapes("mlp", features=())["params"]) == {"Dense_0/kernel": (784, 10)}


def test_lenet5():
    params = shapes("lenet5")["params"]
    assert kernels(params) == {
        "conv1/kernel": (5, 5, 1, 6),
        "conv2/kernel": (5, 5, 6, 16),
        "dense1/kernel": (256, 120),
        "dense2/kernel": (120, 84),
        "logits/kernel": (84, 10),
    }
    assert weights(params) == 44_190
    for sparsity, kept in ((0.9, 4792), (0.98, 1269)):  # weights in use, in the README's table
        config = {**fashion_mnist_lenet5.get_config().to_dict(), "sparsity": sparsity}
        active = {name: leaf.n_active for name, leaf in build.plan(config, params).items()}
        assert "conv1/kernel" not in active
        assert sum(active.values()) + 150 + 236 == kept  # and the first convolution and biases
    assert kernels(shapes("lenet5", image=(16, 16, 1))["params"])["dense1/kernel"] == (16, 120)
    with refused("images"):
        shapes("lenet5", image=(8, 8, 1))


def test_wide_resnet_22_2():
    params = shapes("wide_resnet")["params"]
    assert len(kernels(params)) == 1 + 9 * 2 + 3 + 1
    assert weights(params) == 1_076_912
    assert kernels(params)["stage1_block1/shortcut/kernel"] == (1, 1, 16, 32)
    assert kernels(params)["stage3_block1/conv1/kernel"] == (3, 3, 64, 128)
    assert "shortcut" not in params["stage1_block2"]
    with refused("depth", "20"):
        shapes("wide_resnet", depth=20)


def test_dropout_acts_in_training_only():
    model = MODELS["wide_resnet"](3, depth=10, width=1, dropout=0.5)
    x = jax.random.normal(jax.random.key(1), (2, 8, 8, 1))
    rng = np.random.default_rng(0)
    variables = jax.eval_shape(model.init, jax.random.key(0), x)
    variables = jax.tree.map(lambda leaf: np.float32(rng.uniform(0.1, 1, leaf.shape)), variables)

    @jax.jit
    def train(key):
        return model.apply(variables, x, train=True, rngs={"dropout": key}, mutable=["batch_stats"])

    first, state = train(jax.random.key(2))
    other, _ = train(jax.random.key(3))
    assert not np.allclose(first, other)
    assert not np.allclose(state["batch_stats"]["bn"]["mean"], variables["batch_stats"]["bn"]["mean"])
    evaluate = jax.jit(lambda v: model.apply(v, x, train=False))
    np.testing.assert_array_equal(evaluate(variables), evaluate(variables))


def test_resnet50():
    params = shapes("resnet50", num_classes=1000)["params"]
    assert len(kernels(params)) == 54
    assert weights(params) == 25_502_912
    assert kernels(params)["conv1/kernel"] == (7, 7, 3, 64)
    assert kernels(params)["stage2_block1/conv2/kernel"] == (3, 3, 128, 128)
    assert kernels(params)["stage4_block3/conv3/kernel"] == (1, 1, 512, 2048)
    assert kernels(params)["logits/kernel"] == (2048, 1000)
    assert [name for name in params if "shortcut" in params[name]] == [f"stage{i}_block1" for i in (1, 2, 3, 4)]


def test_resnet_blocks_start_as_the_identity():
    model = MODELS["resnet50"](4, **SMALL["resnet50"])
    block = lambda key: model.init(key, jnp.zeros((1, 32, 32, 3)))["params"]["stage2_block1"]  # noqa: E731
    last, other = jax.jit(lambda key: [block(key)[name]["scale"] for name in ("bn3", "bn2")])(jax.random.key(0))
    np.testing.assert_array_equal(last, 0)
    np.testing.assert_array_equal(other, 1)


def test_mobilenet():
    params = shapes("mobilenet", num_classes=1000)["params"]
    assert sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(params)) == 4_231_976
    assert len(kernels(params)) == 1 + 2 * 13 + 1
    assert kernels(params)["block13/depthwise/kernel"] == (3, 3, 1, 1024)
    assert kernels(params)["block2/pointwise/kernel"] == (1, 1, 64, 128)
    assert kernels(shapes("mobilenet", width=0.5)["params"])["conv1/kernel"] == (3, 3, 3, 16)
    for field, value in (("width", 0), ("width", "1"), ("blocks", 14), ("blocks", True), ("dtype", "int8")):
        with refused("MobileNet", field):
            MODELS["mobilenet"](10, **{field: value})


def test_the_flops_of_resnet50():
    """Its own; tests/experiments/test_studies.py has those that the paper's counter finds."""
    model = MODELS["resnet50"](num_classes=1000)
    image = jax.ShapeDtypeStruct((1, 224, 224, 3), jnp.float32)
    variables = jax.eval_shape(model.init, jax.random.key(0), image)
    params = variables.pop("params")
    counted = flops(lambda params, rest, x: model.apply({"params": params, **rest}, x), params, variables, image)
    assert counted.other == 0
    assert sum(macs > 0 for macs in counted.macs.values()) == 54
    assert counted.macs["conv1/kernel"] == 112 * 112 * 64 * 7 * 7 * 3
    assert counted.macs["stage2_block1/conv1/kernel"] == 56 * 56 * 256 * 128  # v1.5: the stride comes later
    assert counted.total == 4_089_184_256
    assert micronet_flops(counted) == 8_189_483_496
