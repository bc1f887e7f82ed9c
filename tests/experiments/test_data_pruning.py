"""`config.data_pruning`: which examples a run trains on, that it resumes bit for bit, and what is refused."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import rigl_jax as rx
from experiments import build, data, data_pruning, feeding, loop, resuming
from experiments.train import train
from tests.errors import refused
from tests.experiments.runs import ONE, assert_equal, configured, lines, prepare, restored
from tests.test_bad_input import changed


def pruned(name, *, stop_at=0, **options):
    config = configured(stop_at=stop_at)
    with config.unlocked():
        config.data_pruning = {"name": name, **options}
    return config


WEIGHTED = {"keep": 0.3, "period": 2, "weights": True, "epsilon": 0.5}


def test_a_resumed_run_equals_a_straight_one(tmp_path):
    """Stopped within a period: what is chosen, and what is known of the losses, comes from the checkpoint.

    tests/experiments/test_train.py changes the execution and the devices at a resume.
    """
    summary = train(pruned("ucb", **WEIGHTED), tmp_path / "whole", devices=ONE)
    for stop_at in (3, 0):
        train(pruned("ucb", stop_at=stop_at, **WEIGHTED), tmp_path / "run", devices=ONE)
    expected = restored(tmp_path / "whole")[0]
    assert_equal(restored(tmp_path / "run")[0], expected)
    assert lines(tmp_path / "run") == lines(tmp_path / "whole")
    assert (summary["data_pruning"], summary["examples"]) == ("ucb", 431)
    assert summary["examples"] == np.count_nonzero(expected.examples.weight)
    assert 5 * 16 < int(expected.examples.stats.seen.sum()) <= 6 * 16  # those without a loss come first


def test_the_hardest_of_all_examples_are_trained_on():
    task = prepare(pruned("el2n", keep=0.1, start=1), ONE)
    feed, state = feeding.open_feed(task), loop.init(task)
    state, _ = feed(0, state)
    np.testing.assert_array_equal(state.examples.weight, 1)
    state, batch = feed(1, state)
    whole = list(task.data.ordered())
    images, labels, weight = (np.concatenate([b[name] for b in whole]) for name in ("image", "label", "weight"))
    logits = jnp.asarray(task.model.apply({"params": state.params}, images[weight > 0], train=False))
    scores = np.asarray(rx.coreset.el2n(logits, jnp.asarray(labels[weight > 0])))
    used = np.asarray(state.examples.weight) > 0
    assert used.sum() == 143
    assert scores[used].min() >= scores[~used].max() - 1e-6
    assert used[np.asarray(batch["index"])].all()


def test_scores_are_counted_in_flops_and_losses_of_steps_are_not():
    one = 1437  # examples
    for name, options, expected in (
        ("el2n", {"keep": 0.1, "start": 2, "period": 2}, 2 * one),  # before the steps 2 and 4 of 6
        ("grand", {"keep": 0.1, "start": 2}, 3 * one),
        ("forgetting", {"keep": 0.1, "start": 2}, 0),
        ("random", {"keep": 0.1, "period": 2}, 0),
        ("none", {}, 0),
    ):
        assert feeding.scored(prepare(pruned(name, **options), ONE)) == expected


def test_a_part_is_read_pass_by_pass_in_an_order_of_its_own():
    part = np.arange(5, 105, 3)  # 34 examples, two batches of 16 a pass
    read = data.load("digits", 16, seed=0).train
    orders = []
    for since in (7, 10):
        batches = read(since, part, since)
        passes = [np.concatenate([next(batches)["index"] for _ in range(2)]) for _ in range(3)]
        assert all(len(set(each)) == 32 and set(each) <= set(part) for each in passes)
        np.testing.assert_array_equal(next(read(since + 3, part, since))["index"], passes[1][16:])
        orders.append(tuple(passes[0]))
    assert len(set(orders)) == 2


@pytest.mark.parametrize("start", [0, 3])
@pytest.mark.parametrize("period", [0, 4])
def test_when_examples_are_chosen(start, period):
    due = data_pruning.random(20, keep=0.5, period=period, start=start).due
    assert [step for step in range(12) if due(step)] == (list(range(start, 12, 4)) if period else [start])


def test_what_is_observed_decides():
    """Losses by their weight; forgetting events with ties in random order; a loss that is not finite tells nothing."""
    greedy = data_pruning.epsilon_greedy(8, keep=0.5, period=1, weights=True, epsilon=0.5)
    examples = jax.jit(greedy.observe)(greedy.init(), np.arange(8), np.arange(8, dtype=np.float32), np.ones(8, bool))
    chosen = jax.jit(lambda examples, key: greedy.choose(examples, None, key).weight)(examples, jax.random.key(0))
    np.testing.assert_array_equal(chosen[6:], 0.5)  # sure to be chosen: 4 / 8
    assert sorted(chosen[:6].tolist()) == [0, 0, 0, 0, 1.5, 1.5]  # 2 of 6
    np.testing.assert_allclose(greedy.weigh(examples._replace(weight=chosen), np.array([7]), np.ones(1, "f")), 0.5)
    forgetting = data_pruning.forgetting(4, keep=0.25, start=1)
    state = forgetting.init()
    observe = jax.jit(forgetting.observe)
    for right, loss in ((True, 1.0), (False, np.nan), (False, 1.0), (True, 1.0)):
        state = observe(state, np.arange(4), np.array([loss, 1, 1, 1], "f"), np.array([right, True, True, True]))
    assert state.stats.events.tolist() == [1, 0, 0, 0]
    keys = jax.random.split(jax.random.key(0), 6)
    each = jax.jit(jax.vmap(lambda examples, key: forgetting.choose(examples, None, key).weight, (None, 0)))
    np.testing.assert_array_equal(each(state, keys)[0], [1, 0, 0, 0])
    assert len(set(each(forgetting.init(), keys).argmax(axis=1).tolist())) > 1


def test_the_examples_of_a_file(tmp_path):
    np.save(tmp_path / "kept.npy", np.array([3, 1]))
    (tmp_path / "kept.txt").write_text("3\n1\n")
    for name in ("kept.npy", "kept.txt"):
        found = data_pruning.from_file(5, path=str(tmp_path / name))
        assert (found.kept, found.due(0), found.due(1)) == (2, True, False)
        np.testing.assert_array_equal(found.choose(found.init(), None, jax.random.key(0)).weight, [0, 1, 0, 1, 0])
    np.save(tmp_path / "twice.npy", np.array([3, 3]))
    np.save(tmp_path / "half.npy", np.array([0.5]))
    (tmp_path / "text.txt").write_text("one\n")
    for name in ("twice.npy", "half.npy", "text.txt", "none.npy"):
        with refused("path", name):
            data_pruning.from_file(5, path=str(tmp_path / name))
    with refused("path", "3"):
        data_pruning.from_file(3, path=str(tmp_path / "kept.npy"))


@pytest.mark.parametrize(
    ("section", "named"),
    [
        ({"name": "ucbb"}, "ucbb ucb"),
        ({"name": "random", "period": 2}, "random keep"),
        ({"name": "random", "keep": 0.3, "perod": 2}, "perod period"),
        ({"name": "random", "keep": 0, "period": 2}, "keep"),
        ({"name": "random", "keep": 0.3, "period": 1.5}, "period"),
        ({"name": "ucb", "keep": 0.3, "period": 2, "weights": True}, "weights epsilon"),
        ({"name": "ucb", "keep": 0.3, "period": 2, "weights": "yes"}, "weights"),
        ({"name": "epsilon_greedy", "keep": 0.3, "period": 2, "epsilon": 2.0}, "epsilon"),
        ({"name": "el2n", "keep": 0.3, "start": 0}, "start"),
        ({"name": "grand", "keep": 0.5, "start": 2, "offset": 0.6}, "offset"),
        ({"name": "file", "path": 1}, "path"),
    ],
)
def test_a_wrong_value_is_named_with_its_section(section, named):
    with refused("config.data_pruning", *named.split()):
        build.check(changed(data_pruning=section))


def test_what_only_the_data_can_tell_is_named():
    with refused("config.data_pruning", "batch_size"):
        prepare(pruned("random", keep=0.01, period=2), ONE)
    with refused("config.data_pruning"):
        prepare(pruned("random", keep=0.5, period=2), ONE, subset=np.arange(100))


def test_configs_of_earlier_versions_are_read():
    earlier = changed(data_pruning=...)
    assert build.check(earlier) == build.check(changed())
    assert resuming.differences(earlier, changed()) == []
    assert resuming.differences(earlier, build.check(pruned("random", keep=0.3, period=2)))
