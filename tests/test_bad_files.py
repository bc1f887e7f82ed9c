"""Damaged or foreign files and wrong command lines: one clear error, exit code 2 or 1, nothing written."""

import json
import re
import shlex
import sys

import jax
import jax.numpy as jnp
import pytest

from experiments import import_idx, launch, main, train
from experiments.data import load
from experiments.io import checkpoint, export
from experiments.report.main import main as report
from tests.bad_input import ROOT, changed, check, one_line

# ml_collections reads config files in a way that Python will drop.
pytestmark = pytest.mark.filterwarnings("ignore:the load_module:DeprecationWarning")


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
        ({"config.json": "[]"}, "config.json: expected a JSON object, got list"),
        ({"config.json": "{"}, "config.json: not JSON"),
        ({"summary.json": "{}"}, r"summary.json lacks dataset, model, method"),
        ({"summary.json": "[]"}, r"summary.json: expected a JSON object, got list"),
        ({"summary.json": json.dumps(SUMMARY | {"test_accuracy": None})}, r"test_accuracy must be a number, got None"),
        ({"summary.json": json.dumps(SUMMARY), "metrics.jsonl": "{\n"}, r"metrics.jsonl line 1: not JSON"),
        ({"summary.json": json.dumps(SUMMARY), "metrics.jsonl": "[]\n"}, r"line 1: expected a JSON object, got list"),
        (
            {"metrics.jsonl": '{"step": 0, "kind": "masks"}\n'},
            r"line 1: density of a line of kind masks must be .*missing",
        ),
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
    assert export.main([str(tmp_path), str(tmp_path / "out")]) == 2
    one_line(capsys, message)
    assert not (tmp_path / "out").exists()


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


def test_what_to_type_is_quoted_for_the_shell(tmp_path):
    with pytest.raises(ValueError, match=r"type: ") as caught:
        load("fashion_mnist", 8, seed=0, data_dir=str(tmp_path / "my data; x"))
    command = str(caught.value).split("&& ")[1].split("; or: ")[0]
    assert shlex.split(command)[-1] == str(tmp_path / "my data; x")


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
        ("truncated", r"checkpoint 1 is damaged and set aside \(state/d/.* bytes, not"),
        ("foreign", r"checkpoint 1 is damaged and set aside \(sums.json is missing\)"),
        ("empty", r"checkpoint 1 is damaged and set aside \(sums.json lists nothing\)"),
        ("deep", r"checkpoint 1 is damaged and set aside \(sums.json is not the list of its files\)"),
        ("listless", r"checkpoint 1 is damaged and set aside \(sums.json is not the list of its files\)"),
        ("file", r"checkpoint: cannot write to .*; of earlier ones there is none yet"),
    ],
)
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
        if damage in (lists := {"listless": '["state"]', "empty": "{}", "deep": "[" * 100_000}):
            (folder / "1" / "sums.json").write_text(lists[damage])
        else:
            (part,) = folder.glob("1/state/d/*")
            part.write_bytes(part.read_bytes()[:-5])
    store = checkpoint.open_checkpoints(folder, keep=1, say=said.append)
    shape = jax.ShapeDtypeStruct((3,), "float32", sharding=jnp.ones(3).sharding)
    assert store.restore({"w": shape}) is None
    store.close()
    (told,) = said
    assert re.match(message, told)
    assert "\n" not in told


def test_a_whole_checkpoint_that_does_not_fit_stays(tmp_path):
    store = checkpoint.open_checkpoints(tmp_path, keep=1)
    store.save(1, {"w": jnp.ones(3)}, {}, None)
    store.close()
    store = checkpoint.open_checkpoints(tmp_path, keep=1)
    with pytest.raises(
        ValueError, match=r"checkpoint 1 is whole but does not fit this run: .*\(4,\).*\(3,\)"
    ) as caught:
        store.restore({"w": jax.ShapeDtypeStruct((4,), "float32", sharding=jnp.ones(3).sharding)})
    store.close()
    assert "\n" not in str(caught.value)
    assert (tmp_path / "1").is_dir()


def test_nothing_that_is_read_can_hold_code():
    for package in ("rigl_jax", "experiments"):
        for path in (ROOT / package).rglob("*.py"):
            calls = re.findall(
                r"\b(?:(?:pickle|marshal|shelve|dill|joblib|allow_pickle)\b|(?:eval|exec)\()", path.read_text()
            )
            assert not calls, path


# --- commands ----------------------------------------------------------------------------------------------------

SMOKE = str(ROOT / "configs" / "digits_mlp.py") + ":smoke"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--wordir=x"], r"unknown flag --wordir; did you mean --workdir\?"),
        (["--workdir=run"], r"--config is missing"),
        (["--config", SMOKE], r"--workdir is missing"),
        (["--config=", "--workdir=run"], r"--config is missing"),
        (["--config=nothing.py", "--workdir=run"], r"get_config of the config file gives None"),
        (["--config=binary.py", "--workdir=run"], r"main: reading the config, .*: SyntaxError: .*null bytes"),
        (["--config", SMOKE, "--workdir=bad.py"], r"train: workdir must be a folder.* got the file bad.py"),
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
        (["--config=bad.py", "--workdir=run"], r"main: reading the config, .*bad.py, line 1: SyntaxError: "),
        (["--config", SMOKE, "--workdir="], r"--workdir is missing"),
        (["--config=leave.py", "--workdir=run"], r"main: reading the config, .*leave.py, line 4: SystemExit: 0"),
        (["--config=name.py", "--workdir=run"], r"main: reading the config, .*name.py, line 2: NameError: .*'steps'"),
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
    (tmp_path / "name.py").write_text("def get_config():\n    return steps")
    (tmp_path / "leave.py").write_text("import sys\n\ndef get_config():\n    sys.exit(0)")
    (tmp_path / "empty.py").write_text("")
    (tmp_path / "nothing.py").write_text("def get_config():\n    pass")
    (tmp_path / "binary.py").write_bytes(b"\0\1")
    (tmp_path / "three.py").write_text("def get_config():\n    return 3")
    monkeypatch.delitem(sys.modules, "config_config", raising=False)  # where ml_collections keeps the last config file
    assert main.main(["main", *arguments]) == 2
    one_line(capsys, message)
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--config", SMOKE, "--methods", "rigl,rgl"], r"launch: run rgl-s0: config.method.name: unknown name 'rgl'"),
        (["--config", "none.py"], r"launch: run dense-s0: main: there is no config file .*none.py"),
        (["--config", SMOKE + ",smok"], r"launch: run dense-s0: .*unknown variant 'smok'"),
        (["--study", "fashion_mnits"], r"launch: unknown study 'fashion_mnits'.*did you mean 'fashion_mnist'"),
        (["--config", SMOKE, "--jobs", "0"], r"launch: expected 1 or more, got --jobs 0"),
        (["--config", SMOKE, "--methods", "rigl,set,rigl"], r"launch: --methods names 'rigl' twice"),
        (["--config", SMOKE, "--hosts", "a,b", "--port", "0"], r"launch: --port must be from 1 to 65535, got 0"),
    ],
    ids=lambda value: value[-1][-20:] if isinstance(value, list) else "",
)
def test_a_sweep_with_a_wrong_config_starts_nothing(arguments, message, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(launch, "start", None)  # calling it would fail otherwise
    assert launch.main([*arguments, "--runs", str(tmp_path / "runs")]) == 2
    one_line(capsys, message)
    assert not (tmp_path / "runs").exists()
