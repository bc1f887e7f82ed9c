"""What docs/own_code.md shows, in a folder of its own: model, data, method, optimizer and sweep from outside."""

import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen, nnx

from experiments import build, launch, main, own, report
from experiments.data import load
from experiments.io import files
from experiments.models import adapters
from experiments.task import prepare
from experiments.train import train
from tests.errors import ROOT, refused
from tests.experiments.runs import ONE

(CODE,) = re.findall(r"^```python\n(.*?)^```", (ROOT / "docs/own_code.md").read_text(), re.DOTALL | re.MULTILINE)
X = jax.random.normal(jax.random.key(0), (4, 12))


@pytest.fixture
def folder(tmp_path, monkeypatch):
    (tmp_path / "own.py").write_text(CODE)
    monkeypatch.chdir(tmp_path)
    return tmp_path


def run(name, *settings):
    arguments = ["--config", "own.py", "--workdir", f"runs/{name}", "--config.tensorboard=false", *settings]
    config, workdir, _ = main.parse(arguments)
    train(config, workdir, devices=ONE)
    return files.read_json(workdir / "summary.json")


def test_everything_of_ones_own_trains_resumes_and_is_reported(folder, capsys):
    whole = run("whole")
    assert run("half", "--config.stop_at=10") is None
    resumed = run("half")
    assert {**whole, "seconds": 0} == {**resumed, "seconds": 0}
    assert whole["test_accuracy"] > 0.5
    assert abs(whole["final_sparsity"] - 0.8) < 0.01
    assert (whole["method"], whole["params"]) == ("own.py:taylor_rigl", 12 * 24 + 24 + 24 * 4 + 4)
    for name, stats in (("NnxNet", {"norm"}), ("functions", set())):  # by traces; numbers are below
        config = main.parse(["--config", "own.py", "--workdir", "x", f"--config.model.name=own.py:{name}"]).config
        task = prepare(config, ONE)
        state = task.execution.abstract()
        after = jax.eval_shape(task.execution.step, state, next(task.data.train(0)))
        assert jax.tree.map(jnp.shape, after) == jax.tree.map(jnp.shape, state)
        assert set(state.batch_stats) == stats
    (folder / "runs" / "half").rename(folder / "again")  # equal configs and seeds are one row's mistake
    assert report.main(["runs", "--out", "report"]) == 0
    tables = (folder / "report" / "tables.md").read_text()
    assert "**data, Net**" in tables
    assert "| taylor_rigl | 80 %, ERK" in tables


def test_a_sweep_makes_each_combination_once(folder, capsys):
    line = ["--config", "own.py", "--methods", "dense,rigl,own.py:taylor_rigl", "--config.sparsity=0.8,0.9"]
    line += ["--config.model.width=8", "--config.optimizer.name=sgd,own.py:lion", "--config.steps=2"]
    assert launch.main([*line, "--dry_run"]) == 0
    options, values = launch.command.parse(launch.parser(), line)
    jobs = launch.jobs_of(options, values)
    assert [job.name for job in jobs] == [
        f"{method}{sparsity}-optimizer={optimizer}-s0"
        for method in ("dense", "rigl", "taylor_rigl")
        for sparsity in ([""] if method == "dense" else ["-sparsity=0.8", "-sparsity=0.9"])
        for optimizer in ("sgd", "lion")
    ]
    config = main.parse(jobs[-1].command[3:]).config
    assert (config.sparsity, config.optimizer.name, config.model.width) == (0.9, "own.py:lion", 8)


def test_options_of_an_own_entry_stay_with_it(folder):
    (folder / "mine.py").write_text("import rigl_jax as rx\n\n\ndef mine(plan, alpha):\n    return rx.static(plan)\n")
    line = ["--config", "own.py", "--methods", "dense,rigl,mine.py:mine"]
    line += ["--config.dataset.name=digits,own.py:data", "--config.dataset.noise=0.3"]
    jobs = launch.jobs_of(*launch.command.parse(launch.parser(), [*line, "--config.method.alpha=1,2"]))
    assert [job.name for job in jobs] == [
        f"{method}-dataset={data}{alpha}-s0"
        for method in ("dense", "rigl", "mine")
        for data in ("digits", "data")
        for alpha in (["-method.alpha=1", "-method.alpha=2"] if method == "mine" else [""])
    ]
    launch.check(jobs)
    assert main.parse(jobs[-1].command[3:]).config.dataset.noise == 0.3
    other = main.parse(["--config", "own.py", "--workdir", "x", "--config.dataset.name=digits"]).config
    assert build.check(other)["dataset"] == {"name": "digits", "batch_size": 32}
    with refused("alpah"):
        launch.check(launch.jobs_of(*launch.command.parse(launch.parser(), [*line, "--config.method.alpah=1"])))


def test_a_study_of_ones_own(folder):
    (folder / "study.py").write_text(
        "def sweep(add):\n    add('one', 'own.py', {'seed': 3, 'model.name': 'own.py:Net'})"
    )
    (job,) = launch.study("study.py", folder / "runs", [("steps", "2")])
    parsed = main.parse(job.command[3:])
    assert (parsed.config.seed, parsed.config.steps, parsed.workdir) == (3, 2, folder / "runs" / "study" / "one")
    for i, code in enumerate(("def sweep(): pass", "sweep = 3")):
        (folder / f"study{i}.py").write_text(code)
        with refused(f"study{i}", "sweep", "add"):
            launch.study(f"study{i}.py", folder / "runs", [])


def test_resuming_runs_no_code_that_the_run_directory_names(folder):
    config = own.file("own.py").get_config()
    with config.unlocked():
        config.stop_at, config.tensorboard = 1, False
    train(config, "run", devices=ONE)
    (folder / "bad.py").write_text("raise SystemExit('must not run')")
    text = (folder / "run" / "config.json").read_text()
    (folder / "run" / "config.json").write_text(text.replace("own.py:Net", "bad.py:Net"))
    with refused("model.name", "bad.py:Net"):
        train(config, "run", devices=ONE)
    report.read_run("run")


@pytest.mark.parametrize(
    ("name", "named"),
    [
        ("nowhere.py:Net", "config.model.name nowhere.py"),
        ("own.py", "config.model.name own.py FILE.py:NAME"),
        ("own.py:Nett", "config.model.name Nett Net"),
        ("no_such_package.nets:Net", "config.model.name no_such_package"),
        ("broken.py:Net", "config.model.name broken.py 2 NameError"),
        ("own.py:X", "config.model.name own.py:X int"),
        ("own.py:data", "config.model dict"),
    ],
)
def test_what_is_wrong_with_a_name_is_told(name, named, folder):
    (folder / "own.py").write_text(f"{CODE}\nX = 3\n")
    (folder / "broken.py").write_text("import sys\nprint(nothing)")
    config = own.file("own.py").get_config()
    with config.unlocked():
        config.model = {"name": name}
    with refused(*named.split()):
        build.check(config)


WRONG = {
    "fewer classes": ("model", "def made(n):\n    return Net(n - 1)"),
    "one logit": ("model", "def made(n):\n    return functions(n)[0], lambda params, x: x.sum(-1)"),
    "two results": ("model", "def made(n):\n    return functions(n)[0], lambda params, x: (x, x)"),
    "no method": ("method", "def made(plan):\n    rx.static(plan)"),
    "no schedule": ("schedule", "def made():\n    pass"),
}


@pytest.mark.parametrize("case", WRONG)
def test_own_code_that_returns_something_else_is_refused(case, folder):
    section, code = WRONG[case]
    (folder / "wrong.py").write_text(f"{CODE}\n\n{code}\n")
    config = own.file("own.py").get_config()
    with config.unlocked():
        config[section] = {"name": "wrong.py:made"}
    with refused(f"config.{section}", "wrong.py:made"):
        prepare(config, ONE)


# --- data --------------------------------------------------------------------------------------------------------


def arrays(dtype=np.uint8, shape=(6, 6)):
    rng = np.random.default_rng(0)
    images = rng.integers(0, 256, (30, *shape)).astype(dtype)
    labels = np.arange(30) % 3
    return {"train": (images[:20], labels[:20]), "test": (images[20:], labels[20:])}


def test_a_file_of_arrays(folder):
    (train_images, train_labels), (test_images, test_labels) = arrays().values()
    np.savez("a.npz", x_train=train_images, y_train=train_labels[:, None], x_test=test_images, y_test=test_labels)
    data = load("a.npz", 10, seed=0)
    assert data[3:] == (20, 10, 3, (6, 6, 1), 2)
    epoch = [batch for batch, _ in zip(data.train(0), range(2), strict=False)]
    index = np.concatenate([batch["index"] for batch in epoch])
    assert sorted(index.tolist()) == list(range(20))
    np.testing.assert_array_equal(np.concatenate([batch["label"] for batch in epoch]), train_labels[index])
    assert abs(np.concatenate([batch["image"] for batch in epoch]).mean()) < 1e-5  # standardised
    np.savez("b.npz", images=train_images)
    with refused("b.npz", "train_images"):
        load("b.npz", 10, seed=0)
    (folder / "c.npz").write_bytes(b"PK\x03\x04 cut short")
    with (folder / "d.npz").open("wb") as file:
        np.save(file, train_images)
    for name in ("c.npz", "d.npz"):
        with refused(name):
            load(name, 10, seed=0)


def test_arrays_of_floats_are_taken_as_they_are_and_records_too(folder):
    (folder / "sets.py").write_text(
        "import grain\nfrom tests.experiments.test_own_code import arrays\n\n\n"
        "def floats():\n    return arrays('float64', (5,))\n\n\n"
        "def records(size=20):\n"
        "    rows = lambda split: [{'image': x, 'label': int(y)} for x, y in zip(*split)]\n"
        "    found = {name: grain.MapDataset.source(rows(split)) for name, split in floats().items()}\n"
        "    return {**found, 'train': found['train'][:size], 'num_classes': 3}\n"
    )
    floats, records = load("sets.py:floats", 10, seed=1), load("sets.py:records", 10, seed=1, options={"size": 20})
    assert floats[3:] == records[3:] == (20, 10, 3, (5,), 2)
    for a, b in ((next(floats.train(5)), next(records.train(5))), (next(floats.test()), next(records.test()))):
        assert a.keys() == b.keys()
        for key in a:
            np.testing.assert_array_equal(a[key], b[key], strict=True)
    assert next(floats.train(0))["image"].max() > 200
    with refused("augment"):
        load("sets.py:records", 10, seed=1, augment="inception")


@pytest.mark.parametrize("name", ["sets.py:floats", "sets.py:records"])
def test_a_part_of_the_training_split(name, folder):
    test_arrays_of_floats_are_taken_as_they_are_and_records_too(folder)
    part = load(name, 4, seed=0, subset=[3, 5, 7, 11])
    batch = next(part.train(2))
    assert (part.num_train, sorted(batch["index"].tolist())) == (4, [3, 5, 7, 11])
    for subset in ([3, 3, 4, 5], [99, 1, 2, 3], [0.5], []):
        with refused("subset"):
            load(name, 1, seed=0, subset=subset)


BAD = {
    "no dict": lambda found: 3,
    "no test": lambda found: {"train": found["train"]},
    "shapes": lambda found: {**found, "test": (np.zeros((2, 3)), np.zeros(2, int))},
    "labels": lambda found: {**found, "train": (found["train"][0], found["train"][1][:-1])},
    "fractions": lambda found: {**found, "train": (found["train"][0], found["train"][1] / 2)},
    "classes": lambda found: {**found, "num_classes": 2},
    "no classes": lambda found: {"train": [{"image": np.zeros(3), "label": 0}], "test": [{"image": 0, "label": 0}]},
    "no test but valid": lambda found: {"train": found["train"], "valid": found["test"]},
    "three parts": lambda found: {**found, "train": (*found["train"], 1)},
    "rows of different lengths": lambda found: {**found, "train": ([[1, 2], [1]], [0, 1])},
    "complex numbers": lambda found: {**found, "train": (found["train"][0] + 1j, found["train"][1])},
    "words": lambda found: {**found, "train": (found["train"][0].astype(str), found["train"][1])},
    "a number": lambda found: {**found, "train": (3.0, 1)},
    "huge labels": lambda found: {**found, "train": (found["train"][0], found["train"][1] + 2**40)},
    "no records": lambda found: {"train": [3], "test": [3], "num_classes": 2},
}


@pytest.mark.parametrize("case", BAD)
def test_data_that_are_none(case, folder, monkeypatch):
    (folder / "sets.py").write_text("found = None\n\n\ndef made():\n    return found\n")
    monkeypatch.setattr(own.file("sets.py"), "found", BAD[case](arrays()))
    with refused("sets.py:made"):
        load("sets.py:made", 1, seed=0)


# --- models ------------------------------------------------------------------------------------------------------


class Normed(linen.Module):
    @linen.compact
    def __call__(self, x, *, train=False):
        x = linen.BatchNorm(use_running_average=not train)(linen.Dense(8)(x))
        return linen.Dropout(0.5, deterministic=not train)(x)


def test_a_linen_module_gives_the_same_bits_as_by_itself():
    module, x, key = Normed(), X, jax.random.key(1)
    model, variables = adapters.from_linen(module), module.init(key, x)
    made = model.init(key, x, train=False)
    jax.tree.map(np.testing.assert_array_equal, made, dict(variables))
    options = {"train": True, "mutable": ["batch_stats"], "rngs": {"dropout": key}}
    ours, theirs = model.apply(made, x, **options), module.apply(variables, x, **options)
    jax.tree.map(np.testing.assert_array_equal, ours, (theirs[0], dict(theirs[1])))


class Counting(linen.Module):
    """Keeps collections of its own, draws from a stream of its own, and takes no `train`."""

    @linen.compact
    def __call__(self, x):
        count = self.variable("counters", "calls", lambda: jnp.zeros(()))
        if self.is_mutable_collection("counters") and not self.is_initializing():
            count.value += 1
        return linen.Dense(2)(x) + jax.random.normal(self.make_rng("noise"))


def test_collections_and_streams_of_any_name():
    model = adapters.adapt(lambda num_classes: Counting(), 2)
    variables = model.init(jax.random.key(0), X)
    assert list(variables["params"]) == ["Dense_0"]
    options = {"train": True, "mutable": ["batch_stats"]}
    first, after = model.apply(variables, X, **options, rngs={"dropout": jax.random.key(1)})
    second, after = model.apply({**variables, **after}, X, **options, rngs={"dropout": jax.random.key(2)})
    assert [float(leaf) for leaf in jax.tree.leaves(after)] == [2.0]
    assert not np.array_equal(first, second)


class Nnx(nnx.Module):
    def __init__(self, num_classes, *, rngs):
        self.layers = nnx.List([nnx.Linear(12, 12, rngs=rngs), nnx.Linear(12, num_classes, rngs=rngs)])
        self.norm, self.dropout = nnx.BatchNorm(12, rngs=rngs), nnx.Dropout(0.5, rngs=rngs)

    def __call__(self, x):
        return self.layers[1](self.dropout(self.norm(self.layers[0](x))))


def test_an_nnx_module_as_plain_dicts():
    model = adapters.adapt(Nnx, 3)
    variables = model.init(jax.random.key(0), X)
    names = {jax.tree_util.keystr(path, simple=True, separator="/") for path, _ in jax.tree.leaves_with_path(variables)}
    assert {"params/layers/0/kernel", "params/norm/scale", "batch_stats/norm/mean"} < names
    assert not any("rng" in name or "dropout" in name for name in names)
    np.testing.assert_array_equal(model.apply(variables, X, train=False), model.apply(variables, X, train=False))
    options = {"train": True, "mutable": ["batch_stats"]}
    outs = [model.apply(variables, X, **options, rngs={"dropout": jax.random.key(seed)}) for seed in (1, 1, 2)]
    np.testing.assert_array_equal(outs[0][0], outs[1][0])
    assert not np.array_equal(outs[0][0], outs[2][0])
    assert jax.tree.structure(outs[0][1]["batch_stats"]) == jax.tree.structure(variables["batch_stats"])
    assert not np.array_equal(outs[0][1]["batch_stats"]["norm"]["mean"], variables["batch_stats"]["norm"]["mean"])


def test_functions_get_what_they_take():
    def noisy(params, x, *, train, key):
        return x @ params["w"] + (jax.random.normal(key) if train else 0.0)

    model = adapters.adapt(lambda n: (lambda key, x: {"w": jnp.ones((12, n))}, noisy), 3)
    variables = model.init(jax.random.key(0), X)
    logits, _ = model.apply(variables, X, train=True, mutable=["batch_stats"], rngs={"dropout": jax.random.key(0)})
    assert logits.shape == (4, 3)
    np.testing.assert_array_equal(model.apply(variables, X, train=False), X @ jnp.ones((12, 3)))
    with refused("int"):
        adapters.adapt(lambda num_classes: num_classes, 3)
