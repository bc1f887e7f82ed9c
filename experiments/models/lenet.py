"""LeNet-5 (LeCun et al., 1998) in the form that the RigL experiments train: ReLU and max pooling."""

from collections.abc import Sequence
from typing import Any

from flax import linen as nn
from jax import Array
from jax import numpy as jnp

from experiments.rules import check_fields, dtype, sizes
from rigl_jax.arguments import optional

_MIN_SIDE = 16  # 16 -> 12 -> 6 -> 2 -> 1


class LeNet5(nn.Module):
    """Two unpadded 5x5 convolutions, each pooled by 2, then two hidden layers: 44,190 weights on 28x28x1, 10 classes.

    Attributes:
      num_classes: width of the last layer.
      features: channels of the two convolutions, widths of the two hidden layers.
      dtype: of the computation; None follows the input.
    """

    num_classes: int
    features: Sequence[int] = (6, 16, 120, 84)
    dtype: Any = None

    def __post_init__(self) -> None:
        """Checks the fields."""
        check_fields(self, features=sizes, dtype=optional(dtype))
        super().__post_init__()

    @nn.compact
    def __call__(self, x: Array, *, train: bool = False) -> Array:
        """Float `[batch, height, width, channels]` to logits `[batch, num_classes]`; `train` changes nothing.

        Raises:
          ValueError: an image smaller than 16x16, of which the unpadded convolutions leave nothing.
        """
        if min(x.shape[1:3]) < _MIN_SIDE:
            raise ValueError(f"LeNet5: expected images of at least {_MIN_SIDE}x{_MIN_SIDE}, got {x.shape[1:3]}")
        options = {"dtype": self.dtype, "kernel_init": nn.initializers.he_normal()}
        *channels, wide, narrow = self.features
        for i, width in enumerate(channels, start=1):
            x = nn.relu(nn.Conv(width, (5, 5), padding="VALID", name=f"conv{i}", **options)(x))
            x = nn.max_pool(x, (2, 2), strides=(2, 2))
        x = x.reshape(x.shape[0], -1)
        x = nn.relu(nn.Dense(wide, name="dense1", **options)(x))
        x = nn.relu(nn.Dense(narrow, name="dense2", **options)(x))
        return nn.Dense(self.num_classes, dtype=self.dtype, name="logits")(x).astype(jnp.float32)
