"""Code in the documentation runs, and the pages that are generated are up to date."""

import pathlib
import re

import jax
import jax.numpy as jnp
import numpy as np
import optax

import rigl_jax as rx
from experiments import gallery
from experiments.benchmarks import page as benchmark_page

ROOT = pathlib.Path(__file__).parents[1]


def test_the_example_of_adding_an_algorithm():
    page = (ROOT / "docs" / "adding_an_algorithm.md").read_text()
    (code,) = re.findall(r"```python\n(.*?)```", page, re.DOTALL)
    assert len([line for line in code.splitlines() if line.strip()]) < 40
    names = {}
    exec(code, names)
    params = {"w": jnp.arange(1.0, 17.0).reshape(4, 4)}
    grads = {"w": 1 / params["w"] ** 2}  # |w g| = 1 / w: the largest weights are dropped, the smallest grown
    plan = rx.make_plan(params, 0.5)
    tx = rx.sparsify(optax.sgd(0.1), names["taylor_rigl"](plan, period=2, fraction=0.5), key=jax.random.key(0))
    state = tx.init(params)
    params = rx.apply_masks(params, state.masks)
    before = np.flatnonzero(np.asarray(state.masks["w"]))
    updates, state = tx.update(grads, state, params)
    params = optax.apply_updates(params, updates)
    rx.check_masked(params, state.masks)
    kept = set(before[:4].tolist())
    free = [i for i in range(16) if i not in kept]
    assert set(np.flatnonzero(np.asarray(state.masks["w"])).tolist()) == kept | set(free[:4])
    assert int(state.algorithm.rewirings) == 1


def test_pages_name_files_that_exist():
    for page in (ROOT / "docs").glob("*.md"):
        for path in re.findall(r"\]\((?!http|#)([^)]+)\)", page.read_text()):
            assert (page.parent / path).exists(), f"{page.name}: {path}"
        for path in re.findall(r"`(tests/[\w/]+\.py|experiments/[\w/]+\.py|rigl_jax/[\w/]+\.py)`", page.read_text()):
            assert (ROOT / path).exists(), f"{page.name}: {path}"


def test_the_gallery_is_up_to_date(monkeypatch):
    monkeypatch.chdir(ROOT)
    assert gallery.PAGE.read_text() == gallery.page()
    assert {path.stem for path in gallery.PICTURES.glob("*.png")} == set(rx.ALGORITHMS)


def test_the_benchmark_tables_are_those_of_the_records(monkeypatch):
    monkeypatch.chdir(ROOT)
    for page in benchmark_page.PAGES:
        assert "<!-- bench:" in page.read_text()
        assert page.read_text() == benchmark_page.fill(page.read_text())
