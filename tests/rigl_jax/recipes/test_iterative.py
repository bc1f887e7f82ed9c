"""Pruning in rounds with retraining, and the pruned network trained from scratch."""

import itertools

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import rigl_jax as rx
from rigl_jax import recipes
from tests.errors import refused

KEY = jax.random.key(0)
PARAMS = {"a": jax.random.normal(KEY, (30, 20)), "b": jax.random.normal(jax.random.key(1), (20, 5)), "c": jnp.ones(5)}
PLAN = rx.make_plan(PARAMS, 0.9, rx.uniform)


def same(params, masks, start, stop, key):
    return recipes.Trained(params, (start, stop))


def pruned(rounds, plan=PLAN, params=PARAMS, **given):
    plan_at = recipes.plan_towards(plan, rounds)
    given = {"steps": 0, "retrain_steps": 0, "key": KEY} | given
    return list(recipes.iterative_pruning(same, params, plan_at, rounds=rounds, **given))


@pytest.mark.parametrize("scope", ["layer", "global"])
@pytest.mark.parametrize("rounds", [2, 3, 7])
def test_without_training_rounds_are_one_shot(rounds, scope):
    chex.assert_trees_all_equal(pruned(rounds, scope=scope)[-1].masks, pruned(1, scope=scope)[-1].masks)
    magnitudes = rx.criteria.magnitude
    expected = rx.prune(PLAN, PARAMS, magnitudes, scope=scope).masks
    chex.assert_trees_all_equal(pruned(1, scope=scope)[-1].masks, expected)


def test_each_round_takes_the_same_share():
    for n in (1, 2, 5):
        share = 1 - (1 - 0.9) ** (1 / n)
        tickets = pruned(n)
        assert 1 - (1 - share) ** n == pytest.approx(0.9)
        assert tickets[-1].sparsity == pytest.approx(0.9)
        for ticket in tickets[1:]:
            assert ticket.carry.fraction == pytest.approx(share, abs=0.02)
            assert ticket.carry.sparsity == ticket.sparsity


def test_one_leaf_ranks_as_all_leaves_do():
    plan = rx.make_plan({"a": PARAMS["a"]}, 0.8)
    masks = [pruned(3, plan, {"a": PARAMS["a"]}, scope=scope)[-1].masks for scope in ("layer", "global")]
    chex.assert_trees_all_equal(*masks)


def test_rescaling_adjacent_layers_changes_what_magnitude_keeps():
    """A ReLU network computes the same; scores such as SNIP's do not change, magnitudes do."""
    scaled = {**PARAMS, "a": PARAMS["a"] * 4, "b": PARAMS["b"] / 4}
    masks = [pruned(1, params=params)[-1].masks for params in (PARAMS, scaled)]
    assert int(masks[1]["a"].sum()) > int(masks[0]["a"].sum())


def test_what_retraining_is_told():
    seen = []

    def retrain(r):
        seen.append(r)
        return same

    tickets = pruned(3, retrain=retrain, retrain_steps=[4, 0, 6], steps=20)
    assert [r.level for r in seen] == [1, 3]
    assert [t.aux for t in tickets] == [(0, 20), (0, 4), None, (0, 6)]
    for before, after in itertools.pairwise(tickets):
        drop = recipes.retraining.norm_drop(before.params, rx.apply_masks(before.params, after.masks))
        assert after.carry.norm_drop == drop
        assert 0 < drop / np.sqrt(after.carry.fraction) <= 1
    goes_on = pruned(3, retrain_steps=[4, 5, 6], steps=20)
    assert [t.aux for t in goes_on] == [(0, 20), (20, 24), (24, 29), (29, 35)]


def test_statistics_are_estimated_again_after_each_pruning():
    calls = []

    def reestimate(params, masks):
        calls.append(int(masks["a"].sum()))
        return {**params, "c": params["c"] + 1}

    assert pruned(2, reestimate=reestimate)[-1].params["c"].tolist() == [3.0] * 5
    assert len(calls) == 2


def test_structures_and_surgeons():
    plan = rx.make_plan(PARAMS, 0.5, rx.uniform, rules=[("a", rx.block(5, 5)), ("b", rx.fan_in()), ("c", None)])
    tickets = pruned(2, plan, scope="layer")
    assert tickets[-1].sparsity == pytest.approx(0.5, abs=0.05)

    def doubles(plan, params, masks, batch):
        kept = rx.topology.prune_tree(plan, rx.criteria.magnitude(rx.apply_masks(params, masks)))
        return rx.base.Pruned(rx.apply_masks(jax.tree.map(lambda p: 2 * p, params), kept), kept)

    ticket = pruned(2, criterion=doubles, scope="layer")[-1]
    chex.assert_trees_all_equal(ticket.params["a"], jnp.where(ticket.masks["a"], 4 * PARAMS["a"], 0))


def test_the_pruned_network_from_scratch():
    assert recipes.scratch_steps(160, 1.52, 1.0) == 243
    assert recipes.scratch_steps(90, 1.4, 1.0, cap=2) == 125
    assert recipes.scratch_steps(90, 2.3, 1.0, cap=2) == 180
    assert recipes.scratch_steps(100, 2.5, 1.0) == 250
    init = lambda key: jax.tree.map(lambda p: jax.random.normal(key, p.shape), PARAMS)  # noqa: E731
    masks, lengths = pruned(1)[-1].masks, []

    def train_for(steps):
        lengths.append(steps)
        return same

    scratch = recipes.scratch_control(train_for, init, masks, steps=10, key=KEY)
    longer = recipes.scratch_control(train_for, init, masks, steps=10, key=KEY, costs=(2.5, 1.0), rescale=False)
    assert lengths == [10, 25]
    assert [scratch.aux, longer.aux] == [(0, 10), (0, 25)]
    rx.check_masked(scratch.params, masks)
    fan = jnp.sqrt(masks["a"].size / masks["a"].sum())
    chex.assert_trees_all_close(scratch.params["a"], longer.params["a"] * fan, rtol=1e-6)
    chex.assert_trees_all_equal(scratch.params["c"], longer.params["c"])
    chex.assert_trees_all_equal(longer.params, rx.apply_masks(init(jax.random.fold_in(KEY, 0)), masks))


def test_odd_arguments():
    for given, argument in (
        ({"retrain_steps": [1]}, "retrain_steps"),
        ({"retrain_steps": -1}, "retrain_steps"),
        ({"steps": 0.5}, "steps"),
        ({"retrain": 3}, "retrain"),
        ({"reestimate": 3}, "reestimate"),
        ({"scope": "all"}, "scope"),
        ({"retrain": lambda r: None, "retrain_steps": 3}, "retrain"),
    ):
        with refused("iterative_pruning", argument):
            pruned(2, **given)
    for given, argument in (((0, 1, 1), "steps"), ((10, 0, 1), "dense"), ((10, 1, 2), "pruned")):
        with refused("scratch_steps", argument):
            recipes.scratch_steps(*given)
    with refused("scratch_steps", "cap"):
        recipes.scratch_steps(10, 2, 1, cap=0.5)
    with refused("scratch_control", "costs"):
        recipes.scratch_control(lambda n: same, lambda key: PARAMS, {}, steps=1, key=KEY, costs=3)
    with refused("scratch_control", "train_for"):
        recipes.scratch_control(lambda n: 3, lambda key: PARAMS, pruned(1)[-1].masks, steps=1, key=KEY)
