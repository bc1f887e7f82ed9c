"""Several processes train one network: the masks and metrics of one process, written once."""

import json
import os
import socket
import subprocess
import sys

import jax
import numpy as np
import pytest

from experiments import main, processes, sharding
from experiments.io import files
from experiments.train import train
from tests import xla
from tests.errors import ROOT, refused
from tests.experiments.runs import ONE, assert_close, configured, restored

SMOKE = ["--config", "configs/digits_mlp.py:smoke"]
soak = pytest.mark.skipif("SOAK" not in os.environ, reason="slow: set SOAK=1")
# The command, and then a check that is made to fail: each process claims masks of its own.
TRAIN = """
import sys
import jax
import jax.numpy as jnp
from experiments import main, sharding
code = main.main(sys.argv[1:])
try:
    sharding.check_agreement(jnp.uint32(jax.process_index()), 5)
except ValueError as error:
    print("drift:", error)
"""
END = "sys.exit(code)"

# Checkpoints 1, 2 and 3 of a state that lies on both processes; a byte of the third is flipped, and of the second one
# process alone reads something else than was written.
DAMAGED = """
import pathlib
from jax.experimental import multihost_utils
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from experiments.io import checkpoint, sums
placed = NamedSharding(Mesh(jax.devices(), "data"), PartitionSpec("data"))
folder = pathlib.Path(sys.argv[sys.argv.index("--workdir") + 1]).parent / "lr[0.1]"
store = checkpoint.open_checkpoints(folder, keep=3)
for step in (1, 2, 3):
    store.save(step, {"w": jax.jit(lambda: jnp.arange(512.0) + step, out_shardings=placed)()}, {"at": step}, None)
store.close()
if jax.process_index() == 0:
    file = max((p for p in (folder / "3" / "state").rglob("*") if p.is_file()), key=lambda p: p.stat().st_size)
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 1
    file.write_bytes(content)
multihost_utils.sync_global_devices("damaged")
if jax.process_index() == 1:
    read = sums._crc
    sums._crc = lambda file: read(file) ^ (1 if "2" in file.parts else 0)
store = checkpoint.open_checkpoints(folder, keep=3, warn=lambda line: print("said:", line))
state, facts = store.restore({"w": jax.ShapeDtypeStruct((512,), "float32", sharding=placed)})
store.close()
print("found:", facts["at"], float(jnp.sum(state["w"])))
"""


def free_port():
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def start(place, count, devices, arguments, program):
    environment = {
        **os.environ,
        "JAX_PLATFORMS": "cpu",
        "JAX_CPU_COLLECTIVES_IMPLEMENTATION": "gloo",
        "XLA_FLAGS": xla.flags(devices),
        "JAX_COORDINATOR_ADDRESS": f"127.0.0.1:{place[0]}",
        "JAX_NUM_PROCESSES": str(count),
        "JAX_PROCESS_ID": str(place[1]),
    }
    command = [sys.executable, "-c", program, *arguments]
    pipe = subprocess.PIPE
    return subprocess.Popen(command, cwd=ROOT, env=environment, stdout=pipe, stderr=subprocess.STDOUT, text=True)


def together(count, devices, run, *overrides, program=TRAIN + END):
    """What each of several processes of one run prints; all must end well."""
    arguments = [*SMOKE, "--workdir", str(run), "--distributed", *overrides]
    port = free_port()
    processes = [start((port, i), count, devices, arguments, program) for i in range(count)]
    try:
        printed = [process.communicate(timeout=300)[0] for process in processes]
    finally:
        for process in processes:
            process.kill()
            process.wait()
    assert [process.returncode for process in processes] == [0] * count, "\n".join(printed)
    return printed


def check_equal(run, alone):
    mine, other = (files.read_lines(where / "metrics.jsonl") for where in (run, alone))
    assert [(line["step"], line["kind"]) for line in mine] == [(line["step"], line["kind"]) for line in other]
    for left, right in zip(mine, other, strict=True):
        if left["kind"] in ("masks", "first_layer"):
            assert left == right
        else:
            np.testing.assert_allclose(left["loss"], right["loss"], rtol=1e-4)
            assert left["accuracy"] == pytest.approx(right["accuracy"], abs=0.01)
    assert_close(*((state.params, state.opt_state.masks) for state, _ in map(restored, (run, alone))))


@pytest.fixture(scope="module")
def alone(tmp_path_factory):
    run = tmp_path_factory.mktemp("alone") / "run"
    train(configured(), run, devices=ONE)
    return run


@pytest.fixture(scope="module")
def two(tmp_path_factory):
    """Two processes of two devices: outputs over a model axis inside each, biases over both processes."""
    folder = tmp_path_factory.mktemp("two")
    rules = "((r'.*/kernel', (None, 'model')), ('.*', 'fsdp'))"
    config = folder / "config.py"  # a mesh of two axes is more than an override can say
    config.write_text(
        "from configs import digits_mlp\n\n\ndef get_config(variant=''):\n"
        "    config = digits_mlp.get_config('smoke')\n    config.unlock()\n"
        f"    config.mesh = dict(data=2, model=2)\n    config.sharding = {rules}\n    return config.lock()\n"
    )
    return folder, together(2, 2, folder / "run", "--config", str(config), program=TRAIN + DAMAGED + END)


def test_two_processes_with_sharded_weights_equal_one(alone, two):
    run, (first, second) = two[0] / "run", two[1]
    assert "sparsity, step 6" in first
    assert "sparsity, step 6" not in second  # the first process speaks for all
    check_equal(run, alone)
    assert json.loads((run / "env.json").read_text())["device_count"] == 4
    for printed in (first, second):
        assert "drift: train: the masks differ between devices after step 5" in printed
        assert "process 0: 00000000; process 1: 00000001" in printed


@soak
def test_four_processes_go_on_where_two_stopped(alone, tmp_path):
    run = tmp_path / "run"
    together(2, 1, run, "--config.stop_at=3")
    assert not (run / "summary.json").exists()
    together(4, 1, run)
    check_equal(run, alone)


@soak
@pytest.mark.parametrize(
    ("rules", "mesh"), [(sharding.ALL_FSDP, {"data": 4}), (sharding.ALL_OUTPUTS, {"data": 2, "model": 2})]
)
def test_two_processes_with_packed_weights_that_are_cut_equal_one(rules, mesh, alone, tmp_path):
    axes = [f"--config.mesh.{axis}={size}" for axis, size in mesh.items()]
    together(2, 2, tmp_path / "run", "--config.execution=packed", f"--config.sharding={rules}", *axes)
    check_equal(tmp_path / "run", alone)


def test_a_checkpoint_that_one_process_cannot_read_is_passed_over_by_all(two):
    folder, both = two[0] / "lr[0.1]", two[1]  # a name that orbax would take for a pattern
    assert "has another content" in "".join(both)
    for printed in both:
        assert printed.count("said: checkpoint 3 is damaged and set aside") == 1
        assert printed.count("said: checkpoint 2 is damaged and set aside") == 1
        assert f"found: 1 {float(sum(range(512)) + 512)}" in printed
        assert "Traceback" not in printed
    assert {p.name for p in folder.iterdir()} == {"1", "damaged-2", "damaged-3"}


def test_the_environment_says_where_a_process_is():
    here = {"JAX_COORDINATOR_ADDRESS": "10.0.0.1:99", "JAX_NUM_PROCESSES": "4", "JAX_PROCESS_ID": "3"}
    assert processes.place(here) == {"coordinator_address": "10.0.0.1:99", "num_processes": 4, "process_id": 3}
    assert processes.place({}) == {}
    for wrong in ({"JAX_NUM_PROCESSES": "3"}, {"JAX_PROCESS_ID": ""}, {"JAX_COORDINATOR_ADDRESS": ""}):
        with refused("--distributed", *wrong):
            processes.place({**here, **wrong})


@pytest.mark.parametrize(("flag", "distributed"), [("--distributed", True), ("--distributed=true", True), ("", False)])
def test_the_flag_is_heard_however_it_is_written(flag, distributed, monkeypatch):
    monkeypatch.chdir(ROOT)
    assert main.parse([*SMOKE, "--workdir", "run", *([flag] if flag else [])]).distributed is distributed


def test_gathering_on_one_process_is_fetching():
    found = sharding.gather({"a": jax.numpy.ones(3), "b": None})
    assert isinstance(found["a"], np.ndarray)
    assert found["b"] is None
