"""The networks of the experiments: plain Flax linen, nothing about sparsity.

Every model is called as `module.apply(variables, x, train=bool, rngs={"dropout": key}, mutable=["batch_stats"])`
with `x` float `[batch, height, width, channels]` and returns float32 logits `[batch, num_classes]`. The random key is
needed only where a model drops out, `mutable` only where it normalises by batches. Weights are float32;
`dtype="bfloat16"` computes in bfloat16.
"""

from collections.abc import Callable, Mapping

from flax import linen as nn

from experiments.models.lenet import LeNet5
from experiments.models.mlp import MLP
from experiments.models.mobilenet import MobileNet
from experiments.models.resnet import ResNet
from experiments.models.wide_resnet import WideResNet

MODELS: Mapping[str, Callable[..., nn.Module]] = {
    "mlp": MLP,
    "lenet5": LeNet5,
    "wide_resnet": WideResNet,
    "resnet50": ResNet,
    "mobilenet": MobileNet,
}
"""`name -> constructor(num_classes, **options)`; the options are the module's fields."""

__all__ = ["MLP", "MODELS", "LeNet5", "MobileNet", "ResNet", "WideResNet"]
