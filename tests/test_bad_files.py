"""Damaged or foreign files and wrong command lines: one clear error, exit code 2 or 1, nothing written."""

import json
import re
import shlex

import jax
import jax.numpy as jnp
import pytest

from experiments import launch, main, train
from experiments.data import load
from experiments.io import checkpoint, export
from experiments.report.main import main as report
from tests.errors import ROOT, one_line, refused
from tests.test_bad_input import changed


@pytest.mark.parametrize(
    ("name", "text"),
    [("config.json", "[]"), ("config.json", "{"), ("summary.json", "{}"), ("summary.json", "3")],
)
def test_a_workdir_of_something_else_is_refused(name, text, tmp_path):
    (tmp_path / name).write_text(text)
    with refused(name):
        train.train(changed(), tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == [name]


def test_what_is_wrong_with_a_config_is_told_before_what_changed(tmp_path):
    (tmp_path / "config.json").write_text(json.dumps(changed()))
    with refused("Dense_9/kernel"):
        train.train(changed(rules=[["Dense_9/kernel", "dense"]], seed=7), tmp_path)
    with refused("seed", "7"):
        train.train(changed(seed=7), tmp_path)


SUMMARY = dict.fromkeys(("dataset", "model", "method", "distribution"), "x") | dict.fromkeys(
    ("seed", "sparsity", "test_accuracy", "active_params", "final_sparsity", "steps", "seconds"), 0
) | {"flops_inference_x_dense": 1, "flops_training_x_dense": 1}  # fmt: skip


RUN = {"config.json": "{}", "metrics.jsonl": "", "summary.json": json.dumps(SUMMARY)}


@pytest.mark.parametrize(
    ("files", "named"),
    [
        ({}, "config.json"),
        (RUN | {"config.json": "[]"}, "config.json list"),
        (RUN | {"config.json": "{"}, "config.json"),
        (RUN | {"summary.json": "{}"}, "summary.json dataset model method"),
        (RUN | {"summary.json": "[]"}, "summary.json list"),
        (RUN | {"summary.json": json.dumps(SUMMARY | {"test_accuracy": None})}, "test_accuracy None"),
        (RUN | {"metrics.jsonl": "{\n"}, "metrics.jsonl 1"),
        (RUN | {"metrics.jsonl": "[]\n"}, "metrics.jsonl 1 list"),
        (RUN | {"metrics.jsonl": '{"step": 0, "kind": "masks"}\n'}, "metrics.jsonl 1 density masks"),
        ({name: RUN[name] for name in ("config.json", "summary.json")}, "metrics.jsonl"),
    ],
    ids=str,
)
def test_a_report_of_damaged_runs(files, named, tmp_path, capsys):
    run = tmp_path / "runs" / "one"
    run.mkdir(parents=True)
    for name, text in files.items():
        (run / name).write_text(text)
    assert report([str(tmp_path / "runs"), "--out", str(tmp_path / "out")]) == 2
    one_line(capsys, *named.split(), start="report: ")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(("text", "named"), [("{}", "summary"), ("[]", "list"), (RUN["summary.json"], "config.json")])
def test_an_export_of_damaged_runs(text, named, tmp_path, capsys):
    (tmp_path / "one").mkdir()
    (tmp_path / "one" / "summary.json").write_text(text)
    assert export.main([str(tmp_path), str(tmp_path / "out")]) == 2
    one_line(capsys, "one", named)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        (("digts", 8), "digts digits"),
        (("fashion_mnist", 8), "fashion_mnist"),
        (("", 8), "dataset"),
        ((3, 8), "dataset 3"),
        (("digits", 0), "batch_size 0"),
        (("digits", 10**6), "batch_size 1000000"),
        (("half", 8), "half"),
    ],
    ids=str,
)
def test_a_data_set_that_cannot_be_opened(arguments, named, tmp_path):
    (tmp_path / "half" / "1.0.0").mkdir(parents=True)  # where writing it was cut short
    with refused(*named.split()):
        load(*arguments, seed=0, data_dir=str(tmp_path))
    assert [path.name for path in tmp_path.rglob("*")] == ["half", "1.0.0"]


def test_what_to_type_is_quoted_for_the_shell(tmp_path):
    with refused("fashion_mnist") as caught:
        load("fashion_mnist", 8, seed=0, data_dir=str(tmp_path / "my data; x"))
    assert shlex.quote(str(tmp_path / "my data; x")) in str(caught.value)


@pytest.mark.parametrize(
    ("damage", "named"),
    [
        ("truncated", "state/d"),
        ("foreign", "sums.json"),
        ("empty", "sums.json"),
        ("deep", "sums.json"),
        ("listless", "sums.json"),
    ],
)
def test_checkpoints_of_something_else(damage, named, tmp_path):
    folder, said = tmp_path / "checkpoints", []
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
    store = checkpoint.open_checkpoints(folder, keep=1, warn=said.append)
    shape = jax.ShapeDtypeStruct((3,), "float32", sharding=jnp.ones(3).sharding)
    assert store.restore({"w": shape}) is None
    store.close()
    (told,) = said
    assert "checkpoint 1 " in told
    assert named in told
    assert "\n" not in told


def test_a_file_in_the_place_of_the_checkpoints(tmp_path):
    (tmp_path / "checkpoints").write_text("x")
    with refused("checkpoints", error=OSError):
        checkpoint.open_checkpoints(tmp_path / "checkpoints", keep=1)


def test_a_whole_checkpoint_that_does_not_fit_stays(tmp_path):
    store = checkpoint.open_checkpoints(tmp_path, keep=1)
    store.save(1, {"w": jnp.ones(3)}, {}, None)
    store.close()
    store = checkpoint.open_checkpoints(tmp_path, keep=1)
    with refused("checkpoint 1", "(4,)", "(3,)"):
        store.restore({"w": jax.ShapeDtypeStruct((4,), "float32", sharding=jnp.ones(3).sharding)})
    store.close()
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


RUN_IN = ["--config", SMOKE, "--workdir=run"]


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        (["--workdir=run"], "--config"),
        (["--config=", "--workdir=run"], "--config"),
        (["--config", SMOKE], "--workdir"),
        (["--config", SMOKE, "--workdir="], "--workdir"),
        (["--config", SMOKE, "--wordir=run"], "--wordir --workdir"),
        (["--config", SMOKE, "--workdir=bad.py"], "workdir bad.py"),
        (["--config", SMOKE + ",smok", "--workdir=run"], "smok smoke"),
        ([*RUN_IN, "more"], "more"),
        ([*RUN_IN, "--config.sed=1"], "sed seed"),
        ([*RUN_IN, "--config.sparsty=1"], "sparsty sparsity"),
        ([*RUN_IN, "--config.method.nam=1"], "config.method nam name"),
        ([*RUN_IN, "--config.steps=many"], "config.steps many"),
        ([*RUN_IN, "--config.sparsity=1.2"], "sparsity 1.2"),
        ([*RUN_IN, "--config.model.features=(0,3)"], "config.model features"),
        ([*RUN_IN, "--config.seed=" + "9" * 30], "seed"),
        ([*RUN_IN, "--config.seed=-1"], "seed -1"),
        ([*RUN_IN, "--config.method.name=rgl"], "rgl rigl"),
        ([*RUN_IN, "--config.dataset.batch_size=0"], "batch_size 0"),
        ([*RUN_IN, "--config.dataset.name=digts"], "digts digits"),
        ([*RUN_IN, "--config.mesh.data=3"], "config.mesh 8"),
        (["--config=none.py", "--workdir=run"], "none.py"),
        (["--config=nothing.py", "--workdir=run"], "get_config"),
        (["--config=binary.py", "--workdir=run"], "binary.py SyntaxError"),
        (["--config=bad.py", "--workdir=run"], "bad.py 1 SyntaxError"),
        (["--config=leave.py", "--workdir=run"], "leave.py 4 SystemExit"),
        (["--config=name.py", "--workdir=run"], "name.py 2 NameError steps"),
        (["--config=empty.py", "--workdir=run"], "get_config"),
        (["--config=three.py", "--workdir=run"], "config"),
    ],
    ids=lambda value: value[-1][-30:] if value and isinstance(value, list) else "",
)
def test_the_command_names_what_is_wrong(arguments, named, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "bad.py").write_text("def get_config(:")
    (tmp_path / "name.py").write_text("def get_config():\n    return steps")
    (tmp_path / "leave.py").write_text("import sys\n\ndef get_config():\n    sys.exit(0)")
    (tmp_path / "empty.py").write_text("")
    (tmp_path / "nothing.py").write_text("def get_config():\n    pass")
    (tmp_path / "binary.py").write_bytes(b"\0\1")
    (tmp_path / "three.py").write_text("def get_config():\n    return 3")
    assert main.main(arguments) == 2
    one_line(capsys, *named.split())
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        (["--config", SMOKE, "--methods", "rigl,rgl"], "rgl-s0 config.method.name rgl"),
        (["--config", "none.py"], "none.py"),
        (["--config", SMOKE + ",smok"], "smok"),
        (["--study", "fashion_mnits"], "fashion_mnits fashion_mnist"),
        (["--config", SMOKE, "--jobs", "0"], "--jobs 0"),
        (["--config", SMOKE, "--methods", "rigl,set,rigl"], "method.name rigl"),
        (["--config", SMOKE, "--hosts", "a,b", "--port", "0"], "--port 0"),
        *((["--config", SMOKE, f"--hosts={hosts}"], "--hosts") for hosts in ("one", "a,a", "a,b;c", "")),
        *((["--config", SMOKE, f"--tpu={place}"], "--tpu") for place in ("-x:zone", "a:b:c", "slice", "")),
    ],
    ids=lambda value: value[-1][-20:] if isinstance(value, list) else "",
)
def test_a_sweep_with_a_wrong_config_starts_nothing(arguments, named, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(launch, "start", None)  # calling it would fail otherwise
    assert launch.main([*arguments, "--runs", str(tmp_path / "runs")]) == 2
    one_line(capsys, *named.split())
    assert not (tmp_path / "runs").exists()
