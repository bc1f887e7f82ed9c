"""`fit` alone: it writes no file and keeps the state that it is given; a stop changes nothing; given weights."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from experiments import loop, sharding, step
from experiments import task as task_module
from experiments.io import checkpoint
from tests.errors import refused
from tests.experiments.runs import ONE, assert_equal, configured, prepare


def task_of(execution):
    config = configured(execution=execution.replace("dense", "masked"))
    config.method.name = "dense" if execution == "dense" else "rigl"
    return prepare(config, ONE)


@pytest.fixture(scope="module")
def tasks():
    return {execution: task_of(execution) for execution in ("dense", "masked", "packed")}


@pytest.mark.parametrize("execution", ["dense", "masked", "packed"])
def test_two_parts_are_the_whole_without_a_file_and_the_start_is_kept(execution, tasks, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    task = tasks[execution]
    start = loop.init(task)
    before = jax.tree.map(jnp.copy, start)
    whole = loop.fit(task, start, 5)
    assert_equal(loop.fit(task, loop.fit(task, start, 2), 5), whole)
    assert_equal(start, before)
    assert_equal(loop.fit(task, whole, 5), whole)
    assert list(tmp_path.iterdir()) == []


def test_functions_are_called_in_order_at_the_steps_of_the_config(tasks):
    task, seen = tasks["masked"], []  # 6 steps, log_every=2, eval_every=checkpoint_every=3, rewirings at 0, 2, 4

    def note(kind):
        return lambda done, *found: seen.append((done, kind, *(() if kind != "step" else (found[1] is not None,))))

    hooks = {"after_step": note("step"), "log": note("log"), "evaluate": note("eval"), "save": note("save")}
    state = loop.fit(task, loop.init(task), 6, **hooks, interrupted=lambda done: done == 5)
    assert int(state.step) == 5
    kinds = [[kind for at, kind, *_ in seen if at == done] for done in range(1, 6)]
    assert kinds == [["step"], ["step", "log"], ["step", "eval", "save"], ["step", "log"], ["step", "save"]]
    rewired = [rest[0] for _, kind, *rest in seen if kind == "step"]
    assert rewired == [True, False, True, False, True]


@pytest.mark.parametrize("execution", ["masked", "packed"])
def test_training_starts_from_given_weights_and_masks(execution, tasks):
    task = tasks[execution]
    first, other = loop.init(task), jax.tree.map(jnp.ones_like, loop.init(task).params)
    masks = jax.tree.map(jnp.logical_not, task.execution.masks(first))
    state = loop.init(task, params=other, masks=masks)
    kernel, mask = (tree["Dense_1"]["kernel"] for tree in (state.params, masks))
    np.testing.assert_array_equal(kernel, np.asarray(mask, np.float32))
    np.testing.assert_array_equal(state.explored["Dense_1"]["kernel"], mask)
    np.testing.assert_array_equal(task.execution.masks(state)["Dense_1"]["kernel"], mask)
    assert np.isfinite(loop.evaluate(task, loop.fit(task, state, 2))["loss"])


def test_what_does_not_fit_the_model_is_refused(tasks):
    params = loop.init(tasks["masked"]).params
    with refused("Dense_1/kernel"):
        loop.init(tasks["masked"], params={**params, "Dense_1": {**params["Dense_1"], "kernel": jnp.ones((2, 2))}})
    with refused("masks"):
        loop.init(tasks["dense"], masks=jax.tree.map(lambda p: p != 0, params))


def test_the_loss_is_the_mean_over_examples(tasks):
    task = tasks["masked"]
    state = loop.init(task)
    batch = sharding.place(next(task.data.train(0)), task.mesh)
    objective = step.Objective(task.model, task.data.image_shape, seed=0, pruning=task.data_pruning)
    losses_of = jax.jit(lambda s, batch: step.example_losses(objective, task.model.apply, s.params, s, batch))
    losses, (right, _) = losses_of(state, batch)
    assert losses.shape == right.shape == batch["label"].shape
    loss, gradient = task.execution.gradient(state, batch)
    np.testing.assert_allclose(loss, jnp.mean(losses), rtol=1e-6)
    assert jax.tree.structure(gradient) == jax.tree.structure(state.params)


def test_a_part_of_the_training_examples_keeps_their_indices():
    rows = np.arange(100, 200)
    task = task_module.prepare(configured(), ONE, subset=rows)
    whole = prepare(configured(), ONE).data
    assert (task.data.num_train, task.data.num_test) == (100, whole.num_test)
    batches = task.data.train(0)
    seen = [next(batches) for _ in range(task.data.steps_per_epoch)]
    found = np.concatenate([batch["index"] for batch in seen])
    assert found.dtype == np.int32
    assert len(set(found.tolist())) == len(found)
    assert set(found.tolist()) <= set(rows.tolist())
    images = {}
    for _, batch in zip(range(whole.steps_per_epoch), whole.train(0), strict=False):
        images |= dict(zip(batch["index"].tolist(), batch["image"], strict=True))
    for index, image in zip(seen[0]["index"].tolist(), seen[0]["image"], strict=True):
        if index in images:  # the last batch of an epoch may lack some
            np.testing.assert_array_equal(image, images[index])
    for part, other in zip(seen[0].values(), next(whole.train(0)).values(), strict=True):
        assert (part.shape, part.dtype) == (other.shape, other.dtype)


# What checkpoints of all versions hold, for SGD with momentum and RigL.
WEIGHTS = [f"['Dense_{i}']['{name}']" for i in range(2) for name in ("bias", "kernel")]
KERNELS = [name for name in WEIGHTS if "kernel" in name]
TOTALS = [f".totals['{name}']" for name in ("accuracy", "loss", "missed", "skipped", "steps")]


@pytest.mark.parametrize("execution", ["dense", "masked", "packed"])
def test_checkpoints_hold_what_those_of_earlier_versions_hold(execution, tasks):
    state = tasks[execution].execution.abstract()
    found = {jax.tree_util.keystr(path) for path, _ in jax.tree_util.tree_leaves_with_path(state)}
    inner = ".opt_state" if execution == "dense" else ".opt_state.inner"
    sparse = [".opt_state.step", ".opt_state.key"]
    sparse += [f"{of}{name}" for of in (".opt_state.algorithm.masks", ".explored") for name in KERNELS]
    moments = {name.removeprefix(inner) for name in found if name.startswith(inner)}
    assert {name for name in found if not name.startswith(inner)} == {
        ".step",
        ".key",
        *(f".params{name}" for name in WEIGHTS),
        *TOTALS,
        *([] if execution == "dense" else sparse),
    }
    assert moments
    assert type(state)._fields == (
        "step",
        "params",
        "batch_stats",
        "opt_state",
        "key",
        "explored",
        "totals",
        "examples",
    )


class EarlierState(NamedTuple):
    """The state of earlier versions, field by field."""

    step: Any
    params: Any
    batch_stats: Any
    opt_state: Any
    key: Any
    explored: Any
    totals: Any


@pytest.mark.parametrize("execution", ["dense", "packed"])
def test_a_state_of_an_earlier_version_is_restored_bit_for_bit(execution, tasks, tmp_path):
    task = tasks[execution]
    state = loop.fit(task, loop.init(task), 2)
    earlier = EarlierState(*state[:-1])
    assert execution != "dense" or earlier.explored is None
    store = checkpoint.open_checkpoints(tmp_path / "checkpoints", keep=1)
    store.save(2, earlier, {}, None)
    store.close()
    store = checkpoint.open_checkpoints(tmp_path / "checkpoints", keep=1)
    found, _ = store.restore(task.execution.abstract())
    store.close()
    assert_equal(found, state)
    assert_equal(loop.fit(task, found, 4), loop.fit(task, state, 4))
