"""The division of a native call among threads, under pools whose threads come at once, late or never."""

import os
import pathlib
import subprocess

import pytest

from rigl_jax.native import build

HERE = pathlib.Path(__file__).parent / "threads"


def test_every_task_runs_once_whenever_workers_come(tmp_path):
    if os.environ.get("RIGL_JAX_NATIVE") == "0":
        pytest.skip("a test of native code")
    try:
        compiler = build.compiler()
    except RuntimeError as error:
        pytest.skip(str(error))
    program = tmp_path / "stress"
    flags = ("-std=c++17", "-O1", "-pthread", "-I", HERE, "-I", build.SOURCES)
    subprocess.run([compiler, *flags, HERE / "stress.cc", "-o", program], check=True)
    done = subprocess.run([program], capture_output=True, text=True, check=False, timeout=300)
    assert done.returncode == 0, done.stdout
