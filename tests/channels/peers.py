"""Small models of the kinds that Torch-Pruning lists (README, examples, tests), rebuilt from their public descriptions.

Kinds that `tests.channels.models` has already are not repeated. Unlike those, these may have sizes written down, as
models of frameworks do.
"""

import math

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from tests.channels.models import (
    IMAGE,
    Draw,
    attend,
    batch_norm,
    conv,
    dense,
    group_norm,
    layer_norm,
    pool,
    rms_norm,
    rotate,
)  # fmt: skip

relu, silu, gelu = jax.nn.relu, jax.nn.silu, jax.nn.gelu


def _cbr(d, *window, n, m):
    """Convolution and batch normalisation."""
    return {"conv": d.conv(*window, n=n, m=m), "norm": d.batch_norm(m)}


def cbr(p, x, act=relu, **options):
    """Convolution, batch normalisation, activation."""
    return act(batch_norm(p["norm"], conv(p["conv"], x, **options)))


def _same(x):
    return x


def _times(x, n):
    """Nearest neighbours, n times as large."""
    return jnp.repeat(jnp.repeat(x, n, 1), n, 2)


def _means(x):
    return x.mean((1, 2))


# --- classification --------------------------------------------------------------------------------------------------


def vgg_bn(d):
    p = {"a": _cbr(d, 3, 3, n=3, m=8), "b": _cbr(d, 3, 3, n=8, m=12), "c": d.dense(48, 16), "d": d.dense(16, 3)}

    def apply(p, x):
        x = pool(cbr(p["b"], pool(cbr(p["a"], x))))
        return dense(p["d"], relu(dense(p["c"], x.reshape(x.shape[0], -1))))

    return p, apply, IMAGE


def squeezenet(d):
    """A fire module; the classifier is a convolution."""
    p = {"s": d.conv(1, 1, n=3, m=4), "one": d.conv(1, 1, n=4, m=6), "three": d.conv(3, 3, n=4, m=6)}
    p["head"] = d.conv(1, 1, n=12, m=3)

    def apply(p, x):
        x = relu(conv(p["s"], x))
        x = jnp.concatenate([relu(conv(p["one"], x)), relu(conv(p["three"], x))], -1)
        return _means(relu(conv(p["head"], x)))

    return p, apply, IMAGE


def bottleneck(d):
    """ResNet-50's block, with and without a projection."""
    p = {"stem": _cbr(d, 3, 3, n=3, m=8), "short": _cbr(d, 1, 1, n=8, m=16), "head": d.dense(16, 3)}
    for i, n in enumerate((8, 16)):
        p[f"block{i}"] = {"a": _cbr(d, 1, 1, n=n, m=4), "b": _cbr(d, 3, 3, n=4, m=4), "c": _cbr(d, 1, 1, n=4, m=16)}

    def apply(p, x):
        x = cbr(p["stem"], x)
        for i in range(2):
            q = p[f"block{i}"]
            y = cbr(q["c"], cbr(q["b"], cbr(q["a"], x), stride=2 - i), _same)
            x = relu(y + (x if i else cbr(p["short"], x, _same, stride=2)))
        return dense(p["head"], _means(x))

    return p, apply, IMAGE


def preact_resnet(d):
    """Normalisation before each convolution."""
    p = {"stem": d.conv(3, 3, n=3, m=8), "n1": d.batch_norm(8), "a": d.conv(3, 3, n=8, m=6), "n2": d.batch_norm(6)}
    p |= {"b": d.conv(3, 3, n=6, m=8), "n3": d.batch_norm(8), "head": d.dense(8, 3)}

    def apply(p, x):
        x = conv(p["stem"], x)
        y = conv(p["a"], relu(batch_norm(p["n1"], x)))
        x = x + conv(p["b"], relu(batch_norm(p["n2"], y)))
        return dense(p["head"], _means(relu(batch_norm(p["n3"], x))))

    return p, apply, IMAGE


def _inverted(d, n, wide, squeeze=None):
    p = {"up": _cbr(d, 1, 1, n=n, m=wide), "dw": _cbr(d, 3, 3, n=1, m=wide), "down": _cbr(d, 1, 1, n=wide, m=n)}
    return p | ({"s": d.dense(wide, squeeze), "e": d.dense(squeeze, wide)} if squeeze else {})


def inverted(p, x, act):
    """An inverted residual, with squeeze and excitation where it has them."""
    y = cbr(p["up"], x, act)
    y = cbr(p["dw"], y, act, groups=y.shape[-1])
    if "s" in p:
        y = y * jax.nn.sigmoid(dense(p["e"], act(dense(p["s"], _means(y)))))[:, None, None]
    return x + cbr(p["down"], y, _same)


def _mobile(act, squeeze):
    def kind(d):
        p = {"stem": _cbr(d, 3, 3, n=3, m=4), "block": _inverted(d, 4, 12, squeeze), "head": d.dense(4, 3)}
        return p, lambda p, x: dense(p["head"], _means(inverted(p["block"], cbr(p["stem"], x, act), act))), IMAGE

    return kind


mobilenet_v2 = _mobile(jax.nn.relu6, None)
mobilenet_v3 = _mobile(jax.nn.hard_swish, 6)
efficientnet = _mobile(silu, 6)


def efficientnet_v2(d):
    """A fused block: one convolution in place of the first two."""
    p = {"stem": _cbr(d, 3, 3, n=3, m=4), "up": _cbr(d, 3, 3, n=4, m=12), "down": _cbr(d, 1, 1, n=12, m=4)}
    p["head"] = d.dense(4, 3)

    def apply(p, x):
        x = cbr(p["stem"], x, silu)
        return dense(p["head"], _means(x + cbr(p["down"], cbr(p["up"], x, silu), _same)))

    return p, apply, IMAGE


def regnet(d):
    """Four groups of two channels, squeeze and excitation."""
    p = {"stem": _cbr(d, 3, 3, n=3, m=8), "a": _cbr(d, 1, 1, n=8, m=8), "g": _cbr(d, 3, 3, n=2, m=8)}
    p |= {"s": d.dense(8, 4), "e": d.dense(4, 8), "c": _cbr(d, 1, 1, n=8, m=8), "head": d.dense(8, 3)}

    def apply(p, x):
        x = cbr(p["stem"], x)
        y = cbr(p["g"], cbr(p["a"], x), groups=4)
        y = y * jax.nn.sigmoid(dense(p["e"], relu(dense(p["s"], _means(y)))))[:, None, None]
        return dense(p["head"], _means(relu(x + cbr(p["c"], y, _same))))

    return p, apply, IMAGE


def inception_v3(d):
    """Factorised convolutions, branches that branch."""
    p = {"a": _cbr(d, 1, 1, n=3, m=4), "b": _cbr(d, 1, 3, n=4, m=4), "c": _cbr(d, 3, 1, n=4, m=6)}
    p |= {"d": _cbr(d, 1, 1, n=3, m=4), "head": d.dense(14, 3)}

    def apply(p, x):
        y = cbr(p["a"], x)
        y = jnp.concatenate([cbr(p["b"], y), cbr(p["c"], y)], -1)
        pooled = lax.reduce_window(x, 0.0, lax.add, (1, 3, 3, 1), (1, 1, 1, 1), "SAME") / 9
        return dense(p["head"], _means(jnp.concatenate([y, cbr(p["d"], pooled)], -1)))

    return p, apply, IMAGE


def xception(d):
    """Separable convolutions, as NASNet has them too."""
    p = {"stem": _cbr(d, 3, 3, n=3, m=8), "dw": d.conv(3, 3, n=1, m=8), "pw": _cbr(d, 1, 1, n=8, m=12)}
    p |= {"short": _cbr(d, 1, 1, n=8, m=12), "head": d.dense(12, 3)}

    def apply(p, x):
        x = cbr(p["stem"], x)
        y = pool(cbr(p["pw"], conv(p["dw"], relu(x), groups=8), _same))
        return dense(p["head"], _means(y + cbr(p["short"], x, _same, stride=2)))

    return p, apply, IMAGE


def shufflenet_v2(d):
    """Half of the channels goes around the block; then the halves are shuffled."""
    p = {"stem": _cbr(d, 3, 3, n=3, m=8), "a": _cbr(d, 1, 1, n=4, m=4), "dw": _cbr(d, 3, 3, n=1, m=4)}
    p |= {"c": _cbr(d, 1, 1, n=4, m=4), "end": _cbr(d, 1, 1, n=8, m=10), "head": d.dense(10, 3)}

    def apply(p, x):
        x = cbr(p["stem"], x)
        left, right = jnp.split(x, 2, -1)
        right = cbr(p["c"], cbr(p["dw"], cbr(p["a"], right), _same, groups=4))
        x = jnp.concatenate([left, right], -1)
        x = x.reshape(*x.shape[:-1], 2, 4).swapaxes(-1, -2).reshape(x.shape)
        return dense(p["head"], _means(cbr(p["end"], x)))

    return p, apply, IMAGE


# --- transformers ----------------------------------------------------------------------------------------------------


def _attention(d, width, heads=2, size=4, bias=None):
    p = {"qkv": d.dense(width, 3 * heads * size), "out": d.dense(heads * size, width)}
    return p | ({} if bias is None else {"bias": d(heads, bias, bias)})


def attention(p, x, heads=2):
    """Fused queries, keys and values; a bias for each head where it has one."""
    q, k, v = (dense(p["qkv"], x).reshape(*x.shape[:2], 3, heads, -1)[:, :, i] for i in range(3))
    weights = jnp.einsum("bqhd,bkhd->bhqk", q, k) / 2 + p.get("bias", 0.0)
    return dense(p["out"], jnp.einsum("bhqk,bkhd->bqhd", jax.nn.softmax(weights), v).reshape(*x.shape[:2], -1))


def swin(d):
    """Shifted windows with a bias of relative positions, then merged patches."""
    p = {"patch": d.conv(1, 1, n=3, m=8), "n1": d.norm(8), "attention": _attention(d, 8, bias=4), "n2": d.norm(8)}
    p |= {"up": d.dense(8, 12), "down": d.dense(12, 8), "n3": d.norm(32), "merge": d(32, 10), "head": d.dense(10, 3)}

    def apply(p, x):
        x = conv(p["patch"], x)
        b, h, w, c = x.shape
        y = jnp.roll(layer_norm(p["n1"], x), (-1, -1), (1, 2))
        y = y.reshape(b, h // 2, 2, w // 2, 2, c).transpose(0, 1, 3, 2, 4, 5).reshape(-1, 4, c)
        y = attention(p["attention"], y)
        y = y.reshape(b, h // 2, w // 2, 2, 2, c).transpose(0, 1, 3, 2, 4, 5).reshape(b, h, w, c)
        x = x + jnp.roll(y, (1, 1), (1, 2))
        x = x + dense(p["down"], gelu(dense(p["up"], layer_norm(p["n2"], x))))
        x = jnp.concatenate([x[:, i::2, j::2] for j in range(2) for i in range(2)], -1)
        return dense(p["head"], _means(layer_norm(p["n3"], x) @ p["merge"]))

    return p, apply, IMAGE


def bert(d):
    """Words, positions and types; normalisation after each sum; a pooled first token."""
    p = {"words": d(11, 8), "positions": d(5, 8), "types": d(2, 8), "n0": d.norm(8), "n1": d.norm(8), "n2": d.norm(8)}
    p |= {"attention": _attention(d, 8), "up": d.dense(8, 12), "down": d.dense(12, 8)}
    p |= {"pool": d.dense(8, 8), "head": d.dense(8, 3)}

    def apply(p, tokens):
        x = layer_norm(p["n0"], p["words"][tokens] + p["positions"][jnp.arange(5)][None] + p["types"][tokens % 2])
        x = layer_norm(p["n1"], x + attention(p["attention"], x))
        x = layer_norm(p["n2"], x + dense(p["down"], gelu(dense(p["up"], x))))
        return dense(p["head"], jnp.tanh(dense(p["pool"], x[:, 0])))

    return p, apply, (2, 5)


def llama(d):
    """RMSNorm, rotary queries on half as many keys (with Qwen2's biases), SwiGLU, a head of its own."""
    p = {"embed": d(11, 8), "n1": d.norm(8), "n2": d.norm(8), "n3": d.norm(8), "head": d(8, 11)}
    p |= {"q": d.dense(8, 4 * 4), "k": d.dense(8, 2 * 4), "v": d.dense(8, 2 * 4), "o": d(4 * 4, 8)}
    p |= {"gate": d(8, 12), "up": d(8, 12), "down": d(12, 8)}

    def apply(p, tokens):
        x = p["embed"][tokens]
        y = rms_norm(p["n1"], x)
        q, k, v = (dense(p[name], y).reshape(*tokens.shape, n, 4) for name, n in (("q", 4), ("k", 2), ("v", 2)))
        k, v = (jnp.repeat(a, 2, 2) for a in (rotate(k), v))
        x = x + attend(rotate(q), k, v, causal=True).reshape(*tokens.shape, -1) @ p["o"]
        y = rms_norm(p["n2"], x)
        x = x + (silu(y @ p["gate"]) * (y @ p["up"])) @ p["down"]
        return rms_norm(p["n3"], x) @ p["head"]

    return p, apply, (2, 5)


def segment_anything(d):
    """An image encoder with a neck, prompts, two-way attention, and masks from tokens and upscaled images."""
    p = {"patch": d.conv(2, 2, n=3, m=8), "pos": d(1, 4, 4, 8), "n1": d.norm(8), "attention": _attention(d, 8)}
    p |= {"neck": d.conv(1, 1, n=8, m=6), "n2": d.norm(6), "tokens": d(1, 3, 6)}
    p |= {name: d.dense(6, 8) for name in "qkv"} | {"o": d.dense(8, 6), "up": d.conv(2, 2, n=6, m=4)}
    p["hyper"] = d.dense(6, 4)

    def apply(p, x):
        x = conv(p["patch"], x, 2, "VALID") + p["pos"]
        y = layer_norm(p["n1"], x).reshape(x.shape[0], 16, 8)
        x = x + attention(p["attention"], y).reshape(x.shape)
        x = layer_norm(p["n2"], conv(p["neck"], x))
        flat = x.reshape(x.shape[0], 16, 6)
        tokens = jnp.broadcast_to(p["tokens"], (x.shape[0], 3, 6))
        q, k, v = (
            dense(p[n], y).reshape(x.shape[0], -1, 2, 4) for n, y in zip("qkv", (tokens, flat, flat), strict=True)
        )
        tokens = tokens + dense(p["o"], attend(q, k, v).reshape(x.shape[0], 3, 8))
        up = gelu(conv(p["up"], x, padding=((1, 1), (1, 1)), dilated=2))
        return jnp.einsum("btc,bhwc->bthw", dense(p["hyper"], tokens), up)

    return p, apply, IMAGE


def diffusion(d):
    """A U-Net for noise: sinusoids of the time, GroupNorm, attention over places, nearest neighbours, a skip."""
    p = {"in": d.conv(3, 3, n=3, m=8), "t1": d.dense(4, 8), "t2": d.dense(8, 8), "n1": d.norm(8)}
    p |= {"a": d.conv(3, 3, n=8, m=8), "down": d.conv(3, 3, n=8, m=8), "n2": d.norm(8), "attention": _attention(d, 8)}
    p |= {"up": d.conv(3, 3, n=8, m=8), "n3": d.norm(16), "out": d.conv(3, 3, n=16, m=3)}

    def apply(p, x):
        time = jnp.arange(1.0, 3.0)[:, None] * jnp.array([[1.0, 0.1]])
        time = dense(p["t2"], silu(dense(p["t1"], jnp.concatenate([jnp.sin(time), jnp.cos(time)], -1))))
        x = conv(p["in"], x)
        skip = x + conv(p["a"], silu(group_norm(p["n1"], x, 2))) + time[:, None, None]
        x = conv(p["down"], skip, 2)
        y = group_norm(p["n2"], x, 2).reshape(x.shape[0], -1, x.shape[-1])
        x = x + attention(p["attention"], y).reshape(x.shape)
        x = jnp.concatenate([conv(p["up"], _times(x, 2)), skip], -1)
        return conv(p["out"], silu(group_norm(p["n3"], x, 2)))

    return p, apply, IMAGE


# --- detection, segmentation, flow -----------------------------------------------------------------------------------


def _pyramid(d):
    p = {"c3": _cbr(d, 3, 3, n=3, m=8), "c4": _cbr(d, 3, 3, n=8, m=12), "l3": d.conv(1, 1, n=8, m=6)}
    return p | {"l4": d.conv(1, 1, n=12, m=6), "smooth": d.conv(3, 3, n=6, m=6)}


def pyramid(p, x):
    """Two levels of a feature pyramid."""
    c3 = cbr(p["c3"], x, stride=2)
    p4 = conv(p["l4"], cbr(p["c4"], c3, stride=2))
    return conv(p["smooth"], conv(p["l3"], c3) + _times(p4, 2)), p4


def retinanet(d):
    """Heads for classes and boxes, the same on all levels; all anchors in one list (FCOS has no anchors)."""
    p = _pyramid(d) | {"classes": d.conv(3, 3, n=6, m=6), "boxes": d.conv(3, 3, n=6, m=6)}
    p |= {"class": d.conv(3, 3, n=6, m=2 * 5), "box": d.conv(3, 3, n=6, m=2 * 4)}

    def apply(p, x):
        levels = pyramid(p, x)
        heads = (("classes", "class", 5), ("boxes", "box", 4))
        return [
            jnp.concatenate([conv(p[b], relu(conv(p[a], y))).reshape(y.shape[0], -1, n) for y in levels], 1)
            for a, b, n in heads
        ]

    return p, apply, IMAGE


def mask_rcnn(d):
    """Regions are cut out of the pyramid by bilinear interpolation; heads for boxes and masks."""
    p = _pyramid(d) | {"rpn": d.conv(3, 3, n=6, m=6), "object": d.conv(1, 1, n=6, m=2), "fc": d.dense(24, 10)}
    p |= {
        "box": d.dense(10, 4),
        "mask": d.conv(3, 3, n=6, m=6),
        "up": d.conv(2, 2, n=6, m=4),
        "out": d.conv(1, 1, n=4, m=2),
    }

    def apply(p, x):
        fine, _ = pyramid(p, x)
        objects = conv(p["object"], relu(conv(p["rpn"], fine)))
        place = jax.nn.sigmoid(objects[:, 0, 0]) * 2  # [batch, 2]: where a region begins, from data
        low = jnp.floor(place).astype(jnp.int32)
        part = place - low
        rows, columns = (low[:, k, None] + jnp.arange(3) for k in (0, 1))
        cut = jax.vmap(lambda image, r, c: image[r[:, None], c[None]])(
            fine, jnp.clip(rows, 0, 3), jnp.clip(columns, 0, 3)
        )
        a, b = (part[:, k, None, None, None] for k in (0, 1))
        cut = cut[:, :-1] * (1 - a) + cut[:, 1:] * a
        cut = cut[:, :, :-1] * (1 - b) + cut[:, :, 1:] * b
        boxes = dense(p["box"], relu(dense(p["fc"], cut.reshape(x.shape[0], -1))))
        masks = relu(conv(p["up"], relu(conv(p["mask"], cut)), padding=((1, 1), (1, 1)), dilated=2))
        return objects, boxes, conv(p["out"], masks)

    return p, apply, IMAGE


def ssd(d):
    """A scaled L2 norm over channels, predictions from two levels."""
    p = {"a": d.conv(3, 3, n=3, m=8), "scale": d(8) + 1, "b": d.conv(3, 3, n=8, m=10)}
    p |= {"one": d.conv(3, 3, n=8, m=12), "two": d.conv(3, 3, n=10, m=12)}

    def apply(p, x):
        x = pool(relu(conv(p["a"], x)))
        y = relu(conv(p["b"], x, 2))
        x = p["scale"] * x / jnp.sqrt(1e-6 + jnp.square(x).sum(-1, keepdims=True))
        out = jnp.concatenate([conv(p[n], z).reshape(z.shape[0], -1, 6) for n, z in (("one", x), ("two", y))], 1)
        return jax.nn.softmax(out[..., :2]), out[..., 2:]

    return p, apply, IMAGE


def deeplab(d):
    """Dilated convolutions beside each other and beside the mean of the image; bilinear upsampling."""
    p = {"stem": _cbr(d, 3, 3, n=3, m=8), "one": _cbr(d, 1, 1, n=8, m=4), "far": _cbr(d, 3, 3, n=8, m=4)}
    p |= {"image": _cbr(d, 1, 1, n=8, m=4), "project": _cbr(d, 1, 1, n=12, m=8), "head": d.conv(1, 1, n=8, m=3)}

    def apply(p, x):
        y = cbr(p["stem"], x, stride=2)
        image = jnp.broadcast_to(cbr(p["image"], y.mean((1, 2), keepdims=True)), (*y.shape[:-1], 4))
        y = jnp.concatenate([cbr(p["one"], y), cbr(p["far"], y, dilation=2), image], -1)
        y = conv(p["head"], cbr(p["project"], y))
        return jax.image.resize(y, (*x.shape[:-1], 3), "bilinear")

    return p, apply, IMAGE


def lraspp(d):
    """A gate from the coarse level, classes from both."""
    p = {"low": _cbr(d, 3, 3, n=3, m=6), "high": _cbr(d, 3, 3, n=6, m=8), "cbr": _cbr(d, 1, 1, n=8, m=8)}
    p |= {"gate": d.conv(1, 1, n=8, m=8), "a": d.conv(1, 1, n=6, m=3), "b": d.conv(1, 1, n=8, m=3)}

    def apply(p, x):
        low = cbr(p["low"], x, stride=2)
        high = cbr(p["high"], low, stride=2)
        y = cbr(p["cbr"], high) * jax.nn.sigmoid(conv(p["gate"], high.mean((1, 2), keepdims=True)))
        y = jax.image.resize(y, (x.shape[0], 4, 4, 8), "bilinear")
        return conv(p["a"], low) + conv(p["b"], y)

    return p, apply, IMAGE


def yolo(d):
    """C2f (a split, bottlenecks, all of it concatenated), SPPF, a path up and down, distances as expectations."""
    p = {"stem": _cbr(d, 3, 3, n=3, m=8), "cv1": _cbr(d, 1, 1, n=8, m=8), "m": _cbr(d, 3, 3, n=4, m=4)}
    p |= {"cv2": _cbr(d, 1, 1, n=12, m=8), "down": _cbr(d, 3, 3, n=8, m=10), "sp1": _cbr(d, 1, 1, n=10, m=4)}
    p |= {"sp2": _cbr(d, 1, 1, n=12, m=10), "up": _cbr(d, 1, 1, n=18, m=8), "box": d.conv(1, 1, n=8, m=4 * 4)}
    p["class"] = d.conv(1, 1, n=8, m=3)

    def apply(p, x):
        x = cbr(p["stem"], x, silu)
        parts = jnp.split(cbr(p["cv1"], x, silu), 2, -1)
        parts.append(parts[-1] + cbr(p["m"], parts[-1], silu))
        x = cbr(p["cv2"], jnp.concatenate(parts, -1), silu)
        y = cbr(p["sp1"], cbr(p["down"], x, silu, stride=2), silu)
        chain = [y]
        for _ in range(2):
            chain.append(lax.reduce_window(chain[-1], -jnp.inf, lax.max, (1, 3, 3, 1), (1, 1, 1, 1), "SAME"))
        y = _times(cbr(p["sp2"], jnp.concatenate(chain, -1), silu), 2)
        x = cbr(p["up"], jnp.concatenate([y, x], -1), silu)
        box = conv(p["box"], x).reshape(x.shape[0], -1, 4, 4)
        distances = (jax.nn.softmax(box) * jnp.arange(4.0)).sum(-1)
        return jnp.concatenate([distances, jax.nn.sigmoid(conv(p["class"], x)).reshape(x.shape[0], -1, 3)], -1)

    return p, apply, IMAGE


def raft(d):
    """Correlations of two frames, looked up where the flow points, and a convolutional GRU that refines it."""
    p = {"f": d.conv(3, 3, n=3, m=6), "c": d.conv(3, 3, n=3, m=8), "motion": d.conv(3, 3, n=3, m=4)}
    p |= {name: d.conv(3, 3, n=12, m=8) for name in ("z", "r", "q")} | {"flow": d.conv(3, 3, n=8, m=2)}

    def apply(p, x):
        a, b = (relu(conv(p["f"], y, 2)) for y in (x, x[:, ::-1]))
        correlation = jnp.einsum("bijc,bklc->bijkl", a, b) / math.sqrt(a.shape[-1])
        hidden, flow = jnp.tanh(conv(p["c"], x, 2)), jnp.zeros((*a.shape[:3], 2))

        def step(carry, _):
            hidden, flow = carry
            at = jnp.clip(jnp.round(lax.stop_gradient(flow)).astype(jnp.int32) + 1, 0, 3)
            look = jax.vmap(jax.vmap(jax.vmap(lambda c, k: c[k[0], k[1]])))(correlation, at)[..., None]
            y = relu(conv(p["motion"], jnp.concatenate([look, flow], -1)))
            both = jnp.concatenate([hidden, y], -1)
            z, r = (jax.nn.sigmoid(conv(p[n], both)) for n in "zr")
            hidden = (1 - z) * hidden + z * jnp.tanh(conv(p["q"], jnp.concatenate([r * hidden, y], -1)))
            return (hidden, flow + conv(p["flow"], hidden)), None

        return lax.scan(step, (hidden, flow), None, 2)[0][1]

    return p, apply, IMAGE


# --- graphs and points -----------------------------------------------------------------------------------------------


def dgcnn(d):
    """Edges to the nearest points in the space of features, the largest over neighbours."""
    p = {"a": d.dense(6, 8), "b": d.dense(16, 10), "head": d.dense(10, 3)}

    def edges(x):
        distance = jnp.square(x[:, :, None] - x[:, None]).sum(-1)
        near = lax.top_k(-distance, 3)[1]
        neighbours = jax.vmap(lambda x, i: x[i])(x, near)
        centre = jnp.broadcast_to(x[:, :, None], neighbours.shape)
        return jnp.concatenate([centre, neighbours - centre], -1)

    def apply(p, x):
        x = relu(dense(p["a"], edges(x))).max(2)
        x = relu(dense(p["b"], edges(x))).max(2)
        return dense(p["head"], x.max(1))

    return p, apply, (2, 5, 3)


def graph_attention(d):
    """Two heads over the edges of one graph; sums at their ends."""
    p = {"w": d(4, 2, 6), "source": d(2, 6), "target": d(2, 6), "head": d(2, 6, 3)}
    a, b = (jnp.array(k) for k in ((0, 1, 2, 3, 0, 2), (1, 2, 3, 0, 0, 2)))

    def apply(p, x):
        h = jnp.einsum("ni,ihf->nhf", x, p["w"])
        score = jnp.exp(jax.nn.leaky_relu((h * p["source"]).sum(-1)[a] + (h * p["target"]).sum(-1)[b]))
        total = jax.ops.segment_sum(score, b, 4)
        out = jax.ops.segment_sum(h[a] * (score / total[b])[..., None], b, 4)
        return jnp.einsum("nhf,hfo->no", jax.nn.elu(out), p["head"])

    return p, apply, (4, 4)


# --- the networks of its tests ---------------------------------------------------------------------------------------


def cascaded_concat(d):
    p = {f"b{i}": _cbr(d, 1, 1, n=3, m=4 * i) for i in (1, 2, 3)} | {"out": d.conv(1, 1, n=24, m=3)}

    def apply(p, x):
        y = cbr(p["b1"], x)
        for i in (2, 3):
            y = jnp.concatenate([y, cbr(p[f"b{i}"], x)], -1)
        return conv(p["out"], y)

    return p, apply, IMAGE


def concat_split(d):
    """Parts of one block and of another are read together; the rest is added at the end."""
    p = {"a": _cbr(d, 1, 1, n=3, m=12), "b": _cbr(d, 1, 1, n=3, m=6), "c": _cbr(d, 1, 1, n=12, m=6)}
    p["head"] = d.dense(6, 3)

    def apply(p, x):
        one, two = jnp.split(cbr(p["a"], x), 2, -1)
        y = cbr(p["c"], jnp.concatenate([one, cbr(p["b"], x)], -1)) + two
        return dense(p["head"], _means(y))

    return p, apply, IMAGE


def shared_split(d):
    """Three parts, two of which meet the same layer."""
    p = {"a": _cbr(d, 1, 1, n=3, m=16), "b": _cbr(d, 1, 1, n=4, m=5), "c": _cbr(d, 1, 1, n=8, m=5)}

    def apply(p, x):
        one, two, three = jnp.split(cbr(p["a"], x), (4, 8), -1)
        return cbr(p["b"], one), cbr(p["b"], two), cbr(p["c"], three)

    return p, apply, IMAGE


def other_axis(d):
    """Concatenated and split along the height, not along channels."""
    p = {
        "a": _cbr(d, 1, 1, n=3, m=6),
        "b": _cbr(d, 1, 1, n=3, m=6),
        "c": d.conv(1, 1, n=6, m=8),
        "d": d.conv(1, 1, n=8, m=3),
    }

    def apply(p, x):
        y = conv(p["c"], jnp.concatenate([cbr(p["a"], x), cbr(p["b"], x)], 1))
        return conv(p["d"], jnp.split(y, 2, 1)[0])

    return p, apply, IMAGE


def reshaped(d):
    """A dense layer that makes an image, transposed convolutions, flattened again."""
    p = {"fc": d.dense(5, 2 * 2 * 6), "up": d.conv(2, 2, n=6, m=4), "head": d.dense(64, 3)}

    def apply(p, x):
        x = relu(dense(p["fc"], x)).reshape(-1, 2, 2, 6)
        x = relu(conv(p["up"], x, padding=((1, 1), (1, 1)), dilated=2))
        return dense(p["head"], x.reshape(x.shape[0], -1))

    return p, apply, (2, 5)


def customized(d):
    """A layer of one's own (an L2 norm, scale and bias), beside params that nothing reads."""
    p = {"fc1": d.dense(5, 8), "scale": d(8), "bias": d(8), "fc": d.dense(8, 8), "fc2": d.dense(8, 3), "unused": d(10)}

    def apply(p, x):
        x = relu(dense(p["fc1"], x))
        x = x / jnp.sqrt(jnp.square(x).sum(-1, keepdims=True) + 1e-6)
        return dense(p["fc2"], dense(p["fc"], x * p["scale"] + p["bias"]))

    return p, apply, (2, 5)


def fc_residual(d):
    p = {"fc1": d.dense(5, 8), "fc2": d.dense(8, 8), "fc3": d.dense(8, 3)}

    def apply(p, x):
        x = relu(dense(p["fc1"], x))
        return dense(p["fc3"], x + relu(dense(p["fc2"], x)))

    return p, apply, (2, 5)


def several_outputs(d):
    """Hidden layers are outputs as well: nothing but the joint layer's input could go, and it is an output too."""
    p = {"fc1": d.dense(5, 8), "fc2": d.dense(5, 6), "fc3": d.dense(14, 10), "fc4": d.dense(10, 3)}

    def apply(p, x):
        a, b = relu(dense(p["fc1"], x)), relu(dense(p["fc2"], x))
        return a, b, dense(p["fc4"], relu(dense(p["fc3"], jnp.concatenate([a, b], -1))))

    return p, apply, (2, 5)


def wide_and_deep(d):
    p = {
        "deep": d.dense(5, 8),
        "n": d.batch_norm(8),
        "deeper": d.dense(8, 6),
        "wide": d.dense(5, 4),
        "out": d.dense(10, 1),
    }

    def apply(p, x):
        y = relu(dense(p["deeper"], relu(batch_norm(p["n"], dense(p["deep"], x)))))
        return jax.nn.sigmoid(dense(p["out"], jnp.concatenate([dense(p["wide"], x), y], -1)))

    return p, apply, (2, 5)


def prelu_instance(d):
    """Slopes of their own for each channel, InstanceNorm, and one channel at the end."""
    p = {
        "a": d.conv(3, 3, n=3, m=8),
        "slope": d(8),
        "n": d.norm(8),
        "b": d.conv(3, 3, n=8, m=1),
        "last": d.batch_norm(1),
    }

    def apply(p, x):
        x = conv(p["a"], x)
        x = jnp.where(x > 0, x, p["slope"] * x)
        x = (x - x.mean((1, 2), keepdims=True)) * lax.rsqrt(x.var((1, 2), keepdims=True) + 1e-5)
        return relu(batch_norm(p["last"], conv(p["b"], x * p["n"]["scale"] + p["n"]["bias"])))

    return p, apply, IMAGE


NEW = {
    "vgg_bn": vgg_bn, "squeezenet": squeezenet, "bottleneck": bottleneck, "preact_resnet": preact_resnet,
    "mobilenet_v2": mobilenet_v2, "mobilenet_v3": mobilenet_v3, "efficientnet": efficientnet,
    "efficientnet_v2": efficientnet_v2, "regnet": regnet, "inception_v3": inception_v3, "xception": xception,
    "shufflenet_v2": shufflenet_v2, "swin": swin, "bert": bert, "llama": llama, "segment_anything": segment_anything,
    "diffusion": diffusion, "retinanet": retinanet, "mask_rcnn": mask_rcnn, "ssd": ssd, "deeplab": deeplab,
    "lraspp": lraspp, "yolo": yolo, "raft": raft, "dgcnn": dgcnn, "graph_attention": graph_attention,
    "cascaded_concat": cascaded_concat, "concat_split": concat_split, "shared_split": shared_split,
    "other_axis": other_axis, "reshaped": reshaped, "customized": customized, "fc_residual": fc_residual,
    "several_outputs": several_outputs, "wide_and_deep": wide_and_deep, "prelu_instance": prelu_instance,
}  # fmt: skip
TOKENS = ("bert", "llama")


def make(kind):
    """(params, apply, an input)."""
    params, apply, shape = NEW[kind](Draw(0))
    rng = np.random.default_rng(1)
    x = rng.integers(0, 11, shape) if kind in TOKENS else rng.normal(size=shape).astype(np.float32)
    return params, apply, jax.device_put(x)
