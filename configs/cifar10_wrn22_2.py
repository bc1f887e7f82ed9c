"""WideResNet-22-2 on CIFAR-10 as in section 4.2 of the RigL paper: 97,656 steps of 128, or 250 epochs.

    python -m experiments.main --config configs/cifar10_wrn22_2.py --workdir runs/cifar10

Not run to the end here; made for an accelerator. Expected test accuracy, from the paper and its reproduction: dense
94.1, static 91.6, RigL 93.1 at 90 % ERK; 92.9 and 93.8 at 80 %.
"""

from ml_collections import ConfigDict

from configs import common


def get_config(variant: str = "") -> ConfigDict:
    """Variants: `smoke`."""
    config = common.get_config(steps=97_656)
    config.dataset.name = "cifar10"  # cropped and mirrored, each image standardised
    config.dataset.batch_size = 128
    config.model = ConfigDict({"name": "wide_resnet", "depth": 22, "width": 2, "dropout": 0.3})
    config.optimizer.weight_decay = 5e-4
    config.schedule = ConfigDict(
        {"name": "piecewise", "peak": 0.1, "warmup": 0, "boundaries": (30_000, 60_000, 90_000), "factor": 0.2}
    )
    config.method.stop = 75_000
    config.log_every = 100
    config.eval_every = 1000
    config.checkpoint_every = 2000
    return common.apply_variants(config, variant, {"smoke": _smoke})


def _smoke(config: ConfigDict) -> None:
    common.smoke(config, steps=4, batch_size=8)
    config.method.stop = 4
    config.model.depth = 10
    config.model.width = 1
    config.schedule.boundaries = (2, 3)
