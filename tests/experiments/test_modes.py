"""A whole run in a mode of JAX that changes what is computed behind the model's back."""

import json
import os
import subprocess
import sys

import pytest

from configs import digits_mlp
from tests import xla
from tests.errors import ROOT


def test_a_run_with_x64_keeps_its_types_and_counts(tmp_path):
    arguments = ["--config=configs/digits_mlp.py:smoke", f"--workdir={tmp_path}"]
    environment = os.environ | {"JAX_ENABLE_X64": "1", "PYTHONPATH": str(ROOT), "XLA_FLAGS": xla.flags(devices=1)}
    command = [sys.executable, "-m", "experiments.main", *arguments]
    ended = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert ended.returncode == 0, ended.stderr[-2000:]
    found = json.loads((tmp_path / "summary.json").read_text())
    config = digits_mlp.get_config("smoke")
    assert found["steps"] == config.steps
    assert found["sparsity"] == pytest.approx(config.sparsity, abs=1e-3)
