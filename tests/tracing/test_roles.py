"""Which leaves are kernels and which of their axes are what: by names, by modules, by a trace; the same everywhere."""

import functools
import pickle

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen, nnx

import rigl_jax as rx
from rigl_jax import topology
from rigl_jax.description import letters
from tests.errors import refused

IDS, IMAGES, KEY = jnp.zeros((2, 5), int), jnp.zeros((2, 9, 9, 1)), jax.random.key(0)

# --- one network, four times -----------------------------------------------------------------------------------------


class LinenLayer(linen.Module):
    @linen.compact
    def __call__(self, x, _):
        return linen.Dense(8)(linen.LayerNorm()(x)), None


class LinenNet(linen.Module):
    @linen.compact
    def __call__(self, ids, images):
        x = linen.Embed(11, 8, name="embed")(ids)
        x = x + self.param("pos_embedding", linen.initializers.zeros, (1, 5, 8))
        x = linen.MultiHeadDotProductAttention(num_heads=2, name="attention")(linen.LayerNorm(name="norm")(x))
        stack = linen.scan(LinenLayer, variable_axes={"params": 0}, split_rngs={"params": True}, length=3)
        x, _ = stack(name="stack")(x, None)
        y = linen.Conv(6, (3, 3), name="grey")(images)
        y = linen.Conv(6, (3, 3), feature_group_count=6, name="dw")(y)
        y = linen.Conv(4, (3, 3), name="conv")(y)
        return linen.Dense(3, name="head")(x), y


@functools.cache
def linen_net():
    net = LinenNet()
    params = jax.eval_shape(net.init, KEY, IDS, IMAGES)["params"]
    names = {
        "q": "attention/query/kernel",
        "k": "attention/key/kernel",
        "v": "attention/value/kernel",
        "o": "attention/out/kernel",
        "stack": "stack/Dense_0/kernel",
        "grey": "grey/kernel",
        "conv": "conv/kernel",
        "head": "head/kernel",
    }
    return params, lambda p, *inputs: net.apply({"params": p}, *inputs), (IDS, IMAGES), names


class NnxNet(nnx.Module):
    def __init__(self, rngs):
        self.embed, self.pos_embedding = nnx.Embed(11, 8, rngs=rngs), nnx.Param(jnp.zeros((1, 5, 8)))
        self.attention = nnx.MultiHeadAttention(2, 8, decode=False, rngs=rngs)
        self.norm, self.head = nnx.LayerNorm(8, rngs=rngs), nnx.Linear(8, 3, rngs=rngs)
        self.stack, self.norms = (
            nnx.vmap(lambda key: nnx.Linear(8, 8, rngs=nnx.Rngs(key)))(jax.random.split(KEY, 3)),
            (nnx.vmap(lambda key: nnx.LayerNorm(8, rngs=nnx.Rngs(key)))(jax.random.split(KEY, 3))),
        )
        self.grey = nnx.Conv(1, 6, (3, 3), rngs=rngs)
        self.dw = nnx.Conv(6, 6, (3, 3), feature_group_count=6, rngs=rngs)
        self.conv = nnx.Conv(6, 4, (3, 3), rngs=rngs)

    def __call__(self, ids, images):
        x = self.attention(self.norm(self.embed(ids) + self.pos_embedding[...]))
        graph, layers = nnx.split((self.stack, self.norms))

        def layer(x, one):
            dense, norm = nnx.merge(graph, one)
            return dense(norm(x)), None

        x, _ = jax.lax.scan(layer, x, layers)
        return self.head(x), self.conv(self.dw(self.grey(images)))


@functools.cache
def nnx_net():
    graph, params = nnx.split(NnxNet(nnx.Rngs(0)), nnx.Param)
    names = {
        key: f"attention/{name}/kernel" for key, name in zip("qkvo", ("query", "key", "value", "out"), strict=True)
    }
    names |= {name: f"{name}/kernel" for name in ("stack", "grey", "conv", "head")}
    return params, lambda p, *inputs: nnx.merge(graph, p)(*inputs), (IDS, IMAGES), names


class EquinoxNet(eqx.Module):
    embed: eqx.nn.Embedding
    pos_embedding: jax.Array
    attention: eqx.nn.MultiheadAttention
    norm: eqx.nn.LayerNorm
    stack: eqx.nn.Linear
    norms: eqx.nn.LayerNorm
    grey: eqx.nn.Conv2d
    dw: eqx.nn.Conv2d
    conv: eqx.nn.Conv2d
    head: eqx.nn.Linear

    def __init__(self):
        self.embed, self.pos_embedding = eqx.nn.Embedding(11, 8, key=KEY), jnp.zeros((5, 8))
        self.attention, self.norm = eqx.nn.MultiheadAttention(2, 8, key=KEY), eqx.nn.LayerNorm(8)
        self.stack = eqx.filter_vmap(lambda key: eqx.nn.Linear(8, 8, key=key))(jax.random.split(KEY, 3))
        self.norms = eqx.filter_vmap(lambda key: eqx.nn.LayerNorm(8))(jax.random.split(KEY, 3))
        self.grey, self.dw = eqx.nn.Conv2d(1, 6, 3, key=KEY), eqx.nn.Conv2d(6, 6, 3, groups=6, key=KEY)
        self.conv, self.head = eqx.nn.Conv2d(6, 4, 3, key=KEY), eqx.nn.Linear(8, 3, key=KEY)

    def __call__(self, ids, image):
        x = jax.vmap(self.norm)(jax.vmap(self.embed)(ids) + self.pos_embedding)
        x = self.attention(x, x, x)
        layers, static = eqx.partition((self.stack, self.norms), eqx.is_array)

        def layer(x, one):
            dense, norm = eqx.combine(one, static)
            return jax.vmap(dense)(jax.vmap(norm)(x)), None

        x, _ = jax.lax.scan(layer, x, layers)
        return jax.vmap(self.head)(x), self.conv(self.dw(self.grey(image)))


@functools.cache
def equinox_net():
    params, static = eqx.partition(EquinoxNet(), eqx.is_inexact_array)
    names = {
        key: f"attention/{name}_proj/weight"
        for key, name in zip("qkvo", ("query", "key", "value", "output"), strict=True)
    }
    names |= {name: f"{name}/weight" for name in ("stack", "grey", "conv", "head")}
    apply = lambda p, *inputs: jax.vmap(eqx.combine(p, static))(*inputs)  # noqa: E731
    return params, apply, (IDS, jnp.zeros((2, 1, 9, 9))), names


def dict_net():
    """As Haiku names them."""
    shapes = {
        "embed": {"embeddings": (11, 8)},
        "pos_embedding": (1, 5, 8),
        "norm": {"scale": (8,), "offset": (8,)},
        **{f"attention/{name}": {"w": (8, 8), "b": (8,)} for name in "qkvo"},
        "stack": {"w": (3, 8, 8), "b": (3, 8)},
        "stack/norm": {"scale": (3, 8), "offset": (3, 8)},
        "grey": {"w": (3, 3, 1, 6), "b": (6,)},
        "dw": {"w": (3, 3, 1, 6), "b": (6,)},
        "conv": {"w": (3, 3, 6, 4), "b": (4,)},
        "head": {"w": (8, 3), "b": (3,)},
    }
    params = jax.tree.map(lambda s: jax.ShapeDtypeStruct(s, "float32"), shapes, is_leaf=lambda s: isinstance(s, tuple))

    def conv(p, x, groups=1):
        numbers = ("NHWC", "HWIO", "NHWC")
        return jax.lax.conv_general_dilated(
            x, p["w"], (1, 1), "SAME", dimension_numbers=numbers, feature_group_count=groups
        ) + p["b"].reshape(1, 1, 1, -1)

    def dense(p, x):
        return x @ p["w"] + p["b"].reshape(1, 1, -1)

    def norm(p, x):
        return x * p["scale"].reshape(1, 1, -1) + p["offset"].reshape(1, 1, -1)

    def apply(p, ids, images):
        x = norm(p["norm"], p["embed"]["embeddings"][ids] + p["pos_embedding"])
        q, k, v = (dense(p[f"attention/{name}"], x).reshape(2, 5, 2, 4) for name in "qkv")
        x = jnp.einsum("bhqk,bkhd->bqhd", jax.nn.softmax(jnp.einsum("bqhd,bkhd->bhqk", q, k)), v)
        x = dense(p["attention/o"], x.reshape(2, 5, 8))
        layers = p["stack"], p["stack/norm"]
        x, _ = jax.lax.scan(lambda x, layer: (dense(layer[0], norm(layer[1], x)), None), x, layers)
        return dense(p["head"], x), conv(p["conv"], conv(p["dw"], conv(p["grey"], images), 6))

    names = {name: f"attention/{name}/w" for name in "qkvo"}
    names |= {name: f"{name}/w" for name in ("stack", "grey", "conv", "head")}
    return params, apply, (IDS, IMAGES), names


NETS = {"linen": linen_net, "nnx": nnx_net, "equinox": equinox_net, "dict": dict_net}
AXES = {
    "linen": {
        "q": "ioo",
        "k": "ioo",
        "v": "ioo",
        "o": "iio",
        "stack": "sio",
        "grey": "wwio",
        "conv": "wwio",
        "head": "io",
    },
    "equinox": {**dict.fromkeys("qkvo", "oi"), "stack": "soi", "grey": "oiww", "conv": "oiww", "head": "oi"},
    "dict": {**dict.fromkeys("qkvo", "io"), "stack": "sio", "grey": "wwio", "conv": "wwio", "head": "io"},
}
AXES["nnx"] = AXES["linen"]
# ERK at 0.7 over the layers above, each of the 3 layers of the stack a layer of its own.
LAYERS = dict.fromkeys((*"qkvo", "s0", "s1", "s2"), (8, 8))
LAYERS |= {"grey": (3, 3, 1, 6), "conv": (3, 3, 6, 4), "head": (8, 3)}


@pytest.mark.parametrize("traced", [False, True], ids=["named", "traced"])
@pytest.mark.parametrize("framework", NETS)
def test_one_network_has_one_plan_in_every_framework(framework, traced):
    params, apply, inputs, names = NETS[framework]()
    given = {"apply": apply, "inputs": inputs} if traced else {}
    if not traced and framework != "equinox":  # whose modules say how many groups they have
        params = without(params, "dw")  # beside another of one input channel it makes `grey` look depthwise
    plan = rx.make_plan(params, 0.7, **given)
    assert sorted(plan) == sorted(names.values())
    shared = rx.erk(LAYERS, 0.7)
    for key, name in names.items():
        leaf = plan[name]
        assert letters(leaf.axes, leaf.shape) == AXES[framework][key], name
        layer = "s0" if key == "stack" else key
        size = np.prod(LAYERS[layer])
        assert leaf.n_active == size - int(shared[layer] * size), name
    assert (plan[names["stack"]].groups, plan[names["stack"]].group_size) == (3, 64)


def without(params, name):
    return {key: value for key, value in params.items() if key != name}


# --- by name ---------------------------------------------------------------------------------------------------------

BY_NAME = [
    # name, shape, what lies beside it, axes, dense
    ("Dense_0/kernel", (4, 6), {}, "io", None),
    ("Dense_0/bias", (4,), {}, "?", "bias or scale"),
    ("LayerNorm_0/scale", (4,), {}, "?", "bias or scale"),
    ("attention/query/bias", (8, 64), {}, "?", "bias or scale"),
    ("Embed_0/embedding", (32, 8), {}, "io", "embedding"),
    ("pos_embedding", (1, 32, 8), {}, "sio", "embedding"),
    ("cls_token", (1, 1, 8), {}, "sio", "embedding"),
    ("conv/kernel", (3, 3, 8, 16), {}, "wwio", None),
    ("column/kernel", (1, 16), {}, "io", None),
    ("first/kernel", (5, 5, 1, 6), {"first/bias": (6,)}, "wwio", None),
    ("dw/kernel", (3, 3, 1, 16), {}, "wwio", "depthwise"),
    ("block/depthwise_conv/kernel", (3, 3, 1, 16), {}, "wwio", "depthwise"),
    ("a/kernel", (3, 3, 1, 16), {"b/kernel": (3, 3, 1, 16)}, "wwio", "depthwise"),
    ("one_d/kernel", (3, 8, 16), {"one_d/bias": (16,)}, "wio", None),
    ("scanned/kernel", (3, 8, 16), {"scanned/bias": (3, 16)}, "sio", None),
    ("scanned/conv/kernel", (2, 3, 3, 8, 16), {"scanned/conv/bias": (2, 16)}, "swwio", None),
    ("heads/kernel", (8, 4, 2), {"heads/bias": (4, 2)}, "ioo", None),
    ("either/kernel", (4, 4, 2), {"either/bias": (4, 2)}, "?", None),  # 4 layers of 4 x 2, or 4 heads of 2
    ("either/kernel", (3, 8, 16), {}, "?", None),
    ("a/kernel", (3, 1, 16), {"b/kernel": (3, 1, 16)}, "?", "depthwise"),
    ("a/kernel", (3, 1, 16), {"b/kernel": (3, 8, 16)}, "?", None),
    ("batch_stats/mean", (3, 16), {}, "?", "bias or scale"),
    ("conv1.weight", (8, 4, 3, 3), {"conv1.bias": (8,)}, "oiww", None),
    ("conv1d.weight", (8, 4, 3), {"conv1d.bias": (8,)}, "oiw", None),
    ("fc.weight", (10, 8), {"fc.bias": (10,)}, "oi", None),
    ("jax_like/weight", (8, 10), {"jax_like/bias": (10,)}, "io", None),
    ("tok_emb.weight", (11, 8), {}, "io", "embedding"),
    ("patch_embed.weight", (8, 3), {"patch_embed.bias": (8,)}, "oi", None),
    ("norms/weight", (3, 8), {"norms/bias": (3, 8)}, "?", "bias or scale"),
    ("rms_norm/weight", (3, 8), {}, "?", "bias or scale"),
    ("linear/w", (8, 4), {"linear/b": (4,)}, "io", None),
    ("layer_stack/b", (3, 4), {"layer_stack/w": (3, 8, 4)}, "?", "bias or scale"),
    ("b", (4, 3), {"a": (3, 4)}, "io", None),
    ("0", (6, 32), {"1": (32,)}, "io", None),
    ("empty/kernel", (0, 4), {}, "io", "empty"),
    # layers that are not along axis 0
    ("scan/kernel", (16, 4, 16), {"scan/bias": (16, 4)}, "iso", None),
    ("scan/kernel", (8, 4, 16), {"scan/bias": (16, 4)}, "iso", None),
    ("scan/w", (8, 4, 16), {"scan/b": (16, 4)}, "iso", None),
    ("scan/weight", (16, 8, 4), {"scan/bias": (16, 4)}, "sio", None),  # as before: the bias fits (layers, in, out)
    ("scan/weight", (16, 4, 8), {"scan/bias": (4, 16)}, "osi", None),
    ("scan/kernel", (16, 16, 4), {"scan/bias": (16, 4)}, "?", None),  # or 16 layers of 16 x 4, or 16 heads of 4
    ("scan/kernel", (4, 4, 4), {"scan/bias": (4, 4)}, "?", None),
    ("scan/conv/kernel", (3, 4, 3, 8, 16), {"scan/conv/bias": (16, 4)}, "wswio", None),
    ("scan/heads/kernel", (8, 3, 4, 2), {"scan/heads/bias": (4, 3, 2)}, "isoo", None),
    ("neither/kernel", (8, 4, 16), {"neither/bias": (5, 4)}, "?", None),
    # what the names say
    ("depthwise/kernel", (8, 1, 3, 3), {}, "oiww", "depthwise"),
    ("dw/w", (8, 1, 3, 3), {"dw/b": (8,)}, "oiww", "depthwise"),
    ("dw/kernel", (3, 1, 1, 16), {}, "wwio", "depthwise"),
    ("conv/kernel", (8, 1, 3, 3), {}, "wwio", None),
    ("embed/table", (100, 16), {}, "io", "embedding"),
    ("embedding/w", (100, 16), {}, "io", "embedding"),
    ("pos_embed/w", (1, 10, 16), {}, "sio", "embedding"),
    ("embedding/kernel", (4, 4, 3, 16), {"embedding/bias": (16,)}, "wwio", None),
    ("embed/w", (48, 16), {"embed/b": (16,)}, "io", None),
    ("embed/proj/w", (48, 16), {}, "io", None),
    ("patch_embed/w", (48, 16), {}, "io", None),
    ("unembed/w", (16, 100), {}, "io", None),
    ("posemb", (1, 10, 16), {}, "sio", "embedding"),
    ("positional_encoding", (10, 16), {}, "io", "embedding"),
    ("pos_enc", (10, 16), {}, "io", "embedding"),
    ("cls", (1, 1, 16), {}, "sio", "embedding"),
    ("cls_token", (1, 16), {}, "io", "embedding"),
    ("cls", (16, 10), {}, "io", None),
    ("ln/g", (3, 16), {"ln/b": (3, 16)}, "?", "bias or scale"),
    ("ln/b", (3, 16), {"ln/g": (3, 16)}, "?", "bias or scale"),
    ("ln/w", (3, 16), {"ln/b": (3, 16)}, "?", "bias or scale"),
    ("rms/weight", (3, 16), {}, "?", "bias or scale"),
    ("norm/g", (3, 16), {}, "?", "bias or scale"),
    ("batchnorm2d_1/weight", (3, 16), {}, "?", "bias or scale"),
    ("norm_mlp/w", (16, 32), {"norm_mlp/b": (32,)}, "io", None),
    ("norm_mlp/dense/w", (16, 32), {}, "io", None),
    ("normals/w", (16, 3), {"normals/b": (3,)}, "io", None),
    ("normal/w", (16, 3), {}, "io", None),
]


@pytest.mark.parametrize(("name", "shape", "beside", "axes", "dense"), BY_NAME)
def test_by_name(name, shape, beside, axes, dense):
    shapes = {name: shape, **beside}
    found = rx.roles({n: jax.ShapeDtypeStruct(s, "float32") for n, s in shapes.items()})[name]
    assert letters(found.axes, shape) == axes
    assert found.dense == dense


class Odd(eqx.Module):
    table: jax.Array
    w: jax.Array

    def __call__(self, x):
        return self.w @ jnp.tanh(x)


def test_the_attributes_of_a_module_that_is_not_known_are_asked_for():
    odd = Odd(jnp.zeros((5, 8)), jnp.zeros((4, 8)))
    assert rx.roles(odd)["w"].axes is None
    fan_in = [("w", rx.fan_in()), (".*", None)]
    with refused("w", "fan_in"):
        rx.make_plan(odd, 0.5, rules=fan_in)
    assert rx.make_plan(odd, 0.5)["w"].n_active == rx.make_plan({"w": odd.w, "table": odd.table}, 0.5)["w"].n_active
    given = rx.make_plan(odd, 0.5, rules=fan_in, axes={"w": rx.Axes((1,), (0,))})
    seen = rx.make_plan(odd, 0.5, rules=fan_in, apply=lambda odd, x: odd(x), inputs=[jnp.zeros(8)])
    assert given["w"].axes == seen["w"].axes == rx.Axes((1,), (0,))
    assert given["w"].n_active == seen["w"].n_active == 4


# --- by trace --------------------------------------------------------------------------------------------------------


def noisy(p, x):
    keep = jax.random.bernoulli(jax.random.key(0), 0.5, p["w"].shape)
    return x @ jnp.where(keep, p["w"], 0).astype(jnp.bfloat16).astype(jnp.float32)


def unrolled(p, x):
    for i in range(3):
        x = x @ p["w"][i]
    return x


def chosen(p, x):
    return jnp.einsum("bd,bdf->bf", x, p["w"][jnp.argmax(x, -1)])


def normalised(p, x):
    return x @ (p["g"] * p["w"] / jnp.linalg.norm(p["w"], axis=0, keepdims=True))


def looped(p, x):
    return jax.lax.fori_loop(0, 3, lambda i, x: x @ p["w"][i], x)


def experts(p, x):
    hidden = jax.nn.relu(jnp.einsum("bi,eio->ebo", x, p["w"]))
    return jnp.einsum("ebo,eoi->ebi", hidden, p["out"])


def members(p, x):
    def member(one, x):
        return jnp.tanh(x @ one["w"] + one["bias"][None]) @ one["out"]

    return jax.vmap(member, (0, None))(p, x)


def blocks(p, x):
    return jnp.einsum("bgd,gdf->bgf", (x @ p["w"]).reshape(2, 2, 4), p["out"])


BY_TRACE = [
    # leaf, shapes, apply, axes, dense
    ("w", {"w": (8, 4)}, lambda p, x: x @ p["w"], "io", None),
    ("w", {"w": (4, 8)}, lambda p, x: (p["w"] @ x.T).T, "oi", None),
    ("w", {"w": (8, 8)}, noisy, "io", None),
    ("w", {"w": (3, 8, 8)}, unrolled, "sio", None),
    ("w", {"w": (3, 8, 8)}, looped, "sio", None),
    ("w", {"w": (8, 8, 4)}, chosen, "sio", None),
    ("w", {"w": (8, 8), "g": (1, 8)}, normalised, "io", None),
    ("g", {"w": (8, 8), "g": (1, 8)}, normalised, "?", "bias or scale"),
    ("a", {"a": (8, 2), "c": (2, 6)}, lambda p, x: x @ (p["a"] @ p["c"]), "io", None),
    ("c", {"a": (8, 2), "c": (2, 6)}, lambda p, x: x @ (p["a"] @ p["c"]), "io", None),
    ("w", {"w": (12, 8)}, lambda p, x: jnp.einsum("bi,hoi->bho", x, p["w"].reshape(3, 4, 8)), "oi", None),
    ("w", {"w": (3, 8, 4)}, lambda p, x: jnp.einsum("ebi,eio->ebo", jnp.stack([x] * 3), p["w"]), "sio", None),
    ("w", {"w": (3, 4, 8)}, lambda p, x: jax.vmap(lambda w, x: x @ w.T)(p["w"], jnp.stack([x] * 3)), "soi", None),
    ("w", {"w": (3, 8, 8)}, lambda p, x: jax.lax.scan(lambda x, w: (x @ w, None), x, p["w"])[0], "sio", None),
    ("w", {"w": (8, 8)}, lambda p, x: jax.checkpoint(lambda w, x: jax.jit(jnp.matmul)(x, w))(p["w"], x), "io", None),
    ("w", {"w": (8, 8)}, lambda p, x: jax.lax.cond(x.sum() > 0, lambda: x @ p["w"], lambda: x), "io", None),
    ("w", {"w": (3, 8, 4), "out": (3, 4, 8)}, experts, "sio", None),
    ("out", {"w": (3, 8, 4), "out": (3, 4, 8)}, experts, "sio", None),
    ("w", {"w": (3, 8, 4), "bias": (3, 4), "out": (3, 4, 8)}, members, "sio", None),
    ("w", {"w": (8, 8), "out": (2, 4, 4)}, blocks, "io", None),
    ("out", {"w": (8, 8), "out": (2, 4, 4)}, blocks, "sio", None),
    ("kernel", {"kernel": (8, 8)}, lambda p, x: x * p["kernel"][:1], "?", "bias or scale"),
    ("w", {"w": (8, 4)}, lambda p, x: p["w"][jnp.argmax(x, -1)], "io", "embedding"),
    ("w", {"w": (8, 4)}, lambda p, x: p["w"][jnp.array([0, 3, 1])] @ jnp.ones((4, 2)), "io", "embedding"),
    ("w", {"w": (8, 4)}, lambda p, x: x @ p["w"][jnp.arange(8)[::-1]], "io", None),
    ("w", {"w": (8, 8)}, lambda p, x: p["w"][jnp.argmax(x, -1)] @ p["w"].T, "io", "embedding"),
]


@pytest.mark.parametrize(("leaf", "shapes", "apply", "axes", "dense"), BY_TRACE)
def test_by_trace(leaf, shapes, apply, axes, dense):
    params = {name: jax.ShapeDtypeStruct(shape, "float32") for name, shape in shapes.items()}
    found = rx.roles(params, apply, (jnp.ones((2, 8)),))[leaf]
    assert letters(found.axes, shapes[leaf]) == axes
    assert found.dense == dense


def test_kernels_under_vmap_are_layers_and_not_depthwise():
    make = lambda key: eqx.nn.Sequential(  # noqa: E731
        [eqx.nn.Conv2d(1, 6, 3, key=key), eqx.nn.Conv2d(6, 6, 3, groups=6, key=key)]
    )
    params, static = eqx.partition(eqx.filter_vmap(make)(jax.random.split(KEY, 5)), eqx.is_inexact_array)
    apply = lambda p, x: eqx.filter_vmap(lambda net, x: jax.vmap(net)(x))(eqx.combine(p, static), x)  # noqa: E731
    for found in (rx.roles(params), rx.roles(params, apply, (jnp.zeros((5, 2, 1, 9, 9)),))):
        first, second = found["layers/0/weight"], found["layers/1/weight"]
        assert letters(first.axes, (5, 6, 1, 3, 3)) == letters(second.axes, (5, 6, 1, 3, 3)) == "soiww"
        assert (first.dense, second.dense) == (None, "depthwise")


def test_members_that_share_their_input_are_told_by_their_modules():
    make = lambda key: eqx.nn.MLP(4, 3, 8, 1, key=key)  # noqa: E731
    params, static = eqx.partition(eqx.filter_vmap(make)(jax.random.split(KEY, 5)), eqx.is_inexact_array)
    apply = lambda p, x: eqx.filter_vmap(lambda net: jax.vmap(net)(x))(eqx.combine(p, static))  # noqa: E731
    found = rx.roles(params, apply, (jnp.zeros((7, 4)),))
    assert (
        letters(found["layers/0/weight"].axes, (5, 8, 4)) == letters(found["layers/1/weight"].axes, (5, 3, 8)) == "soi"
    )


@pytest.mark.parametrize(
    ("given", "named"),
    [
        *(({"axes": {"w": axes}}, "axes w") for axes in (rx.Axes((0,), (0,)), rx.Axes((0, 1), ()), (0, 1))),
        ({"axes": {"v": rx.Axes((0,), (1,))}}, "axes v"),
        ({"axes": [("w", rx.Axes((0,), (1,)))]}, "axes"),
        ({"apply": lambda p, x: x @ p["w"], "inputs": (jnp.ones((2, 5)),)}, "apply inputs"),
        ({"apply": lambda p, x: x @ p["w"], "inputs": jnp.ones((2, 4))}, "inputs"),
    ],
)
def test_what_cannot_be_is_told(given, named):
    with refused(*named.split()):
        rx.make_plan({"w": jnp.zeros((4, 6))}, 0.5, **given)


# --- structures along these axes -------------------------------------------------------------------------------------

STRUCTURES = [rx.unstructured, lambda axes=None: rx.block(2, 3, axes), lambda axes=None: rx.n_of_m(2, 4, axes=axes)]
STRUCTURES += [rx.fan_in, lambda axes=None: rx.channel(axes=axes)]


@functools.partial(jax.jit, static_argnums=0)
def pruned_and_rewired(structure, drop, grow):
    kept = topology.prune(structure, drop, 2)
    return kept, topology.rewire(structure, kept, drop, grow, 2)


@pytest.mark.parametrize("make", STRUCTURES, ids=lambda make: make().name)
def test_a_structure_along_other_axes_is_that_of_the_transposed_weight(make):
    drop, grow = np.random.default_rng(0).random((2, 3, 8, 6), np.float32)
    there = make().bind(rx.Axes((-1,), (0,), window=(1,)))  # (out, window, in)
    turned = lambda x: np.transpose(x, (2, 0, 1))  # noqa: E731
    kept, after = pruned_and_rewired(make(), drop, grow)
    found, found_after = pruned_and_rewired(there, turned(drop), turned(grow))
    np.testing.assert_array_equal(found, turned(kept))
    np.testing.assert_array_equal(found_after.mask, turned(after.mask))
    assert pickle.loads(pickle.dumps(there)).units((6, 3, 8)) == there.units((6, 3, 8))


@pytest.mark.parametrize("make", STRUCTURES, ids=lambda make: make().name)
def test_each_layer_of_a_stack_is_on_its_own(make):
    scale = np.float32([1e-3, 1.0, 1e3]).reshape(1, 3, 1, 1)  # by the leaf, the first layer would lose all
    drop, grow = np.random.default_rng(0).random((2, 3, 8, 6), np.float32) * scale
    kept, after = pruned_and_rewired(make().bind(rx.Axes((1,), (2,), stack=(0,))), drop, grow)
    for i in range(3):
        one, alone = pruned_and_rewired(make(), drop[i], grow[i])
        np.testing.assert_array_equal(kept[i], one)
        np.testing.assert_array_equal(after.mask[i], alone.mask)
        np.testing.assert_array_equal(after.kept[i], alone.kept)


ONE_WAY = [
    # structure, shape, axes; sums of the mask over what are equal
    (rx.fan_in(), (12, 8), rx.Axes((1,), (0,)), (1,)),
    (rx.fan_in(), (8, 4, 4), rx.Axes((0,), (1, 2)), (0,)),
    (rx.fan_in(), (4, 4, 8), rx.Axes((0, 1), (2,)), (0, 1)),
    (rx.fan_in(), (6, 4, 3, 3), rx.Axes((1,), (0,), (2, 3)), (1, 2, 3)),
    (rx.fan_in(), (3, 12, 8), rx.Axes((2,), (1,), stack=(0,)), (2,)),
]


@pytest.mark.parametrize(("structure", "shape", "axes", "summed"), ONE_WAY)
def test_constant_fan_in_is_constant_under_srigl_and_rigl(structure, shape, axes, summed):
    drawn = np.random.default_rng(0).normal(size=(2, *shape)).astype(np.float32)
    plan = rx.make_plan({"w": drawn[0]}, 0.5, rx.uniform, rules=[("w", structure)], axes={"w": axes})
    algorithms = rx.rigl(plan), rx.srigl(plan, min_salient=0.0)

    @jax.jit
    def rewired(weights, grads):
        masks = algorithms[0].init(KEY, weights).masks
        signals = rx.Signals(weights, grads, 0, KEY)
        return [a.update(a.init(KEY, weights)._replace(masks=masks), signals).state.masks for a in algorithms]

    for masks in rewired({"w": drawn[0]}, {"w": drawn[1]}):
        counts = np.asarray(masks["w"]).sum(summed)
        assert set(counts.ravel().tolist()) == {plan["w"].n_active}


def test_axes_that_are_given_make_no_kernel():
    params = {"embed": {"weight": jnp.zeros((11, 8))}, "w": jnp.zeros((8, 8))}
    plan = rx.make_plan(params, 0.5, axes={".*": rx.Axes((1,), (0,))})
    assert list(plan) == ["w"]
    assert plan["w"].axes == rx.Axes((1,), (0,))
    assert list(rx.make_plan(params, 0.5, rules=[(".*", rx.unstructured())])) == ["embed/weight", "w"]
    for outputs in (5, -3, 1.0):
        with refused("make_plan", "axes", "'w'"):
            rx.make_plan(params, 0.5, axes={"w": rx.Axes((0,), (outputs,))})


def test_the_scale_of_first_weights_follows_the_axes_of_the_plan():
    params = {"w": jnp.ones((2, 6, 8))}
    plan = rx.make_plan(params, 0.5, rx.uniform, axes={"w": rx.Axes((2,), (1,), stack=(0,))})
    masks = topology.random_masks(plan, KEY, params)
    found = rx.rescale_init(params, masks, plan=plan)["w"]
    active = np.maximum(np.asarray(masks["w"]).sum(2, keepdims=True), 1)
    np.testing.assert_allclose(found, np.asarray(masks["w"]) * np.sqrt(8 / active), rtol=1e-6)


@pytest.mark.parametrize("structure", [rx.fan_in(), rx.block(4, 2), rx.n_of_m(1, 4)], ids=lambda s: s.name)
def test_weights_with_outputs_first_run_packed(structure):
    layer = eqx.nn.Linear(16, 12, key=KEY)
    plan = rx.make_plan(layer, 0.75, rx.uniform, rules=[("weight", structure), (".*", None)])
    masked = rx.apply_masks(layer, topology.random_masks(plan, KEY, layer))
    x = jax.random.normal(KEY, (5, 16))
    packed = rx.pack(masked, topology.random_masks(plan, KEY, layer))
    assert packed.values.weight.shape == (48,)
    found = jax.jit(rx.run_packed(lambda layer, x: jax.vmap(layer)(x)))(packed, x)  # a dense product would warn
    np.testing.assert_allclose(found, jax.vmap(masked)(x), rtol=1e-5, atol=1e-6)
