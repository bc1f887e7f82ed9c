"""LeNet-300-100 (784-300-100-10, 266,200 weights) on Fashion-MNIST.

    python -m experiments.main --config configs/fashion_mnist_mlp.py --workdir runs/fashion_mlp

Runs in about 2 minutes on 2 cores. Expected test accuracy: see the table in the README.
The data set must have been prepared once; the error of a run without it says how.
"""

from ml_collections import ConfigDict

from configs import common


def get_config(variant: str = "") -> ConfigDict:
    """Variants: `smoke`."""
    config = common.get_config(steps=25 * 468)  # 25 epochs of 468 batches
    config.dataset.name = "fashion_mnist"
    config.dataset.batch_size = 128
    config.model.name = "mlp"
    config.model.features = (300, 100)
    config.optimizer.weight_decay = 5e-4
    config.schedule.peak = 0.1
    config.log_every = 117
    config.eval_every = 468
    config.checkpoint_every = 5 * 468
    return common.apply_variants(config, variant, {"smoke": _smoke})


def _smoke(config: ConfigDict) -> None:
    common.smoke(config)
    config.model.features = (20, 12)
