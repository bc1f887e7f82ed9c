"""What several networks are made of."""

from __future__ import annotations

from typing import Any

from flax import linen as nn

he_fan_out = nn.initializers.variance_scaling(2.0, "fan_out", "truncated_normal")
"""The first weights of a convolution (He et al., 2015), for the gradient's scale."""


def batch_norm(train: bool, dtype: Any, name: str, **options: Any) -> nn.BatchNorm:
    """Batch normalisation with the running averages that all networks here use; `options` are of `nn.BatchNorm`."""
    return nn.BatchNorm(use_running_average=not train, momentum=0.9, epsilon=1e-5, dtype=dtype, name=name, **options)
