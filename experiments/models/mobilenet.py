"""MobileNet-v1 for ImageNet (Howard et al., 2017)."""

from functools import partial
from typing import Any

from flax import linen as nn
from jax import Array
from jax import numpy as jnp

from experiments.models.layers import batch_norm, he_fan_out
from experiments.rules import check_fields, dtype, is_number
from rigl_jax.arguments import optional, rule
from rigl_jax.checks import is_whole

_BLOCKS = ((64, 1), (128, 2), (128, 1), (256, 2), (256, 1), (512, 2), *[(512, 1)] * 5, (1024, 2), (1024, 1))
_width = rule("a number above 0", lambda value: is_number(value) and value > 0)
_blocks = rule(f"a whole number from 0 to {len(_BLOCKS)}", lambda n: is_whole(n) and n <= len(_BLOCKS))


class Separable(nn.Module):
    """A 3x3 convolution of each channel by itself (with the stride), then a 1x1 convolution; each normalised, ReLU6."""

    features: int
    stride: int
    dtype: Any = None

    @nn.compact
    def __call__(self, x: Array, *, train: bool) -> Array:
        """Float `[batch, height, width, channels]` to `[batch, height / stride, width / stride, features]`."""
        conv = partial(nn.Conv, use_bias=False, dtype=self.dtype, kernel_init=he_fan_out)
        norm = partial(batch_norm, train, self.dtype)
        channels = x.shape[-1]
        depthwise = conv(channels, (3, 3), self.stride, padding=1, feature_group_count=channels, name="depthwise")
        x = nn.relu6(norm(name="depthwise_bn")(depthwise(x)))
        return nn.relu6(norm(name="pointwise_bn")(conv(self.features, (1, 1), name="pointwise")(x)))


class MobileNet(nn.Module):
    """A convolution and 13 separable blocks: 4,231,976 parameters at width 1 and 1000 classes.

    Attributes:
      num_classes: width of the last layer.
      width: multiplies the channels of every layer, above 0; 1.98 is the paper's "big" network.
      blocks: how many of the 13 blocks there are, from the first on; 0 to 13.
      dtype: of the computation; None follows the input.
    """

    num_classes: int
    width: float = 1.0
    blocks: int = 13
    dtype: Any = None

    def __post_init__(self) -> None:
        """Checks the fields."""
        check_fields(self, width=_width, blocks=_blocks, dtype=optional(dtype))
        super().__post_init__()

    @nn.compact
    def __call__(self, x: Array, *, train: bool = False) -> Array:
        """Float `[batch, height, width, channels]` to logits `[batch, num_classes]`."""
        conv1 = partial(nn.Conv, use_bias=False, dtype=self.dtype, kernel_init=he_fan_out, name="conv1")
        x = conv1(self._channels(32), (3, 3), strides=2, padding=1)(x)
        x = nn.relu6(batch_norm(train, self.dtype, name="bn1")(x))
        for i, (features, stride) in enumerate(_BLOCKS[: self.blocks], start=1):
            x = Separable(self._channels(features), stride, self.dtype, name=f"block{i}")(x, train=train)
        x = x.mean(axis=(1, 2))
        init = nn.initializers.normal(0.01)
        return nn.Dense(self.num_classes, dtype=self.dtype, kernel_init=init, name="logits")(x).astype(jnp.float32)

    def _channels(self, features: int) -> int:
        return max(1, int(self.width * features))
