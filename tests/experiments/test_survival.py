"""What is left on disk at any moment resumes exactly; signals, bad numbers and broken invariants are told."""

import functools
import os
import shutil
import signal
import time

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental import multihost_utils

from experiments import build, guard, main, processes, sharding, train
from experiments.finite import finite
from tests.errors import refused
from tests.experiments.runs import ONE, assert_equal, configured, lines, numbers, prepare, restored


def copy(run, target):
    """The folder as it is now, while another thread may be writing a checkpoint."""
    while True:
        try:
            return shutil.copytree(run, target)
        except (shutil.Error, FileNotFoundError):  # renamed just then
            shutil.rmtree(target)


@pytest.fixture(scope="module")
def straight(tmp_path_factory):
    """An uninterrupted run, and copies of its folder after each step: all that a kill there would leave."""
    folder = tmp_path_factory.mktemp("straight")

    def note(step):
        saved = folder / "run" / "checkpoints" / "3"  # another thread may still be writing it
        assert step <= 3 or any(saved.exists() or time.sleep(0.01) for _ in range(6000))
        copy(folder / "run", folder / f"killed-{step}")
        return False

    train.train(configured(check_every=1), folder / "run", devices=ONE, interrupted=note)
    return folder


@pytest.mark.parametrize("step", [2, 5])
def test_what_a_kill_leaves_resumes_bit_for_bit(step, straight, tmp_path):
    run = tmp_path / "run"
    shutil.copytree(straight / f"killed-{step}", run)
    assert (run / "checkpoints" / "3").exists() == (step > 3)
    half = run / "checkpoints" / "6.orbax-checkpoint-tmp"  # and a checkpoint that was being written
    shutil.copytree(straight / "run" / "checkpoints" / "6", half)
    (half / "_CHECKPOINT_METADATA").unlink()
    with (run / "metrics.jsonl").open("a") as file:
        file.write('{"step": 6, "ki')
    train.train(configured(), run, devices=ONE)
    assert lines(run) == lines(straight / "run")
    assert_equal(restored(run)[0], restored(straight / "run")[0])
    assert not half.exists()


def test_an_interrupted_run_saves_there_and_resumes_bit_for_bit(straight, tmp_path):
    run = tmp_path / "run"
    assert train.train(configured(), run, devices=ONE, interrupted=lambda step: step == 5)["steps"] == 5
    assert (run / "checkpoints" / "5").is_dir()
    assert not (run / "summary.json").exists()
    train.train(configured(), run, devices=ONE)
    assert lines(run) == lines(straight / "run")
    assert_equal(restored(run)[0], restored(straight / "run")[0])


def test_sigterm_is_noted_and_the_handler_put_back():
    before = signal.getsignal(signal.SIGTERM)
    with processes.preemption() as interrupted:
        assert not interrupted(1)
        os.kill(os.getpid(), signal.SIGTERM)
        assert interrupted(2)
    assert signal.getsignal(signal.SIGTERM) is before


def test_processes_that_train_together_agree_through_jax(monkeypatch):
    monkeypatch.setattr(jax.distributed, "is_initialized", lambda: True)
    monkeypatch.setattr(multihost_utils, "reached_preemption_sync_point", lambda step: step == 7)
    before = signal.getsignal(signal.SIGTERM)
    with processes.preemption() as interrupted:
        assert signal.getsignal(signal.SIGTERM) is before  # JAX's own must stay
        assert [interrupted(6), interrupted(7)] == [False, True]


def test_the_command_ends_well_on_sigterm(monkeypatch, capsys):
    def fake(config, workdir, *, interrupted):
        os.kill(os.getpid(), signal.SIGTERM)
        return {"steps": 3 if interrupted(3) else config.steps}

    monkeypatch.setattr(train, "train", fake)
    assert main.main(["--config", "configs/digits_mlp.py:smoke", "--workdir", "runs/never"]) == 0
    assert "stopped by SIGTERM, saved at step 3" in capsys.readouterr().out


# --- numbers that are not finite ---------------------------------------------------------------------------------


def spoiled(batch):
    return {**batch, "image": np.full_like(batch["image"], np.nan)}


def poison(monkeypatch, step):
    """Makes the batch of one step (counted from 1) nan."""
    load = build.data

    def data(config, subset):
        found = load(config, subset)

        def batches(start):
            for i, batch in enumerate(found.train(start), start=start + 1):
                yield spoiled(batch) if i == step else batch

        return found._replace(train=batches)

    monkeypatch.setattr(build, "data", data)


def test_a_run_stops_with_a_diagnosis_and_goes_on_when_told_to_skip(monkeypatch, tmp_path):
    poison(monkeypatch, step=5)
    run = tmp_path / "run"
    with refused("step 5", "Dense_0/kernel", "step 3", "on_nonfinite", error=FloatingPointError):
        train.train(configured(), run, devices=ONE)
    summary = train.train(configured(on_nonfinite="skip", check_every=1), run, devices=ONE)
    assert summary["skipped"] == 1
    found = [line for line in lines(run) if line["kind"] == "train"]
    assert [(line["step"], line.get("skipped")) for line in found] == [(2, None), (4, 0), (6, 1)]
    assert np.isfinite(found[-1]["loss"])


def stepped(task, state, batch, rewire):
    batch = sharding.place(batch, task.mesh)
    return task.execution.rewire(state, batch)[0] if rewire else task.execution.step(state, batch)


@pytest.mark.parametrize("execution", ["dense", "masked", "packed"])
def test_a_skipped_batch_leaves_everything_as_it_was(execution):
    config = configured(on_nonfinite="skip", execution=execution.replace("dense", "masked"))
    config.method.name = "dense" if execution == "dense" else "rigl"
    task = prepare(config, ONE)
    masked = task.execution.to_masked
    batches, state = task.data.train(0), task.execution.from_masked(task.execution.init())
    state = stepped(task, state, next(batches), rewire=execution != "dense")
    before = jax.device_get(numbers(_learnt(masked(state))))
    for rewire in (False, execution != "dense"):
        state = stepped(task, state, spoiled(next(batches)), rewire)
        after = masked(state)
        for left, right in zip(before, numbers(_learnt(after)), strict=True):
            np.testing.assert_array_equal(left, right)
    assert [int(after.totals[name]) for name in ("steps", "skipped")] == [1, 2]
    # RigL's rewiring would not have updated weights.
    assert int(after.totals["missed"]) == (2 if execution == "dense" else 1)
    assert int(after.step) == 3
    assert execution == "dense" or int(after.opt_state.step) == 3
    weights = numbers(after.params)  # the next step is given the state itself
    state = stepped(task, state, next(batches), rewire=False)
    assert not np.array_equal(numbers(masked(state).params)[-1], weights[-1])


def _learnt(state):
    opt_state = state.opt_state._replace(step=state.step * 0) if hasattr(state.opt_state, "masks") else state.opt_state
    return state.params, opt_state, state.explored


def test_nan_gradients_through_a_whole_rewiring_leave_exact_counts():
    task = prepare(configured(), ONE)
    state = stepped(task, task.execution.init(), spoiled(next(task.data.train(0))), rewire=True)
    table, _ = jax.jit(functools.partial(guard.measure_masks, task.algorithm))(state.params, state.opt_state.algorithm)
    assert table[:, 0].tolist() == [leaf.active_weights for leaf in task.plan.values()]
    assert table[:, 1].tolist() == [0] * len(task.plan)


def test_finite_looks_at_floats_only():
    assert bool(finite({"a": jnp.ones(2), "n": jnp.arange(3), "key": jax.random.key(0), "none": None}))
    assert not bool(finite({"a": jnp.ones(2), "b": {"c": jnp.array([0.0, -jnp.inf], jnp.bfloat16)}}))


# --- the guard ---------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def guarded():
    task = prepare(configured(check_every=2), ONE)
    return task, task.execution.init()


def look(guarded, change, step=2, rewired=False):
    """What the guard says of a state in which the mask or weights of one leaf are changed."""
    task, state = guarded
    found, masks = guard.open_guard(task, state), task.execution.masks(state)
    mask, kernel = (tree["Dense_1"]["kernel"] for tree in (masks, state.params))
    mask, kernel = change(mask, kernel)
    params = {**state.params, "Dense_1": {**state.params["Dense_1"], "kernel": kernel}}
    changed = {**masks, "Dense_1": {**masks["Dense_1"], "kernel": mask}}
    algorithm = state.opt_state.algorithm._replace(masks=changed)
    state = state._replace(params=params, opt_state=state.opt_state._replace(algorithm=algorithm))
    found.check(step, state, rewired)
    found.verify()


def test_the_guard_is_silent_where_all_is_well_or_nothing_is_due(guarded):
    look(guarded, lambda mask, kernel: (mask, kernel))
    look(guarded, lambda mask, kernel: (~mask, kernel), step=1)


def test_the_guard_names_the_leaf_whose_count_is_wrong(guarded):
    with refused("Dense_1/kernel", "2"):
        look(guarded, lambda mask, kernel: (mask.at[0].set(True), kernel), rewired=True)


def test_the_guard_names_the_leaf_with_weights_off_its_mask(guarded):
    with refused("Dense_1/kernel", "2"):
        look(guarded, lambda mask, kernel: (mask, jnp.ones_like(kernel)))


def test_the_guard_sees_masks_that_change_by_themselves(guarded):
    def moved(mask, kernel):
        return jnp.roll(mask, 1), jnp.zeros_like(kernel)

    with refused("masks", "2"):
        look(guarded, moved)
    look(guarded, moved, rewired=True)
