"""Small models of many kinds. They read all sizes off their params, so they also run with fewer channels."""

import math

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax


class Draw:
    """Random params, one after the other. NumPy makes them: JAX would compile for each shape, even `jnp.asarray`."""

    def __init__(self, seed=0):
        self.rng = np.random.default_rng(seed)

    def __call__(self, *shape):
        return jax.device_put(self.drawn(*shape))

    def drawn(self, *shape):
        return (self.rng.normal(size=shape) / math.sqrt(math.prod(shape[:-1]) or 1)).astype(np.float32)

    def dense(self, n, m):
        return {"kernel": self(n, m), "bias": self(m)}

    def conv(self, *window, n, m):
        return {"kernel": self(*window, n, m), "bias": self(m)}

    def norm(self, n):
        scale, bias = (np.float32(0.1) * self.drawn(n) for _ in range(2))
        return jax.device_put({"scale": 1 + scale, "bias": bias})

    def batch_norm(self, n):
        mean, var = self.drawn(n), self.drawn(n)
        return {**self.norm(n), **jax.device_put({"mean": np.float32(0.1) * mean, "var": 1 + np.abs(var)})}


def dense(p, x):
    return x @ p["kernel"] + p["bias"]


def conv(p, x, stride=1, padding="SAME", groups=1, dilation=1, dilated=1):
    rank = x.ndim - 2
    spatial = "DHW"[3 - rank :]
    numbers = (f"N{spatial}C", f"{spatial}IO", f"N{spatial}C")
    return p["bias"] + lax.conv_general_dilated(
        x, p["kernel"], (stride,) * rank, padding, (dilated,) * rank, (dilation,) * rank, numbers, groups
    )


def batch_norm(p, x):
    return (x - p["mean"]) * lax.rsqrt(p["var"] + 1e-5) * p["scale"] + p["bias"]


def layer_norm(p, x):
    return (x - x.mean(-1, keepdims=True)) * lax.rsqrt(x.var(-1, keepdims=True) + 1e-5) * p["scale"] + p["bias"]


def rms_norm(p, x):
    return x * lax.rsqrt(jnp.mean(x * x, -1, keepdims=True) + 1e-6) * p["scale"]


def group_norm(p, x, size):
    *batch, h, w, c = x.shape
    grouped = x.reshape(*batch, h, w, c // size, size)
    mean, var = (f(grouped, (-4, -3, -1), keepdims=True) for f in (jnp.mean, jnp.var))
    return ((grouped - mean) * lax.rsqrt(var + 1e-5)).reshape(x.shape) * p["scale"] + p["bias"]


def pool(x, reducer=lax.max, start=-jnp.inf):
    return lax.reduce_window(x, start, reducer, (1, 2, 2, 1), (1, 2, 2, 1), "VALID")


def attend(q, k, v, causal=False):
    """[batch, time, heads, features] each."""
    weights = jnp.einsum("bqhd,bkhd->bhqk", q, k) / math.sqrt(8)
    if causal:
        weights = jnp.where(jnp.tril(jnp.ones(weights.shape[-2:], bool)), weights, -1e9)
    return jnp.einsum("bhqk,bkhd->bqhd", jax.nn.softmax(weights), v)


def rotate(x):
    """Rotary positions: pairs of features (i, i + half)."""
    time, half = x.shape[1], x.shape[-1] // 2
    angle = jnp.arange(time)[:, None] / 100.0 ** (jnp.arange(half) / half)
    cos, sin = (f(angle)[:, None] for f in (jnp.cos, jnp.sin))
    a, b = jnp.split(x, 2, -1)
    return jnp.concatenate([a * cos - b * sin, b * cos + a * sin], -1)


IMAGE = (2, 8, 8, 3)


def mlp(d):
    p = {"a": d.dense(5, 12), "b": d.dense(12, 10), "c": d.dense(10, 3)}
    return p, lambda p, x: dense(p["c"], jax.nn.gelu(dense(p["b"], jax.nn.relu(dense(p["a"], x))))), (4, 5)


def lenet(d):
    p = {"a": d.conv(3, 3, n=3, m=8), "b": d.conv(3, 3, n=8, m=12), "c": d.dense(48, 16), "d": d.dense(16, 3)}

    def apply(p, x):
        x = pool(jax.nn.relu(conv(p["a"], x)))
        x = pool(jax.nn.relu(conv(p["b"], x)))
        return dense(p["d"], jax.nn.relu(dense(p["c"], x.reshape(x.shape[0], -1))))

    return p, apply, IMAGE


def resnet(d):
    p = {"stem": d.conv(3, 3, n=3, m=8), "n0": d.batch_norm(8)}
    p |= {"a": d.conv(3, 3, n=8, m=16), "n1": d.batch_norm(16), "b": d.conv(3, 3, n=16, m=16), "n2": d.batch_norm(16)}
    p |= {"short": d.conv(1, 1, n=8, m=16), "n3": d.batch_norm(16), "head": d.dense(16, 3)}

    def apply(p, x):
        x = jax.nn.relu(batch_norm(p["n0"], conv(p["stem"], x)))
        y = jax.nn.relu(batch_norm(p["n1"], conv(p["a"], x, 2)))
        y = batch_norm(p["n2"], conv(p["b"], y)) + batch_norm(p["n3"], conv(p["short"], x, 2))
        return dense(p["head"], jax.nn.relu(y).mean((1, 2)))

    return p, apply, IMAGE


def padded_shortcut(d):
    """The shortcut of the ResNets for CIFAR: every other pixel, zeros for the new channels."""
    p = {"stem": d.conv(3, 3, n=3, m=8), "a": d.conv(3, 3, n=8, m=16), "head": d.dense(16, 3)}

    def apply(p, x):
        x = jax.nn.relu(conv(p["stem"], x))
        y = conv(p["a"], x, 2)
        more = y.shape[-1] - x.shape[-1]
        x = jnp.pad(x[:, ::2, ::2], ((0, 0), (0, 0), (0, 0), (more // 2, more - more // 2)))
        return dense(p["head"], jax.nn.relu(x + y).mean((1, 2)))

    return p, apply, IMAGE


def densenet(d):
    p = {"stem": d.conv(3, 3, n=3, m=8), "head": d.dense(16, 3)}
    for i in range(2):
        p |= {f"n{i}": d.batch_norm(8 + 4 * i), f"c{i}": d.conv(3, 3, n=8 + 4 * i, m=4)}

    def apply(p, x):
        x = conv(p["stem"], x)
        for i in range(2):
            x = jnp.concatenate([x, conv(p[f"c{i}"], jax.nn.relu(batch_norm(p[f"n{i}"], x)))], -1)
        return dense(p["head"], x.mean((1, 2)))

    return p, apply, IMAGE


def inception(d):
    p = {
        "a": d.conv(1, 1, n=3, m=4),
        "b": d.conv(1, 1, n=3, m=6),
        "c": d.conv(3, 3, n=6, m=8),
        "d": d.conv(1, 1, n=3, m=4),
    }
    p["head"] = d.dense(16, 3)

    def apply(p, x):
        pooled = lax.reduce_window(x, -jnp.inf, lax.max, (1, 3, 3, 1), (1, 1, 1, 1), "SAME")
        x = jnp.concatenate([conv(p["a"], x), conv(p["c"], jax.nn.relu(conv(p["b"], x))), conv(p["d"], pooled)], -1)
        return dense(p["head"], jax.nn.relu(x).mean((1, 2)))

    return p, apply, IMAGE


def mobilenet(d):
    p = {
        "a": d.conv(1, 1, n=3, m=8),
        "dw": d.conv(3, 3, n=1, m=16),
        "n": d.batch_norm(16),
        "b": d.conv(1, 1, n=16, m=3),
    }

    def apply(p, x):
        x = jax.nn.relu(conv(p["a"], x))
        return conv(p["b"], jax.nn.relu(batch_norm(p["n"], conv(p["dw"], x, groups=x.shape[-1])))).mean((1, 2))

    return p, apply, IMAGE


def resnext(d):
    """A convolution with more groups than channels in each: whole groups are removed."""
    p = {"a": d.conv(1, 1, n=3, m=16), "g": d.conv(3, 3, n=2, m=16), "b": d.conv(1, 1, n=16, m=3)}

    def apply(p, x):
        x = jax.nn.relu(conv(p["a"], x))
        groups = x.shape[-1] // p["g"]["kernel"].shape[-2]
        return conv(p["b"], jax.nn.relu(conv(p["g"], x, groups=groups))).mean((1, 2))

    return p, apply, IMAGE


def shufflenet(d):
    """Two groups of many channels, shuffled: the same channels of both groups are removed."""
    p = {"a": d.conv(1, 1, n=3, m=16), "g": d.conv(1, 1, n=8, m=16), "h": d.conv(1, 1, n=16, m=3)}

    def apply(p, x):
        x = jax.nn.relu(conv(p["a"], x))
        x = conv(p["g"], x, groups=2)
        *rest, c = x.shape
        x = x.reshape(*rest, 2, c // 2).swapaxes(-1, -2).reshape(*rest, c)
        return conv(p["h"], jax.nn.relu(x)).mean((1, 2))

    return p, apply, IMAGE


def squeeze_excite(d):
    p = {"a": d.conv(3, 3, n=3, m=8), "s": d.dense(8, 4), "e": d.dense(4, 8), "b": d.conv(1, 1, n=8, m=3)}

    def apply(p, x):
        x = jax.nn.silu(conv(p["a"], x))
        gate = jax.nn.sigmoid(dense(p["e"], jax.nn.relu(dense(p["s"], x.mean((1, 2))))))
        return conv(p["b"], x * gate[:, None, None]).mean((1, 2))

    return p, apply, IMAGE


def unet(d):
    """A skip around a downsampling and a transposed convolution."""
    p = {
        "a": d.conv(3, 3, n=3, m=8),
        "b": d.conv(3, 3, n=8, m=12),
        "up": d.conv(2, 2, n=12, m=6),
        "c": d.conv(3, 3, n=14, m=3),
    }

    def apply(p, x):
        x = jax.nn.relu(conv(p["a"], x))
        y = jax.nn.relu(conv(p["b"], pool(x)))
        y = conv(p["up"], y, padding=((1, 1), (1, 1)), dilated=2)
        return conv(p["c"], jnp.concatenate([x, y], -1))

    return p, apply, IMAGE


def convnext(d):
    p = {"stem": d.conv(2, 2, n=3, m=8), "n0": d.norm(8), "dw": d.conv(3, 3, n=1, m=8), "n1": d.norm(8)}
    p |= {"up": d.dense(8, 32), "down": d.dense(32, 8), "gamma": d(8), "n2": d.norm(8), "head": d.dense(8, 3)}

    def apply(p, x):
        x = layer_norm(p["n0"], conv(p["stem"], x, 2, "VALID"))
        y = layer_norm(p["n1"], conv(p["dw"], x, groups=x.shape[-1]))
        x = x + p["gamma"] * dense(p["down"], jax.nn.gelu(dense(p["up"], y)))
        return dense(p["head"], layer_norm(p["n2"], x.mean((1, 2))))

    return p, apply, IMAGE


def group_normed(d):
    p = {"a": d.conv(3, 3, n=3, m=16), "n": d.norm(16), "b": d.conv(3, 3, n=16, m=3)}
    return p, lambda p, x: conv(p["b"], jax.nn.relu(group_norm(p["n"], conv(p["a"], x), 2))).mean((1, 2)), IMAGE


def temporal(d):
    """Dilated convolutions over time."""
    p = {"a": d.conv(3, n=4, m=8), "b": d.conv(3, n=8, m=8), "c": d.conv(1, n=8, m=3)}

    def apply(p, x):
        x = jax.nn.relu(conv(p["a"], x, dilation=2))
        return conv(p["c"], x + jax.nn.relu(conv(p["b"], x, dilation=4)))

    return p, apply, (2, 10, 4)


def volume(d):
    p = {"a": d.conv(3, 3, 3, n=2, m=6), "b": d.conv(3, 3, 3, n=6, m=3)}
    return p, lambda p, x: conv(p["b"], jax.nn.relu(conv(p["a"], x, 2))), (1, 4, 4, 4, 2)


def _block(d, width, heads=4, size=6):
    p = {name: d(width, heads, size) for name in "qkv"} | {"o": d(heads, size, width)}
    return p | {"n1": d.norm(width), "n2": d.norm(width), "up": d.dense(width, 20), "down": d.dense(20, width)}


def _encode(p, x):
    y = layer_norm(p["n1"], x)
    q, k, v = (jnp.einsum("btc,chd->bthd", y, p[name]) for name in "qkv")
    x = x + jnp.einsum("bthd,hdc->btc", attend(q, k, v), p["o"])
    return x + dense(p["down"], jax.nn.gelu(dense(p["up"], layer_norm(p["n2"], x))))


def vit(d):
    """Patches, a class token, positions, kernels with an axis of heads."""
    p = {"patch": d.conv(4, 4, n=3, m=16), "cls": d(1, 1, 16), "pos": d(1, 5, 16), "block": _block(d, 16)}
    p |= {"n": d.norm(16), "head": d.dense(16, 3)}

    def apply(p, x):
        x = conv(p["patch"], x, 4, "VALID")
        x = x.reshape(x.shape[0], -1, x.shape[-1])
        cls = jnp.broadcast_to(p["cls"], (x.shape[0], 1, x.shape[-1]))
        x = _encode(p["block"], jnp.concatenate([cls, x], 1) + p["pos"])
        return dense(p["head"], layer_norm(p["n"], x)[:, 0])

    return p, apply, IMAGE


def gpt(d):
    """Tokens, fused queries, keys and values, rotary positions, RMSNorm, a fused gated MLP, a tied head."""
    p = {"embed": d(11, 16), "n1": d.norm(16), "qkv": d(16, 3 * 4 * 6), "o": d(4 * 6, 16), "n2": d.norm(16)}
    p |= {"up": d(16, 2 * 20), "down": d(20, 16)}

    def apply(p, tokens):
        x = p["embed"][tokens]
        q, k, v = jnp.split((rms_norm(p["n1"], x) @ p["qkv"]).reshape(*tokens.shape, 3, -1, 6), 3, 2)
        y = attend(rotate(q[:, :, 0]), rotate(k[:, :, 0]), v[:, :, 0], causal=True)
        x = x + y.reshape(*tokens.shape, -1) @ p["o"]
        gate, value = jnp.split(rms_norm(p["n2"], x) @ p["up"], 2, -1)
        x = x + (jax.nn.silu(gate) * value) @ p["down"]
        return x @ p["embed"].T

    return p, apply, (2, 5)


def grouped_query(d):
    """Eight heads of queries on four of keys and values, repeated."""
    p = {"q": d(10, 8 * 6), "k": d(10, 4 * 6), "v": d(10, 4 * 6), "o": d(8 * 6, 10)}

    def apply(p, x):
        q, k, v = ((x @ p[name]).reshape(*x.shape[:2], -1, 6) for name in "qkv")
        k, v = (jnp.repeat(y, 2, axis=2) for y in (k, v))
        return attend(q, k, v).reshape(*x.shape[:2], -1) @ p["o"]

    return p, apply, (2, 5, 10)


def lstm(d):
    """Four gates in one kernel, over time."""
    p = {"x": d(4, 4 * 8), "h": d(8, 4 * 8), "b": d(4 * 8), "head": d.dense(8, 3)}

    def apply(p, x):
        def step(carry, row):
            h, c = carry
            i, f, g, o = jnp.split(row @ p["x"] + h @ p["h"] + p["b"], 4, -1)
            c = jax.nn.sigmoid(f) * c + jax.nn.sigmoid(i) * jnp.tanh(g)
            h = jax.nn.sigmoid(o) * jnp.tanh(c)
            return (h, c), h

        zero = jnp.zeros((x.shape[0], p["h"].shape[0]))
        return dense(p["head"], lax.scan(step, (zero, zero), x.swapaxes(0, 1))[1][-1])

    return p, apply, (2, 5, 4)


def gru(d):
    p = {"x": d(4, 3 * 8), "h": d(8, 3 * 8), "head": d.dense(8, 3)}

    def apply(p, x):
        def step(h, row):
            (r, z, n), (hr, hz, hn) = (jnp.split(y, 3, -1) for y in (row @ p["x"], h @ p["h"]))
            z = jax.nn.sigmoid(z + hz)
            h = (1 - z) * jnp.tanh(n + jax.nn.sigmoid(r + hr) * hn) + z * h
            return h, h

        return dense(p["head"], lax.scan(step, jnp.zeros((x.shape[0], p["h"].shape[0])), x.swapaxes(0, 1))[0])

    return p, apply, (2, 5, 4)


def stacked(d):
    """Three layers of a transformer in one scan."""
    layers = [_block(d, 16) for _ in range(3)]
    p = {
        "in": d.dense(5, 16),
        "layers": jax.tree.map(lambda *a: jax.device_put(np.stack(a)), *layers),
        "out": d.dense(16, 3),
    }

    def apply(p, x):
        x, _ = lax.scan(lambda x, layer: (_encode(layer, x), None), dense(p["in"], x), p["layers"])
        return dense(p["out"], x)

    return p, apply, (2, 4, 5)


def experts(d):
    """A soft mixture: the experts are channels of the router."""
    p = {"router": d(6, 4), "up": d(4, 6, 10), "down": d(4, 10, 3)}

    def apply(p, x):
        h = jax.nn.relu(jnp.einsum("bi,eih->beh", x, p["up"]))
        return jnp.einsum("beh,eho,be->bo", h, p["down"], jax.nn.softmax(x @ p["router"]))

    return p, apply, (3, 6)


def branch(d):
    """A branch chosen by the data."""
    p = {"a": d.dense(5, 8), "b": d.dense(8, 8), "c": d.dense(8, 3)}

    def apply(p, x):
        h = dense(p["a"], x)
        h = lax.cond(x.sum() > 0, lambda h: jax.nn.relu(dense(p["b"], h)), jnp.tanh, h)
        return dense(p["c"], h)

    return p, apply, (4, 5)


KINDS = {
    f.__name__: f
    for f in (
        mlp, lenet, resnet, padded_shortcut, densenet, inception, mobilenet, resnext, shufflenet, squeeze_excite, unet,
        convnext, group_normed, temporal, volume, vit, gpt, grouped_query, lstm, gru, stacked, experts, branch,
    )
}  # fmt: skip


def make(kind, seed=0):
    """(params, apply, an input)."""
    params, apply, shape = KINDS[kind](Draw(seed))
    rng = np.random.default_rng(seed + 1)
    x = rng.integers(0, 11, shape) if kind == "gpt" else rng.normal(size=shape).astype(np.float32)
    return params, apply, jax.device_put(x)
