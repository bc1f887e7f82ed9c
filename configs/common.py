"""What every config holds, with the values that most of them share. No task of its own.

A config file gives `get_config(variant: str = "")`; a variant is a comma-separated list of words. `smoke` shrinks
everything to a few steps. A config file is Python and is run as such: use files that you trust. Checkpoints and records
are data (orbax arrays and JSON) and are read without running anything that is in them. Any key can be set on the
command line, `--config.method.name=set`; `steps` moves along what is counted in fractions of it.
"""

from collections.abc import Callable, Mapping

from ml_collections import ConfigDict, FieldReference
from ml_collections.config_dict import placeholder


def get_config(steps: int = 1000) -> ConfigDict:
    """The base: RigL at 90 % with the paper's schedule, SGD with momentum and a cosine learning rate.

    Args:
      steps: training steps; one step is one batch, rewirings included.
    """
    config = ConfigDict()
    config.seed = 0  # initial weights, order of the data, dropout and masks
    config.steps = FieldReference(steps)
    config.stop_at = 0  # interrupt at this step as if killed there, to be resumed; 0: never

    # Every section is a name and its options; options that the named one does not take are not used.
    # A name may also be a place of your own code, "own.py:Net": see docs/own_code.md.
    config.dataset = ConfigDict({"name": "digits", "batch_size": 128})
    config.dataset.data_dir = placeholder(str)  # where prepared sets lie; none: $TFDS_DATA_DIR or TFDS's own folder
    config.model = ConfigDict({"name": "mlp"})
    config.optimizer = ConfigDict({"name": "sgd", "momentum": 0.9, "nesterov": True, "weight_decay": 0.0})
    config.schedule = ConfigDict({"name": "cosine", "peak": 0.1, "warmup": 0, "steps": config.get_ref("steps")})
    config.label_smoothing = 0.0
    # Trains on a part of the examples: random, epsilon_greedy, ucb (options keep and period), el2n, grand, forgetting
    # (keep and start), file (path); docs/data_pruning.md explains them.
    config.data_pruning = ConfigDict({"name": "none"})

    config.method = ConfigDict({"name": "rigl", "period": 100, "fraction": 0.3})  # or dense, static, set, ...
    config.method.stop = config.get_ref("steps") * 3 // 4  # the last rewiring
    config.sparsity = 0.9  # fraction of zeros over all sparse leaves
    config.distribution = ConfigDict({"name": "erk"})  # or uniform, erdos_renyi
    # (regular expression on "layer/kernel", structure, its numbers), as (".*/kernel", "block", 4, 1); "dense" leaves a
    # layer out. The first match wins and every leaf needs one. Empty: all kernels are sparse, unstructured.
    config.rules = ()

    config.execution = "masked"  # or packed: active weights only, on sparse kernels
    config.mesh = ConfigDict({"data": -1})  # devices by axis, -1: those that are left; another axis as "model": 4
    # (regular expression, mesh axes of a leaf's last axes, "fsdp" or "outputs"), as (".*/kernel", (None, "model")): see
    # experiments/sharding.py. Empty: the batch is split over "data", weights are whole on every device. Packed weights
    # take () or ((".*", "fsdp"),) on a mesh of "data" alone, and ((".*", "outputs"),) on one of "data" and "model".
    config.sharding = ()

    config.log_every = 50  # steps between train lines
    config.eval_every = 500  # steps between passes over the test set
    config.checkpoint_every = 500  # a multiple of eval_every; 0: at the end only
    config.keep = 1  # latest checkpoints kept, besides the best
    config.check_every = 0  # steps between checks of counts, zeros and masks (experiments/guard.py); 0: never
    config.on_nonfinite = "stop"  # a loss or gradient that is not finite: stop, or skip the batch and count it
    config.progress = True  # a bar, in a terminal
    config.tensorboard = True
    return config


def apply_variants(config: ConfigDict, variant: str, known: Mapping[str, Callable[[ConfigDict], None]]) -> ConfigDict:
    """Applies each word of `variant` in turn and locks the config.

    Raises:
      ValueError: a word that the config does not know.
    """
    for word in filter(None, (word.strip() for word in variant.split(","))):
        if word not in known:
            raise ValueError(f"config: unknown variant {word!r}, expected one of {', '.join(known)}")
        known[word](config)
    return config.lock()


def smoke(config: ConfigDict, *, steps: int = 6, batch_size: int = 16) -> None:
    """A few steps with two or three rewirings, every kind of line and a checkpoint."""
    config.steps = steps
    config.dataset.batch_size = batch_size
    config.method.period = 2
    config.log_every = 2
    config.eval_every = steps // 2
    config.checkpoint_every = steps // 2
    config.tensorboard = False
