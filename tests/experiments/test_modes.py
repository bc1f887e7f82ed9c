"""A whole run in modes of JAX that change what is computed behind the model's back."""

import json
import os
import pathlib
import subprocess
import sys

import pytest

import experiments
from configs import digits_mlp

ROOT = pathlib.Path(experiments.__file__).parent.parent


@pytest.mark.parametrize("mode", ["JAX_ENABLE_X64"])
def test_a_run_in_this_mode_keeps_its_types_and_counts(mode, tmp_path):
    arguments = ["--config=configs/digits_mlp.py:smoke", f"--workdir={tmp_path}"]
    environment = os.environ | {mode: "1", "PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-m", "experiments.main", *arguments]
    ended = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert ended.returncode == 0, ended.stderr[-2000:]
    found = json.loads((tmp_path / "summary.json").read_text())
    config = digits_mlp.get_config("smoke")
    assert found["steps"] == config.steps
    assert found["sparsity"] == pytest.approx(config.sparsity, abs=1e-3)
