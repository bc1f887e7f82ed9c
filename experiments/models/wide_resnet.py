"""Wide residual networks for 32x32 images (Zagoruyko and Komodakis, 2016), pre-activation."""

from functools import partial
from typing import Any

from flax import linen as nn
from jax import Array
from jax import numpy as jnp

from experiments.models.layers import batch_norm
from experiments.rules import check_fields, dtype, share
from rigl_jax.arguments import optional, rule, whole
from rigl_jax.checks import is_whole

_he_fan_out = nn.initializers.variance_scaling(2.0, "fan_out", "normal")  # as the paper's authors initialise
_depth = rule("10, 16, 22, ... (6n + 4)", lambda value: is_whole(value, 10) and value % 6 == 4)


class WideBlock(nn.Module):
    """Normalise, ReLU, 3x3, normalise, ReLU, dropout, 3x3, add. A 1x1 shortcut only where the width changes."""

    features: int
    stride: int
    dropout: float
    dtype: Any = None

    @nn.compact
    def __call__(self, x: Array, *, train: bool) -> Array:
        """Float `[batch, height, width, channels]` to `[batch, height / stride, width / stride, features]`."""
        conv = partial(nn.Conv, self.features, use_bias=False, dtype=self.dtype, kernel_init=_he_fan_out)
        norm = partial(batch_norm, train=train, dtype=self.dtype)
        active = nn.relu(norm(name="bn1")(x))
        if x.shape[-1] != self.features:  # the shortcut, too, reads the activated input
            x = conv((1, 1), strides=self.stride, name="shortcut")(active)
        y = conv((3, 3), strides=self.stride, name="conv1")(active)
        y = nn.relu(norm(name="bn2")(y))
        y = nn.Dropout(self.dropout, deterministic=not train)(y)
        return x + conv((3, 3), name="conv2")(y)


class WideResNet(nn.Module):
    """WRN-depth-width: a 3x3 convolution and three stages of `(depth - 4) / 6` blocks; 1,076,912 weights by default.

    Attributes:
      num_classes: width of the last layer.
      depth: layers, 6n + 4.
      width: the stages have 16, 32 and 64 times as many channels.
      dropout: rate inside the blocks, in [0, 1); training then needs `rngs={"dropout": key}`.
      dtype: of the computation; None follows the input.
    """

    num_classes: int
    depth: int = 22
    width: int = 2
    dropout: float = 0.3
    dtype: Any = None

    def __post_init__(self) -> None:
        """Checks the fields."""
        check_fields(self, depth=_depth, width=whole(1), dropout=share, dtype=optional(dtype))
        super().__post_init__()

    @nn.compact
    def __call__(self, x: Array, *, train: bool = False) -> Array:
        """Float `[batch, height, width, channels]` to logits `[batch, num_classes]`."""
        blocks = (self.depth - 4) // 6
        x = nn.Conv(16, (3, 3), use_bias=False, dtype=self.dtype, kernel_init=_he_fan_out, name="conv1")(x)
        for stage, base in enumerate((16, 32, 64), start=1):
            for block in range(1, blocks + 1):
                stride = 2 if stage > 1 and block == 1 else 1
                name = f"stage{stage}_block{block}"
                x = WideBlock(base * self.width, stride, self.dropout, self.dtype, name=name)(x, train=train)
        x = nn.relu(batch_norm(train, self.dtype, name="bn")(x))
        x = x.mean(axis=(1, 2))
        return nn.Dense(self.num_classes, dtype=self.dtype, name="logits")(x).astype(jnp.float32)
