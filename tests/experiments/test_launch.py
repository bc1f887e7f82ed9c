"""The command line says in one line what is wrong; a sweep runs what is missing and nothing else."""

import functools
import json
import shlex
import sys

import pytest

from experiments import launch, main, remote, train
from experiments.io import run_directory
from experiments.studies import fashion_mnist
from tests import xla
from tests.experiments.runs import ONE, configured

SMOKE = "configs/digits_mlp.py:smoke"
SUMMARY = json.dumps(dict.fromkeys(run_directory.SUMMARY, 1) | {"test_accuracy": 0.5, "method": "rigl"})


def call(*arguments):
    return main.main([*arguments])


def test_help_shows_how(capsys):
    with pytest.raises(SystemExit) as stop:
        call("--help")
    assert stop.value.code == 0
    assert "python -m experiments.main --config configs/digits_mlp.py" in capsys.readouterr().out


def test_a_run_from_the_command_line(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(train, "train", functools.partial(train.train, devices=ONE))
    run = str(tmp_path / "run")
    overrides = ["--config.method.name=static", "--config.sparsity=0.5", "--config.steps=2", "--config.eval_every=2"]
    overrides += ["--config.checkpoint_every=0"]
    assert call("--config", SMOKE, "--workdir", run, *overrides) == 0
    summary = json.loads((tmp_path / "run" / "summary.json").read_text())
    assert (summary["method"], summary["sparsity"], summary["steps"]) == ("static", 0.5, 2)
    assert f"static at {100 * summary['final_sparsity']:.1f} % sparsity" in capsys.readouterr().out


def test_the_fashion_mnist_study_has_every_run_once(tmp_path):
    jobs = launch.study("fashion_mnist", tmp_path, [])
    assert len(jobs) == len({job.workdir for job in jobs}) == 2 * (1 + 3 * 2) * 3
    job = next(job for job in jobs if job.name == "lenet5-set-0.98-s2")
    assert job.command[:3] == [sys.executable, "-m", "experiments.main"]
    assert {"--config.method.name=set", "--config.sparsity=0.98", "--config.seed=2"} < set(job.command)
    assert {str(launch.ROOT / config) for config in fashion_mnist.MODELS.values()} == {job.command[4] for job in jobs}


def scripted(folder, name, code):
    """A job that runs a line of Python."""
    return launch.Job(name, folder / name, [sys.executable, "-c", code])


def test_a_sweep_runs_what_is_missing_and_reports_what_failed(tmp_path, capfd):
    done = tmp_path / "done"
    done.mkdir()
    (done / "summary.json").write_text(SUMMARY)
    finish = f"open({str(tmp_path / 'good' / 'summary.json')!r}, 'w').write({SUMMARY!r})"
    jobs = [
        scripted(tmp_path, "done", "raise SystemExit('must not run')"),
        scripted(tmp_path, "good", finish),
        scripted(tmp_path, "bad", "raise SystemExit('error: no luck')"),
    ]
    assert launch.run(jobs, 2) == 1
    told = capfd.readouterr().out
    assert "3 runs, 1 finished before, 2 to do" in told
    assert "good: test accuracy 50.00 %, 1 s" in told
    assert "bad: failed with code 1: error: no luck" in told
    assert launch.run(jobs[:2], 1) == 0
    assert "2 runs, 2 finished before, 0 to do" in capfd.readouterr().out


def test_a_run_with_x64_keeps_its_types_and_counts(tmp_path, monkeypatch):
    """In a process of its own: JAX reads its mode when it starts."""
    monkeypatch.setenv("JAX_ENABLE_X64", "1")
    monkeypatch.setenv("XLA_FLAGS", xla.flags(devices=1))
    run = launch.job("run", SMOKE, [], tmp_path)
    assert launch.run([run], 1) == 0, (run.workdir / "log.txt").read_text()
    summary = json.loads((run.workdir / "summary.json").read_text())
    assert summary["steps"] == configured().steps
    assert summary["sparsity"] == pytest.approx(configured().sparsity, abs=1e-3)


def test_a_stopped_run_is_no_failure(tmp_path, capfd):
    assert launch.run([scripted(tmp_path, "preempted", "pass")], 1) == 0
    assert "preempted: stopped before its end" in capfd.readouterr().out


def test_sigterm_to_the_launcher_lets_its_runs_save(tmp_path, capfd):
    wait = (
        "import os, signal, time\n"
        "signal.signal(signal.SIGTERM, lambda *_: (print('saved'), exit(0)))\n"
        "os.kill(os.getppid(), signal.SIGTERM)\n"
        "time.sleep(60)"
    )
    assert launch.run([scripted(tmp_path, "a", wait), scripted(tmp_path, "b", "never")], 1) == 2
    told = capfd.readouterr().out
    assert "a: stopped before its end" in told
    assert (tmp_path / "a" / "log.txt").read_text() == "saved\n"
    assert not (tmp_path / "b").exists()


def test_dry_run_prints_the_commands_of_what_is_left(tmp_path, capsys):
    finished = tmp_path / "digits_mlp-smoke" / "dense-s0"
    finished.mkdir(parents=True)
    (finished / "summary.json").write_text(SUMMARY)
    assert launch.main(["--config", SMOKE, "--runs", str(tmp_path), "--methods", "dense,rigl", "--dry_run"]) == 0
    (line,) = capsys.readouterr().out.splitlines()
    assert "--config.method.name=rigl" in line
    assert str(tmp_path / "digits_mlp-smoke" / "rigl-s0") in line


def test_commands_for_several_hosts(tmp_path, capsys):
    arguments = ["--config", SMOKE, "--runs", str(tmp_path), "--methods", "rigl"]
    assert launch.main([*arguments, "--hosts", "10.0.0.1,10.0.0.2", "--port", "99"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[::2] == ["# on 10.0.0.1", "# on 10.0.0.2"]
    for i, line in enumerate(lines[1::2]):
        place = f"JAX_COORDINATOR_ADDRESS=10.0.0.1:99 JAX_NUM_PROCESSES=2 JAX_PROCESS_ID={i}"
        assert line.startswith(f"{place} python -m experiments.main --config {SMOKE}")
        assert line.endswith("--distributed")
    assert launch.main([*arguments, "--tpu", "slice:us-central2-b"]) == 0
    (line,) = capsys.readouterr().out.splitlines()
    assert line.startswith("gcloud compute tpus tpu-vm ssh slice --zone us-central2-b --worker=all '--command=cd ")
    assert list(tmp_path.iterdir()) == []  # nothing was started


def test_paths_are_those_of_the_callers_folder(tmp_path, monkeypatch, capfd):
    (tmp_path / "own.py").write_text(
        "from configs import digits_mlp\n\n\ndef get_config(variant=''):\n    return digits_mlp.get_config('smoke')\n"
    )
    monkeypatch.chdir(tmp_path)
    assert main.parse(["--config", "own.py", "--workdir", "run"]).config.steps == 6
    assert launch.main(["--config", "own.py:x", "--methods", "rigl", "--dry_run"]) == 0
    command = shlex.split(capfd.readouterr().out)
    assert command[3:5] == ["--config", f"{tmp_path}/own.py:x"]
    assert command[-1] == f"{tmp_path}/runs/own-x/rigl-s0"
    assert launch.main(["--config", "own.py", "--methods", "rigl", "--hosts", "a,b"]) == 0
    assert f"--config {tmp_path}/own.py" in capfd.readouterr().out
    assert launch.main(["--config", "configs/digits_mlp.py", "--dry_run"]) == 2  # is not here
    assert "there is no config file" in capfd.readouterr().err
    (job,) = [job for job in launch.study("fashion_mnist", tmp_path, []) if job.name == "mlp-rigl-0.9-s0"]
    assert main.parse(job.command[3:]).config.method.name == "rigl"
    # A job starts here too, and finds the project.
    monkeypatch.delenv("PYTHONPATH", raising=False)
    where = scripted(tmp_path, "where", "import os, experiments, configs\nprint(os.getcwd())")
    assert launch.run([where], 1) == 0
    assert (tmp_path / "where" / "log.txt").read_text() == f"{tmp_path}\n"


@pytest.mark.parametrize("folder", ["a b", "a; rm -rf x", "$(x)", "it's", "rigl-jax"])
def test_the_project_folder_is_quoted_for_the_shell(folder, tmp_path, monkeypatch):
    monkeypatch.setattr(remote, "ROOT", tmp_path / folder)
    job = launch.job("run", str(tmp_path / folder / "configs" / "x.py"), [("rules", "(('a b',),)")], tmp_path)
    told = shlex.split(remote.on_tpu(job.command, "slice:zone"))[-1].removeprefix("--command=")
    assert shlex.split(told) == ["cd", folder, "&&", ".venv/bin/python", "-m", "experiments.main", "--config",
        "configs/x.py", "--config.rules=(('a b',),)", "--workdir", str(tmp_path / "run"), "--distributed"]  # fmt: skip


def test_a_run_that_another_launch_finished_meanwhile_is_no_failure(tmp_path, capfd):
    finish = f"import os\nos.mkdir({str(tmp_path / 'b')!r})\n"
    finish += f"open({str(tmp_path / 'b' / 'summary.json')!r}, 'w').write({SUMMARY!r})"
    assert launch.run([scripted(tmp_path, "a", finish), scripted(tmp_path, "b", "raise SystemExit('never')")], 1) == 0
    assert "[2/2] b: finished by another launch" in capfd.readouterr().out


def test_half_a_summary_is_no_finished_run(tmp_path):
    job = scripted(tmp_path, "a", "")
    job.workdir.mkdir()
    for text, finished in ((SUMMARY, True), (SUMMARY[:-9], False), ("", False), ("{}", False)):
        (job.workdir / "summary.json").write_text(text)
        assert job.finished is finished


def test_what_a_log_holds_does_not_reach_the_terminal(tmp_path, capfd):
    assert launch.run([scripted(tmp_path, "a", "import sys\nsys.exit('\\x1b]0;title\\a bad')")], 1) == 1
    assert "a: failed with code 1: \\x1b]0;title\\x07 bad" in capfd.readouterr().out
