"""What goes into products with weights and comes out: equal to the products, whatever the layer."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import rigl_jax as rx
from rigl_jax.base import Axes
from rigl_jax.tracing import capture, from_matrix, to_matrix
from tests.errors import refused

KEY = jax.random.key(0)
W = jax.random.normal(KEY, (4, 6))
X = jax.random.normal(jax.random.key(1), (5, 4))

LAYERS = {
    "dense": (nn.Dense(6), (2, 5, 4)),
    "attention": (nn.MultiHeadDotProductAttention(num_heads=3, qkv_features=12), (2, 5, 12)),
    "1-D convolution": (nn.Conv(6, (3,), strides=2), (2, 9, 4)),
    "dilated convolution": (nn.Conv(4, (3, 2), kernel_dilation=2), (2, 8, 8, 3)),
    "transposed convolution": (nn.ConvTranspose(4, (3, 3), strides=(2, 2)), (2, 4, 4, 3)),
}


def products_are_right(apply, params, *inputs, found, **options):
    out, products = jax.jit(lambda p, *xs: capture(apply, p, *xs, **options))(params, *inputs)
    np.testing.assert_allclose(out, apply(params, *inputs), rtol=1e-4, atol=1e-5)
    leaves = rx.trees.named_leaves(params)
    for name, used in products.items():
        for product in used:
            matrix = to_matrix(leaves[name], product.axes)
            np.testing.assert_allclose(product.x @ matrix, product.y, rtol=1e-4, atol=1e-4)
            np.testing.assert_array_equal(from_matrix(matrix, product.axes, leaves[name].shape), leaves[name])
    assert {name: len(used) for name, used in products.items()} == found
    return products


@pytest.mark.parametrize("name", LAYERS)
def test_layers(name):
    layer, shape = LAYERS[name]
    x = jax.random.normal(KEY, shape)
    params = layer.init(KEY, x)
    kernels = [leaf for leaf in rx.trees.named_leaves(params) if leaf.endswith("kernel")]
    products_are_right(layer.apply, params, x, found=dict.fromkeys(kernels, 1))


WAYS = {
    "left": (lambda p, x: p["w"].T @ x.T, 1),
    "twice": (lambda p, x: jnp.tanh(x @ p["w"]) @ p["w"].T, 2),
    "in jit and a checkpoint": (jax.jit(jax.checkpoint(lambda p, x: jax.nn.relu(x @ p["w"]))), 1),
    "in vmap": (lambda p, x: jax.vmap(lambda row: row @ p["w"])(x), 1),
    "of a constant": (lambda p, x: jnp.ones((2, 4)) @ p["w"] + x.sum(), 1),
    "in a gradient": (lambda p, x: jax.grad(lambda x: (x @ p["w"]).sum())(x), 2),
    "not at all": (lambda p, x: x * p["w"].sum(), 0),
}


@pytest.mark.parametrize("name", WAYS)
def test_ways_to_multiply(name):
    apply, n = WAYS[name]
    products_are_right(apply, {"w": W}, X, found={"w": n} if n else {})


def test_a_convolution_of_a_constant():
    kernel = jax.random.normal(KEY, (3, 2, 4))
    layer = lambda p, x: nn.Conv(4, (3,), use_bias=False).apply({"params": p}, jnp.ones((1, 5, 2))) + x.sum()  # noqa: E731
    products_are_right(layer, {"kernel": kernel}, X, found={"kernel": 1})


def test_stacked_layers_have_products_of_their_own():
    w, x = jax.random.normal(KEY, (3, 4, 6)), jax.random.normal(KEY, (3, 5, 4))
    apply = lambda p, x: jax.vmap(jnp.matmul)(x, p["w"])  # noqa: E731
    (product,) = products_are_right(apply, {"w": w}, x, found={"w": 1})["w"]
    assert (product.x.shape, product.y.shape, product.axes.stack) == ((3, 5, 4), (3, 5, 6), (0,))


def test_what_the_model_makes_of_a_weight_first():
    mask = W > 0
    (product,) = capture(lambda p, x: x @ jnp.where(mask, p["w"], 0), {"w": W}, X)[1]["w"]
    np.testing.assert_allclose(product.y, X @ jnp.where(mask, W, 0), rtol=1e-5)


def test_gradients_of_products():
    """The gradient of a weight is the product of the captured inputs with them; derivatives of its own are kept."""

    def apply(params, x):
        return jax.nn.relu(x @ params["w"]) @ params["w"].T

    loss = lambda out: jnp.sum(jnp.sin(out))  # noqa: E731
    params = {"w": W.at[:, 0].set(0.0)}  # a ReLU at 0
    _, shapes = jax.eval_shape(lambda: capture(apply, params, X))
    zeros = {name: [jnp.zeros(p.y.shape, p.y.dtype) for p in used] for name, used in shapes.items()}

    def added(add):
        out, products = capture(apply, params, X, add=add)
        return loss(out), products

    dy, products = jax.grad(added, has_aux=True)(zeros)
    total = sum(from_matrix(p.x.T @ d, p.axes, W.shape) for p, d in zip(products["w"], dy["w"], strict=True))
    np.testing.assert_allclose(total, jax.grad(lambda p: loss(apply(p, X)))(params)["w"], rtol=1e-4, atol=1e-5)


@jax.custom_jvp
def multiplied(x, w):
    return x @ w


multiplied.defjvp(lambda primals, tangents: (multiplied(*primals), tangents[0] @ primals[1]))
SCANNED = lambda p, x: jax.lax.scan(lambda c, _: (jnp.tanh(c @ p["w"] @ p["w"].T), None), x, None, length=2)[0]  # noqa: E731
UNSEEN = {
    "scan": SCANNED,
    "cond": lambda p, x: jax.lax.cond(x[0, 0] > 0, lambda: x @ p["w"], lambda: x @ p["w"]),
    "custom_jvp_call": lambda p, x: multiplied(x, p["w"]),
    "part": lambda p, x: x[:, :2] @ p["w"][:2],
    "order": lambda p, x: x @ p["w"][::-1],
    "split": lambda p, x: jnp.einsum("bi,iho->ohb", x, p["w"].reshape(4, 2, 3)),
    "another weight": lambda p, x: x @ (p["w"] @ p["v"]),
}


@pytest.mark.parametrize("why", UNSEEN)
def test_products_that_are_not_seen_are_refused_by_name(why):
    params = {"v": jnp.ones((6, 6)), "w": W}
    with refused("capture", "v" if why == "another weight" else "w"):
        capture(UNSEEN[why], params, X)
    out, products = capture(UNSEEN[why], params, X, leaves=[])
    np.testing.assert_allclose(out, UNSEEN[why](params, X), rtol=1e-5)
    assert products == {}


def test_grouped_convolutions_are_refused():
    layer = nn.Conv(4, (3, 3), feature_group_count=2)
    x = jnp.ones((1, 5, 5, 4))
    params = layer.init(KEY, x)
    with refused("capture", "kernel"):
        capture(layer.apply, params, x)


def test_bad_arguments():
    apply = lambda p, x: x @ p["w"]  # noqa: E731
    params = {"b": jnp.ones(3), "w": W}
    with refused("capture", "'b'"):
        capture(apply, params, X, leaves=["b"])
    with refused("add", "'w'"):
        capture(apply, params, X, add={"w": [jnp.zeros((5, 6))] * 2})
    with refused("add", "'w'"):
        capture(apply, params, X, add={"w": [jnp.zeros((6, 5))]})
    with refused("axes"):
        to_matrix(W, Axes((0,), (0,)))
    with refused("matrix"):
        from_matrix(W, Axes((0,), (1,)), (4, 5))
