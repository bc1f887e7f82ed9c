"""What every recipe keeps: masks hold, a ticket is all that the rest depends on, and training is called as it says.

Each row is a call on one small network with a normalisation statistic among its params. A new recipe needs a row here.
"""

import functools
import itertools

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import rigl_jax as rx
from rigl_jax import recipes
from tests.errors import refused

KEY = jax.random.key(0)
X = jax.random.normal(jax.random.key(1), (64, 8))
Y = jnp.argmax(X @ jax.random.normal(jax.random.key(2), (8, 4)), axis=1)
RATE = optax.linear_schedule(0.5, 0.0, 40)


def init(key):
    a, b = jax.random.split(key)
    return {
        "a": {"kernel": jax.random.normal(a, (8, 16)) / 3, "bias": jnp.zeros(16)},
        "b": {"kernel": jax.random.normal(b, (16, 4)) / 4},
        "mean": jnp.zeros(16),
    }


PARAMS = init(KEY)
RULES = [(".*kernel", rx.unstructured()), (".*", None)]
PLAN = rx.make_plan(PARAMS, 0.75, rx.uniform, rules=RULES)
MASKS = rx.topology.random_masks(PLAN, KEY, PARAMS)


def hidden(params, x):
    return x @ params["a"]["kernel"] + params["a"]["bias"][None]


def apply(params, x):
    return jax.nn.relu(hidden(params, x) - params["mean"][None]) @ params["b"]["kernel"]


def loss(params, x, y):
    return jnp.mean(optax.softmax_cross_entropy_with_integer_labels(apply(params, x), y))


@functools.partial(jax.jit, static_argnums=(0, 1))
def run(algorithm, rate, params, masks, start, stop, key):
    inner = optax.sgd(rate, momentum=0.9)
    tx = rx.sparsify(inner, algorithm, key=key)
    params, state = rx.replace_masks(inner, tx.init(params), params, masks)

    def step(i, carry):
        params, state = carry
        rows = jax.random.randint(jax.random.fold_in(key, i), (16,), 0, 64)
        grads = jax.grad(loss)(params, X[rows], Y[rows])
        updates, state = tx.update(grads, state, params)
        params = optax.apply_updates(params, updates)
        params["mean"] = 0.9 * params["mean"] + 0.1 * hidden(params, X[rows]).mean(axis=0)
        return params, state

    return jax.lax.fori_loop(start, stop, step, (params, state))


FIXED = rx.static(PLAN)


def trainer(algorithm=FIXED, rate=RATE, calls=None):
    """A training function; it writes down what it is asked for."""

    def train(params, masks, start, stop, key):
        if calls is not None:
            calls.append((start, stop, params["mean"]))
        params, state = run(algorithm, rate, params, masks, start, stop, key)
        return recipes.Trained(params, {"loss": loss(params, X, Y)}, state.masks)

    return train


DYNAMIC = rx.set_(PLAN, period=5)
RETRAINED = {n: recipes.retraining.llr(RATE, 40, n) for n in (10, 12)}
PLAN_AT = recipes.plan_towards(PLAN, 3)
RECIPES = {
    "lottery_ticket": lambda calls, **k: recipes.lottery_ticket(
        trainer(calls=calls), PARAMS, PLAN_AT, levels=3, steps=40, rewind_to=10, **k
    ),
    "lottery_ticket, learning rate": lambda calls, **k: recipes.lottery_ticket(
        trainer(calls=calls), PARAMS, PLAN_AT, levels=3, steps=40, rewind_to=10, rewind="learning_rate", **k
    ),
    "iterative_pruning": lambda calls, **k: recipes.iterative_pruning(
        trainer(calls=calls),
        PARAMS,
        PLAN_AT,
        rounds=3,
        steps=40,
        retrain_steps=recipes.retraining.split(32, 3),
        retrain=lambda r: trainer(FIXED, RETRAINED[r.steps], calls),
        **k,
    ),
    "colt": lambda calls, **k: recipes.colt(
        [trainer(calls=calls), trainer(rate=0.1, calls=calls)], PARAMS, PLAN, rounds=3, steps=40, rate=0.2, **k
    ),
    "free_tickets": lambda calls, **k: recipes.free_tickets(
        trainer(DYNAMIC, calls=calls), init, PLAN, members=4, steps=40, **k
    ),
    "edst": lambda calls, **k: recipes.edst(
        trainer(DYNAMIC, calls=calls), PARAMS, MASKS, PLAN, members=4, explore=20, refine=10, **k
    ),
    "sup_tickets": lambda calls, **k: recipes.sup_tickets(
        trainer(calls=calls), PARAMS, MASKS, PLAN, tickets=4, start=20, cycle=5, **k
    ),
}
CALLS = {
    "lottery_ticket": [(0, 10), *[(10, 40)] * 4],
    "lottery_ticket, learning rate": [(0, 10), *[(10, 40)] * 4],
    "iterative_pruning": [(0, 40), (0, 10), (0, 10), (0, 12)],
    "colt": [(0, 40)] * 6,
    "free_tickets": [(0, 40)] * 4,
    "edst": [(0, 30), (30, 40), (40, 50), (50, 60)],
    "sup_tickets": [(20, 25), (25, 30), (30, 35), (35, 40)],
}
NESTED = ("lottery_ticket", "lottery_ticket, learning rate", "iterative_pruning", "colt")
each = pytest.mark.parametrize("name", RECIPES)


@functools.cache
def tickets(name):
    return list(RECIPES[name]([], key=KEY))


@each
def test_a_ticket_is_a_masked_network(name):
    assert [ticket.level for ticket in tickets(name)] == [0, 1, 2, 3]
    for ticket in tickets(name):
        rx.check_masked(ticket.params, ticket.masks)
        chex.assert_trees_all_equal_shapes(ticket.params, PARAMS)
        assert ticket.sparsity == pytest.approx(float(rx.sparsity(ticket.masks)), abs=1e-6)
    held = [sum(int(mask.sum()) for mask in jax.tree.leaves(t.masks)) for t in tickets(name)]
    wanted = [sum(layer.active_weights for layer in PLAN_AT(level).values()) for level in range(4)]
    if name == "colt":
        return  # parts agree on what they agree on
    assert held == (wanted if name in NESTED else wanted[-1:] * 4)


@pytest.mark.parametrize("name", NESTED)
def test_what_is_pruned_never_returns(name):
    masks = [ticket.masks for ticket in tickets(name)]
    assert all(mask.all() for mask in jax.tree.leaves(masks[0]))
    for before, after in itertools.pairwise(masks):
        assert not any(jnp.any(b & ~a) for a, b in zip(jax.tree.leaves(before), jax.tree.leaves(after), strict=True))


@each
def test_resumed_from_a_saved_ticket_the_rest_has_the_same_bits(name):
    for ticket in tickets(name)[:3]:
        # As any format would give it back: arrays of NumPy, other containers of numbers, no `aux`.
        saved = jax.device_get(ticket)._replace(level=np.int64(ticket.level), aux=None)
        rest = list(RECIPES[name]([], key=KEY, resume=saved))
        assert [type(t.level) for t in rest] == [int] * len(rest)
        chex.assert_trees_all_equal(rest, tickets(name)[ticket.level + 1 :])
    assert list(RECIPES[name]([], key=KEY, resume=tickets(name)[-1])) == []


@each
def test_training_is_called_level_by_level(name):
    calls = []
    walk = RECIPES[name](calls, key=KEY)
    assert calls == []
    next(walk)
    begun = len(calls)
    assert begun == {"colt": 0, "lottery_ticket": 2, "lottery_ticket, learning rate": 2}.get(name, 1)
    next(walk)
    assert len(calls) == begun + (2 if name == "colt" else 1)
    list(walk)
    assert [call[:2] for call in calls] == CALLS[name]


BEFORE = {
    "lottery_ticket": lambda level: tickets("lottery_ticket")[0].carry["mean"],  # rewound
    "lottery_ticket, learning rate": lambda level: tickets("lottery_ticket, learning rate")[level - 1].params["mean"],
    "iterative_pruning": lambda level: tickets("iterative_pruning")[level - 1].params["mean"],  # kept
    "colt": lambda level: PARAMS["mean"],
    "free_tickets": lambda level: PARAMS["mean"],  # of the member's own first weights
    "edst": lambda level: tickets("edst")[level - 1].params["mean"],
    "sup_tickets": lambda level: tickets("sup_tickets")[level - 1].carry.params["mean"],  # of the run, not the average
}


@each
def test_statistics_go_where_the_recipe_says_and_it_says_so(name):
    """The optimizer's state cannot go anywhere: training is given weights, masks, steps and a key."""
    calls = []
    list(RECIPES[name](calls, key=KEY))
    given = [call[2] for call in calls]
    trainings = {"colt": 2}.get(name, 1)
    for level in range(1, 4):
        begun = len(given) - trainings * (4 - level)
        for mean in given[begun : begun + trainings]:
            np.testing.assert_array_equal(mean, BEFORE[name](level))
    if name not in ("colt", "free_tickets"):
        assert np.any(BEFORE[name](1))
    text = getattr(recipes, name.partition(",")[0]).__doc__
    assert all(word in text for word in ("statistics", "optimizer", "chedule"))


def test_statistics_of_an_average_are_estimated_on_the_data():
    """With them the network of the average normalises by what its units have; without, by a mean of means."""
    estimate = lambda params, masks: {**params, "mean": hidden(params, X).mean(axis=0)}  # noqa: E731
    found = list(RECIPES["sup_tickets"]([], key=KEY, reestimate=estimate))
    for ticket, other in zip(found[1:], tickets("sup_tickets")[1:], strict=True):
        np.testing.assert_allclose(ticket.params["mean"], hidden(ticket.params, X).mean(axis=0), rtol=1e-6)
        assert np.abs(other.params["mean"] - hidden(other.params, X).mean(axis=0)).max() > 1e-2
        chex.assert_trees_all_equal(ticket.carry, other.carry)
        chex.assert_trees_all_equal(ticket.params["a"], other.params["a"])


@pytest.mark.parametrize(("name", "steps"), [("free_tickets", 160), ("edst", 60)])
def test_an_ensemble_costs_what_its_steps_cost(name, steps):
    """No step is trained twice, all are sparse: EDST gives four networks for less than a dense one of its length."""
    dense, calls, total = rx.flops(apply, PARAMS, X[:1]).total, [], 0.0
    for ticket in RECIPES[name](calls, key=KEY):
        sparse = rx.flops(apply, ticket.params, X[:1], masks=ticket.masks).total
        start, stop, _ = calls[-1]
        total += (stop - start) * rx.training_cost(DYNAMIC, sparse, dense, stop - start)
    assert sum(stop - start for start, stop, _ in calls) == steps
    counted = PLAN["a/kernel"].active_weights + PLAN["b/kernel"].active_weights
    assert total == pytest.approx(steps * 3 * counted)
    if name == "edst":
        assert total < 3 * dense * steps / 3


@each
def test_another_key_is_another_run(name):
    level = 1 if name == "colt" else 0
    for _, ticket in zip(range(level + 1), RECIPES[name]([], key=jax.random.key(9)), strict=False):
        found = ticket
    expected = tickets(name)[level]
    leaves = [(found.params, expected.params), (found.masks, expected.masks)]
    assert any(not np.array_equal(a, b) for pair in leaves for a, b in zip(*map(jax.tree.leaves, pair), strict=True))


@each
def test_odd_arguments_are_refused_when_the_recipe_is_called(name):
    for given, argument in (
        ({"key": 3}, "key"),
        ({"resume": PARAMS}, "resume"),
        ({"resume": tickets(name)[0]._replace(level=9)}, "resume"),
    ):
        with refused(name.partition(",")[0], argument):
            RECIPES[name]([], **({"key": KEY} | given))
