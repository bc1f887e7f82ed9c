"""Residual networks for ImageNet (He et al., 2016) in the v1.5 form: the stride sits on the 3x3 convolution."""

from collections.abc import Sequence
from functools import partial
from typing import Any

from flax import linen as nn
from jax import Array
from jax import numpy as jnp

from experiments.models.layers import batch_norm, he_fan_out
from experiments.rules import check_fields, dtype, sizes
from rigl_jax.arguments import optional, whole


class Bottleneck(nn.Module):
    """1x1, 3x3 (with the stride), 1x1 to four times the features, each normalised; the last scale starts at zero."""

    features: int
    stride: int
    dtype: Any = None

    @nn.compact
    def __call__(self, x: Array, *, train: bool) -> Array:
        """Float `[batch, height, width, channels]` to `[batch, height / stride, width / stride, 4 * features]`."""
        conv = partial(nn.Conv, use_bias=False, dtype=self.dtype, kernel_init=he_fan_out)
        norm = partial(batch_norm, train, self.dtype)
        wide = 4 * self.features
        y = nn.relu(norm(name="bn1")(conv(self.features, (1, 1), name="conv1")(x)))
        y = conv(self.features, (3, 3), strides=self.stride, padding=1, name="conv2")(y)
        y = nn.relu(norm(name="bn2")(y))
        y = conv(wide, (1, 1), name="conv3")(y)
        # With a zero scale each block starts as the identity (Goyal et al., 2017).
        y = norm(name="bn3", scale_init=nn.initializers.zeros)(y)
        if x.shape != y.shape:
            x = conv(wide, (1, 1), strides=self.stride, name="shortcut")(x)
            x = norm(name="shortcut_bn")(x)
        return nn.relu(x + y)


class ResNet(nn.Module):
    """ResNet-50 by default: 54 kernels with 25,502,912 weights at 1000 classes.

    Attributes:
      num_classes: width of the last layer.
      stage_sizes: bottleneck blocks in each stage; (3, 4, 23, 3) is ResNet-101.
      num_filters: channels of the first convolution; stage i computes in `num_filters * 2**i`.
      dtype: of the computation; None follows the input.
    """

    num_classes: int
    stage_sizes: Sequence[int] = (3, 4, 6, 3)
    num_filters: int = 64
    dtype: Any = None

    def __post_init__(self) -> None:
        """Checks the fields."""
        check_fields(self, stage_sizes=sizes, num_filters=whole(1), dtype=optional(dtype))
        super().__post_init__()

    @nn.compact
    def __call__(self, x: Array, *, train: bool = False) -> Array:
        """Float `[batch, height, width, channels]` to logits `[batch, num_classes]`."""
        conv1 = partial(nn.Conv, use_bias=False, dtype=self.dtype, kernel_init=he_fan_out, name="conv1")
        x = conv1(self.num_filters, (7, 7), strides=2, padding=3)(x)
        x = nn.relu(batch_norm(train, self.dtype, name="bn1")(x))
        x = nn.max_pool(x, (3, 3), strides=(2, 2), padding=((1, 1), (1, 1)))
        for stage, blocks in enumerate(self.stage_sizes):
            for block in range(blocks):
                stride = 2 if stage > 0 and block == 0 else 1
                name = f"stage{stage + 1}_block{block + 1}"
                x = Bottleneck(self.num_filters * 2**stage, stride, self.dtype, name=name)(x, train=train)
        x = x.mean(axis=(1, 2))
        init = nn.initializers.normal(0.01)
        return nn.Dense(self.num_classes, dtype=self.dtype, kernel_init=init, name="logits")(x).astype(jnp.float32)
