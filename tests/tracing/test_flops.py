"""Hand-counted multiply-accumulates for every kind of operation (for ResNet-50 see test_models.py)."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec as P

from rigl_jax.tracing.flops import Product, flops
from tests.errors import refused


def spec(*shape, dtype=jnp.float32):
    return jax.ShapeDtypeStruct(shape, dtype)


W = {"w": spec(4, 4)}
X = spec(2, 4)


def conv(x, kernel, strides=(1, 1), padding="SAME", **options):
    numbers = ("NHWC", "HWIO", "NHWC")
    return jax.lax.conv_general_dilated(x, kernel, strides, padding, dimension_numbers=numbers, **options)


def test_a_dense_layer_costs_batch_times_weights_and_its_bias_nothing():
    params = {"dense": {"kernel": spec(4, 3), "bias": spec(3)}}
    counted = flops(lambda p, x: x @ p["dense"]["kernel"] + p["dense"]["bias"][None], params, spec(5, 4))
    assert counted.macs == {"dense/bias": 0, "dense/kernel": 5 * 4 * 3}
    assert counted.other == 0
    assert counted.total == counted.dense_total == 60
    assert counted.products == (Product("dense/kernel", 60, 15),)


@pytest.mark.parametrize(
    ("image", "kernel", "options", "expected"),
    [
        ((1, 8, 8, 3), (3, 3, 3, 5), {}, 8 * 8 * 5 * 9 * 3),
        ((2, 8, 8, 3), (3, 3, 3, 5), {"strides": (2, 2)}, 2 * 4 * 4 * 5 * 9 * 3),
        ((1, 8, 8, 3), (3, 3, 3, 5), {"padding": "VALID"}, 6 * 6 * 5 * 9 * 3),
        ((1, 8, 8, 3), (3, 3, 3, 5), {"padding": "VALID", "rhs_dilation": (2, 2)}, 4 * 4 * 5 * 9 * 3),
        ((1, 8, 8, 6), (3, 3, 2, 12), {"feature_group_count": 3}, 8 * 8 * 12 * 9 * 2),
        ((1, 8, 8, 6), (3, 3, 1, 6), {"feature_group_count": 6}, 8 * 8 * 6 * 9),
        ((4, 8, 8, 3), (3, 3, 3, 6), {"batch_group_count": 2}, 2 * 8 * 8 * 6 * 9 * 3),
    ],
    ids=["plain", "strided", "valid", "dilated", "grouped", "depthwise", "batch groups"],
)
def test_convolutions(image, kernel, options, expected):
    counted = flops(lambda p, x: conv(x, p["k"], **options), {"k": spec(*kernel)}, spec(*image))
    assert counted.macs == {"k": expected}


def test_layout_of_a_convolution_does_not_matter():
    def apply(p, x):
        return jax.lax.conv_general_dilated(x, p["k"], (1,), "SAME", dimension_numbers=("NCH", "OIH", "NCH"))

    assert flops(apply, {"k": spec(5, 3, 7)}, spec(2, 3, 8)).macs == {"k": 2 * 8 * 5 * 7 * 3}


def test_a_transposed_convolution_does_not_pay_for_the_zeros_it_inserts():
    def apply(p, x):
        return jax.lax.conv_transpose(x, p["k"], (2, 2), "SAME", dimension_numbers=("NHWC", "HWIO", "NHWC"))

    # Every input element meets every weight that reads it once.
    assert flops(apply, {"k": spec(2, 2, 3, 5)}, spec(1, 4, 4, 3)).macs == {"k": 4 * 4 * 3 * 2 * 2 * 5}


def test_ragged_products_and_their_gradients():
    sizes = np.array([4, 2], np.int32)

    def apply(p, x):
        return jax.lax.ragged_dot(x, p["experts"], sizes)

    params, x = {"experts": spec(2, 4, 3)}, spec(6, 4)
    assert flops(apply, params, x).macs == {"experts": 6 * 4 * 3}
    # Only the forward product and the gradient of the weights, whose operands are activations.
    backward = flops(jax.grad(lambda p, x: (apply(p, x) ** 2).sum()), params, x)
    assert backward.macs == {"experts": 6 * 4 * 3}
    assert backward.other == 6 * 4 * 3


def test_a_backward_pass_costs_as_much_as_two_forward_passes():
    def loss(p, x):
        return (conv(jnp.tanh(conv(x, p["a"])), p["b"], (2, 2)) ** 2).sum()

    params, x = {"a": spec(3, 3, 2, 4), "b": spec(3, 3, 4, 5)}, spec(1, 8, 8, 2)
    forward = flops(loss, params, x)
    both = flops(jax.grad(loss, argnums=(0, 1)), params, x)
    assert both.macs == {name: 2 * macs for name, macs in forward.macs.items()}
    assert both.other == forward.total


def _custom_jvp(w, x):
    product = jax.custom_jvp(lambda w, x: x @ w)
    product.defjvp(lambda primals, tangents: (product(*primals), tangents[1]))
    return product(w, x)


def _custom_vjp(w, x):
    product = jax.custom_vjp(lambda w, x: x @ w)
    product.defvjp(lambda w, x: (x @ w, (w, x)), lambda saved, g: (saved[0], g))
    return product(w, x)


@pytest.mark.parametrize(
    "apply",
    [
        lambda w, x: jax.jit(jax.jit(lambda a, b: b @ a))(w, x),
        lambda w, x: jax.checkpoint(lambda a, b: b @ a)(w, x),
        lambda w, x: jax.named_call(lambda a, b: b @ a, name="layer")(w, x),
        _custom_jvp,
        _custom_vjp,
        lambda w, x: jax.vmap(lambda row: row @ w)(x),
        lambda w, x: jax.vmap(lambda row: w.T @ row)(x),
        lambda w, x: jnp.einsum("ij,bi->bj", w, x),
        lambda w, x: jax.lax.optimization_barrier((x, w))[0] @ jax.lax.optimization_barrier((x, w))[1],
    ],
    ids=["jit", "remat", "named", "custom_jvp", "custom_vjp", "vmap", "vmap left", "einsum", "barrier"],
)
def test_one_layer_in_many_wrappings(apply):
    counted = flops(lambda p, x: apply(p["w"], x), W, X)
    assert counted.macs == {"w": 2 * 4 * 4}
    assert counted.other == 0


def test_a_scan_counts_every_trip():
    def apply(p, x):
        x, _ = jax.lax.scan(lambda x, w: (jnp.tanh(x @ w @ p["shared"]), None), x, p["stacked"])
        return jax.lax.fori_loop(0, 5, lambda _, x: x @ p["head"], x)

    params = {"stacked": spec(3, 4, 4), "shared": spec(4, 4), "head": spec(4, 4)}
    assert flops(apply, params, X).macs == {"stacked": 3 * 32, "shared": 3 * 32, "head": 5 * 32}


def test_a_weight_in_the_carry_of_a_scan_keeps_its_name():
    def apply(p, x):
        def body(carry, _):
            w, x, nothing = carry
            return (w.T, x @ w, nothing + w), None

        return jax.lax.scan(body, (p["w"], x, jnp.zeros((4, 4))), length=3)[0][2] @ x.T

    assert flops(apply, W, X).macs == {"w": 3 * 32 + 32}  # zeros + w + w.T + ... is still made of w alone


def test_a_carry_that_turns_into_data_is_data():
    def apply(p, x):
        def body(carry, _):
            w, y = carry
            return (w + y.sum(), y @ w), None

        return jax.lax.scan(body, (p["w"], x), length=3)[0]

    counted = flops(apply, W, X)
    assert (counted.macs, counted.other) == ({"w": 0}, 3 * 32)


def test_cond_costs_its_most_expensive_branch():
    def apply(p, x):
        branches = [lambda x: x, lambda x: x @ p["w"] @ p["w"], lambda x: x @ p["v"]]
        return jax.lax.switch(x.sum().astype(int), branches, x)

    assert flops(apply, {"v": spec(4, 4), "w": spec(4, 4)}, X).macs == {"v": 0, "w": 2 * 32}


def test_a_while_loop_needs_a_number_of_trips():
    def apply(p, x):
        return jax.lax.while_loop(lambda y: (y @ p["v"]).sum() < 9, lambda y: y @ p["w"], x)

    params = {"v": spec(4, 1), "w": spec(4, 4)}
    with refused("while_trips", "v", "w"):
        flops(apply, params, X)
    assert flops(apply, params, X, while_trips=3).macs == {"v": 3 * 8, "w": 3 * 32}
    assert flops(apply, params, X, while_trips=0).total == 0
    # Without products inside, the number does not matter.
    harmless = flops(lambda p, x: jax.lax.while_loop(lambda y: y.sum() < 9, lambda y: y + 1, x) @ p["w"], W, X)
    assert harmless.macs == {"w": 32}


def test_devices_share_the_work_of_shard_map_and_pmap():
    mesh = jax.make_mesh((2,), ("data",), axis_types=(jax.sharding.AxisType.Auto,))
    layer = jax.shard_map(lambda w, x: x @ w, mesh=mesh, in_specs=(P(), P("data")), out_specs=P("data"))
    assert flops(lambda p, x: layer(p["w"], x), W, X).macs == {"w": 32}
    mapped = jax.pmap(lambda w, x: x @ w, in_axes=(None, 0))
    assert flops(lambda p, x: mapped(p["w"], x), W, spec(2, 1, 4)).macs == {"w": 32}


def test_products_that_cannot_be_counted_are_refused():
    pallas = pytest.importorskip("jax.experimental.pallas")

    def kernel(x, w, out):
        out[...] = x[...] @ w[...]

    product = pallas.pallas_call(kernel, out_shape=spec(2, 4), interpret=True)
    with refused("pallas_call"):
        flops(lambda p, x: product(x, p["w"]), W, X)


@pytest.mark.parametrize(
    "weight",
    [
        lambda w: w.astype(jnp.bfloat16).T[:, :4].reshape(4, 4),
        lambda w: w * jnp.eye(4),
        lambda w: jnp.where(jnp.eye(4, dtype=bool), w, 0),
        lambda w: (w - w.mean()) / jnp.sqrt(w.var() + 1e-5),
        lambda w: jnp.sign(w) * jnp.abs(w).max(),
        lambda w: jnp.pad(w[1:], ((0, 1), (0, 0))),
        lambda w: w + jax.lax.stop_gradient(jnp.round(w) - w),
        lambda w: jax.nn.relu(w),
    ],
    ids=["layout", "mask", "where", "standardised", "binary", "padded", "straight through", "relu"],
)
def test_a_weight_stays_itself_through_operations_with_constants(weight):
    assert flops(lambda p, x: x @ weight(p["w"]), W, X).macs == {"w": 32}


def test_a_tied_weight_is_charged_twice_and_a_lookup_is_free():
    def apply(p, tokens):
        hidden = p["table"][tokens] @ p["w"]
        return hidden @ p["table"].T

    params = {"table": spec(10, 4), "w": spec(4, 4)}
    assert flops(apply, params, spec(7, dtype=jnp.int32)).macs == {"table": 7 * 4 * 10, "w": 7 * 4 * 4}

    twice = flops(lambda p, x: x @ p["table"].T @ p["table"], params, X)
    assert twice.macs == {"table": 2 * 2 * 4 * 10, "w": 0}


def test_a_concatenation_belongs_to_its_parts():
    def apply(p, x):
        fused = jnp.concatenate([p["q"], p["kv"]], axis=1)
        x, _ = jax.lax.scan(lambda x, w: (x @ w, None), x, jnp.stack([p["a"], p["b"], jnp.eye(4)]))
        return x @ fused

    params = {"a": spec(4, 4), "b": spec(4, 4), "q": spec(4, 2), "kv": spec(4, 6)}
    counted = flops(apply, params, X)
    assert counted.macs == pytest.approx({"a": 32, "b": 32, "q": 2 * 4 * 2, "kv": 2 * 4 * 6})
    assert counted.other == pytest.approx(32)  # the constant in the stack


def test_weight_normalisation_is_charged_to_the_direction_and_a_sum_of_two_weights_to_nobody():
    params = {"g": spec(4), "v": spec(4, 4)}

    def normalised(p, x):
        return x @ (p["v"] * (p["g"] / jnp.linalg.norm(p["v"], axis=0))[None])

    assert flops(normalised, params, X).macs == {"g": 0, "v": 32}
    low_rank = {"a": spec(4, 1), "b": spec(1, 3), "w": spec(4, 3)}
    counted = flops(lambda p, x: x @ (p["w"] + p["a"] @ p["b"]), low_rank, X)
    assert counted.macs == {"a": 4 * 3, "b": 0, "w": 0}
    assert counted.other == 2 * 4 * 3


def test_attention_scores_are_other():
    def attention(p, x):
        q, k, v = (x @ p[name] for name in "qkv")
        return jax.nn.softmax(q @ k.T * p["scale"][None]) @ v

    params = {**{name: spec(4, 8) for name in "qkv"}, "scale": spec(5)}
    counted = flops(attention, params, spec(5, 4))
    assert counted.macs == {"q": 160, "k": 160, "v": 160, "scale": 0}
    assert counted.other == 2 * 5 * 5 * 8


def test_a_scale_on_activations_does_not_make_them_weights():
    def apply(p, x):
        return (x * p["scale"][None] + p["bias"][None]) @ p["w"]

    params = {"scale": spec(4), "bias": spec(4), "w": spec(4, 1)}
    assert flops(apply, params, spec(1, 4)).macs == {"scale": 0, "bias": 0, "w": 4}


def test_masks_scale_the_macs_of_their_leaf_only():
    params = {"a": spec(4, 4), "b": spec(4, 4)}
    mask = np.zeros((4, 4), bool)
    mask[0, :3] = True
    counted = flops(lambda p, x: (x @ p["a"] @ p["b"]) @ x.T, params, X, masks={"a": mask, "b": None})
    assert counted.density == {"a": 3 / 16, "b": 1}
    assert counted.macs == {"a": 32, "b": 32}
    assert counted.sparse_macs == {"a": 6, "b": 32}
    assert (counted.other, counted.total, counted.dense_total) == (16, 54, 80)
    planned = counted._replace(density={**counted.density, "b": 0.5})
    assert planned.total == 38
