"""Code in README.md and docs/ runs, generated parts are up to date, and links lead somewhere."""

import importlib.util
import inspect
import pathlib
import re

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import tensorboardX

import rigl_jax as rx
from experiments import gallery, report
from experiments.benchmarks import page as benchmark_page

ROOT = pathlib.Path(__file__).parents[1]
PAGES = {
    path.relative_to(ROOT).as_posix(): path.read_text() for path in (ROOT / "README.md", *ROOT.glob("docs/**/*.md"))
}
GUIDES = (
    "choosing",
    "data_pruning",
    "devices",
    "diagnostics",
    "faq",
    "frameworks",
    "language_models",
    "really_sparse",
    "start",
    "watching",
)
"""Pages whose blocks run one after another, and check themselves."""


def blocks(page):
    """The Python blocks of a page, without those marked as not run."""
    return re.findall(r"(?<!<!-- not run -->\n)^```python\n(.*?)^```", PAGES[page], re.DOTALL | re.MULTILINE)


def users_names():
    """What a reader has before reading: params, a loss and a batch."""

    def loss(params, batch):
        hidden = jax.nn.relu(batch @ params["first"]["kernel"] + params["first"]["bias"][None])
        return jnp.mean((hidden @ params["last"]["kernel"]) ** 2)

    first, last = jax.random.normal(jax.random.key(1), (2, 8, 8))
    params = {"first": {"kernel": first, "bias": jnp.zeros(8)}, "last": {"kernel": last}}
    return {"steps": 3, "params": params, "batch": jnp.ones((4, 8)), "loss": loss}


def test_the_ten_lines_of_the_readme():
    (code,) = blocks("README.md")
    assert len([line for line in code.splitlines() if line.strip() and line[0] != "#"]) <= 10
    exec(code, names := users_names())
    rx.check_masked(names["params"], names["state"].masks)
    assert int(names["state"].step) == 1


def test_the_cookbook(capsys):
    names = users_names()
    for code in blocks("docs/cookbook.md"):
        exec(code, names)
    assert names["packed"].values["first"]["kernel"].shape == (names["plan"]["first/kernel"].n_active,)
    assert int(names["state"].step) == names["steps"]
    rx.check_masked(names["params"], names["masks"])
    np.testing.assert_allclose(
        names["small"].apply(names["small"].params, names["batch"]),
        names["loss"](names["params"], names["batch"]),
        rtol=1e-5,
    )
    assert "first/kernel" in capsys.readouterr().out


def test_the_example_of_adding_an_algorithm():
    (code,) = blocks("docs/adding_an_algorithm.md")
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


def test_the_page_of_pruning():
    names = users_names()
    for code in blocks("docs/pruning.md"):
        exec(code, names)
    rx.check_masked(names["two_in_four"].params, names["two_in_four"].masks, names["rows"])
    rx.check_masked(names["moved"].params, names["moved"].masks, names["rows"])
    assert not np.array_equal(names["moved"].params["last"]["kernel"], names["two_in_four"].params["last"]["kernel"])
    rx.check_masked(names["by_all"].params, names["by_all"].masks, names["shared"])
    assert {name: layer.active_weights for name, layer in names["shared"].items()} == names["counts"]
    for pruned in (names["everywhere"], names["by_lamp"]):
        assert sum(int(m.sum()) for m in jax.tree.leaves(pruned.masks)) == sum(
            layer.active_weights for layer in names["plan"].values()
        )
    assert not np.any(names["further"].masks["last"]["kernel"] & ~names["slowly"].masks["last"]["kernel"])
    for layers in (names["smaller"], names["smaller_nnx"]):
        assert int(layers.masks["kernel"].sum()) == 16
    np.testing.assert_allclose(names["outputs_nnx"], names["batch"] @ names["smaller_nnx"].params["kernel"], rtol=1e-5)
    assert names["packed"].values["last"]["kernel"].size == int(names["further"].masks["last"]["kernel"].sum())
    ticket, total = names["ticket"], sum(layer.active_weights for layer in names["plan"].values())
    assert (ticket.level, sum(int(m.sum()) for m in jax.tree.leaves(ticket.masks))) == (2, total)
    rx.check_masked(ticket.params, ticket.masks)
    normed = names["normed_ticket"].params
    hidden = names["batch"] @ normed["params"]["Dense_0"]["kernel"]
    np.testing.assert_allclose(normed["batch_stats"]["BatchNorm_0"]["mean"], hidden.mean(0), atol=0.1)
    assert names["normed_ticket"].level == 2
    assert names["curve"].mean("compression").tolist() == sorted(names["curve"].mean("compression"))
    rows = re.findall(r"^\| `(\w+)` \| `(\w+)[(`]", PAGES["docs/pruning.md"], re.MULTILINE)
    assert [name for name, _ in rows] == [*rx.criteria.CRITERIA, *rx.criteria.SURGEONS]
    assert {call for _, call in rows} <= set(rx.criteria.__all__)


def test_the_page_of_channels(capsys):
    names = {}
    with jax.numpy_rank_promotion("allow"):
        for code in blocks("docs/channels.md"):
            exec(code, names)
    printed = re.search(r"^```\n(members.*?)^```", PAGES["docs/channels.md"], re.DOTALL | re.MULTILINE)
    assert printed[1] in capsys.readouterr().out
    assert jax.tree.map(jnp.shape, names["finetuned"]) == jax.tree.map(jnp.shape, names["small"].params)


@pytest.mark.parametrize("page", PAGES)
def test_what_a_page_names_exists(page):
    text, folder = PAGES[page], (ROOT / page).parent
    for path in re.findall(r"\]\((?!http|#)([^)#]+)[^)]*\)", text):
        assert (folder / path).exists(), path
    for path in re.findall(r"\b(?:tests|experiments|rigl_jax|configs)/[\w/]+\.(?:py|json)\b", text):
        assert (ROOT / path).exists(), path
    for module in re.findall(r"python -m (experiments[\w.]*)", text):
        assert importlib.util.find_spec(module), module
    for command in re.findall(r"\bmake ([a-z][\w-]+)(?=`|    #)", text):
        assert re.search(rf"^{command}:", (ROOT / "Makefile").read_text(), re.MULTILINE), command


class Log(dict):
    """What loggers are given, in the calls of W&B and CLU."""

    def log(self, values, step):
        self.update({name: (value, step) for name, value in values.items()})

    def write_scalars(self, step, values):
        assert all(isinstance(value, (int, float)) for value in values.values())
        self.log(values, step)


@pytest.mark.parametrize("page", GUIDES)
def test_the_blocks_of_a_guide(page, capsys, tmp_path):
    names = users_names()
    if page == "watching":
        names |= {"wandb": Log(), "clu_writer": Log(), "tensorboard": tensorboardX.SummaryWriter(str(tmp_path))}
    assert blocks(f"docs/{page}.md")
    for code in blocks(f"docs/{page}.md"):
        exec(code, names)
        if page == "frameworks" and "state" in names:  # each block trains another kind of params for three steps
            assert int(names["state"].step) == 3
            assert 0.79 < float(rx.sparsity(names["state"].masks)) < 0.81
    if page == "watching":
        names["tensorboard"].close()
        names["bar"].close()
        assert names["wandb"]["masks/step"] == (9, 9)
        assert names["wandb"]["masks/density"][0].keys() == {"first/kernel", "last/kernel"}
        assert names["clu_writer"]["density/first/kernel"] == (0.25, 9)
        assert next(tmp_path.iterdir()).stat().st_size > 500
    if page == "start":
        share = float(capsys.readouterr().out.split()[-1])
        assert share > 0.2  # where a tenth would be chance: what the page says


def test_the_reference_lists_every_public_name():
    listed = {
        name
        for page, text in PAGES.items()
        if "/api/" in page
        for name in re.findall(r"^::: rigl_jax\.([\w.]+)$", text, re.M)
    }
    assert {name.partition(".")[0] for name in listed} <= {*rx.__all__, "plot"}
    modules = {name for name in rx.__all__ if inspect.ismodule(getattr(rx, name))}
    named = {name for name in rx.__all__ if name not in modules and not name.startswith("__")}
    families = [getattr(rx, module) for module in ("channels", "criteria", "execution", "recipes")]  # listed as a whole
    covered = {name for name in named for family in families if getattr(family, name, None) is getattr(rx, name)}
    elsewhere = {"ALGORITHMS", "Criterion", "Leaf", "Masks", "Plan", "Score", "Surgeon"}  # no objects with docstrings
    assert sorted(named - listed - covered - elsewhere) == []
    assert sorted(modules - listed - {"algorithms", "base", "optimizers", "structures", "values"}) == []  # by function


def test_the_reference_lists_functions_that_have_the_name_of_their_module():
    """The site shows what a family exports, but takes such a name for the module: it is listed by its whole path."""
    listed = {
        name for page, text in PAGES.items() if "/api/" in page for name in re.findall(r"^::: ([\w.]+)$", text, re.M)
    }
    packages = [name for name in listed if (ROOT / name.replace(".", "/") / "__init__.py").exists()]
    assert len(packages) > 5
    twins = {
        f"{package}.{name}.{name}"
        for package in packages
        for name in getattr(importlib.import_module(package), "__all__", ())
        if inspect.isfunction(getattr(importlib.import_module(package), name))
        and importlib.util.find_spec(f"{package}.{name}")
    }
    assert sorted(twins - listed) == []


def test_the_index_lists_every_page_and_the_command_line_every_config():
    listed = set(re.findall(r"\]\(((?:api/)?\w+\.md)\)", PAGES["docs/README.md"]))
    assert listed == {path.relative_to(ROOT / "docs").as_posix() for path in ROOT.glob("docs/**/*.md")} - {"README.md"}
    notebooks = set(re.findall(r"\]\(\.\./notebooks/(\w+)\.ipynb\)", PAGES["docs/README.md"]))
    assert notebooks == {path.stem for path in ROOT.glob("notebooks/*.ipynb")}
    configs = set(re.findall(r"^\| `(\w+)` \|", PAGES["docs/command_line.md"], re.MULTILINE))
    assert configs == {path.stem for path in ROOT.glob("configs/*.py")} - {"__init__", "common"}


def test_the_changelog_goes_by_version():
    """What docs/versions.md says of it: unreleased changes first, then releases by number and date, newest first."""
    text = (ROOT / "CHANGELOG.md").read_text(encoding="utf-8")
    first, *releases = re.findall(r"^## (.+)$", text, re.MULTILINE)
    numbers = [re.fullmatch(r"(\d+)\.(\d+)\.(\d+) \(\d{4}-\d\d-\d\d\)", name) for name in releases]
    assert first == "Unreleased"
    assert all(numbers)
    order = [tuple(map(int, number.groups())) for number in numbers]
    assert order == sorted(order, reverse=True)
    assert set(re.findall(r"^### (.+)$", text, re.MULTILINE)) <= {"Added", "Changed", "Deprecated", "Removed", "Fixed"}


def test_generated_pages_and_tables_are_those_of_the_records(monkeypatch):
    monkeypatch.chdir(ROOT)
    assert gallery.PAGE.read_text() == gallery.page()
    assert {path.stem for path in gallery.PICTURES.glob("*.png")} == set(rx.ALGORITHMS)
    assert report.main(["--check"]) == 0
    for page in benchmark_page.PAGES:
        assert "<!-- bench:" in page.read_text()
        assert page.read_text() == benchmark_page.fill(page.read_text())
