"""Any value of a config can be set on the command line, in any order; what none of its names takes is told."""

import pytest

from experiments import build, main
from tests.errors import refused

SMOKE = ["--config", "configs/digits_mlp.py:smoke", "--workdir", "never"]


def parsed(*arguments):
    return build.check(main.parse([*SMOKE, *arguments]).config)


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (["optimizer.name=adam", "optimizer.b2=0.99"], {"optimizer": {"name": "adam", "b2": 0.99}}),
        (["optimizer.b2=0.99", "optimizer.name=adam"], {"optimizer": {"name": "adam", "b2": 0.99}}),
        (["optimizer.b2=0.5", "optimizer.b2=0.99"], {"optimizer": {"b2": 0.99}}),
        (
            ["schedule.boundaries=(2,4)", "schedule.name=piecewise", "schedule.factor=0.1"],
            {"schedule": {"name": "piecewise", "boundaries": [2, 4], "factor": 0.1}},
        ),
        (["method.two_sided=true"], {"method": {"two_sided": True, "period": 2}}),
        (["method.stop=None"], {"method": {"stop": None, "period": 2}}),
        (["method.start=1", "method.name=set"], {"method": {"name": "set", "start": 1}}),
        (["distribution.power=2"], {"distribution": {"name": "erk", "power": 2}}),
        (["dataset.augment=none", "dataset.workers=1"], {"dataset": {"augment": "none", "workers": 1}}),
        (["dataset.data_dir=None"], {"dataset": {"data_dir": None}}),
        (["dataset.data_dir=3"], {"dataset": {"data_dir": "3"}}),
        (["model.name=wide_resnet", "model.depth=10", "model.width=1"], {"model": {"depth": 10, "width": 1}}),
        (["mesh.model=2"], {"mesh": {"data": -1, "model": 2}}),
        (["rules=(('.*/kernel','block',4,1),)"], {"rules": [[".*/kernel", "block", 4, 1]]}),
        (["sharding=(('.*','fsdp'),)"], {"sharding": [[".*", "fsdp"]]}),
        (["steps=40"], {"steps": 40, "method": {"stop": 30}}),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_what_a_section_may_hold_can_be_set(arguments, expected):
    found = parsed(*(f"--config.{argument}" for argument in arguments))
    for key, value in expected.items():
        assert found[key] == (found[key] | value if isinstance(value, dict) else value)


def test_a_value_may_stand_apart():
    found = parsed("--config.optimizer.name", "adam", "--config.optimizer.b2", "0.5", "--config.seed", "3")
    assert (found["optimizer"]["name"], found["optimizer"]["b2"], found["seed"]) == ("adam", 0.5, 3)


@pytest.mark.parametrize(
    "argument",
    [
        "optimizer.b3=0.9",
        "method.perod=3",
        "dataset.seed=3",
        "mesh.2x=3",
        "optimizer.b2=fast",
        "optimizer.momentum=None",
        "model.width=[[[",
        "method.grow=magnitude",
        "steps=many",
        "seed.of=3",
    ],
    ids=lambda value: value.split("=")[0],
)
def test_what_is_wrong_is_named(argument):
    name = {"optimizer.b2=fast": "optimizer.name=adam", "model.width=[[[": "model.name=wide_resnet"}.get(argument)
    with refused(*argument.split("=")[0].split(".")):
        parsed(f"--config.{argument}", *([f"--config.{name}"] if name else []))


@pytest.mark.parametrize("arguments", [["--config.seed"], ["--config.seed", "--config.steps=3"]])
def test_a_value_that_is_missing_is_told(arguments):
    with refused("--config.seed"):
        parsed(*arguments)
