"""Compacted models against the masked ones: the same function, on hand-made and random sparse networks."""

import itertools

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from rigl_jax import apply_masks
from rigl_jax.execution.compact import compact
from rigl_jax.execution.packed import pack, unpack
from rigl_jax.execution.run import run_packed
from tests.errors import refused


class MLP(nn.Module):
    features: tuple = (40, 30, 20)
    act: object = nn.gelu

    @nn.compact
    def __call__(self, x):
        for width in self.features:
            x = self.act(nn.Dense(width)(x))
        return nn.Dense(5)(x)


class ConvNet(nn.Module):
    padding: str = "VALID"
    features: tuple = (12, 16, 24)
    act: object = nn.sigmoid

    @nn.compact
    def __call__(self, x):
        for i, width in enumerate(self.features[:-1]):
            x = self.act(nn.Conv(width, (3, 3), padding=self.padding)(x))
            x = (nn.max_pool if i else nn.avg_pool)(x, (2, 2), strides=(2, 2))
        x = x.reshape(x.shape[0], -1)
        x = self.act(nn.Dense(self.features[-1])(x))
        return nn.Dense(3)(x)


class Residual(nn.Module):
    """1x1 convolutions and batch statistics around a stream."""

    @nn.compact
    def __call__(self, x):
        x = nn.Conv(16, (1, 1), use_bias=False)(x)
        for _ in range(2):
            y = nn.relu(nn.BatchNorm(use_running_average=True)(x))
            y = nn.Conv(16, (1, 1), use_bias=False)(y)
            y = nn.relu(nn.BatchNorm(use_running_average=True)(y))
            x = x + nn.Conv(16, (1, 1))(y)
        return nn.Dense(4)(x.mean((1, 2)))


def sparse(module, shape, density, seed=0):
    """(apply, variables with random biases and statistics, masks of the kernels, an input)."""
    rng = np.random.default_rng(seed)
    x = rng.normal(size=shape).astype(np.float32)
    shapes = jax.eval_shape(module.init, jax.random.key(0), x)
    params = jax.tree.map(
        lambda s: (rng.uniform(0.2, 1, s.shape) * rng.choice([-1, 1], s.shape)).astype(s.dtype), shapes
    )
    if "batch_stats" in params:
        params["batch_stats"] = jax.tree.map(np.abs, params["batch_stats"])
    masks = jax.tree.map(lambda p: None if p.ndim < 2 else rng.random(p.shape) < density, params)
    return module.apply, params, masks, x


def check(apply, params, masks, x, tolerance=1e-5):
    small = compact(apply, params, masks, x)
    want = jax.jit(apply)(apply_masks(params, masks), x)
    np.testing.assert_allclose(jax.jit(small.apply)(small.params, x), want, rtol=tolerance, atol=tolerance)
    assert jax.tree.structure(small.params) == jax.tree.structure(params)
    again = compact(small.apply, small.params, small.masks, x)
    assert again.kept == again.shapes == {}
    assert jax.tree.all(jax.tree.map(np.array_equal, again.params, small.params))
    return small


def size(tree):
    return sum(leaf.size for leaf in jax.tree.leaves(tree))


@pytest.mark.parametrize(("density", "seed"), [(0.01, 0), (0.05, 0), (0.05, 1)])
def test_a_sparse_mlp_computes_the_same_with_fewer_units(density, seed):
    apply, params, masks, x = sparse(MLP(), (6, 50), density, seed)
    small = check(apply, params, masks, x)
    assert size(small.params) < size(params) / 2
    widths = [small.params["params"][f"Dense_{i}"]["kernel"].shape for i in range(4)]
    assert widths[0][0] == 50
    assert widths[-1][1] == 5
    assert [a[1] for a in widths[:-1]] == [b[0] for b in widths[1:]]


def test_the_model_itself_rebuilt_with_the_reported_widths_takes_the_params():
    apply, params, masks, x = sparse(MLP(), (6, 50), 0.03)
    small = check(apply, params, masks, x)
    widths = tuple(small.shapes[f"params/Dense_{i}/kernel"][1][1] for i in range(3))
    y = jax.jit(MLP(widths).apply)(small.params, x)
    np.testing.assert_allclose(y, jax.jit(small.apply)(small.params, x), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(("padding", "seed"), [("VALID", 0), ("SAME", 1)])
def test_a_sparse_convolutional_network_computes_the_same_with_fewer_units(padding, seed):
    apply, params, masks, x = sparse(ConvNet(padding), (2, 14, 14, 2), 0.03, seed)
    small = check(apply, params, masks, x)
    assert size(small.params) < 0.8 * size(params)
    before, now = small.shapes["params/Dense_0/kernel"]
    pixels = before[0] // 16
    assert now[0] == pixels * small.params["params"]["Conv_1"]["bias"].size  # the flattened image shrinks by channels


def test_a_residual_network_with_batch_statistics():
    apply, params, masks, x = sparse(Residual(), (2, 4, 4, 3), 0.08)
    small = check(apply, params, masks, x, tolerance=3e-5)
    assert size(small.params) < size(params)
    streams = {small.params["params"][f"Conv_{i}"]["kernel"].shape[-1] for i in (0, 2, 4)}
    assert len(streams) == 1


class Decoder(nn.Module):
    """Transposed convolutions, as in autoencoders and generators."""

    padding: str = "SAME"
    turned: bool = False
    act: object = nn.relu

    @nn.compact
    def __call__(self, x):
        options = {"padding": self.padding, "transpose_kernel": self.turned}
        for width in (12, 16):
            x = self.act(nn.ConvTranspose(width, (3, 3), strides=(2, 2), **options)(x))
        return nn.Conv(3, (1, 1))(x)


@pytest.mark.parametrize(
    ("padding", "turned", "act"), [("SAME", False, nn.relu), ("VALID", True, nn.relu), ("SAME", True, nn.sigmoid)]
)
def test_transposed_convolutions(padding, turned, act):
    """Channels are removed beside them as beside others; numbers other than 0 stay, as zeros lie between the pixels."""
    small = check(*sparse(Decoder(padding, turned, act), (2, 3, 3, 6), 0.03))
    assert small.shapes["params/ConvTranspose_1/kernel"][1][3 if turned else 2] < 12


def test_other_batch_sizes_and_the_small_model_packed():
    apply, params, masks, x = sparse(ConvNet(), (2, 14, 14, 2), 0.03)
    small = compact(apply, params, masks, x)
    one = x[:1]
    want = jax.jit(apply)(apply_masks(params, masks), one)
    np.testing.assert_allclose(jax.jit(small.apply)(small.params, one), want, rtol=1e-5, atol=1e-5)
    packed = pack(small.params, small.masks)
    np.testing.assert_allclose(jax.jit(run_packed(small.apply))(packed, one), want, rtol=1e-5, atol=1e-5)


def two_layers(p, x):
    return jnp.tanh(x @ p["a"] + p["c"][None]) @ p["b"] + p["d"][None]


def hand(a, b):
    params = {"a": a, "b": b, "c": np.linspace(0.5, 1, len(b)), "d": np.ones(b.shape[1])}
    params = {name: jnp.asarray(value, jnp.float32) for name, value in params.items()}
    return params, {"a": params["a"] != 0, "b": params["b"] != 0, "c": None, "d": None}


def test_units_by_hand():
    a, b = np.ones((2, 4)), np.ones((4, 3))
    a[:, 1] = 0  # no inputs: always tanh(c[1])
    b[2] = 0  # no outputs
    params, masks = hand(a, b)
    small = check(two_layers, params, masks, jnp.ones((5, 2)))
    assert {name: {k: v.tolist() for k, v in axes.items()} for name, axes in small.kept.items()} == {
        "a": {1: [0, 3]},
        "b": {0: [0, 3]},
        "c": {0: [0, 3]},
    }
    np.testing.assert_allclose(small.params["d"], 1 + np.tanh(params["c"][1]), rtol=1e-6)


def test_nothing_is_removed_where_nothing_is_dead():
    params, masks = hand(np.eye(4), np.ones((4, 3)))
    small = check(two_layers, params, masks, jnp.ones((5, 4)))
    assert small.kept == small.shapes == {}
    assert all((small.params[name] == params[name]).all() for name in params)


def test_inputs_and_outputs_of_the_model_stay():
    a, b = np.ones((2, 4)), np.ones((4, 3))
    a[0], b[:, 1] = 0, 0  # an input that nobody reads, an output that nothing reaches
    assert check(two_layers, *hand(a, b), jnp.ones((5, 2))).kept == {}


@pytest.mark.parametrize(("a", "b"), [(0, 1), (1, 0), (0, 0)], ids=["no inputs", "no outputs", "neither"])
def test_one_unit_stays_of_a_layer_that_is_all_dead(a, b):
    small = check(two_layers, *hand(np.full((2, 4), a), np.full((4, 3), b)), jnp.ones((5, 2)))
    assert small.params["a"].shape == (2, 1)


def test_a_constant_without_a_bias_to_hold_it_stays():
    a = np.ones((2, 4))
    a[:, 1] = 0
    params, masks = hand(a, np.ones((4, 3)))
    x = jnp.ones((5, 2))
    assert check(lambda p, x: jnp.tanh(x @ p["a"] + p["c"][None]) @ p["b"], params, masks, x).kept == {}
    twice = check(lambda p, x: two_layers(p, x) * p["d"][None], params, masks, x)
    assert twice.kept == {}  # the bias has another use
    zero = check(lambda p, x: jnp.tanh(x @ p["a"]) @ p["b"], params, masks, x)
    assert zero.params["a"].shape == (2, 3)  # but 0 needs no bias


def conv_pair(padding):
    def apply(p, x):
        for k, b in (("k0", "b0"), ("k1", "b1")):
            numbers = ("NHWC", "HWIO", "NHWC")
            x = jax.lax.conv_general_dilated(x, p[k], (1, 1), padding, dimension_numbers=numbers)
            x = x + p[b][None, None, None]
        return x

    return apply


@pytest.mark.parametrize(("padding", "bias", "left"), [("VALID", 0.5, 3), ("SAME", 0.5, 4), ("SAME", 0.0, 3)])
def test_a_constant_beside_padding_stays_unless_it_is_zero(padding, bias, left):
    rng = np.random.default_rng(0)
    params = {
        "k0": rng.normal(size=(3, 3, 2, 4)),
        "k1": rng.normal(size=(3, 3, 4, 2)),
        "b0": np.full(4, bias),
        "b1": np.ones(2),
    }
    params["k0"][..., 1] = 0
    params["k1"][1, 1, 1] -= params["k1"][:, :, 1].sum((0, 1))  # taps that cancel inside do not at the border
    params = {name: jnp.asarray(value, jnp.float32) for name, value in params.items()}
    masks = dict.fromkeys(params)
    small = check(conv_pair(padding), params, masks, jnp.asarray(rng.normal(size=(1, 6, 6, 2)), jnp.float32))
    assert small.params["k0"].shape[-1] == left


@pytest.mark.parametrize(
    "between",
    [
        lambda h: h - h.mean(-1, keepdims=True),
        lambda h: jnp.sort(h, -1),
        lambda h: jnp.concatenate([h, h], -1)[:, 2:6],
        lambda h: h.reshape(-1, 2, 2).sum(-1).repeat(2, -1),
        lambda h: h + jnp.arange(4.0)[None],
        lambda h: jax.lax.scan(lambda c, _: (c * 2, None), h, length=2)[0],
        lambda h: h @ h.T @ h,
    ],
    ids=["normalised", "sorted", "concatenated", "split", "with a constant", "loop", "attention"],
)
def test_units_that_meet_what_cannot_be_told_apart_stay(between):
    a, b = np.ones((2, 4)), np.arange(12.0).reshape(4, 3)
    a[:, 1], b[2] = 0, 0
    params, masks = hand(a, b)
    small = check(lambda p, x: between(jnp.tanh(x @ p["a"])) @ p["b"], params, masks, jnp.ones((5, 2)))
    assert small.kept == {}


@pytest.mark.parametrize(
    "apply",
    [
        lambda p, x: jax.vmap(lambda row: p["b"].T @ jnp.tanh(p["a"].T @ row + p["c"]) + p["d"])(x),
        lambda p, x: jnp.where((h := x @ p["a"] + p["c"][None]) > 0, h, jnp.zeros((5, 4))) @ p["b"] + p["d"][None],
        lambda p, x: jnp.einsum("bi,ih->hb", x, p["a"] * jnp.ones(4)[None]).T @ p["b"] + p["d"][None],
        lambda p, x: jax.checkpoint(lambda h: (jax.nn.silu(h) * p["c"][None]) @ p["b"])(x @ p["a"]) + p["d"][None],
        lambda p, x: (x @ p["a"] + p["c"][None]).reshape(5, 2, 2).reshape(5, 4) @ p["b"] - p["d"][None],
    ],
    ids=["weights on the left", "sizes written down", "transposed", "checkpoint, gate", "regrouped"],
)
def test_other_ways_to_write_a_model(apply, request):
    a, b = np.arange(8.0).reshape(2, 4) - 3.5, np.arange(12.0).reshape(4, 3) / 5
    a[:, 1], b[2] = 0, 0
    params, masks = hand(a, b)
    small = check(apply, params, masks, jnp.asarray(np.random.default_rng(0).normal(size=(5, 2)), jnp.float32))
    assert small.params["a"].shape == ((2, 4) if request.node.callspec.id == "regrouped" else (2, 2))


def test_weights_that_are_tied_cast_or_transposed():
    rng = np.random.default_rng(0)
    params = {"w": jnp.asarray(rng.normal(size=(6, 8)), jnp.float32), "c": jnp.zeros(8), "d": jnp.ones(6)}
    masks = {"w": jnp.asarray(rng.random((6, 8)) < 0.3).at[:, 2:5].set(False), "c": None, "d": None}

    def tied(p, x):
        w = p["w"].astype(jnp.bfloat16)
        h = nn.relu(x.astype(jnp.bfloat16) @ w + p["c"][None].astype(jnp.bfloat16))
        return (h @ w.T).astype(jnp.float32) + p["d"][None]

    small = check(tied, params, masks, jnp.asarray(rng.normal(size=(3, 6)), jnp.float32), tolerance=2e-2)
    assert small.params["w"].shape[1] <= 5
    assert small.params["w"].shape[0] == 6


def test_a_mask_that_does_not_fit_is_named():
    params, masks = hand(np.ones((2, 4)), np.ones((4, 3)))
    with refused("mask", "a"):
        compact(two_layers, params, {**masks, "a": masks["b"]}, jnp.ones((5, 2)))
    with refused("params"):
        compact(two_layers, params, {"a": None}, jnp.ones((5, 2)))


# ---- derivatives


@jax.custom_vjp
def reversed_gradient(x):
    return x


reversed_gradient.defvjp(lambda x: (x, None), lambda _, g: (-2 * g,))


@jax.custom_vjp
def scaled(x, y):
    return x * y, x, x


scaled.defvjp(lambda x, y: (scaled(x, y), (x, y)), lambda kept, g: (g[0] * 3 * kept[1] + g[2], g[1] * 5))


@jax.custom_jvp
def stepped(x):
    return jnp.where(x > 0, 1.0, 0.0)


stepped.defjvp(lambda x, t: (stepped(*x), t[0] * jnp.exp(-(x[0] ** 2))))


@jax.custom_vjp
def gated(x, y):
    return x


gated.defvjp(lambda x, y: (x, y), lambda y, g: (g * y, g))

FUNCTIONS = {
    "relu": jax.nn.relu,
    "gelu": jax.nn.gelu,
    "softplus": jax.nn.softplus,
    "logsumexp": lambda x: x + jax.nn.logsumexp(x, axis=0, keepdims=True),
    "softmax": lambda x: x * jax.nn.softmax(x, axis=0),
    "custom_jvp": stepped,
    "custom_vjp": reversed_gradient,
    "custom_vjp, several": lambda x: sum(scaled(x, x + 1.0)),
    "custom_vjp, of what only the derivative reads": lambda x: gated(x, jnp.sin(x)),
    "custom_vjp, a part": lambda x: scaled(x, x + 1.0)[0],
    "nested": lambda x: jax.jit(lambda x: jax.nn.relu(reversed_gradient(x)))(x),
}


# What a scan holds is evaluated by the rules of what is outside of it, so each rule is enough there.
IN_A_SCAN = ["relu", "custom_jvp", "custom_vjp", "custom_vjp, of what only the derivative reads", "nested"]


@pytest.mark.parametrize(
    ("form", "name"),
    [*itertools.product(["compacted", "packed"], FUNCTIONS), *itertools.product(["packed in a scan"], IN_A_SCAN)],
)
def test_gradients_are_those_of_the_function_at_0_as_well(form, name):
    """Of a network whose hidden units are 0 where they are not dead, and of another."""
    a, b = np.ones((2, 4)), np.arange(1.0, 13).reshape(4, 3)
    a[:, 1], b[2] = 0, 0
    a[1, 3] = -1
    params, masks = hand(a, b)
    params = params | {"c": jnp.zeros(4)}
    masks = masks | {"c": None}
    x = jnp.array([[1.0, -1.0], [0.0, 0.0], [0.5, 2.0]])

    def apply(p, x):
        layer = lambda h: FUNCTIONS[name](h @ p["a"] + p["c"][None])  # noqa: E731
        if form == "packed in a scan":
            return jax.lax.scan(lambda carry, row: (carry, layer(row[None])[0]), 0.0, x)[1] @ p["b"] + p["d"][None]
        return layer(x) @ p["b"] + p["d"][None]

    def gradients(apply, params):
        loss = lambda params, x: jnp.sum(jnp.cos(apply(params, x)))  # noqa: E731
        return jax.jit(jax.grad(loss, argnums=(0, 1), allow_int=True))(params, x)

    full = apply_masks(params, masks)
    expected, expected_x = gradients(apply, full)
    if form == "compacted":
        small = compact(apply, params, masks, x)
        assert small.shapes["a"][1][1] < 4
        got, got_x = gradients(small.apply, small.params)
        expected = {
            leaf: np.asarray(g)[np.ix_(*(small.kept.get(leaf, {}).get(k, np.arange(n)) for k, n in enumerate(g.shape)))]
            for leaf, g in expected.items()
        }
    else:
        packed = pack(params, masks)
        run = lambda values, x: run_packed(apply)(packed._replace(values=values), x)  # noqa: E731
        values, got_x = gradients(run, packed.values)
        got = unpack(packed._replace(values=values))
        expected = apply_masks(expected, masks)
    np.testing.assert_allclose(got_x, expected_x, rtol=1e-4, atol=1e-4)
    for leaf in expected:
        np.testing.assert_allclose(got[leaf], expected[leaf], rtol=1e-4, atol=1e-4, err_msg=leaf)


def test_channels_with_a_scale_of_0_are_constants():
    """gamma = 0: only beta is left of the channel, which the next bias takes."""
    params = {"a": jnp.ones((2, 3)), "gamma": jnp.array([1.0, 0.0, 2.0]), "beta": jnp.array([0.0, 0.5, 1.0])}
    params |= {"b": jnp.array([[1.0], [2.0], [3.0]]), "bias": jnp.zeros(1)}

    def apply(p, x):
        h = jax.nn.relu((x @ p["a"]) * p["gamma"][None] + p["beta"][None])
        return h @ p["b"] + p["bias"][None]

    small = compact(apply, params, dict.fromkeys(params), jnp.ones((2, 2)))
    assert small.shapes["a"] == ((2, 3), (2, 2))
    assert small.params["bias"].tolist() == [1.0]
    np.testing.assert_allclose(small.apply(small.params, jnp.ones((2, 2))), apply(params, jnp.ones((2, 2))))
