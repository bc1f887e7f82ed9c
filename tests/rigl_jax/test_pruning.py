"""`prune` beyond what every criterion keeps: surgeons, given masks, and fine-tuning by `static`."""

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import rigl_jax as rx
from rigl_jax.pruning import schedule_rounds
from tests.errors import refused

PARAMS = {"a": jnp.arange(1.0, 25.0).reshape(4, 6), "b": jnp.linspace(-3.0, 3.0, 24).reshape(6, 4), "bias": jnp.ones(4)}
PLAN = rx.make_plan(PARAMS, 0.5, rx.uniform)
FAN_IN = rx.make_plan(PARAMS, 0.5, rx.uniform, rules=[("a", rx.fan_in()), ("b", rx.block(2, 2)), ("bias", None)])
KEY = jax.random.key(0)


def halves(plan, params, masks, batch):
    """A surgeon: prunes by magnitude and doubles what is left."""
    after = rx.prune(plan, params, masks=masks)
    return after._replace(params=jax.tree.map(lambda p: 2 * p, after.params))


def counts(first, last, rounds):
    plan = {"w": rx.make_plan({"w": jnp.ones((1, first))}, 0.0)["w"]._replace(n_active=last)}
    return schedule_rounds("me", rx.topology.ranking("me", plan), rounds).counts["w"]


def test_counts_fall_geometrically_and_end_exactly():
    assert counts(10_000, 1000, 4).tolist() == [5623, 3162, 1778, 1000]
    for last in (1, 37, 9999, 10_000):
        found = counts(10_000, last, 100)
        assert found[-1] == last
        assert (np.diff(found) <= 0).all()


@pytest.mark.parametrize("rounds", [1, 2])
def test_nan_scores_are_refused_by_leaf_and_rank_lowest_under_jit(rounds):
    def spoiled(params, batch):
        return {**params, "b": params["b"].at[0, 0].set(batch)}

    prune = lambda nan: rx.prune(PLAN, PARAMS, spoiled, nan, rounds=rounds)  # noqa: E731
    with refused("prune", "criterion", "'b'"):
        prune(jnp.nan)
    assert not jax.jit(prune)(jnp.nan).masks["b"][0, 0]
    gone = jax.tree.map(lambda mask: mask.at[0, 0].set(False), {n: jnp.ones(PARAMS[n].shape, bool) for n in "ab"})
    rx.prune(PLAN, PARAMS, spoiled, jnp.nan, masks={**gone, "bias": None})  # that weight is gone and cannot compete


def test_a_criterion_in_numpy_cannot_rank_in_rounds():
    in_numpy = lambda params, batch: jax.tree.map(lambda p: np.abs(np.asarray(p)), params)  # noqa: E731
    chex.assert_trees_all_equal(rx.prune(PLAN, PARAMS, in_numpy).masks, rx.prune(PLAN, PARAMS).masks)
    with refused("criterion", "rounds"):
        rx.prune(PLAN, PARAMS, in_numpy, rounds=2)


def test_a_criterion_names_the_batch_that_it_lacks_or_cannot_read():
    plan, params, x = rx.make_plan({"w": jnp.ones((4, 3))}, 0.5), {"w": jnp.ones((4, 3))}, jnp.ones((2, 4))
    apply = lambda p, x: x @ p["w"]  # noqa: E731
    loss = lambda p, batch: jnp.mean((apply(p, batch[0]) - batch[1]) ** 2)  # noqa: E731
    as_linen = lambda p, x: x @ p["w"][: np.shape(x)[-1]]  # noqa: E731  # reads the shape of whatever it is given
    made = {"wanda": as_linen, **dict.fromkeys(("nnrelief", "synflow", "sparsegpt"), apply), "snip": loss}
    for name, given in made.items():
        with refused(name, "batch", "None"):
            rx.prune(plan, params, getattr(rx.criteria, name)(given))
        if given is not loss:
            with refused(name, "batch", "labels", "tuple"):
                rx.prune(plan, params, getattr(rx.criteria, name)(given), (x, jnp.ones(2)))
            with refused(name, "apply", "loss"):
                rx.prune(plan, params, getattr(rx.criteria, name)(lambda p, x: jnp.sum(x @ p["w"])), x)


def test_an_error_of_the_model_that_the_batch_does_not_explain_is_the_model_s_own():
    params, x = {"w": jnp.arange(12.0).reshape(4, 3)}, jnp.ones((2, 4))
    plan = rx.make_plan(params, 0.5)
    for given, batch in ((lambda p, x: x @ p["other"], None), (lambda p, x: x.missing, x)):
        with pytest.raises((KeyError, AttributeError)):
            rx.prune(plan, params, rx.criteria.wanda(given), batch)
    two = lambda p, pair: (pair[0] + pair[1]) @ p["w"]  # noqa: E731
    chex.assert_trees_all_equal(rx.prune(plan, params, rx.criteria.wanda(two), (x, x)), rx.prune(plan, params))


def test_a_surgeon_moves_the_weights_that_stay_in_each_round():
    pruned = rx.prune(PLAN, PARAMS, halves, rounds=2)
    expected = rx.prune(PLAN, PARAMS, rounds=2)
    chex.assert_trees_all_equal(pruned.masks, expected.masks)
    np.testing.assert_array_equal(pruned.params["a"], 4 * expected.params["a"])


def test_a_surgeon_is_held_to_counts_and_masks():
    full = jax.tree.map(lambda p: jnp.ones(p.shape, bool), {n: PARAMS[n] for n in "ab"})
    for surgeon in (
        lambda plan, params, masks, batch: rx.Pruned(params, {**full, "bias": None}),
        lambda plan, params, masks, batch: params,
    ):
        with refused("criterion"):
            rx.prune(PLAN, PARAMS, surgeon)
    with refused("scope"):
        rx.prune(PLAN, PARAMS, halves, scope="global")


@pytest.mark.parametrize("plan", [PLAN, FAN_IN])
def test_static_trains_the_masks_that_it_is_given(plan):
    pruned = rx.prune(plan, PARAMS)
    algorithm = rx.static(plan, pruned.masks)
    tx = rx.sparsify(optax.sgd(0.1), algorithm, key=KEY)
    state = jax.jit(tx.init)(pruned.params)
    chex.assert_trees_all_equal(state.masks, pruned.masks)
    assert algorithm.keeps_counts
    updates, state = tx.update(PARAMS, state, pruned.params)
    rx.check_masked(optax.apply_updates(pruned.params, updates), pruned.masks, plan)


def test_masks_of_one_ranking_have_the_total_and_claim_no_counts():
    masks = rx.prune(PLAN, PARAMS, scope="global").masks
    assert int(masks["a"].sum()) != PLAN["a"].n_active
    assert not rx.static(PLAN, masks).keeps_counts


def test_given_masks_are_checked():
    masks = rx.prune(PLAN, PARAMS).masks
    for wrong, words in (
        ({**masks, "a": None}, "a"),
        ({**masks, "bias": jnp.ones(4, bool)}, "bias"),
        ({**masks, "a": masks["a"].astype(int)}, "a"),
        ({**masks, "a": masks["b"]}, "a"),
        ({**masks, "a": ~masks["a"] | masks["a"]}, "masks"),
    ):
        with refused(words):
            rx.static(PLAN, wrong)
    good = rx.prune(FAN_IN, PARAMS).masks
    for leaf in "ab":  # of other counts in each neuron; through tiles
        with refused(leaf):
            rx.static(FAN_IN, {**good, leaf: masks[leaf].at[0, 0].set(~masks[leaf][0, 0])})
    with refused("masks"):
        rx.prune(PLAN, PARAMS, masks={**masks, "a": jnp.zeros((4, 6), bool)})
    with refused("traced"):
        jax.jit(lambda masks: rx.static(PLAN, masks).init(KEY, PARAMS))(masks)


def test_weights_that_cannot_be_ranked_are_refused_when_training_begins():
    short = {**PARAMS, "a": PARAMS["a"].astype(jnp.float8_e4m3fn)}
    with refused("a", "float8_e4m3fn"):
        rx.static(PLAN).init(KEY, short)


def test_wrong_scores_are_told_in_the_name_of_the_method():
    params = {"w": jnp.ones((2, 2))}
    algorithm = rx.algorithms.one_shot(rx.make_plan(params, 0.5), lambda params, batch: {"w": jnp.ones(3)})
    with refused("one_shot", "'w'"):
        algorithm.init(KEY, params)
