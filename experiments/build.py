"""From a config to objects: the one place where a string chooses code.

A config holds data only. Each section (`model`, `dataset`, `optimizer`, `schedule`, `distribution`, `method`) has a
`name`, looked up in one of the tables below, and options, which are the keyword arguments of what the name stands for.
A section may also hold options of its table's other entries, so that a run changes method or optimizer by the name
alone (`--config.method.name=static`); an option that no entry takes is an error.
"""

from __future__ import annotations

import inspect
import re
from collections.abc import Callable, Mapping
from typing import Any

import flax.linen as nn
import jax
import optax
from jax.sharding import Mesh, NamedSharding, PartitionSpec

import rigl_jax as rx
from experiments import data as data_module
from experiments import finite, sharding
from experiments.config import plain
from experiments.models import MODELS
from experiments.optimizers import OPTIMIZERS, SCHEDULES, kernels
from experiments.options import check_kind, choose, options, unknown
from rigl_jax import checks, structures
from rigl_jax.algorithms import ALGORITHMS
from rigl_jax.base import Algorithm, Plan, PyTree
from rigl_jax.execution import PackedTraining

KEYS: dict[str, tuple[type, ...]] = {
    "seed": (int,),
    "steps": (int,),
    "stop_at": (int,),
    "dataset": (Mapping,),
    "model": (Mapping,),
    "optimizer": (Mapping,),
    "schedule": (Mapping,),
    "label_smoothing": (float, int),
    "method": (Mapping,),
    "sparsity": (float, int),
    "distribution": (Mapping,),
    "rules": (list, tuple),
    "execution": (str,),
    "mesh": (Mapping,),
    "sharding": (list, tuple),
    "log_every": (int,),
    "eval_every": (int,),
    "checkpoint_every": (int,),
    "keep": (int,),
    "check_every": (int,),
    "on_nonfinite": (str,),
    "progress": (bool,),
    "tensorboard": (bool,),
}
"""What a config holds, all of it required; `configs/common.py` gives each a value and says what it means."""

EXECUTIONS = {"masked": False, "packed": True}
"""How sparse weights are stored and multiplied: dense under masks, or by their active values (`rx.packed_training`)."""

DENSE = "dense"
"""The method that is no algorithm: the inner optimizer alone, without masks."""

DISTRIBUTIONS: dict[str, Callable[..., dict[str, float]]] = {
    "erk": rx.erk,
    "erdos_renyi": rx.erdos_renyi,
    "uniform": rx.uniform,
}
STRUCTURES: dict[str, Callable[..., Any]] = {
    "dense": lambda: None,
    "unstructured": structures.unstructured,
    "block": structures.block,
    "n_of_m": structures.n_of_m,
    "fan_in": structures.fan_in,
    "channel": structures.channel,
}

SECTIONS: dict[str, tuple[Mapping[str, Callable[..., Any]], int]] = {
    "model": (MODELS, 1),
    "optimizer": (OPTIMIZERS, 2),
    "schedule": (SCHEDULES, 0),
    "distribution": (DISTRIBUTIONS, 2),
    "method": ({DENSE: lambda plan: plan, **ALGORITHMS}, 1),
}
"""What the name of a section chooses from, and how many leading arguments are no options."""


# --- keys ------------------------------------------------------------------------------------------------------------


def check(config: Mapping[str, Any]) -> dict[str, Any]:
    """The config as plain data, if its keys, types, names, options and ranges are right.

    Raises:
      ValueError: names the first wrong key, what was expected and what was given.
    """
    config = plain(config)
    for key in config:
        if key not in KEYS:
            raise unknown("config", "key", key, list(KEYS))
    for key, types in KEYS.items():
        if key not in config:
            raise ValueError(f"config: the key {key!r} is missing; configs/common.py gives every key a value")
        wrong = not isinstance(config[key], types) or (isinstance(config[key], bool) and bool not in types)
        if wrong:
            raise ValueError(f"config.{key}: expected {types[0].__name__}, got {config[key]!r}")
    if not 0 <= config["sparsity"] < 1:
        raise ValueError(
            f"config.sparsity: expected a fraction of zeros in [0, 1), got {config['sparsity']} (90 % is 0.9)"
        )
    if not 0 <= config["label_smoothing"] < 1:
        raise ValueError(f"config.label_smoothing: expected a number in [0, 1), got {config['label_smoothing']}")
    for key in ("steps", "log_every", "eval_every", "keep"):
        if config[key] < 1:
            raise ValueError(f"config.{key}: expected 1 or more, got {config[key]}")
    for key in ("seed", "stop_at", "checkpoint_every", "check_every"):
        if config[key] < 0:
            raise ValueError(f"config.{key}: expected 0 or more, got {config[key]}")
    for key, value in config.items():
        if int in KEYS[key] and float not in KEYS[key] and value >= (limit := checks.LARGEST * (1 + (key == "seed"))):
            raise ValueError(f"config.{key}: expected less than {limit}, got {value}")
    if config["checkpoint_every"] % config["eval_every"]:
        raise ValueError(
            "config.checkpoint_every: expected a multiple of eval_every="
            f"{config['eval_every']} (checkpoints are ranked by test accuracy), got {config['checkpoint_every']}"
        )
    _check_dataset(config["dataset"])
    for where, (table, fixed) in SECTIONS.items():
        choose(where, table, config[where], fixed)
    if config["execution"] not in EXECUTIONS:
        raise unknown("config.execution", "execution", config["execution"], list(EXECUTIONS))
    if config["on_nonfinite"] not in finite.CHOICES:
        raise unknown("config.on_nonfinite", "choice", config["on_nonfinite"], list(finite.CHOICES))
    rules(config)
    _check_constructed(config)
    sharding.check_rules(config["sharding"])
    return config


def _check_constructed(config: Mapping[str, Any]) -> None:
    """Makes what needs neither data nor devices, so that a launcher can tell before it starts anything.

    The method is made for a plan of one large leaf; what depends on the network's own leaves is told later.
    """
    learning_rate(config)
    if config["method"]["name"] == DENSE:
        return
    large = rx.Leaf("kernel", (2**15, 2**15), structures.unstructured(), 2**29)
    method = {option: value for option, value in config["method"].items() if option != "never_ablate"}
    try:
        choose("method", ALGORITHMS, method, 1)({large.name: large})
    except (ValueError, TypeError) as error:
        raise ValueError(f"config.method: {str(error).removeprefix('config.method: ')}") from None


def section_options(section: str) -> dict[str, list[inspect.Parameter]]:
    """The options that a section may hold, with the parameters of that name of all that its name can choose.

    {} for what is no section with options. The data set's name is the loader's to judge.
    """
    found: dict[str, list[inspect.Parameter]] = {}
    for entry, fixed in [(data_module.load, 1)] if section == "dataset" else _entries(section):
        for option, parameter in options(entry, fixed).named.items():
            if section != "dataset" or option not in ("seed", "process_index", "process_count"):
                found.setdefault(option, []).append(parameter)
    return dict(sorted(found.items()))


def _entries(section: str) -> list[tuple[Callable[..., Any], int]]:
    table, fixed = SECTIONS.get(section, ({}, 0))
    return [(entry, fixed) for entry in table.values()]


def _check_dataset(section: Mapping[str, Any]) -> None:
    """The options of a data set are keywords of `experiments.data.load`."""
    known = {name: parameter for name, (parameter,) in section_options("dataset").items()}
    for option in section:
        if option != "name" and option not in known:
            raise unknown("config.dataset", "option", option, known)
    for option in ("name", "batch_size"):
        if option not in section:
            raise ValueError(f"config.dataset: the option {option!r} is missing")
    if not isinstance(section["name"], str):
        raise ValueError(f"config.dataset.name: expected a word, got {section['name']!r}")
    for option in section.keys() & known.keys():
        check_kind(f"config.dataset.{option}", known[option], section[option], least=int(option != "workers"))


# --- objects -----------------------------------------------------------------------------------------------------


def model(config: Mapping[str, Any], num_classes: int) -> nn.Module:
    """The linen module."""
    return choose("model", MODELS, config["model"], 1)(num_classes)


def data(config: Mapping[str, Any]) -> data_module.Data:
    """The data set, opened; `seed` decides the order of its training images. Each process reads its own share."""
    options = dict(config["dataset"])
    return data_module.load(
        options.pop("name"),
        **options,
        seed=config["seed"],
        process_index=jax.process_index(),
        process_count=jax.process_count(),
    )


def learning_rate(config: Mapping[str, Any]) -> optax.Schedule:
    """The learning rate by weight updates done."""
    return choose("schedule", SCHEDULES, config["schedule"])()


def optimizer(config: Mapping[str, Any], params: PyTree) -> optax.GradientTransformation:
    """The inner optimizer; weight decay is in it, so the gradients that decide growth do not hold it.

    `params`, which may be abstract, say what decays: packed values no longer show how many axes their weight has.
    """
    return choose("optimizer", OPTIMIZERS, config["optimizer"], 2)(learning_rate(config), kernels(params))


def training(
    config: Mapping[str, Any],
    inner: optax.GradientTransformation,
    algorithm: Algorithm | None,
    key: jax.Array,
    mesh: Mesh,
) -> tuple[optax.GradientTransformationExtraArgs, PackedTraining | None]:
    """What updates the weights: a masked transformation, and beside it its packed form where the config asks for it."""
    packed = EXECUTIONS[config["execution"]]
    if algorithm is None:
        if packed:
            raise ValueError("config.execution: a dense run has nothing to pack, got 'packed'; use 'masked'")
        return optax.with_extra_args_support(inner), None
    tx = rx.sparsify(inner, algorithm, key=key)
    if not packed:
        return tx, None
    if mesh.size > 1 and (mesh.size > mesh.shape[sharding.DATA] or config["sharding"]):
        raise ValueError(
            "config.execution: packed weights lie whole on every device, which share the batch; it takes a mesh of "
            f"{sharding.DATA!r} alone and no sharding rules, got mesh {dict(mesh.shape)}, sharding {config['sharding']}"
        )
    whole = NamedSharding(mesh, PartitionSpec()) if mesh.size > 1 else None
    return tx, rx.packed_training(inner, algorithm, key=key, sharding=whole)


def rules(config: Mapping[str, Any]) -> tuple[tuple[str, Any], ...] | None:
    """`config.rules`: a regular expression, a structure's name (or "dense") and its numbers, as in
    `(".*/kernel", "block", 4, 1)`; None where there are none.
    """
    found = []
    for i, rule in enumerate(config["rules"]):
        if not (isinstance(rule, (list, tuple)) and len(rule) >= 2 and all(isinstance(r, str) for r in rule[:2])):
            raise ValueError(
                f"config.rules[{i}]: expected (regular expression, structure, its numbers ...), got {rule!r}"
            )
        pattern, name, *numbers = rule
        if name not in STRUCTURES:
            raise unknown(f"config.rules[{i}]", "structure", name, list(STRUCTURES))
        try:
            re.compile(pattern)
            found.append((pattern, STRUCTURES[name](*numbers)))
        except TypeError as error:
            raise ValueError(f"config.rules[{i}]: {name} does not take {numbers}: {error}") from None
        except re.error as error:
            raise ValueError(f"config.rules[{i}]: {pattern!r} is not a regular expression: {error}") from None
        except ValueError as error:
            raise ValueError(f"config.rules[{i}]: {error}") from None
    return tuple(found) or None


def plan(config: Mapping[str, Any], params: PyTree) -> Plan | None:
    """Which leaves are sparse, and how sparse; None for the dense method. `params` may be abstract."""
    if config["method"]["name"] == DENSE:
        return None
    distribution = choose("distribution", DISTRIBUTIONS, config["distribution"], 2)
    return rx.make_plan(params, sparsity=config["sparsity"], distribution=distribution, rules=rules(config))


def algorithm(config: Mapping[str, Any], plan: Plan | None) -> Algorithm | None:
    """The sparse-training method over the plan; None for the dense method."""
    return None if plan is None else choose("method", ALGORITHMS, config["method"], 1)(plan)
