"""Every bad input gets one clear error: who refuses, what was expected, what was given, of which key."""

import inspect

import hypothesis
import jax
import jax.numpy as jnp
import pytest
from hypothesis import strategies as st

import rigl_jax as rx
from experiments import build
from tests import bad_input, bad_input_compute
from tests.bad_input import changed, check

LIBRARY = {
    f"{part}: {name}": row
    for part, rows in {
        "plans": bad_input.PLANS,
        "times": bad_input.TIMES,
        "training": bad_input.TRAINING,
        "compute": bad_input_compute.COMPUTE,
        "methods": bad_input_compute.METHODS,
    }.items()
    for name, row in rows.items()
}


@pytest.fixture
def nowhere(tmp_path, monkeypatch):
    """The working directory of a call that must write nothing."""
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    yield tmp_path
    assert not list((tmp_path / "here").iterdir())


@pytest.mark.parametrize("name", LIBRARY)
def test_the_library_says_what_is_wrong(name, nowhere):
    call, message = LIBRARY[name]
    with pytest.raises(ValueError, match=message) as caught:
        call()
    check(caught.value)


NUMERIC = [
    (name, option)
    for name, constructor in rx.ALGORITHMS.items()
    for option, parameter in inspect.signature(constructor).parameters.items()
    if parameter.kind is parameter.KEYWORD_ONLY and isinstance(parameter.default, (int, float, type(None), type))
    if not isinstance(parameter.default, bool) and option not in ("loss", "grow_values")
]
ANYTHING = st.one_of(
    st.none(), st.text(max_size=3), st.booleans(), st.integers(-3, 60), st.sampled_from([2**31, 10**40, 1j, b"x"]),
    st.floats(), st.floats(0, 1), st.lists(st.integers(0, 3), max_size=2), st.just({}),
)  # fmt: skip


@hypothesis.settings(max_examples=120)
@hypothesis.given(st.sampled_from(NUMERIC), ANYTHING)
def test_any_value_of_any_numeric_option_works_or_is_refused(which, value):
    name, option = which
    try:
        algorithm = bad_input_compute.made(name, **{option: value})
    except ValueError as error:
        check(error)
        return
    assert algorithm.due(5) in (True, False)
    if name in ("grasp", "synflow"):  # tracing them takes a second; their options are read when they are made
        return
    state = jax.eval_shape(algorithm.init, bad_input.KEY, bad_input.PARAMS)
    signals = rx.Signals(bad_input.PARAMS, bad_input.PARAMS, jnp.int32(3), bad_input.KEY)
    jax.eval_shape(lambda state: algorithm.update(state, signals).state, state)


@hypothesis.given(ANYTHING)
def test_any_sparsity_and_any_structure_work_or_are_refused(value):
    shape = bad_input.one((4, 4))
    for call in (
        lambda: rx.make_plan(shape, value),
        lambda: rx.erk({"w": (4, 4)}, 0.5, power=value),
        lambda: rx.make_plan(shape, 0.5, rules=((".*", rx.block(value, 1)),)),
        lambda: rx.make_plan(shape, 0.5, rules=((".*", rx.n_of_m(1, value)),)),
        lambda: rx.make_plan(shape, 0.5, rules=((".*", rx.channel(value)),)),
        lambda: rx.make_plan(shape, 0.5, rules=value),
        lambda: rx.make_plan(shape, 0.5, sparsities=value),
    ):
        try:
            call()
        except ValueError as error:
            check(error)


# --- configs -----------------------------------------------------------------------------------------------------


CONFIGS = [
    *(({key: ...}, f"config: the key '{key}' is missing; configs/common.py") for key in build.KEYS),
    *(({key: None}, rf"config.{key}: expected {types[0].__name__}, got None") for key, types in build.KEYS.items()),
    *(({key[:-1]: 1}, rf"config: unknown key '{key[:-1]}'.*did you mean '{key}'") for key in build.KEYS),
    *(({key: 2**31}, rf"config.{key}: expected less than 2147483648") for key in ("steps", "log_every", "keep")),
    *(({key: -1}, rf"config.{key}: expected . or more, got -1") for key in ("seed", "stop_at", "steps", "eval_every")),
    ({"seed": 2**32}, r"config.seed: expected less than 4294967296, got 4294967296"),
    ({"seed": 10**40}, r"config.seed: expected less than 4294967296, got 1000000000"),
    ({"sparsity": float("nan")}, r"config.sparsity: expected a fraction .*got nan"),
    ({"execution": "pakced"}, r"config.execution: unknown execution 'pakced'.*did you mean 'packed'"),
    (
        {"model__features": [0, 3]},
        r"config.model.features: expected whole numbers, each from 1 to below 2\*\*31, got \[0, 3\]",
    ),
    ({"model__features": "300"}, r"config.model.features: expected whole numbers.*got '300'"),
    ({"model__features": [1.5]}, r"config.model.features: expected whole numbers.*got \[1.5\]"),
    ({"model__dtype": "float33"}, r"config.model.dtype: expected one of float32, bfloat16, float16, got 'float33'"),
    (
        {"model": {"name": "wide_resnet", "dropout": 1.0}},
        r"config.model.dropout: expected a number in \[0, 1\), got 1.0",
    ),
    (
        {"model": {"name": "wide_resnet", "width": 0}},
        r"config.model.width: expected a whole number from 1 to below 2\*\*31, got 0",
    ),
    ({"model__name": ["mlp"]}, r"config.model.name: unknown name \"\['mlp'\]\""),
    ({"dataset__batch_size": 0}, r"config.dataset.batch_size: expected a whole number from 1 to below 2\*\*31, got 0"),
    ({"dataset__batch_size": "all"}, r"config.dataset.batch_size: expected a whole number.*got 'all'"),
    ({"dataset__workers": -1}, r"config.dataset.workers: expected a whole number from 0 to below 2\*\*31, got -1"),
    ({"dataset__data_dir": 3}, r"config.dataset.data_dir: expected a word, got 3"),
    ({"dataset__name": 3}, r"config.dataset.name: expected a word, got 3"),
    ({"optimizer__momentum": 1.0}, r"config.optimizer.momentum: expected a number in \[0, 1\), got 1.0"),
    ({"optimizer__weight_decay": -1}, r"config.optimizer.weight_decay: expected a number from 0 to below 1e30, got -1"),
    ({"optimizer__nesterov": "no"}, r"config.optimizer.nesterov: expected True or False, got 'no'"),
    ({"schedule__peak": "high"}, r"config.schedule.peak: expected a number from 0 to below 1e30, got 'high'"),
    ({"schedule__peak": float("inf")}, r"config.schedule.peak: expected a number.*got inf"),
    ({"schedule__warmup": 6}, r"config.schedule: cosine needs more steps than warmup=6, got steps=6"),
    ({"schedule": {"name": "piecewise", "peak": 1, "boundaries": ["x"], "factor": 1}}, r"boundaries: .*got \['x'\]"),
    ({"distribution__power": "x"}, r"config.distribution.power: expected a number from 0 to below 1e30, got 'x'"),
    ({"method__period": 0}, r"config.method: every: period must be .*got 0"),
    (
        {"method__period": "often"},
        r"config.method.period: expected a whole number from 0 to below 2\*\*31, got 'often'",
    ),
    ({"method__fraction": 3}, r"config.method: rigl: fraction is the share .*got 3"),
    ({"method__stop": -1}, r"config.method.stop: expected a whole number from 0 to below 2\*\*31, got -1"),
    (
        {"method__drop": "magnitude"},
        r"config.method.drop: takes a function, which a config cannot name, got 'magnitude'",
    ),
    ({"method__skip_step": "false"}, r"config.method.skip_step: expected True or False, got 'false'"),
    ({"method": {"name": "grasp"}}, r"config.method: grasp needs the option 'loss', which is not given"),
    ({"rules": [["(", "dense"]]}, r"config.rules\[0\]: '\(' is not a regular expression"),
    ({"rules": [["a", "block", 0, 1]]}, r"config.rules\[0\]: block\(0, 1\): sizes must be integers .*got 0, 1"),
    ({"rules": [["a", "block", 1]]}, r"config.rules\[0\]: block does not take \[1\]"),
    ({"sharding": [["a"]]}, r"config.sharding\[0\]: expected \(regular expression"),
]


@pytest.mark.parametrize(("values", "message"), CONFIGS, ids=lambda v: str(v)[:50] if isinstance(v, dict) else "")
def test_a_config_says_what_is_wrong(values, message, nowhere):
    with pytest.raises(ValueError, match=message) as caught:
        build.check(changed(**values))
    check(caught.value)


@pytest.mark.parametrize("config", [None, 3, "rigl", [1], {"seed": object()}], ids=lambda c: type(c).__name__)
def test_what_is_no_config(config, nowhere):
    with pytest.raises(ValueError, match=r"^config: ") as caught:
        build.check(config)
    check(caught.value)


@hypothesis.given(st.sampled_from([(s, o) for s, v in changed().items() if isinstance(v, dict) for o in v]), ANYTHING)
def test_any_value_of_any_option_of_a_config_works_or_is_refused(which, value):
    section, option = which
    try:
        build.check(changed(**{f"{section}__{option}": value}))
    except ValueError as error:
        check(error)
