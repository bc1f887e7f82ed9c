"""Weights and gradients that are infinite or NaN move nothing: the leaf keeps its mask, its weights and its moments."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import rigl_jax as rx
from rigl_jax import topology
from rigl_jax.algorithms import METHODS
from tests import draws

SHAPES = {"a": (6, 5), "b": (5, 4), "c": (8, 3)}
RULES = [("c", rx.fan_in()), (".*", rx.unstructured())]
COMMON = {"period": 1, "stop": 6, "fraction": 0.5}


drawn = functools.partial(draws.normal, SHAPES)


def square(params):
    return sum(jnp.sum(p**4) for p in params.values())


@functools.cache
def rewiring(algorithm):
    """A method and its compiled rewiring: (weights, gradients) -> masks before, masks after, which weights restart."""
    plan = rx.make_plan(drawn(0), 0.5, rx.uniform, rules=RULES)
    method = METHODS[algorithm].example(plan, **COMMON)

    @jax.jit
    def step(params, grads):
        state = method.init(jax.random.key(0), drawn(0))
        signals = rx.Signals(drawn(0), drawn(1), jnp.int32(0), jax.random.key(3))
        for _ in range(2):  # for methods that look at gradients on every step
            state = method.observe(state, signals)
        signals = signals._replace(
            params=rx.trees.map_masked(lambda m, p: jnp.where(m, p, 0), method.stored(state), params)
        )
        signals = signals._replace(grads=grads)
        state = method.observe(state, signals)
        result = method.update(state, signals)
        return state.masks, result.state.masks, result.fresh

    return method, step


# Those that rewire, with the options above: each rewires on its first step at the latest.
REWIRING = [name for name, entry in METHODS.items() if not entry.required or set(entry.required) <= COMMON.keys()]
REWIRING.remove("static")


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("algorithm", REWIRING)
def test_a_rewiring_leaves_a_leaf_with_such_weights_or_gradients_alone(algorithm, bad):
    method, step = rewiring(algorithm)
    before, clean, _ = jax.device_get(step(drawn(0), drawn(1)))
    reads = method.dense_grads is method.due  # growth by the gradient of the step that rewires
    for of_weights in (True, False) if algorithm != "snip" else (False,):
        broken = {**drawn(0 if of_weights else 1)}
        broken["a"] = np.where(before["a"] == of_weights if not before["a"].all() else True, bad, broken["a"])
        broken["a"] = broken["a"].astype(np.float32)
        _, after, fresh = jax.device_get(step(broken, drawn(1)) if of_weights else step(drawn(0), broken))
        changed = {name: bool((after[name] != before[name]).any()) for name in SHAPES}
        if of_weights or reads:
            assert not changed["a"]
            assert fresh is None or not fresh["a"].any()
        for name in ("b", "c"):  # as without the bad leaf, or all leaves are left alone
            assert not changed[name] or (after[name] == clean[name]).all()
        if method.keeps_counts:
            assert {name: int(m.sum()) for name, m in after.items()} == {n: int(m.sum()) for n, m in before.items()}


def test_methods_that_move_counts_between_leaves_skip_all_of_them():
    for algorithm in ("dsr", "snfs", "granet"):
        _, step = rewiring(algorithm)
        broken = drawn(0) | {"a": np.full(SHAPES["a"], np.nan, np.float32)}
        before, after, _ = step(broken, drawn(1))
        for name in SHAPES:
            np.testing.assert_array_equal(after[name], before[name])


@pytest.mark.parametrize("rewire", [True, None])
def test_behind_apply_if_finite_nothing_moves(rewire):
    """The NaN of a broken batch, on a step that is due."""
    params = drawn(0)
    plan = rx.make_plan(params, 0.5, rx.uniform, rules=RULES)
    inner = optax.apply_if_finite(optax.adam(0.1), 3)
    tx = rx.sparsify(inner, rx.rigl(plan, period=1, skip_step=False), key=jax.random.key(0))
    state = jax.jit(tx.init)(params)
    params = jax.tree.map(lambda p, mask: np.where(mask, p, np.float32(0)), params, state.masks)
    update = jax.jit(functools.partial(tx.update, rewire=rewire))
    updates, after = update(jax.tree.map(lambda p: p * np.float32(np.nan), params), state, params)
    for mask, new in zip(jax.tree.leaves(state.masks), jax.tree.leaves(after.masks), strict=True):
        np.testing.assert_array_equal(mask, new)
    for u in jax.tree.leaves(updates):
        assert not np.asarray(u).any()
    _, later = update(drawn(1), after, params)  # and it goes on from there
    leaves = (jax.tree.leaves(jax.device_get(state.masks)) for state in (later, after))
    assert any((m != n).any() for m, n in zip(*leaves, strict=True))


def test_minus_infinity_is_a_rank_and_a_value_that_is_no_number_counts_as_0():
    params = drawn(0)
    plan = rx.make_plan(params, 0.5, rx.uniform, rules=RULES)
    never = jax.tree.map(lambda p: np.float32(np.where(np.arange(p.size).reshape(p.shape) % 2, -np.inf, 1)), params)

    @jax.jit
    def rewired(params, never):
        masks = topology.random_masks(plan, jax.random.key(0), params)
        return masks, *topology.drop_and_grow(plan, masks, jax.tree.map(jnp.abs, params), never, 0.2)

    masks, after, kept, _ = jax.device_get(rewired(params, never))
    assert (after["a"] != masks["a"]).any()
    assert not (after["a"] & ~kept["a"] & (never["a"] < 0)).any()
    nan = lambda signals: jax.tree.map(lambda p: p * jnp.nan, signals.params)  # noqa: E731
    tx = rx.sparsify(optax.sgd(0.1), rx.set_(plan, period=1, grow_values=nan), key=jax.random.key(0))

    @jax.jit
    def step(params):
        state = tx.init(params)
        params = rx.apply_masks(params, state.masks)
        return tx.update(params, state, params, rewire=True)[0]

    updates = step(params)
    assert all(np.isfinite(u).all() for u in jax.tree.leaves(updates))
