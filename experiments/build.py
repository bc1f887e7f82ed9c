"""From a config to objects: the one place where a string chooses code.

A config holds data only. Each section (`model`, `dataset`, `optimizer`, `schedule`, `distribution`, `method`,
`data_pruning`) has a `name`, looked up in one of the tables below, or a place of a user's own code (see `own.py`), and
options, which are the keyword arguments of what the name stands for. A section may also hold options of its table's
other entries, so that a run changes method or optimizer by the name alone (`--config.method.name=static`); an option
that no entry takes is an error. The command line leaves out what only a user's own entry takes where it names another
one (`command.read`, `launch.grid`).
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import optax
from jax.sharding import Mesh

import rigl_jax as rx
from experiments import data as data_module
from experiments import own, sharding
from experiments.config import DENSE, check_keys, completed, plain
from experiments.data_pruning import DATA_PRUNING, DataPruning
from experiments.execution import Execution, dense, masked, packed
from experiments.models import MODELS, adapters
from experiments.optimizers import OPTIMIZERS, SCHEDULES, kernels
from experiments.options import Options, choose, find, key, known_options, options
from experiments.rules import choice, unknown
from experiments.step import Objective
from rigl_jax import checks, structures
from rigl_jax.algorithms import ALGORITHMS
from rigl_jax.base import Algorithm, Plan, PyTree

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

EXECUTIONS: dict[str, Callable[..., Execution]] = {"masked": masked, "packed": packed}
METHODS: dict[str, Callable[..., Any]] = {DENSE: lambda plan: None, **ALGORITHMS}

SECTIONS: dict[str, tuple[Mapping[str, Callable[..., Any]], int]] = {
    "model": (MODELS, 1),
    "optimizer": (OPTIMIZERS, 2),
    "schedule": (SCHEDULES, 0),
    "distribution": (DISTRIBUTIONS, 2),
    "method": (METHODS, 1),
    "data_pruning": (DATA_PRUNING, 1),
}
"""The table of each section but `dataset`, and how many arguments an entry is given before its options."""


def _choose(section: str, given: Mapping[str, Any]) -> Callable[..., Any]:
    table, fixed = SECTIONS[section]
    return choose(section, table, given, fixed)


def takes(section: str, name: Any, option: str) -> bool:
    """Whether a section may hold an option beside a name; see `options.known_options`.

    Raises:
      ValueError: an unknown name.
    """
    if section == "dataset":
        known = _dataset_options(name)
    elif section in SECTIONS:
        table, fixed = SECTIONS[section]
        known = known_options(section, table, name, fixed)
    else:
        return True
    return option in known.named or known.open_ended


# --- checks ----------------------------------------------------------------------------------------------------------


def check(config: Mapping[str, Any]) -> dict[str, Any]:
    """The config as plain data, if its keys, names and options are right.

    What needs neither data nor devices is made, so that a launcher can tell what is wrong before it starts anything:
    the constructors check their own arguments. The method is made for a plan of one large leaf; what depends on the
    network's own leaves is checked when the network is known.

    Raises:
      ValueError: names the first wrong key, what was expected and what was given.
    """
    config = completed(plain(config))
    check_keys(config)
    choice(EXECUTIONS)("config", "execution", config["execution"])
    _dataset(config["dataset"])
    model(config, num_classes=2)
    leaf = jax.ShapeDtypeStruct((2**15, 2**15), "float32")
    optimizer(config, {"kernel": leaf})
    distribution(config)({"kernel": leaf.shape}, config["sparsity"])
    layer_rules(config)
    data_pruning(config, 2**31 - 1)
    sharding.check_rules(config["sharding"])
    large = rx.LayerPlan("kernel", leaf.shape, structures.unstructured(), 2**29)
    # Lists of words name leaves, which are not known yet.
    method = {option: value for option, value in config["method"].items() if not _are_words(value)}
    _algorithm(method, {large.name: large})
    return config


def _are_words(value: Any) -> bool:
    return isinstance(value, list) and all(isinstance(each, str) for each in value)


def _dataset(section: Mapping[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
    """The options of a data set: those of `experiments.data.load`, and those of a user's own function."""
    given = dict(section)
    name = given.pop("name", None)
    known = _dataset_options(name)
    for option in given:
        if option not in known.named and not known.open_ended:
            raise unknown("config.dataset", "option", option, sorted(known.named))
    ours = {option: value for option, value in given.items() if option in _load_options()}
    with key("dataset"):
        data_module.check(dataset=name, **ours)
    return ours, {option: value for option, value in given.items() if option not in ours}


def _load_options() -> dict[str, Any]:
    not_options = ("seed", "process_index", "process_count", "subset", "options")
    return {k: v for k, v in options(data_module.load, 1).named.items() if k not in not_options}


def _dataset_options(name: Any) -> Options:
    taken = options(find("dataset", {}, name), 0) if own.is_own(name) else Options({}, set(), False)
    return taken._replace(named={**taken.named, **_load_options()})


# --- objects -----------------------------------------------------------------------------------------------------


def model(config: Mapping[str, Any], num_classes: int) -> adapters.Model:
    """The network."""
    constructor = _choose("model", config["model"])
    with key("model"):
        return adapters.adapt(constructor, num_classes)


def data(config: Mapping[str, Any], subset: Sequence[int] | None = None) -> data_module.Data:
    """The data set, or a subset of its training examples; `seed` decides their order. Each process reads its share."""
    ours, options = _dataset(config["dataset"])
    return data_module.load(
        config["dataset"]["name"],
        **ours,
        options=options,
        subset=subset,
        seed=config["seed"],
        process_index=jax.process_index(),
        process_count=jax.process_count(),
    )


def data_pruning(config: Mapping[str, Any], n: int) -> DataPruning:
    """Which of n training examples are used, and when."""
    return _choose("data_pruning", config["data_pruning"])(n)


def learning_rate(config: Mapping[str, Any]) -> optax.Schedule:
    """The learning rate by weight updates done."""
    made = _choose("schedule", config["schedule"])()
    if not callable(made):
        raise ValueError(
            f"config.schedule: {config['schedule']['name']} must give a function of the step, got {made!r:.80}"
        )
    return made


def optimizer(config: Mapping[str, Any], params: PyTree) -> optax.GradientTransformation:
    """The inner optimizer; weight decay is in it, so the gradients that decide growth do not hold it.

    `params`, which may be abstract, say what decays: packed values no longer show how many axes their weight has.
    """
    return _choose("optimizer", config["optimizer"])(learning_rate(config), kernels(params))


def execution(
    config: Mapping[str, Any],
    objective: Objective,
    optimizer: optax.GradientTransformation,
    algorithm: Algorithm | None,
    mesh: Mesh,
) -> Execution:
    """How the run is executed: dense without an algorithm, else by `config.execution`."""
    if algorithm is not None:
        return EXECUTIONS[config["execution"]](objective, optimizer, algorithm, mesh, config["sharding"])
    if config["execution"] != "masked":
        raise ValueError(
            f"config.execution: a dense run has nothing to pack, got {config['execution']!r}; use 'masked'"
        )
    return dense(objective, optimizer, mesh, config["sharding"])


def layer_rules(config: Mapping[str, Any]) -> tuple[tuple[str, Any], ...] | None:
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
            raise unknown(f"config.rules[{i}]", "structure", name, STRUCTURES)
        try:
            re.compile(pattern)
        except re.error as error:
            raise ValueError(f"config.rules[{i}]: {pattern!r} is not a regular expression: {error}") from None
        with key(f"rules[{i}]"):
            found.append((pattern, STRUCTURES[name](*numbers)))
    return tuple(found) or None


def distribution(config: Mapping[str, Any]) -> Callable[..., dict[str, float]]:
    """What shares the sparsity out among the leaves."""
    return _choose("distribution", config["distribution"])


def plan(config: Mapping[str, Any], params: PyTree) -> Plan | None:
    """Which leaves are sparse, and how sparse; None for the dense method. `params` may be abstract."""
    if config["method"]["name"] == DENSE:
        return None
    return rx.make_plan(
        params, sparsity=config["sparsity"], distribution=distribution(config), rules=layer_rules(config)
    )


def algorithm(config: Mapping[str, Any], plan: Plan | None) -> Algorithm | None:
    """The sparse-training method over the plan; None for the dense method."""
    return None if plan is None else _algorithm(config["method"], plan)


def _algorithm(section: Mapping[str, Any], plan: Plan) -> Algorithm | None:
    made = _choose("method", section)(plan)
    if section["name"] == DENSE:
        return None
    with key("method"):
        checks.algorithm(section["name"], made)
    return made
