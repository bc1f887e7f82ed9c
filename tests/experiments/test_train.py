"""Resuming is exact; the number of devices does not matter; what is off stays off."""

import json
import shutil

import jax
import numpy as np
import pytest

from experiments import measure, sharding, task
from experiments import train as train_module
from experiments.loop import evaluate
from experiments.step import cross_entropy
from experiments.train import train
from tests.errors import refused
from tests.experiments.runs import ONE, UNTIMED, assert_close, assert_equal, configured, lines, prepare, restored

CUT = {"execution": "packed", "sharding": sharding.ALL_OUTPUTS, "mesh": {"data": 2, "model": 4}}


def of_masks(run):
    return [line for line in lines(run) if line["kind"] in ("masks", "first_layer")]


def summary(run):
    return {k: v for k, v in json.loads((run / "summary.json").read_text()).items() if k not in UNTIMED}


@pytest.fixture(scope="module")
def straight(tmp_path_factory):
    """An uninterrupted run."""
    run = tmp_path_factory.mktemp("straight") / "run"
    return run, train(configured(), run, devices=ONE)


@pytest.mark.parametrize(
    ("stops", "prepared"),
    [((3,), task.prepare), ((2, 5), prepare)],
    ids=["at a checkpoint, compiled anew", "between lines"],
)
def test_a_resumed_run_equals_a_straight_one_bit_for_bit(stops, prepared, straight, tmp_path, monkeypatch):
    run = tmp_path / "run"
    for stop in stops:
        partial = train(configured(stop_at=stop), run, devices=ONE)
        assert partial["steps"] == stop
        assert not (run / "summary.json").exists()
    monkeypatch.setattr(train_module, "prepare", prepared)
    train(configured(), run, devices=ONE)
    assert lines(run) == lines(straight[0])
    assert summary(run) == summary(straight[0])
    assert_equal(restored(run)[0], restored(straight[0])[0])


def test_a_run_whose_checkpoints_are_lost_starts_anew_and_says_so(straight, tmp_path, caplog):
    run = tmp_path / "run"
    train(configured(stop_at=3), run, devices=ONE)
    assert "starts anew" not in caplog.text
    shutil.rmtree(run / "checkpoints")
    train(configured(), run, devices=ONE)
    assert f"{run} holds a run that was begun, but no checkpoint; it starts anew" in caplog.text
    assert lines(run) == lines(straight[0])


def test_a_finished_run_is_not_repeated(straight):
    run, first = straight
    before = (run / "metrics.jsonl").stat().st_mtime_ns
    assert train(configured(log_every=1), run, devices=ONE) == first
    assert (run / "metrics.jsonl").stat().st_mtime_ns == before


@pytest.mark.parametrize("execution", ["masked", "packed"])
def test_eight_devices_give_the_masks_of_one(execution, straight, tmp_path):
    run = tmp_path / "run"
    train(configured(execution=execution), run, devices=jax.devices()[:8])
    assert of_masks(run) == of_masks(straight[0])
    assert_close(restored(run)[0], restored(straight[0])[0])


@pytest.mark.parametrize(
    "values", [{"mesh": {"data": 4, "model": 2}}, {"sharding": ((".*/kernel", "fsdp"), (".*", "fsdp"))}]
)
def test_packed_weights_are_whole_or_all_cut(values, tmp_path):
    config = configured(execution="packed")
    config.unlock()
    config.update(values)
    with refused("config.execution", *values):
        train(config, tmp_path / "run", devices=jax.devices()[:8])


@pytest.mark.parametrize(
    ("first", "before", "then", "after"),
    [({}, 1, {}, 8), ({"execution": "packed"}, 8, {}, 1), (CUT, 8, {"execution": "packed"}, 8)],
    ids=["masked, one to eight", "packed, eight to one", "packed, cut by outputs, then whole"],
)
def test_a_run_resumes_on_another_number_of_devices(first, before, then, after, straight, tmp_path):
    run = tmp_path / "run"
    train(configured(stop_at=3, **first), run, devices=jax.devices()[:before])
    train(configured(**then), run, devices=jax.devices()[:after])
    assert of_masks(run) == of_masks(straight[0])
    assert_close(restored(run)[0], restored(straight[0])[0])


def test_masks_lines_count_what_happened(straight):
    found = [line for line in lines(straight[0]) if line["kind"] == "masks"]
    assert [line["step"] for line in found] == [0, 1, 3, 5]  # at the start, then after the steps 0, 2 and 4
    assert found[0]["dropped_fraction"] == 0
    assert found[1]["dropped_fraction"] == found[1]["grown_fraction"] > 0
    explored = [line["explored"] for line in found]
    assert explored == sorted(explored)
    assert explored[0] == pytest.approx(1 - found[0]["sparsity"])
    pictures = [line for line in lines(straight[0]) if line["kind"] == "first_layer"]
    assert [(p["step"], p["leaf"]) for p in pictures] == [(0, "Dense_0/kernel"), (6, "Dense_0/kernel")]
    for line, masks in zip(pictures, (found[0], found[-1]), strict=True):
        assert measure.unpack_mask(line).mean() == masks["density"]["Dense_0/kernel"]


def test_seeds_differ_in_weights_data_and_masks():
    tasks = [prepare(configured(seed=seed), ONE) for seed in (0, 1)]
    states = [each.execution.init() for each in tasks]
    kernels = [np.asarray(s.params["Dense_0"]["kernel"]) for s in states]
    masks = [np.asarray(s.opt_state.masks["Dense_0"]["kernel"]) for s in states]
    batches = [next(each.data.train(0))["label"] for each in tasks]
    for pair in (kernels, masks, batches):
        assert not np.array_equal(*pair)
    assert not np.any(kernels[0][~masks[0]])


def test_a_dense_run_has_no_masks_and_learns(tmp_path):
    config = configured(steps=60, eval_every=60, checkpoint_every=0, log_every=60)
    config.method.name = "dense"
    config.dataset.batch_size = 64
    found = train(config, tmp_path / "run", devices=ONE)
    assert found["test_accuracy"] > 0.6
    assert (found["sparsity"], found["final_sparsity"], found["flops_training_x_dense"]) == (0, 0, 1)
    assert found["active_params"] == found["params"]
    assert {line["kind"] for line in lines(tmp_path / "run")} == {"train", "eval"}


def test_a_loss_that_is_not_finite_stops_the_run(tmp_path):
    def huge(task):
        state = task.execution.init()
        return state._replace(params=jax.tree.map(lambda p: jax.device_put(np.asarray(p) * 1e30), state.params))

    with refused("step", error=FloatingPointError):
        train(configured(), tmp_path / "run", devices=ONE, start=huge)


def test_evaluation_counts_every_example_once():
    whole = prepare(configured(), jax.devices()[:8])  # 360 test images are no multiple of 16
    state = whole.execution.init()
    found = evaluate(whole, state)
    images, labels = [], []
    for batch in whole.data.test():
        keep = batch["weight"] > 0
        images.append(batch["image"][keep])
        labels.append(batch["label"][keep])
    logits = whole.model.apply({"params": jax.device_get(state.params)}, np.concatenate(images), train=False)
    logits = np.asarray(logits)
    labels = np.concatenate(labels)
    assert found["accuracy"] == pytest.approx(np.mean(np.argmax(logits, -1) == labels), abs=1e-6)
    assert found["loss"] == pytest.approx(float(cross_entropy(logits, labels).mean()), rel=1e-5)


def test_label_smoothing_by_hand():
    logits = np.log(np.array([[0.7, 0.2, 0.1]], np.float32))
    expected = -(0.8 * np.log(0.7) + 0.1 * np.log(0.2) + 0.1 * np.log(0.1))
    assert float(cross_entropy(logits, np.array([0]), 0.3)[0]) == pytest.approx(expected, rel=1e-5)
