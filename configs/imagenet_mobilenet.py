"""MobileNet-v1 on ImageNet-2012 as in section 4.1.1 of the RigL paper.

    python -m experiments.main --config configs/imagenet_mobilenet.py --workdir runs/mobilenet

Not run here; made for a TPU slice. The paper trains 5 times as long as this. Expected top-1 then: dense 72.1; RigL
with uniform sparsity 71.5 at 75 % and 67.0 at 90 %, with ERK (`:erk`) 71.9 and 68.1. Depthwise kernels are sparse and
the first convolution is dense, which gives the paper's FLOPs; its text says that depthwise kernels are dense too
(`:dense_depthwise`).
"""

from ml_collections import ConfigDict

from configs import common


def get_config(variant: str = "") -> ConfigDict:
    """Variants: `erk`, `dense_depthwise`, `smoke`."""
    config = common.get_config(steps=32_000)
    config.dataset.update({"name": "imagenet2012", "batch_size": 4096, "image_size": 224, "workers": 16})
    config.model = ConfigDict({"name": "mobilenet", "width": 1.0, "blocks": 13})
    config.optimizer.weight_decay = 1e-4
    # An epoch is 320 steps. The authors' rates: 1.0 from epoch 8 (here by a warm-up), a tenth at 40, 75 and 95.
    config.schedule = ConfigDict(
        {
            "name": "piecewise",
            "peak": 1.0 * 4096 / 256 * 0.1,
            "warmup": 2560,
            "boundaries": (12_800, 24_000, 30_400),
            "factor": 0.1,
        }
    )
    config.label_smoothing = 0.1
    config.sparsity = 0.75
    config.distribution.name = "uniform"
    config.rules = (("conv1/kernel", "dense"), (".*/kernel", "unstructured"), (".*", "dense"))
    config.method.stop = 25_000
    config.log_every = 100
    config.eval_every = 1600
    config.checkpoint_every = 1600
    variants = {"erk": _erk, "dense_depthwise": _dense_depthwise, "smoke": _smoke}
    return common.apply_variants(config, variant, variants)


def _erk(config: ConfigDict) -> None:
    config.distribution.name = "erk"


def _dense_depthwise(config: ConfigDict) -> None:
    config.rules = ((".*depthwise/kernel", "dense"), *config.rules)


def _smoke(config: ConfigDict) -> None:
    common.smoke(config, steps=4, batch_size=8)
    config.method.stop = 4
    config.dataset.image_size = 32
    config.dataset.workers = 0
    config.model.width = 0.25
    config.model.blocks = 1
    config.schedule.warmup = 1
    config.schedule.boundaries = (2, 3)
