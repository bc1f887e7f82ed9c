"""COLT, FreeTickets and Sup-Tickets against closed forms and inequalities that hold exactly."""

import itertools

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen

import rigl_jax as rx
from rigl_jax import diagnostics, recipes
from tests.errors import refused

KEY = jax.random.key(0)


def draws(params, masks, start, stop, key):
    """Weights that say nothing about those before: scores of different parts are independent."""
    drawn = jax.tree.map(
        lambda name, p: jax.random.normal(rx.trees.leaf_key(key, name), p.shape), rx.trees.names(params), params
    )
    return recipes.Trained(rx.apply_masks(drawn, masks))


def always(params, masks, start, stop, key):
    return draws(params, masks, start, stop, KEY)


def colt(trains, params, sparsity=0.991, rate=0.15, **given):
    plan = rx.make_plan(params, sparsity, rx.uniform)
    return list(recipes.colt(trains, params, plan, rounds=40, steps=1, key=KEY, rate=rate, **given))


def test_independent_halves_need_half_the_rounds():
    """15 where a lottery needs 29: density is multiplied by 0.85^2 = 0.7225 a round."""
    tickets = colt([draws, draws], {"w": jnp.ones((200, 250))})
    assert tickets[-1].level == 15
    for before, after in itertools.pairwise(tickets):
        left = (1 - after.sparsity) / (1 - before.sparsity)
        assert 1 - 2 * 0.15 - 1e-3 <= left <= 1 - 0.15
        if after.level < 10:
            assert left == pytest.approx(0.7225, abs=0.01)


@pytest.mark.parametrize("scope", ["layer", "global"])
def test_parts_that_agree_are_a_lottery(scope):
    params = {"a": jnp.ones((30, 20)), "b": jnp.ones((20, 10))}
    plan = rx.make_plan(params, 0.5, rx.uniform)
    found = colt([always, always], params, 0.5, 0.2, scope=scope)
    plan_at = recipes.plan_by_rate(plan, 0.2)
    tickets = recipes.lottery_ticket(always, params, plan_at, levels=3, steps=1, key=KEY, scope=scope)
    for ours, other in zip(found[:3], tickets, strict=False):
        chex.assert_trees_all_equal(ours.masks, other.masks)
    assert found[-1].sparsity == 0.5  # the last round takes less, to end at the target
    chex.assert_trees_all_equal(found[-1].params, rx.apply_masks(params, found[-1].masks))


def test_class_parts():
    labels = np.arange(60) % 10
    parts = recipes.class_parts(labels, 3)
    assert [sorted({*labels[part].tolist()}) for part in parts] == [[0, 1, 2, 3], [4, 5, 6], [7, 8, 9]]
    assert sorted(np.concatenate(parts).tolist()) == list(range(60))
    for given, argument in ((([0.5], 1), "labels"), (([[1]], 1), "labels"), (([-1], 1), "labels"), (([0, 1], 3), "n")):
        with refused("class_parts", argument):
            recipes.class_parts(*given)


PARAMS = {"w": jax.random.normal(KEY, (20, 30)), "b": jnp.zeros(30)}
PLAN = rx.make_plan(PARAMS, 0.8)
MASKS = rx.topology.random_masks(PLAN, KEY, PARAMS)
X, Y = jax.random.normal(jax.random.key(5), (50, 20)), jnp.arange(50) % 30


def apply(params, x):
    return x @ params["w"] + params["b"][None]


def stays(params, masks, start, stop, key):
    return recipes.Trained(params, masks=masks)


def edst(**given):
    given = {"members": 3, "explore": 10, "refine": 10, "key": KEY} | given
    return list(recipes.edst(stays, PARAMS, MASKS, PLAN, **given))


def test_an_ensemble_is_no_worse_than_its_members_on_average():
    members = list(recipes.free_tickets(draws, lambda key: PARAMS, PLAN, members=4, steps=1, key=KEY))
    probs = [jax.nn.softmax(apply(ticket.params, X)) for ticket in members]
    together = recipes.ensemble(apply, members)(X)
    np.testing.assert_allclose(together, np.mean(probs, axis=0), rtol=1e-5)
    assert float(diagnostics.nll(together, Y)) <= np.mean([diagnostics.nll(p, Y) for p in probs])
    assert float(diagnostics.brier(together, Y)) <= np.mean([diagnostics.brier(p, Y) for p in probs])
    np.testing.assert_allclose(recipes.ensemble(apply, members[:1])(X), probs[0], rtol=1e-6)
    chex.assert_trees_all_equal(*[[int(mask.sum()) for mask in jax.tree.leaves(t.masks)] for t in members[:2]])


@pytest.mark.parametrize("fraction", [0.0, 0.3, 0.8])
def test_an_escape_moves_as_many_weights_as_it_says(fraction):
    last, following = edst(fraction=fraction)[:2]
    n = PLAN["w"].n_active
    dropped = int(fraction * n)
    both = last.masks["w"] & following.masks["w"]
    assert int(following.masks["w"].sum()) == n
    assert n - dropped <= int(both.sum()) <= n
    strongest = rx.topology.select(jnp.abs(last.params["w"]), n - dropped, among=last.masks["w"])
    np.testing.assert_array_equal(following.params["w"], jnp.where(strongest, last.params["w"], 0))
    if fraction:
        assert float(diagnostics.mask_overlap(last.masks, following.masks)) < 1


def test_an_escape_grows_where_it_is_told():
    scores = {"w": jnp.zeros((20, 30)).at[0].set(1.0), "b": jnp.zeros(30)}
    after = recipes.escape(PLAN, PARAMS, MASKS, KEY, fraction=0.5, grow=lambda params, batch: batch, batch=scores)
    assert after.masks["w"][0].all()
    with refused("escape", "fraction"):
        recipes.escape(PLAN, PARAMS, MASKS, KEY, fraction=1.5)
    with refused("escape", "w"):
        recipes.escape(rx.make_plan(PARAMS, 0.9), PARAMS, MASKS, KEY)


def test_superposed_networks():
    networks = [jax.tree.map(lambda p, i=i: p * (i + 1) ** 2, PARAMS) for i in range(5)]
    average, faded = networks[0], networks[0]
    for n, network in enumerate(networks[1:], 1):
        average = recipes.superpose(average, network, n)
        faded = recipes.superpose(faded, network, n, rule="cima", beta=0.25)
    chex.assert_trees_all_close(average, jax.tree.map(lambda *p: sum(p) / 5, *networks), rtol=1e-5)
    weights = [0.75**4, *[0.25 * 0.75 ** (4 - n) for n in range(1, 5)]]
    expected = jax.tree.map(lambda *p: sum(w * x for w, x in zip(weights, p, strict=True)), *networks)
    chex.assert_trees_all_close(faded, expected, rtol=1e-5)
    for rule in ("caa", "cima"):
        chex.assert_trees_all_equal(recipes.superpose(PARAMS, PARAMS, 3, rule=rule), PARAMS)
    counted = recipes.superpose({"n": jnp.array(3), "w": jnp.ones(2)}, {"n": jnp.array(7), "w": jnp.ones(2)}, 1)
    assert counted["n"] == 7


def sup(train, **given):
    given = {"tickets": 3, "start": 90, "cycle": 10, "key": KEY} | given
    return list(recipes.sup_tickets(train, PARAMS, MASKS, PLAN, **given))


@pytest.mark.parametrize("scope", ["layer", "global"])
@pytest.mark.parametrize("rule", ["caa", "cima"])
def test_averages_are_pruned_to_the_plan(rule, scope):
    tickets = sup(draws, rule=rule, scope=scope)
    for before, after in itertools.pairwise(tickets):
        merged = recipes.superpose(before.params, after.carry.params, after.level, rule=rule)
        assert PLAN["w"].n_active < int((merged["w"] != 0).sum()) <= 2 * PLAN["w"].n_active
        expected = rx.prune(PLAN, merged)
        chex.assert_trees_all_equal((after.params, after.masks), tuple(expected))
        assert int(after.masks["w"].sum()) == PLAN["w"].n_active


def test_equal_tickets_superpose_to_themselves():
    tickets = sup(stays, fraction=0.0)
    for ticket in tickets:
        chex.assert_trees_all_equal(ticket.params, rx.apply_masks(PARAMS, MASKS))


def test_a_convex_loss_of_the_average_is_at_most_the_average_loss():
    tickets = sup(draws, fraction=0.0)
    loss = lambda params: float(diagnostics.nll(jax.nn.softmax(apply(params, X)), Y))  # noqa: E731
    networks = [ticket.carry.params for ticket in tickets]
    average = networks[0]
    for n, network in enumerate(networks[1:], 1):
        average = recipes.superpose(average, network, n)
    assert loss(average) <= np.mean([loss(network) for network in networks])


class Normed(linen.Module):
    """A layer, its batch statistics, and a layer on them."""

    @linen.compact
    def __call__(self, x, train=False):
        x = linen.Dense(20)(x)
        return linen.Dense(20)(linen.relu(linen.BatchNorm(not train, momentum=0.0)(x)))


def test_batch_statistics_of_averages_are_estimated_again():
    """After every merge those of the averaged and pruned network, which an average of statistics is not."""
    net = Normed()
    variables = dict(jax.jit(net.init)(KEY, X))
    plan = rx.make_plan(variables, 0.5)
    masks = rx.topology.random_masks(plan, KEY, variables)

    def reestimate(params, masks):
        return params | net.apply(params, X, train=True, mutable=["batch_stats"])[1]

    @jax.jit
    def waves(params, masks, phase):
        moved = jax.tree.map(lambda p: p + jnp.cos(phase + jnp.arange(p.size)).reshape(p.shape), params)
        return rx.apply_masks(moved, masks)

    train = lambda params, masks, start, stop, key: recipes.Trained(waves(params, masks, stop))  # noqa: E731
    given = {"tickets": 2, "start": 90, "cycle": 10, "key": KEY}
    stale, tickets = (
        list(recipes.sup_tickets(train, variables, masks, plan, reestimate=how, **given)) for how in (None, reestimate)
    )
    for ticket, average in zip(tickets[1:], stale[1:], strict=True):
        chex.assert_trees_all_equal(ticket.params["params"], average.params["params"])
        layer, found = ticket.params["params"]["Dense_0"], ticket.params["batch_stats"]["BatchNorm_0"]
        hidden = np.asarray(X) @ np.asarray(layer["kernel"]) + np.asarray(layer["bias"])
        np.testing.assert_allclose(found["mean"], hidden.mean(0), atol=1e-5)
        np.testing.assert_allclose(found["var"], hidden.var(0), rtol=1e-4)
        assert np.abs(average.params["batch_stats"]["BatchNorm_0"]["mean"] - hidden.mean(0)).max() > 0.1
    carried, kept = tickets[-1].carry.params["batch_stats"], stale[-1].carry.params["batch_stats"]
    chex.assert_trees_all_equal(carried, kept)  # the run goes on with its own


def test_schedules_of_cycles():
    rates = recipes.edst_rates(lambda step: 0.1, 30, 10)
    found = np.asarray(jax.vmap(rates)(jnp.arange(50)))
    np.testing.assert_allclose(found, [0.1] * 30 + ([0.01] * 5 + [0.001] * 5) * 2, rtol=1e-6)
    rates = recipes.retraining.triangular(0.001, 0.005, 8)
    found = np.asarray(jax.vmap(rates)(jnp.arange(17)))
    assert (found[[0, 8, 16]] == np.float32(0.001)).all()
    assert found.argmax() == 4


def test_odd_arguments():
    for given, argument in (
        ({"members": 0}, "members"),
        ({"refine": 0}, "refine"),
        ({"fraction": -0.1}, "fraction"),
        ({"grow": 3}, "grow"),
    ):
        with refused("edst", argument):
            edst(**given)
    for given, argument in (
        ({"tickets": 0}, "tickets"),
        ({"rule": "mean"}, "rule"),
        ({"beta": 2.0}, "beta"),
        ({"scope": "all"}, "scope"),
        ({"reestimate": 3}, "reestimate"),
    ):
        with refused("sup_tickets", argument):
            sup(stays, **given)
    for given, argument in (((PARAMS, {}, 1), "new"), ((PARAMS, PARAMS, 0), "n")):
        with refused("superpose", argument):
            recipes.superpose(*given)
    with refused("ensemble", "tickets"):
        recipes.ensemble(apply, [])
    with refused("colt", "trains"):
        colt(draws, PARAMS)
    with refused("colt", "rate"):
        colt([draws], PARAMS, rate=0)
    with refused("colt", "plan"):
        plan = rx.make_plan(PARAMS, 0.5, rules=[("w", rx.fan_in()), ("b", None)])
        recipes.colt([draws], PARAMS, plan, rounds=1, steps=1, key=KEY)
    with refused("colt", "w"):
        up = lambda params, masks, *_: recipes.Trained(rx.apply_masks({"w": jnp.arange(10.0)[:, None]}, masks))  # noqa: E731
        down = lambda params, masks, *_: recipes.Trained(rx.apply_masks({"w": -jnp.arange(10.0)[::-1, None]}, masks))  # noqa: E731
        small = {"w": jnp.ones((10, 1))}
        plan = rx.make_plan(small, 0.9)
        list(recipes.colt([up, down], small, plan, rounds=1, steps=1, key=KEY, rate=0.6))
