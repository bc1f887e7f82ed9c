"""LeNet-300-100 on scikit-learn's 8x8 digits: the demo, no download.

    python -m experiments.main --config configs/digits_mlp.py --workdir runs/digits

Runs in less than a minute on 2 cores; `make demo` shows what comes out, beside the other methods.
Dense, static and SET are values: `--config.method.name=dense`.
"""

from ml_collections import ConfigDict

from configs import common


def get_config(variant: str = "") -> ConfigDict:
    """Variants: `smoke`."""
    config = common.get_config(steps=2000)  # 181 epochs of 11 batches
    config.dataset.name = "digits"
    config.dataset.batch_size = 128
    config.model.name = "mlp"
    config.model.features = (300, 100)
    config.optimizer.weight_decay = 5e-4
    config.schedule.peak = 0.1
    config.method.period = 50
    config.eval_every = 100
    config.checkpoint_every = 500
    return common.apply_variants(config, variant, {"smoke": _smoke})


def _smoke(config: ConfigDict) -> None:
    common.smoke(config)
    config.model.features = (20,)
