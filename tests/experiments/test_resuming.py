"""What lies in a workdir is believed only if it is this run's; two processes do not train in one."""

import errno
import fcntl
import json
import os
import shutil
import subprocess
import sys

import jax
import pytest

from experiments import sharding
from experiments import train as train_module
from experiments.io import checkpoint, files, run_directory, sums
from experiments.io.lock import locked
from experiments.train import train
from tests.errors import refused
from tests.experiments.runs import ONE, configured, lines, restored


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """A run stopped in its middle, and the same when finished; tests/experiments/test_train.py resumes bit for bit."""
    folder = tmp_path_factory.mktemp("runs")
    train(configured(stop_at=3), folder / "half", devices=ONE)
    shutil.copytree(folder / "half", folder / "whole")
    train(configured(), folder / "whole", devices=ONE)
    return folder


@pytest.fixture
def half(runs, tmp_path):
    return shutil.copytree(runs / "half", tmp_path / "run")


def saved(run, step, state, facts, config=None):
    store = checkpoint.open_checkpoints(run / "checkpoints", keep=2, config=config)
    store.save(step, state, facts, 0.5)
    store.close()


def content(run):
    return {path.relative_to(run): path.read_bytes() for path in run.rglob("*") if path.is_file()}


@pytest.mark.parametrize("number", ["6", "999"])
def test_a_renamed_checkpoint_neither_ends_a_run_nor_is_kept_for_ever(number, runs, half):
    (half / "checkpoints" / "3").rename(half / "checkpoints" / number)
    assert train(configured(), half, devices=ONE)["steps"] == 6
    assert lines(half) == lines(runs / "whole")
    assert {path.name for path in (half / "checkpoints").iterdir()} >= {"6"}
    assert not (half / "checkpoints" / "999").exists()


def lost_config(runs, run):
    (run / "config.json").unlink()
    return {"seed": 1}, ("checkpoint 3", "seed")


def lost_config_and_method(runs, run):
    (run / "config.json").unlink()
    return {"sparsity": 0.8}, ("checkpoint 3", "sparsity")


def checkpoint_of_another_run(runs, run):
    state, facts = restored(run)
    saved(run, 4, state, facts, config=files.read_json(run / "config.json") | {"seed": 1})
    return {}, ("checkpoint 4", "seed")


def checkpoint_from_before_and_lost_config(runs, run):
    state, facts = restored(run)
    shutil.rmtree(run / "checkpoints")
    saved(run, 3, state, facts)
    (run / "config.json").unlink()
    return {"seed": 1}, ("checkpoint 3", "config.json")


def half_a_summary_and_no_checkpoint(runs, run):
    shutil.rmtree(run / "checkpoints")
    (run / "checkpoints").mkdir()
    (run / "summary.json").write_text('{"steps": 6,')
    return {}, ("summary.json",)


@pytest.mark.parametrize(
    "change",
    [
        lost_config,
        lost_config_and_method,
        checkpoint_of_another_run,
        checkpoint_from_before_and_lost_config,
        half_a_summary_and_no_checkpoint,
    ],
)
def test_what_is_not_this_run_is_refused_and_stays_as_it_was(change, runs, half):
    values, named = change(runs, half)
    before = content(half)
    with refused(*named):
        train(configured(**values), half, devices=ONE)
    assert content(half) == before


def test_a_checkpoint_that_cannot_be_read_stops_the_run_before_it_starts_anew(half, monkeypatch):
    def refuse(file):
        raise PermissionError(errno.EACCES, "Permission denied", str(file))

    before = content(half)
    with monkeypatch.context() as patched:
        patched.setattr(sums, "_crc", refuse)
        with refused("checkpoints/3", error=OSError):
            train(configured(), half, devices=ONE)
    assert content(half) == before


def test_a_run_from_before_goes_on_and_the_lack_is_told_once(runs, half, caplog):
    """Earlier versions kept neither the config nor the number of lines in a checkpoint."""
    state, facts = restored(half)
    assert facts.pop("lines") == len(lines(half))
    shutil.rmtree(half / "checkpoints")
    saved(half, 3, state, facts)
    train(configured(), half, devices=ONE)
    assert lines(half) == lines(runs / "whole")
    assert caplog.text.count("does not say of which run it is") == 1
    assert "lost" not in caplog.text


def test_lines_lost_before_the_checkpoint_are_told(runs, half, caplog):
    path = half / "metrics.jsonl"
    path.write_bytes(b"".join(path.read_bytes().splitlines(keepends=True)[:-2]))
    train(configured(stop_at=4), half, devices=ONE)
    assert f"{path} lost 2 lines from before step 3" in caplog.text


def test_half_a_summary_is_made_again_from_the_last_checkpoint(runs, tmp_path, caplog):
    run = shutil.copytree(runs / "whole", tmp_path / "run")
    summary = json.loads((run / "summary.json").read_text())
    for damage in ('{"test_accuracy": 0.', "{}", '{"steps": "x"}', ""):
        (run / "summary.json").write_text(damage)
        assert not run_directory.finished(run)
        found = train(configured(), run, devices=ONE)
        assert {**found, "seconds": 0} == {**summary, "seconds": 0}
        assert files.read_json(run / "summary.json") == found
    assert caplog.text.count("it is made again from the last checkpoint") == 4
    assert lines(run) == lines(runs / "whole")


# --- one process at a time ---------------------------------------------------------------------------------------


def test_a_second_training_is_told_and_changes_nothing(half):
    before = content(half)
    with locked(half), refused(str(half), str(os.getpid()), error=OSError):
        train(configured(), half, devices=ONE)
    assert {k: v for k, v in content(half).items() if k.name != "lock"} == {
        k: v for k, v in before.items() if k.name != "lock"
    }


def test_the_lock_dies_with_its_process(tmp_path):
    program = (
        "import sys, time, pathlib\nfrom experiments.io.lock import locked\n"
        "with locked(pathlib.Path(sys.argv[1])):\n    print('held', flush=True)\n    time.sleep(60)"
    )
    command = [sys.executable, "-c", program, str(tmp_path)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as other:
        assert other.stdout.readline() == "held\n"
        with refused(str(other.pid), error=BlockingIOError), locked(tmp_path):
            pass
        other.kill()
        other.wait()
        with locked(tmp_path):
            assert (tmp_path / "lock").read_text() == f"{os.getpid()}\n"


@pytest.mark.parametrize(
    "make",
    [lambda p: p.mkdir(), lambda p: p.symlink_to("x"), lambda p: p.symlink_to(__file__), os.mkfifo],
    ids=["folder", "broken link", "link", "pipe"],
)
def test_a_lock_that_is_no_file_is_told(make, tmp_path):
    make(tmp_path / "lock")
    with refused(str(tmp_path / "lock"), error=OSError), locked(tmp_path):
        pass


def test_all_processes_are_told_that_the_first_does_not_hold_the_lock(tmp_path, monkeypatch):
    monkeypatch.setattr(jax, "process_index", lambda: 1)
    monkeypatch.setattr(sharding, "all_agree", lambda held: False)  # the first process says no
    with refused("first process", str(tmp_path), error=OSError), train_module._locked_directory(tmp_path):
        pass
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("number", [errno.ENOLCK, errno.ENOTSUP, errno.ENOSYS, errno.EINVAL])
def test_a_file_system_without_locks_holds_nothing(number, tmp_path, monkeypatch):
    def refuse(file, operation):
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(fcntl, "flock", refuse)
    with locked(tmp_path), locked(tmp_path):
        pass
