"""Sharing out by proportion, and SNFS that does it by momentum."""

from fractions import Fraction

import hypothesis
import hypothesis.strategies as st
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import rigl_jax as rx
from rigl_jax import topology
from rigl_jax.algorithms import snfs
from rigl_jax.base import Signals
from tests import oracles

REDISTRIBUTE = jax.jit(topology.redistribute)


def ideal_shares(amount, weights, room):
    """Proportional shares with caps, in exact fractions, one saturated receiver after the other."""
    weights = [Fraction(w) for w in weights]
    share = [Fraction(0)] * len(weights)
    left, open_ = Fraction(min(amount, sum(room))), {i for i, w in enumerate(weights) if w > 0 and room[i] > 0}
    while open_:
        scale = left / sum(weights[i] for i in open_)
        full = {i for i in open_ if scale * weights[i] >= room[i]}
        for i in full or open_:
            share[i] = Fraction(room[i]) if full else scale * weights[i]
        left -= sum(share[i] for i in full or open_)
        open_ = open_ - full if full else set()
    rest = [r if w <= 0 else 0 for w, r in zip(weights, room, strict=True)]
    if left > 0 and sum(rest):
        share = [s + left * r / sum(rest) for s, r in zip(share, rest, strict=True)]
    return share


@st.composite
def shared_out(draw):
    n = draw(st.sampled_from((1, 2, 5)))
    weights = draw(st.lists(st.one_of(st.just(0.0), st.floats(0.0625, 100, width=16)), min_size=n, max_size=n))
    room = draw(st.lists(st.integers(0, 40), min_size=n, max_size=n))
    return draw(st.integers(0, 220)), weights, room


@hypothesis.given(shared_out())
@hypothesis.settings(max_examples=200)
def test_redistribution_is_exact_and_proportional(case):
    amount, weights, room = case
    shares = np.asarray(REDISTRIBUTE(amount, jnp.array(weights), jnp.array(room)))
    assert shares.sum() == min(amount, sum(room))
    assert (shares >= 0).all()
    assert (shares <= room).all()
    for share, exact in zip(shares, ideal_shares(amount, weights, room), strict=True):
        assert abs(share - exact) < Fraction(1001, 1000)  # largest remainder: the floor or the ceiling
    if sum(r for r, w in zip(room, weights, strict=True) if w > 0) >= amount:
        assert not shares[np.array(weights) == 0].any()


@pytest.mark.parametrize(
    ("amount", "weights", "room", "expected"),
    [
        (10, [3, 1], [99, 99], [8, 2]),  # 7.5 and 2.5: a tie goes to the first
        (10, [1, 1, 1], [99, 99, 99], [4, 3, 3]),
        (10, [1, 0], [4, 99], [4, 6]),  # forced onto a receiver of no weight
        (10, [0, 0, 0], [6, 6, 12], [3, 2, 5]),  # no weight at all: by room, 2.5, 2.5, 5
        (99, [1, 2], [3, 4], [3, 4]),  # everything is full, and it ends
        (5, [1, 1], [0, 0], [0, 0]),
        (-3, [1, 1], [5, 5], [0, 0]),
        (9, [np.nan, np.inf, 1], [9, 4, 9], [0, 4, 5]),
        (1_000_000_000, [1, 2, 3], [2_000_000_000, 0, 100_000_000], [900_000_000, 0, 100_000_000]),
    ],
)
def test_redistribution_by_hand(amount, weights, room, expected):
    shares = REDISTRIBUTE(amount, jnp.array(weights, jnp.float32), jnp.array(room, jnp.int32))
    assert shares.tolist() == expected


@hypothesis.given(st.integers(0, 2**31 - 1), st.integers(0, 1000))
def test_large_amounts_stay_exact(amount, seed):
    rng = np.random.default_rng(seed)
    room = rng.integers(0, 2**31 // 5, 5)
    shares = np.asarray(REDISTRIBUTE(amount, jnp.asarray(rng.random(5), jnp.float32), jnp.asarray(room, jnp.int32)))
    assert shares.sum(dtype=np.int64) == min(amount, room.sum())
    assert (shares >= 0).all()
    assert (shares <= room).all()


PARAMS = {"a": jnp.full((6, 10), 2.0), "b": jnp.full((8, 5), 1.0), "bias": jnp.zeros(5)}
HALF = optax.constant_schedule(0.5)


def one_update(algorithm, params, momentum, masks=None):
    state = algorithm.init(jax.random.key(0), params)
    state = state._replace(momentum={**momentum, "bias": None})
    state = state if masks is None else state._replace(masks={**masks, "bias": None})
    grads = jax.tree.map(lambda p: p * jnp.nan, params)  # growth reads the momentum, not this
    return state, jax.jit(algorithm.update)(state, Signals(params, grads, jnp.int32(0), jax.random.key(1))).state


def counts(masks):
    return {name: int(mask.sum()) for name, mask in masks.items() if mask is not None}


def test_what_is_dropped_goes_where_the_momentum_is():
    plan = rx.make_plan(PARAMS, 0.5, rx.uniform)
    momentum = {"a": jnp.full((6, 10), 3.0), "b": jnp.full((8, 5), -1.0)}
    before, after = one_update(snfs(plan, fraction=HALF), PARAMS, momentum)
    assert counts(before.masks) == {"a": 30, "b": 20}
    # 15 and 10 are dropped; of 25, 3/4 go to a and 1/4 to b: 18.75 and 6.25.
    assert counts(after.masks) == {"a": 15 + 19, "b": 10 + 6}
    assert after.masks["bias"] is None


def test_spill_and_a_layer_without_momentum():
    plan = rx.make_plan(PARAMS, 0.25, rx.uniform)
    momentum = {"a": jnp.zeros((6, 10)), "b": jnp.full((8, 5), 5.0)}
    before, after = one_update(snfs(plan, fraction=HALF), PARAMS, momentum)
    assert counts(before.masks) == {"a": 45, "b": 30}
    assert counts(after.masks) == {"a": 75 - 40, "b": 40}  # b fills up, a takes the rest: 37 - 25 = 12


def test_nearly_full_layers_that_grow_drop_no_more_than_their_sparsity():
    plan = rx.make_plan(PARAMS, 0.0, rx.uniform)
    masks = {"a": jnp.asarray(oracles.top(np.ones((6, 10)), 54)), "b": jnp.asarray(oracles.top(np.ones((8, 5)), 10))}
    momentum = {"a": jnp.full((6, 10), 9.0), "b": jnp.full((8, 5), 1.0)}
    _, after = one_update(snfs(plan, fraction=HALF), PARAMS, momentum, masks)
    # a is 0.1 sparse and worth more than the mean: it drops floor(0.1 * 54) = 5, and b 5. Of 10 a gets 9.
    assert counts(after.masks) == {"a": 54 - 5 + 9, "b": 5 + 1}


@pytest.mark.parametrize("redistribute", [True, False])
def test_one_layer_is_rigl_with_momentum_scores(redistribute):
    rng = np.random.default_rng(0)
    mask = oracles.top(rng.random((8, 12)), 40)
    w = np.where(mask, rng.normal(size=(8, 12)), 0).astype(np.float32)
    momentum = rng.normal(size=(8, 12)).astype(np.float32)
    algorithm = snfs(rx.make_plan({"w": w}, 1 - 40 / 96), period=10, stop=100, redistribute=redistribute)
    state = algorithm.init(jax.random.key(0), {"w": jnp.asarray(w)})._replace(
        masks={"w": jnp.asarray(mask)}, momentum={"w": jnp.asarray(momentum)}
    )
    for step in (0, 30):
        new = jax.jit(algorithm.update)(state, Signals({"w": jnp.asarray(w)}, None, jnp.int32(step), jax.random.key(0)))
        n_drop = int(np.float32(oracles.cosine_fraction(0.5, step, 100)) * 40)
        expected = oracles.drop_and_grow(mask, np.abs(w), np.abs(momentum), n_drop)
        np.testing.assert_array_equal(new.state.masks["w"], expected)


def test_the_momentum_is_of_dense_gradients_at_every_step():
    params = {"w": jnp.ones((3, 4))}
    algorithm = snfs(rx.make_plan(params, 0.5), period=100, momentum=0.5)
    tx = rx.sparsify(optax.sgd(0.1), algorithm, key=jax.random.key(0))
    update, state = jax.jit(tx.update), tx.init(params)
    params = rx.apply_masks(params, state.masks)
    for value in (4.0, 2.0, -1.0):
        updates, state = update({"w": jnp.full((3, 4), value)}, state, params)
        params = optax.apply_updates(params, updates)
    np.testing.assert_allclose(state.algorithm.momentum["w"], 4 / 8 + 2 / 4 - 1 / 2)
    assert all(algorithm.dense_grads(step) for step in range(5))


def test_moving_counts_never_lose_a_weight_nor_a_layer():
    params = {"a": jnp.zeros((6, 10)), "b": jnp.zeros((8, 5)), "c": jnp.zeros((2, 3))}
    plan = rx.make_plan(params, 0.7, rx.erk)
    algorithm = snfs(plan, period=1, fraction=optax.constant_schedule(0.9))
    update, state = jax.jit(algorithm.update), algorithm.init(jax.random.key(0), params)
    total = sum(leaf.n_active for leaf in plan.values())
    for step in range(20):
        draw = lambda i, p: jax.random.normal(jax.random.fold_in(jax.random.key(i), step), p.shape)  # noqa: E731
        worth = {name: draw(i, p) * 10.0 ** ((step + i) % 4 - 2) for i, (name, p) in enumerate(params.items())}
        state = state._replace(momentum=worth)
        state = update(state, Signals(worth, None, jnp.int32(step), jax.random.key(step))).state
        assert sum(counts(state.masks).values()) == total
        assert min(counts(state.masks).values()) >= 1
