"""The driver of measurements on a device: what is written when steps fail, hang, or find no time."""

import json
import sys
import time

from experiments.benchmarks.device import __main__, driver, steps
from experiments.benchmarks.device.driver import Step

STUBS = {
    "ends": "print('{\"n\": 1}'); print('no row'); print('{\"n\": 2, \"m\": 3}')",
    "fails": "import sys; print('{\"n\": 4}', flush=True); sys.exit('out of memory')",
    # A child that outlives its parent keeps the pipe open, and must die too.
    "hangs": (
        "import subprocess, sys, time; print('{\"n\": 5}', flush=True); "
        "subprocess.Popen([sys.executable, '-S', '-c', 'import time; time.sleep(60)']); time.sleep(60)"
    ),
    "late": "print('{\"n\": 6}')",
}


def test_a_step_loses_only_itself(tmp_path):
    planned = [Step("ends", 20, ""), Step("fails", 20, ""), Step("hangs", 2, ""), Step("late", 20, "")]
    start = time.monotonic()
    command = lambda name: [sys.executable, "-S", "-c", STUBS[name]]  # noqa: E731
    lines = driver.drive(planned[:3], 30, tmp_path, command, least=0.1)
    lines += driver.drive(planned[3:], 0.05, tmp_path, command, least=0.1)
    assert time.monotonic() - start < 30
    rows = [line for line in lines if "status" not in line]
    assert rows == [
        {"step": "ends", "n": 1},
        {"step": "ends", "n": 2, "m": 3},
        {"step": "fails", "n": 4},
        {"step": "hangs", "n": 5},
    ]
    ends = {line["step"]: line["status"] for line in lines if "status" in line}
    assert ends == {
        "ends": "done",
        "fails": "failed with 1, see device.log",
        "hangs": "killed after 2 s",
        "late": "not started, no time is left",
    }
    log = (tmp_path / "device.log").read_text()
    assert "no row" in log
    assert "out of memory" in log

    file = tmp_path / "device.jsonl"
    assert driver.read(file) == lines
    file.write_text(file.read_text() + '{"step": "cut o')  # the driver itself was killed
    assert driver.read(file) == lines
    text = driver.table(lines)
    assert "### hangs: killed after 2 s" in text
    assert "| n | m |" in text


def test_every_planned_step_exists():
    assert {step.name for step in __main__.STEPS + __main__.MORE} == steps.STEPS.keys() - {"digests"}
    assert sum(step.seconds for step in __main__.STEPS) <= 540
    assert json.loads(json.dumps([step._asdict() for step in __main__.STEPS]))[0]["name"] == "environment"
