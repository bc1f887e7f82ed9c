"""The networks of the studies on Fashion-MNIST as functions of their params, for training and for looking at results.

Params of a network that normalises by batches are `{"params": weights, "batch_stats": running averages}`, the averages
without a gradient; of any other network they are the weights.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import flax.linen as nn
import jax.numpy as jnp
from jax import Array

from experiments.models import LeNet5, WideResNet

Apply = Callable[[Any, Array], Array]
Fit = Callable[[Any, Array], tuple[Array, Any]]


def variables(params: Any) -> Any:
    """What `module.apply` takes."""
    return params if "batch_stats" in params else {"params": params}


def params_of(made: Any) -> Any:
    """The params of what `module.init` gives."""
    return made if "batch_stats" in made else made["params"]


def fitting(module: nn.Module) -> Fit:
    """`(params, images) -> (logits, new running averages)` in training; None where a network has no averages."""
    if not isinstance(module, WideResNet):
        apply = forward(module)
        return lambda params, x: (apply(params, x), None)

    def fit(params: Any, x: Array) -> tuple[Array, Any]:
        logits, new = module.apply(params, x, train=True, mutable=["batch_stats"])
        return logits, new["batch_stats"]

    return fit


def forward(module: nn.Module) -> Apply:
    """`(params, images) -> logits` of a network; LeNet-5 with its convolutions as products.

    In a loop, XLA on CPU takes about five times as long for a small convolution as for the product of its patches.
    """
    if not isinstance(module, LeNet5):
        return lambda params, x: jnp.asarray(module.apply(variables(params), x))

    def product(layer: Any, x: Array) -> Array:
        kernel = layer["kernel"].reshape(len(x), -1)
        return kernel.T @ x + layer["bias"][:, None]

    def apply(params: Any, x: Array) -> Array:
        x = x.transpose(3, 1, 2, 0)  # channels first, images last, so that every loop is long
        for layer in (params["conv1"], params["conv2"]):
            side, n = x.shape[1] - 4, x.shape[-1]
            patches = jnp.stack([x[:, i : i + side, j : j + side] for i in range(5) for j in range(5)])
            x = nn.relu(product(layer, patches.reshape(-1, side * side * n)))
            x = x.reshape(-1, side // 2, 2, side // 2, 2, n).max((2, 4))
        x = x.transpose(1, 2, 0, 3).reshape(-1, x.shape[-1])
        for layer in (params["dense1"], params["dense2"]):
            x = nn.relu(product(layer, x))
        return product(params["logits"], x).T

    return apply
