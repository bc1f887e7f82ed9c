"""Networks and training of `experiments.studies.channels`: all steps in one compiled loop for each set of widths.

A network is a pair of functions that read their widths off the params: `plain` for groups, scores and `rx.channels`,
and `fast`, the same with convolutions as products of patches, for training (see `method_networks.forward`).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax import Array, lax

from experiments.models import LeNet5
from experiments.studies.method_networks import forward
from experiments.studies.method_training import Images, accuracy, optimizer

Params = Any
MOMENTUM = 0.9  # of the running statistics


class Network(NamedTuple):
    """A network of the study.

    Attributes:
      init: `key -> params`; leaves named "mean" and "var" are running statistics and have no gradient.
      plain: `(params, images) -> logits`, for inference.
      fast: `(params, images, train) -> (logits, params with new running statistics)`.
      scales: a regular expression for the scales of normalisations; None where there are none.
    """

    init: Callable[[Array], Params]
    plain: Callable[[Params, Array], Array]
    fast: Callable[[Params, Array, bool], tuple[Array, Params]]
    scales: str | None


def lenet5() -> Network:
    """LeNet-5 as `experiments.models` has it: 44,190 weights in kernels."""
    module = LeNet5(10)
    fast = forward(module)
    return Network(
        init=lambda key: module.init(key, jnp.zeros((1, 28, 28, 1)))["params"],
        plain=lambda params, x: jnp.asarray(module.apply({"params": params}, x)),
        fast=lambda params, x, train: (fast(params, x), params),
        scales=None,
    )


def resnet8(widths: tuple[int, ...] = (8, 16, 32)) -> Network:
    """A residual network of one block a stage (He et al. 2016), its stem of stride 2: 20,680 weights in kernels."""

    def init(key: Array) -> Params:
        keys = iter(jax.random.split(key, 2 + 3 * len(widths)))

        def conv(size: int, n: int, m: int) -> Array:
            return jax.nn.initializers.he_normal()(next(keys), (size, size, n, m))

        def norm(n: int) -> Params:
            return {"scale": jnp.ones(n), "bias": jnp.zeros(n), "mean": jnp.zeros(n), "var": jnp.ones(n)}

        params: Params = {"stem": {"kernel": conv(3, 1, widths[0]), **norm(widths[0])}}
        for i, (n, m) in enumerate(zip((widths[0], *widths), widths, strict=False)):
            params[f"stage{i}"] = {
                "a": {"kernel": conv(3, n, m), **norm(m)},
                "b": {"kernel": conv(3, m, m), **norm(m)},
                **({} if n == m else {"short": {"kernel": conv(1, n, m), **norm(m)}}),
            }
        head = jax.nn.initializers.lecun_normal()(next(keys), (widths[-1], 10))
        return params | {"head": {"kernel": head, "bias": jnp.zeros(10)}}

    def fast(params: Params, x: Array, train: bool) -> tuple[Array, Params]:
        # channels first, images last, so that every loop is long
        return _resnet(params, x.transpose(3, 1, 2, 0), _as_product, train, (1, 2, 3))

    return Network(init, lambda p, x: _resnet(p, x, _convolution, False, (0, 1, 2))[0], fast, "scale$")


Conv = Callable[[Array, Array, int], Array]


def _resnet(params: Params, x: Array, conv: Conv, train: bool, over: tuple[int, ...]) -> tuple[Array, Params]:
    """Logits `[N, 10]`; `over` are the axes of images and places (axes 1 and 2), the other one is that of channels."""
    (channels,) = {0, 1, 2, 3} - set(over)
    new: Params = {}

    def along(v: Array) -> Array:
        return jnp.expand_dims(v, over)

    def layer(p: Params, x: Array, stride: int = 1) -> tuple[Array, Params]:
        x = conv(p["kernel"], x, stride)
        mean, var = p["mean"], p["var"]
        if train:
            mean, var = x.mean(over), x.var(over)
            p = p | {n: MOMENTUM * p[n] + (1 - MOMENTUM) * v for n, v in (("mean", mean), ("var", var))}
        return (x - along(mean)) * along(p["scale"] * lax.rsqrt(var + 1e-5)) + along(p["bias"]), p

    x, new["stem"] = layer(params["stem"], x, 2)
    x = jax.nn.relu(x)
    for name in sorted(params.keys() - {"stem", "head"}):
        p, stride = params[name], 2 if "short" in params[name] else 1
        y, a = layer(p["a"], x, stride)
        y, b = layer(p["b"], jax.nn.relu(y))
        new[name] = {"a": a, "b": b}
        if "short" in p:
            x, new[name]["short"] = layer(p["short"], x, stride)
        x = jax.nn.relu(x + y)
    head, x = params["head"], x.mean((1, 2))
    logits = (x if channels else x.T) @ head["kernel"] + head["bias"][None]
    return logits, new | {"head": head}


def _convolution(kernel: Array, x: Array, stride: int) -> Array:
    pad = kernel.shape[0] // 2
    numbers = ("NHWC", "HWIO", "NHWC")
    return lax.conv_general_dilated(x, kernel, (stride, stride), ((pad, pad), (pad, pad)), dimension_numbers=numbers)


def _as_product(kernel: Array, x: Array, stride: int) -> Array:
    """The same for `[channels, height, width, images]`, as one product with the patches."""
    size, pad = kernel.shape[0], kernel.shape[0] // 2
    side = -(-x.shape[1] // stride)
    x = jnp.pad(x, ((0, 0), (pad, pad), (pad, pad), (0, 0)))
    ends = [slice(i, i + stride * (side - 1) + 1, stride) for i in range(size)]
    patches = jnp.stack([x[:, rows, columns] for rows in ends for columns in ends])
    weights = kernel.reshape(-1, kernel.shape[-1])
    return (weights.T @ patches.reshape(len(weights), -1)).reshape(-1, side, side, x.shape[-1])


NETWORKS: dict[str, Callable[[], Network]] = {"lenet5": lenet5, "resnet8": resnet8}


def _frozen(params: Params) -> Params:
    """True for running statistics."""
    return jax.tree_util.tree_map_with_path(lambda path, _: getattr(path[-1], "key", "") in ("mean", "var"), params)


def trainer(network: Network, penalty: float = 0.0) -> Callable[..., Params]:
    """`(params, images, order, rate, steps) -> params`, compiled once for each set of widths.

    Args:
      network: the network.
      penalty: the strength of the L1 penalty on scales (Network Slimming).

    Returns:
      The training: `order` is int32[at least steps, BATCH]; the rate falls by a cosine from `rate` to 0 at `steps`.
    """

    def train(params: Params, images: Images, order: Array, rate: Any, steps: Any) -> Params:
        still = _frozen(params)
        scales = jax.tree_util.tree_map_with_path(lambda path, _: path[-1].key == "scale", params)
        tx = optimizer(lambda i: rate * 0.5 * (1 + jnp.cos(jnp.pi * i / steps)))

        def loss(params: Params, rows: Array) -> tuple[Array, Params]:
            logits, new = network.fast(params, images.x[rows], True)
            return optax.softmax_cross_entropy_with_integer_labels(logits, images.y[rows]).mean(), new

        def step(i: Array, state: Any) -> Any:
            params, opt_state = state
            grads, new = jax.grad(loss, has_aux=True)(params, order[i])
            grads = jax.tree.map(lambda g, p, s: g + penalty * jnp.sign(p) if s else g, grads, params, scales)
            updates, opt_state = tx.update(grads, opt_state, params)
            moved = optax.apply_updates(params, updates)
            return jax.tree.map(lambda m, n, f: n if f else m, moved, new, still), opt_state

        return lax.fori_loop(0, steps, step, (params, tx.init(params)))[0]

    return jax.jit(train)


def tester(network: Network) -> Callable[[Params, Images], Array]:
    """`(params, images) -> share of right answers`, float32 scalar."""
    return jax.jit(lambda params, images: accuracy(lambda p, x: network.fast(p, x, False)[0], params, images))
