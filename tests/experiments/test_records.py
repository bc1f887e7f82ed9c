"""The run directory: lines, truncation, export, measures against counting by hand."""

import json
import resource

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from experiments import measure
from experiments.io import files, metrics, run_directory
from experiments.io.export import export
from rigl_jax import mask_metrics
from tests.errors import refused


def test_lines_are_there_as_soon_as_written_and_continue(tmp_path):
    writer = metrics.open_writer(tmp_path, -1, tensorboard=False)
    writer.write("train", 1, {"loss": 0.5})
    assert json.loads((tmp_path / "metrics.jsonl").read_text()) == {"step": 1, "kind": "train", "loss": 0.5}
    writer.write("train", 2, {"loss": 0.4})
    writer.close()
    writer = metrics.open_writer(tmp_path, 1, tensorboard=False)
    writer.write("train", 2, {"loss": 0.3})
    writer.close()
    assert [line["loss"] for line in files.read_lines(tmp_path / "metrics.jsonl")] == [0.5, 0.3]


def test_a_full_disk_is_told_and_leaves_whole_lines(tmp_path):
    writer = metrics.open_writer(tmp_path, -1, tensorboard=False)
    writer.write("train", 1, {"loss": 0.5})
    size = (tmp_path / "metrics.jsonl").stat().st_size
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size + 10, hard))
    try:
        with refused("metrics.jsonl", error=OSError):
            writer.write("train", 2, {"loss": 0.4})
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    writer.close()
    metrics.open_writer(tmp_path, 2, tensorboard=False).close()
    assert [line["step"] for line in files.read_lines(tmp_path / "metrics.jsonl")] == [1]


def test_a_run_directory_that_cannot_be_made(tmp_path):
    (tmp_path / "runs").write_text("a file")
    with refused("runs/one", error=OSError):
        run_directory.begin(tmp_path / "runs" / "one", {"seed": 0})


def test_a_writer_that_is_not_active_writes_nothing(tmp_path):
    writer = metrics.open_writer(tmp_path, -1, tensorboard=True, active=False)
    writer.write("train", 1, {"loss": 0.5})
    writer.close()
    assert list(tmp_path.iterdir()) == []


def test_tensorboard_gets_the_numbers(tmp_path):
    writer = metrics.open_writer(tmp_path, -1, tensorboard=True)
    writer.write("masks", 1, {"sparsity": 0.9, "density": {"a/kernel": 0.1}, "leaf": "a"})
    writer.close()
    content = b"".join(path.read_bytes() for path in (tmp_path / "tensorboard").iterdir())
    assert b"masks/sparsity" in content
    assert b"masks/density/a/kernel" in content


def test_only_a_last_line_may_be_cut(tmp_path):
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"step": 1, "kind": "eval"}\n{"step"')
    assert len(files.read_lines(path)) == 1
    path.write_text('{"step"\n{"step": 1, "kind": "eval"}\n')
    with refused("1"):
        files.read_lines(path)


def test_the_environment_names_no_machine(tmp_path):
    run_directory.begin(tmp_path / "run", {"seed": 0})
    env = json.loads((tmp_path / "run" / "env.json").read_text())
    assert env["jax"] == jax.__version__
    assert not any(isinstance(value, str) and value.startswith("/") for value in env.values())
    run_directory.begin(tmp_path / "run", {"seed": 1})  # resumed: the first start's files stay
    assert json.loads((tmp_path / "run" / "config.json").read_text()) == {"seed": 0}


def test_export_keeps_what_is_worth_committing(tmp_path):
    run = tmp_path / "runs" / "rigl-s0"
    run_directory.begin(run, {"seed": 0, "dataset": {"name": "digits", "data_dir": "/some/where"}})
    with refused("rigl-s0"):
        export(run, tmp_path / "records")
    writer = metrics.open_writer(run, -1, tensorboard=True)
    for step in range(100):
        writer.write("masks", step, {"sparsity": 1 / 3})
        writer.write("train", step, {"loss": 1.0})
    writer.write("first_layer", 99, {"leaf": "a"})
    writer.write("eval", 99, {"accuracy": 0.5})
    writer.close()
    files.write_json(run / "summary.json", {"seed": 0})
    target = export(run, tmp_path / "records", points=10)
    assert {p.name for p in target.iterdir()} == {"config.json", "env.json", "summary.json", "metrics.jsonl"}
    assert "data_dir" not in (target / "config.json").read_text()
    lines = files.read_lines(target / "metrics.jsonl")
    assert [line["step"] for line in lines if line["kind"] == "masks"] == [0, 11, 22, 33, 44, 55, 66, 77, 88, 99]
    assert lines[0]["sparsity"] == 0.333333
    assert lines[-1] == {"step": 99, "kind": "eval", "accuracy": 0.5}
    lines = files.read_lines(export(run, tmp_path / "records", pictures=True) / "metrics.jsonl")
    assert [line["kind"] for line in lines].count("first_layer") == 1


def test_measures_against_counting_by_hand():
    rng = np.random.default_rng(0)
    old, new = ({"a": rng.random((2, 3, 4)) < 0.3, "b": None, "c": rng.random((5, 6)) < 0.2} for _ in range(2))
    new["a"][:, :, 1] = False
    seen = {name: None if old[name] is None else old[name] | new[name] for name in old}
    on_device = [jax.tree.map(jnp.asarray, tree) for tree in (old, new, seen)]
    table = np.asarray(jax.jit(mask_metrics.mask_counts)(*on_device))
    line = mask_metrics.mask_values(measure.shapes(on_device[0]), table)
    size = 24 + 30
    before = old["a"].sum() + old["c"].sum()
    assert line["sparsity"] == pytest.approx(1 - (new["a"].sum() + new["c"].sum()) / size)
    assert line["dropped_fraction"] == pytest.approx(sum((old[n] & ~new[n]).sum() for n in "ac") / before)
    assert line["grown_fraction"] == pytest.approx(sum((new[n] & ~old[n]).sum() for n in "ac") / before)
    assert line["explored"] == pytest.approx((seen["a"].sum() + seen["c"].sum()) / size)
    assert line["density"] == {"a": new["a"].mean(), "c": new["c"].mean()}
    dead = {"a": sum(not new["a"][..., i].any() for i in range(4)), "c": sum(not c.any() for c in new["c"].T)}
    assert line["dead_units"] == dead
    assert dead["a"] >= 1


def test_the_first_layer_is_the_first_to_work_and_not_the_first_by_name():
    params = {"b_first": jnp.ones((3, 4)), "a_second": jnp.ones((4, 2))}
    image = jax.ShapeDtypeStruct((1, 3), jnp.float32)
    name = measure.first_layer(lambda p, x: x @ p["b_first"] @ p["a_second"], params, image, {"a_second", "b_first"})
    assert name == "b_first"
