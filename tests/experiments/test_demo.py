import functools
import io
import json

import pytest
from rich.console import Console

from experiments import demo, real_sparsity
from tests.errors import refused
from tests.experiments.runs import ONE

METHODS = ("dense", "rigl")


def run(workdir, **options):
    console = Console(file=io.StringIO(), width=100)
    paths = demo.demo(workdir, variant="smoke", methods=METHODS, console=console, **options)
    return paths, console.file.getvalue()


@pytest.fixture(scope="module")
def done(tmp_path_factory):
    workdir = tmp_path_factory.mktemp("demo")
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(demo, "train", functools.partial(demo.train, devices=ONE))
        return workdir, *run(workdir)


def test_ends_in_a_table_and_a_picture(done):
    workdir, paths, text = done
    for name in ("page", "accuracy", "first_layer"):
        assert paths[name].stat().st_size > 1000
    assert "Dense: every weight" in text
    assert "98 %, ERK" in text
    assert str(paths["page"]) in text.replace("\n", "")
    assert "make fashion_mnist" in text
    assert all(name in text for name in ("Masked  ", "Packed  ", "Weights and state, MB"))
    summary = json.loads((workdir / "rigl-s0" / "summary.json").read_text())
    assert (summary["method"], summary["sparsity"], summary["dataset"]) == ("rigl", 0.98, "digits")
    assert f"{100 * summary['test_accuracy']:.2f}" in text


def test_a_step_three_ways():
    costs = real_sparsity.measure((32, 32), rounds=1)
    weights = 784 * 32 + 32 * 32 + 32 * 10
    dense = 4 * (3 * (weights + 74) + 1)  # values, two moments, a counter
    assert costs["dense"].nbytes == dense
    assert dense + weights <= costs["masked"].nbytes < dense + weights + 100  # a byte a mask; key and counter
    assert costs["packed"].nbytes < dense / 5
    assert all(cost.milliseconds > 0 for cost in costs.values())


def test_a_second_time_nothing_is_trained_and_it_says_so(done):
    workdir, _, first = done
    before = {path: path.stat().st_mtime_ns for path in workdir.glob("*/*.json*")}
    _, text = run(workdir)
    assert "all runs are finished" in text
    assert "Training dense-s0" in first
    assert "Training rigl" not in text
    assert {path: path.stat().st_mtime_ns for path in before} == before
    assert text.count("RigL  ") == first.count("RigL  ")


def test_each_run_has_its_own_config():
    todo = demo.trials("w", 2)
    assert [t.workdir.name for t in todo[:3]] == ["dense-s0", "dense-s1", "static-s0"]
    configs = [demo.configure(trial) for trial in todo]
    assert [(c.method.name, c.seed) for c in configs] == [(t.method, t.seed) for t in todo]
    assert {c.sparsity for c in configs} == {0.98}


def test_fresh_deletes_run_directories_only(tmp_path):
    [trial] = demo.trials(tmp_path, 1, ["rigl"])
    trial.workdir.mkdir()
    (trial.workdir / "mine.txt").write_text("")
    demo.clear([trial])
    assert trial.workdir.exists(), "a folder that holds no run is not ours"
    (trial.workdir / "config.json").write_text("{}")
    demo.clear([trial])
    assert not trial.workdir.exists()


def test_seeds_must_be_at_least_one(tmp_path, capsys):
    with refused("0"):
        demo.demo(tmp_path, seeds=0)
    assert demo.main(["--seeds", "0", "--workdir", str(tmp_path)]) == 2
    assert "got 0" in capsys.readouterr().err
