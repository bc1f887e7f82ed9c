"""Fully connected networks; with the default widths LeNet-300-100 (LeCun et al., 1998)."""

from collections.abc import Sequence
from typing import Any

from flax import linen as nn
from jax import Array
from jax import numpy as jnp

from experiments.rules import check_fields, dtype, sizes
from rigl_jax.arguments import optional


class MLP(nn.Module):
    """Flattened input, ReLU layers, logits. The layers are called `Dense_0`, `Dense_1`, ... in order.

    Attributes:
      num_classes: width of the last layer.
      features: widths of the hidden layers; may be empty.
      dtype: of the computation; None follows the input.
    """

    num_classes: int
    features: Sequence[int] = (300, 100)
    dtype: Any = None

    def __post_init__(self) -> None:
        """Checks the fields."""
        check_fields(self, features=sizes, dtype=optional(dtype))
        super().__post_init__()

    @nn.compact
    def __call__(self, x: Array, *, train: bool = False) -> Array:
        """Float `[batch, ...]` to logits `[batch, num_classes]`; `train` changes nothing."""
        x = x.reshape(x.shape[0], -1)
        for width in self.features:
            x = nn.relu(nn.Dense(width, dtype=self.dtype, kernel_init=nn.initializers.he_normal())(x))
        return nn.Dense(self.num_classes, dtype=self.dtype)(x).astype(jnp.float32)
