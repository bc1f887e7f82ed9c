"""Every config makes its steps in its smoke form, on data of the right shape; every wrong value is named."""

import functools
import importlib

import jax
import numpy as np
import pytest

from configs import digits_mlp
from experiments import build, data
from experiments.io import files
from experiments.train import train
from tests.errors import refused
from tests.experiments.runs import ONE, prepare
from tests.test_bad_input import changed

SHAPES = {
    "digits_mlp": ((8, 8, 1), 10),
    "fashion_mnist_mlp": ((28, 28, 1), 10),
    "fashion_mnist_lenet5": ((28, 28, 1), 10),
    "cifar10_wrn22_2": ((32, 32, 3), 10),
    "imagenet_resnet50": ((32, 32, 3), 1000),
    "imagenet_mobilenet": ((32, 32, 3), 1000),
}


TRAINED = ("digits_mlp", "imagenet_mobilenet")  # in tests/experiments/test_train.py, and below


def synthetic(shape, classes):
    """A stand-in for `data.load` with batches of noise; it takes what the real one takes."""

    @functools.wraps(data.load)
    def load(dataset, batch_size, *, seed, **options):
        def train(step):
            while True:
                rng = np.random.default_rng([seed, step])
                yield batch(rng, batch_size)
                step += 1

        def test():
            yield batch(np.random.default_rng(0), batch_size) | {"weight": np.ones(batch_size, np.float32)}

        def batch(rng, size):
            images = rng.standard_normal((size, *shape), np.float32)
            return {"image": images, "label": rng.integers(classes, size=size).astype(np.int32)}

        return data.Data(train, test, test, 64, batch_size, classes, shape, 64 // batch_size)

    return load


def smoke(name, monkeypatch):
    monkeypatch.setattr(data, "load", synthetic(*SHAPES[name]))
    return importlib.import_module(f"configs.{name}").get_config("smoke")


@pytest.mark.parametrize("name", [name for name in SHAPES if name not in TRAINED])
def test_every_other_config_makes_a_step_and_a_rewiring_in_its_smoke_form(name, monkeypatch):
    """By their traces, which compile nothing."""
    config = smoke(name, monkeypatch)
    task = prepare(config, ONE)
    state, batch = task.execution.abstract(), next(task.data.train(0))
    rewired, _ = jax.eval_shape(task.execution.rewire, state, batch)
    for after in (rewired, jax.eval_shape(task.execution.step, state, batch)):
        jax.tree.map(lambda a, b: (a.shape, a.dtype) == (b.shape, b.dtype) or pytest.fail(f"{a} {b}"), after, state)
    assert jax.eval_shape(task.execution.evaluate, state, next(task.data.test())).shape == (3,)
    assert any(map(task.execution.due, range(config.steps)))
    active, size = (sum(getattr(leaf, n) for leaf in task.plan.values()) for n in ("active_weights", "size"))
    assert abs(1 - active / size - config.sparsity) < 0.02


def test_a_config_trains_in_its_smoke_form(tmp_path, monkeypatch):
    """One with convolutions, batch statistics and rules; tests/experiments/test_train.py trains the plain ones."""
    config = smoke("imagenet_mobilenet", monkeypatch)
    summary = train(config, tmp_path / "run", devices=ONE)
    assert summary["steps"] == config.steps
    assert summary["dataset"] == config.dataset.name
    assert abs(summary["final_sparsity"] - config.sparsity) < 0.02
    assert 0 < summary["flops_inference_x_dense"] < summary["flops_training_x_dense"] < 1
    assert summary["explored"] > 1 - summary["final_sparsity"]  # it rewired
    assert 0 <= summary["test_accuracy"] <= summary["best_accuracy"] <= 1
    kinds = [line["kind"] for line in files.read_lines(tmp_path / "run" / "metrics.jsonl")]
    assert {"train", "eval", "masks", "first_layer"} == set(kinds)


@pytest.mark.parametrize("name", SHAPES)
def test_the_full_form_is_valid_and_rewires_for_three_quarters(name):
    module = importlib.import_module(f"configs.{name}")
    config = module.get_config()
    build.check(config)
    assert abs(config.method.stop / config.steps - 0.75) < 0.04
    assert module.__doc__.count("python -m experiments.main --config configs/" + name)
    assert not {"RUNTIME", "SCORE"} & set(module.__doc__.replace(",", " ").split())


def test_the_papers_hyper_parameters():
    wrn = importlib.import_module("configs.cifar10_wrn22_2").get_config()
    rate = build.learning_rate(build.check(wrn))
    assert [round(float(rate(s)), 6) for s in (0, 29_999, 30_000, 60_000, 90_000)] == [0.1, 0.1, 0.02, 0.004, 0.0008]
    resnet = importlib.import_module("configs.imagenet_resnet50").get_config()
    rate = build.learning_rate(build.check(resnet))
    found = [round(float(rate(s)), 6) for s in (0, 800, 1600, 9599, 9600, 22_400, 28_800)]
    assert found == [0.0, 0.8, 1.6, 1.6, 0.16, 0.016, 0.0016]


def test_steps_move_what_is_counted_in_them():
    config = digits_mlp.get_config()
    config.steps = 400
    assert (config.method.stop, config.schedule.steps) == (300, 400)


def test_a_variant_that_does_not_exist():
    with refused("smok", "smoke"):
        digits_mlp.get_config("smok")


def test_uniform_keeps_the_first_convolution_dense():
    config = importlib.import_module("configs.imagenet_resnet50").get_config("smoke,uniform")
    shapes = {
        "conv1": {"kernel": jax.ShapeDtypeStruct((7, 7, 3, 8), "float32")},
        "logits": {"kernel": jax.ShapeDtypeStruct((20, 10), "float32"), "bias": jax.ShapeDtypeStruct((10,), "float32")},
    }
    assert list(build.plan(build.check(config), shapes)) == ["logits/kernel"]


@pytest.mark.parametrize(
    ("values", "named"),
    [
        ({"sparsty": 0.5}, "sparsty"),
        ({"rules": [["Dense_9/kernel", "unstructured"], [".*", "dense"]]}, "Dense_9/kernel"),
        ({"dataset__batch_size": 15}, "config.dataset.batch_size"),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_what_does_not_fit_is_refused_before_anything_is_written(values, named, tmp_path):
    with refused(named):
        train(changed(**values), tmp_path / "run")
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("method", ["dense", "static", "set", "rigl"])
def test_a_name_alone_changes_the_method(method):
    config = build.check(changed(method__name=method))
    plan = build.plan(config, {"Dense_0": {"kernel": jax.ShapeDtypeStruct((8, 8), "float32")}})
    algorithm = build.algorithm(config, plan)
    due = [] if algorithm is None else [step for step in range(6) if algorithm.due(step)]
    assert due == ([0, 2, 4] if method in ("set", "rigl") else [])
