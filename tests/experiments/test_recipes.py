"""A recipe in run directories: interrupted anywhere and started again, it gives the same bits."""

import chex
import jax
import numpy as np
import pytest
from optax.tree_utils import tree_get_all_with_path

import rigl_jax as rx
from experiments import recipes
from tests.errors import refused
from tests.experiments.runs import ONE, configured, lines, prepare

KEY = jax.random.key(0)


def config():
    found = configured()
    found.method.name = "static"
    return found


def lottery(folder, **given):
    train, network = recipes.runs(folder, devices=ONE, **given)(config()), recipes.first_network(config(), ONE)
    plan_at = rx.recipes.plan_by_rate(rx.make_plan(network, 0.5))
    return rx.recipes.lottery_ticket(train, network, plan_at, levels=1, steps=6, rewind_to=2, key=KEY)


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    folder = tmp_path_factory.mktemp("whole")
    return folder, list(lottery(folder))


def test_levels_are_ordinary_run_directories(whole):
    folder, tickets = whole
    assert sorted(path.name for path in folder.iterdir()) == [f"run_{i:03d}" for i in range(3)]
    for number, ticket in enumerate(tickets, 1):
        found = lines(folder / f"run_{number:03d}")
        assert ticket.aux["steps"] == 6
        assert ticket.aux["final_sparsity"] == pytest.approx(ticket.sparsity, abs=1e-6)
        # steps 2 to 5; the rate of the whole run, whose cosine ends at step 6
        assert max(line["step"] for line in found) == 6
        rates = {line["step"]: line["learning_rate"] for line in found if "learning_rate" in line}
        peak = config().schedule.peak
        assert rates == pytest.approx({s: peak * (1 + np.cos(np.pi * (s - 1) / 6)) / 2 for s in rates}, rel=1e-4)
        assert rates


def test_interrupted_anywhere_it_gives_the_same_bits(whole, tmp_path):
    folder, tickets = whole
    stops = iter([1, 4, 5])
    for _ in range(3):  # in the first run, then in the next, then in the last
        at = next(stops)
        with pytest.raises(recipes.Interrupted):
            list(lottery(tmp_path, interrupted=lambda step, at=at: step == at))
    found = list(lottery(tmp_path))
    for ours, other in zip(found, tickets, strict=True):
        chex.assert_trees_all_equal(ours._replace(aux=None), other._replace(aux=None))
        assert ours.aux["test_accuracy"] == other.aux["test_accuracy"]
    for number in range(3):
        assert lines(tmp_path / f"run_{number:03d}") == lines(folder / f"run_{number:03d}")
    again = list(lottery(folder))  # read, not trained
    chex.assert_trees_all_equal([t.params for t in again], [t.params for t in tickets])


@pytest.mark.parametrize(("optimizer", "method", "updates"), [("sgd", "static", 4), ("adamw", "rigl", 2)])
def test_a_rewound_run_has_the_learning_rate_of_its_step(optimizer, method, updates):
    """Rewirings at steps 0 and 2 update no weights. Adam's own clock, which belongs to its moments, starts at 0."""
    found = configured()
    found.optimizer.name, found.method.name = optimizer, method
    task, network = prepare(found, ONE), recipes.first_network(found, ONE)
    masks = rx.topology.full_masks(rx.make_plan(network, 0.5), network)
    state = recipes._state(task, network, masks, 4)
    counts = {path[-1].tuple_name: int(n) for path, n in tree_get_all_with_path(state.opt_state, "count")}
    assert int(state.step) == int(state.opt_state.step) == 4
    assert counts.pop("ScaleByScheduleState") == updates
    assert {*counts.values()} <= {0}


def test_a_folder_of_another_recipe_is_refused(whole):
    train, network = recipes.runs(whole[0], devices=ONE)(config()), recipes.first_network(config(), ONE)
    masks = rx.topology.full_masks(rx.make_plan(network, 0.5), network)
    with refused("run_000"):
        train(jax.tree.map(lambda p: p + 1, network), masks, 0, 2, KEY)
