"""ResNet-50 on ImageNet-2012 as in section 4.1 of the RigL paper: 32,000 steps of 4096, or 100 epochs.

    python -m experiments.main --config configs/imagenet_resnet50.py --workdir runs/imagenet

Not run here; made for a TPU slice. Expected top-1, from the paper: dense 76.8; RigL with ERK 75.1 at 80 %, 73.0 at
90 %; RigL uniform (`:uniform`, the first convolution dense) 74.6 and 72.0; static with ERK 72.1 and 67.7.
"""

from ml_collections import ConfigDict

from configs import common


def get_config(variant: str = "") -> ConfigDict:
    """Variants: `uniform`, `smoke`."""
    config = common.get_config(steps=32_000)
    config.dataset.update({"name": "imagenet2012", "batch_size": 4096, "image_size": 224, "workers": 16})
    config.model = ConfigDict({"name": "resnet50", "stage_sizes": (3, 4, 6, 3), "num_filters": 64})
    config.optimizer.weight_decay = 1e-4
    # An epoch is 320 steps: warm-up for 5, then a tenth at 30, 70 and 90.
    config.schedule = ConfigDict(
        {
            "name": "piecewise",
            "peak": 1.6,
            "warmup": 1600,
            "boundaries": (9600, 22_400, 28_800),
            "factor": 0.1,
        }
    )
    config.label_smoothing = 0.1
    config.sparsity = 0.8
    config.method.stop = 25_000
    config.log_every = 100
    config.eval_every = 1600
    config.checkpoint_every = 1600
    return common.apply_variants(config, variant, {"uniform": _uniform, "smoke": _smoke})


def _uniform(config: ConfigDict) -> None:
    config.distribution.name = "uniform"
    config.rules = (("conv1/kernel", "dense"), (".*/kernel", "unstructured"), (".*", "dense"))


def _smoke(config: ConfigDict) -> None:
    common.smoke(config, steps=4, batch_size=8)
    config.method.stop = 4
    config.dataset.image_size = 32
    config.dataset.workers = 0
    config.model.stage_sizes = (1,)
    config.model.num_filters = 4
    config.schedule.warmup = 1
    config.schedule.boundaries = (2, 3)
