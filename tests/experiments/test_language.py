"""Text as a TFDS set, character models, and the studies of language and of solutions; mostly without compiling."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tensorflow_datasets as tfds

from experiments import import_text
from experiments.data import text
from experiments.models import MLP
from experiments.models.language import GPT, CharGRU
from experiments.studies import language, language_page, method_training, solutions, solutions_page
from tests.errors import refused


def test_text_reads_back_in_order_and_windows_are_shifted_by_one(tmp_path, capsys):
    tfds.disable_progress_bar()
    whole = bytes(np.random.default_rng(0).integers(256, size=5 * text.PIECE // 2, dtype=np.uint8))
    (tmp_path / "file").write_bytes(whole)
    arguments = ["--name", "my_text", "--source", str(tmp_path / "file"), "--data_dir", str(tmp_path / "data")]
    assert import_text.main(arguments) == 0
    parts = text.prepared("my_text", str(tmp_path / "data"))
    assert b"".join(parts[part] for part in text.PARTS) == whole
    assert len(parts["train"]) == len(whole) * 9 // 10
    assert import_text.main(arguments) == 0
    assert "there already" in capsys.readouterr().out
    inputs, targets = text.windows(whole[:50], 8)
    assert inputs.shape == targets.shape == (6, 8)
    assert (inputs.tobytes(), targets.tobytes()) == (whole[:48], whole[1:49])


def test_a_folder_of_three_files_is_three_parts_and_what_is_missing_is_named(tmp_path, capsys):
    for name in ("wiki.train.raw", "wiki.valid.raw"):
        (tmp_path / name).write_text(name)
    with refused("read_source", "test"):
        text.read_source(tmp_path)
    (tmp_path / "wiki.test.raw").write_text("wiki")
    parts = text.read_source(tmp_path)
    assert parts == {"train": b"wiki.train.raw", "validation": b"wiki.valid.raw", "test": b"wiki"}
    with refused("load", "import_text"):
        text.prepared("kjv", str(tmp_path))
    with refused("windows", "20"):
        text.windows(b"short", 20)
    assert import_text.main(["--name", "other", "--data_dir", str(tmp_path)]) == 1
    assert "--source" in capsys.readouterr().err


@pytest.mark.parametrize("module", [CharGRU(7, embedding=3, width=4, readout=(5,)), GPT(7, width=4, layers=1, heads=2)])
def test_a_character_is_foretold_from_those_before_it(module):
    x = jnp.arange(12).reshape(2, 6) % 7

    @jax.jit
    def both(key):
        params = module.init(key, x)
        return module.apply(params, x), module.apply(params, x.at[:, 3].set(6))

    before, after = both(jax.random.key(0))
    assert (before.shape, before.dtype) == ((2, 6, 7), jnp.float32)
    same = np.asarray(before == after).all(axis=(0, 2))
    np.testing.assert_array_equal(same[:3], True)
    assert not same[3:].any()


def test_models_of_language_refuse_what_does_not_fit():
    with refused("GPT", "heads"):
        GPT(7, width=6, heads=4)
    with refused("CharGRU", "readout"):
        CharGRU(7, readout=(0,))
    with refused("GPT", "context"):
        jax.eval_shape(GPT(7, context=4).init, jax.random.key(0), jnp.zeros((1, 5)))


@pytest.mark.parametrize("model", language.MODELS)
def test_the_paper_s_set_up_takes_steps_and_rewires_on_data_of_its_shape(model):
    """By traces, which compile nothing."""
    spec = language.MODELS[model]
    run, plan = language.prepare(model, "rigl"), language.plan_of(language.network(model))
    assert sum(leaf.n_active for leaf in plan.values()) * 4 == sum(leaf.size for leaf in plan.values())
    windows = jax.ShapeDtypeStruct((1000, spec["length"]), jnp.uint8)
    data = method_training.Images(windows, jax.ShapeDtypeStruct(windows.shape, jnp.int32))
    batches = jax.ShapeDtypeStruct((run.steps, run.batch), jnp.int32)
    state = jax.eval_shape(run.init, 0)
    for rewire in (False, True):
        after = jax.eval_shape(functools.partial(run.train, rewire=rewire), state, data, batches, 0, 1)
        assert jax.tree.map(lambda x: x.shape, after) == jax.tree.map(lambda x: x.shape, state)
    due = [step for step in range(0, run.steps + 1, spec["period"]["other"]) if run.algorithm.due(step)]
    assert len(due) > 20
    small = language._sparse_weights(language.small(model))
    assert 0.8 * sum(leaf.n_active for leaf in plan.values()) < small <= sum(leaf.n_active for leaf in plan.values())


def test_the_architecture_that_is_left_after_the_training():
    """One unit of the first layer is not read, one of the second has no input, and three pixels are read."""
    module, shapes = MLP(10, features=(4, 3)), {"Dense_0": (784, 4), "Dense_1": (4, 3), "Dense_2": (3, 10)}
    masks = {name: np.zeros(shape, bool) for name, shape in shapes.items()}
    masks["Dense_0"][[5, 9, 700], [0, 1, 2]] = True
    masks["Dense_0"][77, 3] = True  # of a unit that nothing reads
    masks["Dense_1"][:3, :2] = True
    masks["Dense_2"][:] = True
    rng = np.random.default_rng(0)
    params = {n: {"kernel": rng.normal(size=m.shape).astype("f") * m, "bias": np.ones(m.shape[1], "f")}
              for n, m in masks.items()}  # fmt: skip
    state = method_training.State(params, None, None, None, None)
    state = state._replace(
        opt_state=_Masks({name: {"kernel": jnp.asarray(mask), "bias": None} for name, mask in masks.items()})
    )
    images = method_training.Images(jnp.asarray(rng.normal(size=(50, 28, 28, 1)), jnp.float32), jnp.arange(50) % 10)
    found = solutions.architecture(module, state, method_training.Data(images, images, images))
    assert found["widths"] == [3, 3, 2]
    assert found["active_weights"] == 3 + 6 + 20
    assert found["bytes"] == (32 * 29 + (9 + 6 + 20) + 32 * (3 + 2 + 10)) // 8
    right = jnp.argmax(jax.jit(module.apply)({"params": params}, images.x), -1) == images.y
    assert found["test_small"] == pytest.approx(float(right.mean()))


class _Masks:
    """The part of a state of `sparsify` that is read."""

    def __init__(self, masks):
        self.masks = masks


def test_the_pages_of_language_and_solutions_are_up_to_date():
    for study, page in ((language, language_page), (solutions, solutions_page)):
        records = study.read()
        assert records.keys() <= set(study.cells())
        assert page.PAGE.read_text() == page.page(records)
    assert solutions_page.PICTURE.exists()
