"""Lottery tickets, their controls and their schedules of counts, against the definition."""

import itertools
import math

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import rigl_jax as rx
from rigl_jax import recipes
from tests.errors import refused

KEY = jax.random.key(0)
PARAMS = {
    "a": jax.random.normal(jax.random.key(1), (16, 24)),
    "b": jax.random.normal(jax.random.key(2), (24, 8)),
    "bias": jnp.zeros(8),
}
PLAN = rx.make_plan(PARAMS, 0.5, rx.uniform)
PLAN_AT = recipes.plan_by_rate(PLAN)


def train(params, masks, start, stop, key):
    """Each step moves active weights by amounts of its own; resumed at any step it gives the same bits."""
    for step in range(start, stop):
        params = one_step(params, masks, step)
    return recipes.Trained(params)


@jax.jit
def one_step(params, masks, step):
    move = lambda name, p: p + 0.1 * jax.random.normal(rx.trees.leaf_key(jax.random.key(step), name), p.shape)  # noqa: E731
    return rx.apply_masks(jax.tree.map(move, rx.trees.names(params), params), masks)


def lottery(**given):
    return list(recipes.lottery_ticket(train, PARAMS, PLAN_AT, **({"levels": 4, "steps": 6, "key": KEY} | given)))


def counts(masks):
    return [int(mask.sum()) for mask in jax.tree.leaves(masks)]


@pytest.mark.parametrize("k", [0, 2])
def test_rewound_weights_are_those_of_the_dense_run(k):
    full = rx.topology.full_masks(PLAN, PARAMS)
    at_k, dense = train(PARAMS, full, 0, k, KEY).params, train(PARAMS, full, 0, 6, KEY).params
    tickets = lottery(rewind_to=k)
    chex.assert_trees_all_equal(tickets[0].params, dense)
    for ticket in tickets:
        chex.assert_trees_all_equal(ticket.carry, rx.apply_masks(at_k, ticket.masks))
        expected = train(ticket.carry, ticket.masks, k, 6, KEY).params
        chex.assert_trees_all_equal(ticket.params, expected)
    for before, after in itertools.pairwise(tickets):
        aim = PLAN_AT(after.level)
        magnitudes = rx.criteria.magnitude(before.params)
        best = rx.prune(aim, before.params, lambda p, _: magnitudes, scope="global", masks=before.masks).masks
        chex.assert_trees_all_equal(after.masks, best)


def test_no_levels_is_the_dense_run():
    (ticket,) = lottery(levels=0)
    chex.assert_trees_all_equal(ticket.params, train(PARAMS, ticket.masks, 0, 6, KEY).params)
    assert ticket.sparsity == 0


def test_density_falls_by_a_fifth_each_level():
    for ticket in lottery():
        assert abs((1 - ticket.sparsity) - 0.8**ticket.level) <= 2 * ticket.level / (16 * 24 + 24 * 8)


def test_learning_rate_rewinding_keeps_the_weights():
    tickets = lottery(rewind="learning_rate", rewind_to=2)
    for before, after in itertools.pairwise(tickets):
        start = rx.apply_masks(before.params, after.masks)
        chex.assert_trees_all_equal(after.params, train(start, after.masks, 2, 6, KEY).params)
        assert after.carry is None


@pytest.mark.parametrize("rate", [0.15, 0.2, 0.5])
def test_a_plan_by_rate_takes_the_ceiling_of_what_is_left(rate):
    plan_at, n = recipes.plan_by_rate(PLAN, rate), 384
    for level in range(30):
        assert plan_at(level)["a"].n_active == n
        n = max(1, n - math.ceil(round(rate * n, 6)))


def test_rounds_of_a_lottery_to_the_sparsity_of_colt():
    """29 at a rate of 0.15, as 0.85^29 is the first power below 0.9 %."""
    plan_at = recipes.plan_by_rate(rx.make_plan({"w": jnp.ones((1000, 1000))}, 0.5), 0.15)
    assert min(level for level in range(40) if plan_at(level)["w"].n_active <= 0.009e6) == 29


def test_controls_have_the_counts_of_the_ticket():
    ticket = lottery()[-1]
    shuffled = recipes.shuffle_masks(PLAN, ticket.masks, KEY)
    assert counts(shuffled) == counts(ticket.masks)
    assert not np.array_equal(shuffled["a"], ticket.masks["a"])
    one_sided = {name: jnp.full(layer.shape, name == "a") for name, layer in PLAN.items()}
    everywhere = counts(recipes.shuffle_masks(PLAN, one_sided, KEY, scope="global"))
    assert sum(everywhere) == 384
    assert min(everywhere) > 100
    drawn = recipes.reinitialise(lambda key: jax.tree.map(lambda p: 1 + jnp.abs(p), PARAMS), ticket.masks, KEY)
    assert [int((drawn[name] != 0).sum()) for name in "ab"] == counts(ticket.masks)
    assert (drawn["bias"] == 1).all()


@pytest.mark.parametrize("structure", [rx.n_of_m(2, 4, axis=0), rx.fan_in(), rx.block(4, 4), rx.channel()])
def test_shuffled_masks_keep_their_structure(structure):
    plan = rx.make_plan(PARAMS, 0.5, rx.uniform, rules=[("[ab]", structure), (".*", None)])
    masks = rx.topology.random_masks(plan, KEY, PARAMS)
    shuffled = recipes.shuffle_masks(plan, masks, jax.random.key(3))
    before, after = (rx.topology.count_groups("test", plan, m) for m in (masks, shuffled))
    chex.assert_trees_all_equal(before, after)
    assert not np.array_equal(shuffled["a"], masks["a"])


def test_every_place_is_as_likely_in_a_shuffled_mask():
    plan = rx.make_plan({"w": jnp.ones((4, 4))}, 0.75)
    masks = rx.topology.random_masks(plan, KEY, {"w": jnp.ones((4, 4))})
    drawn = sum(
        np.asarray(recipes.shuffle_masks(plan, masks, jax.random.key(i))["w"], np.float64).ravel() for i in range(100)
    )
    assert ((drawn - 25) ** 2 / 25).sum() < 38  # chi-squared, 15 degrees, 99.9 %


def test_odd_arguments():
    for given, argument in (
        ({"levels": -1}, "levels"),
        ({"steps": 0}, "steps"),
        ({"rewind_to": 6}, "rewind_to"),
        ({"rewind": "rate"}, "rewind"),
        ({"scope": "all"}, "scope"),
        ({"criterion": 3}, "criterion"),
    ):
        with refused("lottery_ticket", argument):
            lottery(**given)
    with refused("lottery_ticket", "plan_at"):
        recipes.lottery_ticket(train, PARAMS, lambda level: None, levels=1, steps=1, key=KEY)
    with refused("lottery_ticket", "train"):
        list(recipes.lottery_ticket(lambda *_: PARAMS, PARAMS, PLAN_AT, levels=1, steps=1, key=KEY))
    with refused("lottery_ticket", "train"):
        other = recipes.Trained({"a": PARAMS["a"]})
        list(recipes.lottery_ticket(lambda *_: other, PARAMS, PLAN_AT, levels=1, steps=1, key=KEY))
    with refused("a"):  # weights off the masks
        unmasked = lambda params, *_: recipes.Trained(jax.tree.map(lambda p: p + 1, params))  # noqa: E731
        list(recipes.lottery_ticket(unmasked, PARAMS, PLAN_AT, levels=1, steps=1, key=KEY))
    for function, argument, call in (
        ("plan_by_rate", "rate", lambda: recipes.plan_by_rate(PLAN, 1.0)),
        ("plan_towards", "rounds", lambda: recipes.plan_towards(PLAN, 0)),
        ("plan_towards", "plan", lambda: recipes.plan_towards({}, 1)),
        ("shuffle_masks", "scope", lambda: recipes.shuffle_masks(PLAN, {}, KEY, scope="all")),
        ("shuffle_masks", "masks", lambda: recipes.shuffle_masks(PLAN, {"a": None}, KEY)),
        ("reinitialise", "init", lambda: recipes.reinitialise(PARAMS, {}, KEY)),
    ):
        with refused(function, argument):
            call()
