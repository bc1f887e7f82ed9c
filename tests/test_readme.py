"""What the README shows must work as it stands."""

import pathlib
import re

import jax
import jax.numpy as jnp

from experiments import report

ROOT = pathlib.Path(__file__).parents[1]
README = (ROOT / "README.md").read_text()


def test_the_ten_lines_run():
    masked, packed = re.findall(r"```python\n(.*?)```", README, re.DOTALL)
    key = jax.random.key(1)
    names = {
        "steps": 3,
        "params": {"w": jax.random.normal(key, (12, 8)), "b": jnp.zeros(8)},
        "batch": jnp.ones((4, 12)),
        "loss": lambda params, batch: jnp.mean((batch @ params["w"] + params["b"][None]) ** 2),
    }
    exec(masked, names)
    rx = names["rx"]
    rx.check_masked(names["params"], names["state"].masks)
    assert int(names["state"].step) == 1
    exec(packed, names)
    assert names["packed"].values["w"].shape == (names["plan"]["w"].n_active,)
    assert int(names["state"].step) == 3


def test_tables_are_generated_from_committed_records(monkeypatch):
    monkeypatch.chdir(ROOT)
    assert report.main(["--check"]) == 0


def test_every_path_it_names_exists():
    for path in re.findall(r"\]\((?!http)([^)]+)\)", README) + re.findall(r"configs/\w+\.py", README):
        assert (ROOT / path).exists(), path
    for name in re.findall(r"^\| `(\w+)` \|", README, re.MULTILINE):
        assert (ROOT / "configs" / f"{name}.py").exists(), name


def test_both_set_up_commands_are_there():
    makefile = (ROOT / "Makefile").read_text()
    for command in re.findall(r"^make (\w+)", README, re.MULTILINE):
        assert re.search(rf"^{command}:", makefile, re.MULTILINE), command
