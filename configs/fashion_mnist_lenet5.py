"""LeNet-5 (44,190 weights) on Fashion-MNIST.

    python -m experiments.main --config configs/fashion_mnist_lenet5.py --workdir runs/fashion_lenet5

Runs in 2 to 8 minutes on 2 cores. Expected test accuracy: see the table in the README.
The data set must have been prepared once; the error of a run without it says how.
"""

from ml_collections import ConfigDict

from configs import common


def get_config(variant: str = "") -> ConfigDict:
    """Variants: `smoke`."""
    config = common.get_config(steps=6 * 468)  # 6 epochs of 468 batches
    config.dataset.name = "fashion_mnist"
    config.dataset.batch_size = 128
    config.model.name = "lenet5"
    # The first convolution, 150 weights, is dense, as it was in the committed records.
    config.rules = (("conv1/kernel", "dense"), (".*/kernel", "unstructured"), (".*", "dense"))
    config.optimizer.weight_decay = 5e-4
    config.schedule.peak = 0.05
    config.log_every = 117
    config.eval_every = 468
    config.checkpoint_every = 3 * 468
    return common.apply_variants(config, variant, {"smoke": _smoke})


def _smoke(config: ConfigDict) -> None:
    common.smoke(config)
    config.model.features = (3, 4, 12, 10)
