"""Every bad input gets one clear error: who refuses, what was expected, what was given, of which key."""

import gc
import inspect
import json
import pathlib
import re
import sys
import traceback

import hypothesis
import jax
import jax.numpy as jnp
import pytest
from hypothesis import strategies as st

import rigl_jax as rx
from configs import digits_mlp
from experiments import build, checkpoint, import_idx, launch, main, records, train
from experiments.data import load
from experiments.report.main import main as report
from tests import bad_input, bad_input_compute

# ml_collections reads config files in a way that Python will drop.
pytestmark = pytest.mark.filterwarnings("ignore:the load_module:DeprecationWarning")
ROOT = pathlib.Path(__file__).parents[1]
OURS = tuple(str(ROOT / package) for package in ("rigl_jax", "experiments", "configs"))
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


def check(error):
    """One line, raised by us on purpose, and never only the text of something that we call."""
    assert str(error).strip()
    assert "\n" not in str(error)
    last = traceback.extract_tb(error.__traceback__)[-1]
    assert last.filename.startswith(OURS), f"raised in {last.filename}: {error}"
    assert last.line.startswith("raise"), f"not raised on purpose, at {last.line!r}: {error}"


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


def changed(**values):
    """The plain smoke config, with `section__key` set, or taken out where the value is `...`."""
    config = build.plain(digits_mlp.get_config("smoke"))
    for path, value in values.items():
        *sections, key = path.split("__")
        at = config
        for section in sections:
            at = at[section]
        if value is ...:
            del at[key]
        else:
            at[key] = value
    return config


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
    ({"model__features": [0, 3]}, r"config.model.features: expected whole numbers, 1 or more each, got \[0, 3\]"),
    ({"model__features": "300"}, r"config.model.features: expected whole numbers.*got '300'"),
    ({"model__features": [1.5]}, r"config.model.features: expected whole numbers.*got \[1.5\]"),
    ({"model__dtype": "float33"}, r"config.model.dtype: expected one of float32, bfloat16, float16, got 'float33'"),
    (
        {"model": {"name": "wide_resnet", "dropout": 1.0}},
        r"config.model.dropout: expected a number in \[0, 1\), got 1.0",
    ),
    ({"model": {"name": "wide_resnet", "width": 0}}, r"config.model.width: expected a whole number, 1 or more, got 0"),
    ({"model__name": ["mlp"]}, r"config.model.name: unknown name \"\['mlp'\]\""),
    ({"dataset__batch_size": 0}, r"config.dataset.batch_size: expected a whole number, 1 or more, got 0"),
    ({"dataset__batch_size": "all"}, r"config.dataset.batch_size: expected a whole number.*got 'all'"),
    ({"dataset__workers": -1}, r"config.dataset.workers: expected a whole number, 0 or more, got -1"),
    ({"dataset__data_dir": 3}, r"config.dataset.data_dir: expected a word, got 3"),
    ({"dataset__name": 3}, r"config.dataset.name: expected a word, got 3"),
    ({"optimizer__momentum": 1.0}, r"config.optimizer.momentum: expected a number in \[0, 1\), got 1.0"),
    ({"optimizer__weight_decay": -1}, r"config.optimizer.weight_decay: expected a number, 0 or more, got -1"),
    ({"optimizer__nesterov": "no"}, r"config.optimizer.nesterov: expected True or False, got 'no'"),
    ({"schedule__peak": "high"}, r"config.schedule.peak: expected a number, 0 or more, got 'high'"),
    ({"schedule__peak": float("inf")}, r"config.schedule.peak: expected a number.*got inf"),
    ({"schedule__warmup": 6}, r"config.schedule: cosine needs more steps than warmup=6, got steps=6"),
    ({"schedule": {"name": "piecewise", "peak": 1, "boundaries": ["x"], "factor": 1}}, r"boundaries: .*got \['x'\]"),
    ({"distribution__power": "x"}, r"config.distribution.power: expected a number, 0 or more, got 'x'"),
    ({"method__period": 0}, r"config.method: every: period must be .*got 0"),
    ({"method__period": "often"}, r"config.method.period: expected a whole number, 0 or more, got 'often'"),
    ({"method__fraction": 3}, r"config.method: rigl: fraction is the share .*got 3"),
    ({"method__stop": -1}, r"config.method.stop: expected a whole number, 0 or more, got -1"),
    ({"method__drop": "magnitude"}, r"config.method: rigl: drop must be a function, got 'magnitude'"),
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


# --- files -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("files", "message"),
    [
        ({"config.json": "[]"}, r"config.json: expected a JSON object, got list"),
        ({"config.json": "{"}, r"config.json: not JSON"),
        ({"summary.json": "{}"}, r"summary.json: expected the summary of a run, it lacks test_accuracy, steps"),
        ({"summary.json": "3"}, r"summary.json: expected a JSON object, got int"),
    ],
    ids=str,
)
def test_a_workdir_of_something_else_is_refused(files, message, tmp_path):
    for name, text in files.items():
        (tmp_path / name).write_text(text)
    with pytest.raises(ValueError, match=message) as caught:
        train.train(changed(), tmp_path)
    check(caught.value)
    assert {path.name for path in tmp_path.iterdir()} == set(files)


def test_what_is_wrong_with_a_config_is_told_before_what_changed(tmp_path):
    (tmp_path / "config.json").write_text(json.dumps(changed()))
    with pytest.raises(ValueError, match=r"'Dense_9/kernel' applies to nothing"):
        train.train(changed(rules=[["Dense_9/kernel", "dense"]], seed=7), tmp_path)
    with pytest.raises(ValueError, match=r"made with another config \(seed: 0 -> 7\)"):
        train.train(changed(seed=7), tmp_path)


SUMMARY = dict.fromkeys(("dataset", "model", "method", "distribution"), "x") | dict.fromkeys(
    ("seed", "sparsity", "test_accuracy", "active_params", "final_sparsity", "steps", "seconds"), 0
) | {"flops_inference_x_dense": 1, "flops_training_x_dense": 1}  # fmt: skip


@pytest.mark.parametrize(
    ("files", "message"),
    [
        ({}, "none has a config.json"),
        ({"config.json": "[]"}, "expected a JSON object in .*config.json, got list"),
        ({"config.json": "{"}, "expected a JSON object in .*config.json, could not read it"),
        ({"summary.json": "{}"}, r"summary.json lacks dataset, model, method"),
        ({"summary.json": "[]"}, r"expected a JSON object in .*summary.json, got list"),
        ({"summary.json": json.dumps(SUMMARY | {"test_accuracy": None})}, r"test_accuracy must be a number, got None"),
        ({"summary.json": json.dumps(SUMMARY), "metrics.jsonl": "{\n"}, r"metrics.jsonl line 1 is not valid JSON"),
        ({"summary.json": json.dumps(SUMMARY), "metrics.jsonl": "[]\n"}, r"line 1: expected an object with .step"),
        ({"metrics.jsonl": '{"step": 0, "kind": "masks"}\n'}, r"line 1: a line of kind masks lacks density"),
        ({"summary.json": json.dumps(SUMMARY)}, r"metrics.jsonl is missing although the run has a summary"),
    ],
    ids=str,
)
def test_a_report_of_damaged_runs(files, message, tmp_path, capsys):
    run = tmp_path / "runs" / "one"
    run.mkdir(parents=True)
    for name, text in ({"config.json": "{}", "metrics.jsonl": ""} | files if files else {}).items():
        if name != "metrics.jsonl" or name in files or "kind" in message or "number" in message or "lacks" in message:
            (run / name).write_text(text)
    assert report([str(tmp_path / "runs"), "--out", str(tmp_path / "out")]) == 2
    one_line(capsys, message, start="report: ")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{}", "expected the summary of a run, it lacks"),
        ("[]", "expected a JSON object, got list"),
        (json.dumps(SUMMARY), "one has no config.json"),
    ],
)
def test_an_export_of_damaged_runs(text, message, tmp_path, capsys):
    (tmp_path / "one").mkdir()
    (tmp_path / "one" / "summary.json").write_text(text)
    assert records.main([str(tmp_path), str(tmp_path / "out")]) == 2
    one_line(capsys, message)
    assert not (tmp_path / "out").exists()


def one_line(capsys, message, start="error: "):
    told = capsys.readouterr().err
    assert re.search(message, told), told
    assert told.startswith(start)
    assert told.count("\n") == 1
    assert "Traceback" not in told


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("digts", 8), r"load: unknown data set 'digts'; did you mean 'digits'\?"),
        (("fashion_mnist", 8), r"load: data set 'fashion_mnist' is not prepared in .*; type: "),
        (("", 8), r"load: dataset must be a name such as 'digits', given ''"),
        ((3, 8), r"load: dataset must be a name .*given 3"),
        (("digits", 0), r"load: batch_size must be an integer of at least 1, given 0"),
        (("digits", 10**6), r"load: batch_size 1000000 is larger than the 1437 examples of 'digits'"),
        (("half", 8), r"load: TFDS cannot open 'half' in .*: Dataset half not found"),
    ],
    ids=str,
)
def test_a_data_set_that_cannot_be_opened(arguments, message, tmp_path):
    (tmp_path / "half" / "1.0.0").mkdir(parents=True)  # where writing it was cut short
    with pytest.raises(ValueError, match=message) as caught:
        load(*arguments, seed=0, data_dir=str(tmp_path))
    check(caught.value)
    assert [path.name for path in tmp_path.rglob("*")] == ["half", "1.0.0"]


IMAGES = b"\0\0\x08\x03" + bytes((0, 0, 0, 2, 0, 0, 0, 2, 0, 0, 0, 2)) + bytes(8)
LABELS = b"\0\0\x08\x01\0\0\0\2\0\1"


@pytest.mark.parametrize(
    ("images", "message"),
    [
        (None, r"must hold one file train-images-idx3-ubyte"),
        (b"", r"train-images-idx3-ubyte must start with the IDX magic 00 00 TYPE AXES, given nothing"),
        (b"\x80\x04magic", r"must start with the IDX magic 00 00 TYPE AXES, given 80 04 6d 61"),
        (b"\0\0\x0d" + IMAGES[3:], r"must hold unsigned bytes \(IDX type 0x08\), given type 0x0d"),
        (IMAGES[:9], r"is truncated: a header of 3 axes takes 12 bytes, given 5"),
        (IMAGES[:-1], r"must hold 8 bytes for its shape \(2, 2, 2\), given 7, truncated"),
        (IMAGES + b"x", r"must hold 8 bytes for its shape \(2, 2, 2\), given more"),
        (b"\x1f\x8b" + IMAGES, r"must be a whole gzip file"),
        (b"\0\0\x08\x03" + b"\xff" * 12, r"must hold 79228162458924105385300197375 bytes"),
    ],
    ids=lambda value: repr(value)[:20],
)
def test_half_written_idx_files(images, message, tmp_path, capsys):
    source, target = tmp_path / "source", tmp_path / "target"
    source.mkdir()
    for name, content in (("train-labels-idx1", LABELS), ("t10k-images-idx3", IMAGES), ("t10k-labels-idx1", LABELS)):
        (source / f"{name}-ubyte").write_bytes(content)
    if images is not None:
        (source / "train-images-idx3-ubyte").write_bytes(images)
    assert import_idx.main(["--name", "own", "--source", str(source), "--data_dir", str(target)]) == 1
    one_line(capsys, message)
    assert not target.exists()


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        ("shape", r"checkpoint 1 is damaged and set aside, the one before it is used \(.*shape"),
        ("truncated", r"checkpoint 1 is damaged and set aside"),
        ("foreign", r"checkpoint 1 is damaged and set aside"),
        ("file", r"checkpoint: cannot write to .*; of earlier ones there is none yet"),
    ],
)
@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
def test_checkpoints_of_something_else(damage, message, tmp_path):
    folder, said = tmp_path / "checkpoints", []
    if damage == "file":
        folder.write_text("x")
        with pytest.raises(OSError, match=message) as caught:
            checkpoint.open_checkpoints(folder, keep=1)
        assert "\n" not in str(caught.value)
        return
    if damage == "foreign":
        (folder / "1").mkdir(parents=True)
        (folder / "1" / "state.pickle").write_bytes(b"cbuiltins\nprint\n(S'run'\ntR.")
        (folder / "notes").mkdir()
    else:
        store = checkpoint.open_checkpoints(folder, keep=1)
        store.save(1, {"w": jnp.ones(3)}, {}, None)
        store.close()
        for part in folder.glob("1/state/d/*" if damage == "truncated" else "none"):
            part.write_bytes(part.read_bytes()[:-5])
    store = checkpoint.open_checkpoints(folder, keep=1, say=said.append)
    shape = jax.ShapeDtypeStruct((4 if damage == "shape" else 3,), "float32", sharding=jnp.ones(3).sharding)
    assert store.restore({"w": shape}) is None
    store.close()
    (told,) = said
    assert re.match(message, told)
    assert "\n" not in told
    gc.collect()  # orbax leaves the coroutine that failed behind, whose end would fall into another test


def test_nothing_that_is_read_can_hold_code():
    for package in ("rigl_jax", "experiments"):
        for path in (ROOT / package).rglob("*.py"):
            calls = re.findall(r"\b(pickle|marshal|shelve|dill|joblib|allow_pickle|eval\(|exec\()", path.read_text())
            assert not calls, path


# --- commands ----------------------------------------------------------------------------------------------------

SMOKE = str(ROOT / "configs" / "digits_mlp.py") + ":smoke"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--wordir=x"], r"unknown flag --wordir; did you mean --workdir\?"),
        (["--workdir=run"], r"--config is missing"),
        (["--config", SMOKE], r"--workdir is missing"),
        (["--config=none.py", "--workdir=run"], r"there is no config file none.py"),
        (["--config", SMOKE + ",smok", "--workdir=run"], r"unknown variant 'smok', expected one of smoke"),
        (["--config", SMOKE, "--workdir=run", "more"], r"expected only --flags, got 'more'"),
        (["--config", SMOKE, "--workdir=run", "--config.sed=1"], r"--config.sed; did you mean --config.seed\?"),
        (["--config", SMOKE, "--workdir=run", "--config.steps=many"], r"--config.steps=many"),
        (
            ["--config", SMOKE, "--workdir=run", "--config.model.features=(0,3)"],
            r"config.model.features: .*got \[0, 3\]",
        ),
        (
            ["--config", SMOKE, "--workdir=run", "--config.seed=" + "9" * 30],
            r"config.seed: expected less than 4294967296",
        ),
        (["--config", SMOKE, "--workdir=run", "--config.seed=-1"], r"config.seed: expected 0 or more, got -1"),
        (["--config", SMOKE, "--workdir=run", "--config.method.name=rgl"], r"unknown name 'rgl'.*did you mean 'rigl'"),
        (["--config", SMOKE, "--workdir=run", "--config.dataset.batch_size=0"], r"batch_size: expected a whole.*got 0"),
        (["--config", SMOKE, "--workdir=run", "--config.dataset.name=digts"], r"did you mean 'digits'"),
        (["--config", SMOKE, "--workdir=run", "--config.mesh.data=3"], r"config.mesh: .*8 devices"),
        (["--config=bad.py", "--workdir=run"], r"bad.py|SyntaxError|invalid syntax|never closed"),
        (["--config=empty.py", "--workdir=run"], r"the config file must give get_config\(variant\), it raises module"),
        (
            ["--config=three.py", "--workdir=run"],
            r"config: expected sections of numbers, words and lists by name, got i",
        ),
    ],
    ids=lambda value: value[-1][-30:] if isinstance(value, list) else "",
)
def test_the_command_says_what_is_wrong(arguments, message, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "bad.py").write_text("def get_config(:")
    (tmp_path / "empty.py").write_text("")
    (tmp_path / "three.py").write_text("def get_config():\n    return 3")
    monkeypatch.delitem(sys.modules, "config_config", raising=False)  # where ml_collections keeps the last config file
    assert main.main(["main", *arguments]) == 2
    one_line(capsys, message)
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--config", SMOKE, "--methods", "rigl,rgl"], r"launch: run rgl-s0: config.method.name: unknown name 'rgl'"),
        (["--config", "none.py"], r"launch: run dense-s0: main: there is no config file none.py"),
        (["--config", SMOKE + ",smok"], r"launch: run dense-s0: .*unknown variant 'smok'"),
        (["--study", "fashion_mnits"], r"launch: unknown study 'fashion_mnits'.*did you mean 'fashion_mnist'"),
        (["--config", SMOKE, "--jobs", "0"], r"launch: expected 1 or more, got --jobs 0"),
    ],
    ids=lambda value: value[-1][-20:] if isinstance(value, list) else "",
)
def test_a_sweep_with_a_wrong_config_starts_nothing(arguments, message, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(launch, "start", None)  # calling it would fail otherwise
    assert launch.main([*arguments, "--runs", str(tmp_path / "runs")]) == 2
    one_line(capsys, message)
    assert not (tmp_path / "runs").exists()
