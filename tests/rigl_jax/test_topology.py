import chex
import hypothesis
import hypothesis.extra.numpy as hnp
import hypothesis.strategies as st
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import rigl_jax as rx
from rigl_jax import topology
from tests import oracles
from tests.errors import refused
from tests.traces import jit_once

pytestmark = pytest.mark.eight_devices

# Few distinct shapes: each is compiled once and then serves every example.
SIZES = (1, 2, 7, 40)
SELECT = jax.jit(topology.select)

SPECIAL = (0.0, -0.0, 1.0, -1.0, np.inf, -np.inf, np.nan, 1e-40, -1e-40, 65504.0)


@st.composite
def scored(draw, dtype=np.float32):
    size = draw(st.sampled_from(SIZES))
    values = st.one_of(st.sampled_from(SPECIAL), st.floats(-4, 4, width=16), st.integers(-2, 2).map(float))
    scores = draw(hnp.arrays(np.float64, size, elements=values)).astype(dtype)
    among = draw(hnp.arrays(bool, size))
    k = draw(st.integers(-1, size + 2))
    return scores, among, k


@hypothesis.given(scored())
def test_select_is_exact_top_k(case):
    scores, among, k = case
    np.testing.assert_array_equal(SELECT(scores, k), oracles.top(scores, k))
    np.testing.assert_array_equal(SELECT(scores, k, among=among), oracles.top(scores, k, among))


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16])
@hypothesis.given(case=scored())
@hypothesis.settings(max_examples=15)
def test_select_in_short_floats(dtype, case):
    scores, among, k = case
    short = jnp.asarray(scores, dtype)
    expected = oracles.top(np.asarray(short, np.float32), k, among)
    np.testing.assert_array_equal(SELECT(short, k, among=among), expected)


@hypothesis.given(case=scored(), exponent=st.sampled_from([-320, -40, 0]))
@hypothesis.settings(max_examples=15)
def test_select_in_double_precision(case, exponent):
    scores, among, k = case
    wide = np.asarray(scores, np.float64) * 10.0**exponent + np.arange(scores.size) * 1e-300  # no ties in float32 alone
    with jax.enable_x64(True):
        np.testing.assert_array_equal(SELECT(wide, k, among=among), oracles.top(wide, k, among))
        np.testing.assert_array_equal(JOINTLY([wide], k, among=[among])[0], oracles.top(wide, k, among))


def test_select_agrees_with_lax_top_k_on_many_weights():
    scores = jax.random.normal(jax.random.key(0), (100, 1000))
    _, index = jax.lax.top_k(scores.ravel(), 12_345)
    expected = jnp.zeros(100_000, bool).at[index].set(True).reshape(100, 1000)
    chex.assert_trees_all_equal(topology.select(scores, 12_345), expected)


def test_all_equal_scores_go_by_index():
    chosen = topology.select(jnp.zeros((3, 5)), 7)
    assert np.flatnonzero(np.asarray(chosen).ravel()).tolist() == list(range(7))


def test_groups_have_their_own_k():
    scores = jnp.array([[1.0, 5.0, 2.0], [4.0, 5.0, 6.0], [7.0, 0.0, 9.0]])
    columns = topology.select(scores, jnp.array([[1, 2, 0]]), axes=(0,))
    assert np.asarray(columns).astype(int).tolist() == [[0, 1, 0], [0, 1, 0], [1, 0, 0]]


@hypothesis.given(st.integers(0, 1000), st.integers(-1, 25))
def test_joint_selection_is_selection_of_the_concatenation(seed, k):
    rng = np.random.default_rng(seed)
    parts = [rng.integers(0, 4, shape).astype(np.float32) for shape in ((3, 4), (5,), (2, 3))]
    among = [rng.random(p.shape) < 0.7 for p in parts]
    chosen = JOINTLY(parts, k, among=among)
    flat = oracles.top(np.concatenate([p.ravel() for p in parts]), k, np.concatenate([a.ravel() for a in among]))
    np.testing.assert_array_equal(np.concatenate([np.ravel(c) for c in chosen]), flat)


JOINTLY = jax.jit(topology.select_jointly)


def test_pruning_jointly_keeps_something_of_every_layer():
    params = {"a": jnp.full((4, 5), 10.0), "b": jnp.full((3, 3), 1.0), "bias": jnp.ones(5)}
    plan = rx.make_plan(params, 0.6, rx.uniform)
    masks = topology.prune_jointly(plan, params, 12, min_active=2)
    assert {name: int(masks[name].sum()) for name in ("a", "b")} == {"a": 10, "b": 2}
    assert masks["bias"] is None


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_the_search_of_accelerators_finds_the_same(dtype, monkeypatch):
    """They find four bits in a pass. Ties, NaN, infinities, candidates; one group, and groups along an axis."""
    monkeypatch.setattr(topology.topk, "digit_bits", lambda: 4)
    rng = np.random.default_rng(0)
    scores = rng.integers(-20, 20, (40, 33)).astype(np.float32)
    scores.flat[rng.choice(scores.size, 60, replace=False)] = np.resize([np.nan, np.inf, -np.inf, -0.0], 60)
    among = rng.random(scores.shape) < 0.8
    short = jnp.asarray(scores, dtype)
    select = jax.jit(lambda scores, k: topology.select(scores, k, among=among))
    for k in (0, 1, 500, 1200):
        np.testing.assert_array_equal(select(short, k), oracles.top(scores, k, among))
    columns = jax.jit(lambda scores, k: topology.select(scores, k, axes=(0,)))(short, np.arange(33)[None])
    expected = [oracles.top(column, k) for k, column in enumerate(scores.T)]
    np.testing.assert_array_equal(columns, np.stack(expected, axis=1))
    jointly = jax.jit(lambda k: topology.select_jointly([short[:7], short[7:]], k, among=[among[:7], among[7:]]))
    for k in (0, 500, 1400):
        np.testing.assert_array_equal(np.concatenate(jointly(k)), oracles.top(scores, k, among))


def test_select_traces_once_for_every_k():
    select = jit_once(topology.select)
    for k in range(5):
        assert int(select(jnp.arange(6.0), k).sum()) == k


def test_select_of_sharded_scores_equals_select_of_whole():
    scores = jnp.round(jax.random.normal(jax.random.key(1), (16, 24)), 1)  # many ties
    mesh = jax.make_mesh((4, 2), ("a", "b"), axis_types=(jax.sharding.AxisType.Auto,) * 2)
    sharding = jax.NamedSharding(mesh, jax.P("a", "b"))
    sharded = jax.jit(topology.select, static_argnums=1)(jax.device_put(scores, sharding), 100)
    chex.assert_trees_all_equal(np.asarray(sharded), oracles.top(scores, 100))


REWIRE = jax.jit(topology.rewire, static_argnums=0, static_argnames="regrow_dropped")
UNSTRUCTURED = rx.unstructured()


@hypothesis.given(st.integers(0, 10_000), st.integers(0, 30), st.integers(0, 30), st.booleans())
def test_rewire_is_algorithm_1(seed, n_active, n_drop, regrow):
    n_drop = min(n_drop, n_active)
    rng = np.random.default_rng(seed)
    mask = oracles.top(rng.random((5, 6)), n_active)
    drop, grow = rng.integers(0, 5, (2, 5, 6)).astype(np.float32)  # ties everywhere
    new, kept, _ = REWIRE(UNSTRUCTURED, mask, drop, grow, n_drop, regrow_dropped=regrow)
    np.testing.assert_array_equal(new, oracles.drop_and_grow(mask, drop, grow, n_drop, regrow))
    assert int(new.sum()) == n_active
    np.testing.assert_array_equal(kept, oracles.top(drop, n_active - n_drop, mask))


def test_rewire_by_hand():
    # Active: 5, 1, 3, 2. Two are dropped: 1 and 2. Candidates by gradient: 9 (never active), 8 (just dropped), 7, ...
    mask = jnp.array([[True, True, True, True], [False, False, False, False]])
    drop = jnp.array([[5.0, 1.0, 3.0, 2.0], [99.0, 99.0, 99.0, 99.0]])
    grow = jnp.array([[0.0, 8.0, 0.0, 1.0], [7.0, 9.0, 0.0, 0.0]])
    new, kept, _ = topology.rewire(UNSTRUCTURED, mask, drop, grow, 2)
    assert kept.astype(int).tolist() == [[1, 0, 1, 0], [0, 0, 0, 0]]
    assert new.astype(int).tolist() == [[1, 1, 1, 0], [0, 1, 0, 0]]
    forbidden, *_ = topology.rewire(UNSTRUCTURED, mask, drop, grow, 2, regrow_dropped=False)
    assert forbidden.astype(int).tolist() == [[1, 0, 1, 0], [1, 1, 0, 0]]


def test_forbidden_regrowth_gives_way_to_the_count():
    mask = jnp.array([True, True, True, False])
    new, *_ = topology.rewire(UNSTRUCTURED, mask, jnp.arange(4.0), jnp.zeros(4), 3, regrow_dropped=False)
    assert new.tolist() == [True, True, False, True]  # one free place, two of the dropped come back


def test_nan_scores_are_dropped_first_and_grown_last():
    mask = jnp.array([True, True, False, False])
    drop, grow = jnp.array([1.0, jnp.nan, 0.0, 0.0]), jnp.array([0.0, jnp.nan, jnp.nan, 0.5])
    new, kept, _ = topology.rewire(UNSTRUCTURED, mask, drop, grow, 1)
    assert kept.tolist() == [True, False, False, False]
    assert new.tolist() == [True, False, False, True]


def test_an_inactive_weight_never_outranks_an_active_one():
    # An inactive score above every active one, as additive noise makes it in the authors' code.
    mask = jnp.array([True, True, True, False])
    new, kept, _ = topology.rewire(UNSTRUCTURED, mask, jnp.array([0.0, 1e-7, 2e-7, 1e-5]), jnp.zeros(4), 1)
    assert kept.tolist() == [False, True, True, False]
    assert int(new.sum()) == 3


@pytest.mark.parametrize(
    ("fraction", "n", "expected"), [(0.3, 10, 3), (0.3, 9, 2), (0.0, 5, 0), (1.0, 7, 7), (0.1, 30_000_000, 3_000_000)]
)
def test_count_is_a_floor(fraction, n, expected):
    assert int(topology.count(fraction, n)) == expected


def test_random_masks_are_exact_repeatable_and_differ_between_leaves():
    params = {"a": jnp.ones((20, 10)), "b": jnp.ones((20, 10)), "bias": jnp.ones(10)}
    plan = rx.make_plan(params, 0.7, rx.uniform)
    masks = topology.random_masks(plan, jax.random.key(3), params)
    assert masks["bias"] is None
    assert {name: int(m.sum()) for name, m in masks.items() if m is not None} == {"a": 60, "b": 60}
    chex.assert_trees_all_equal(masks, jax.jit(lambda k: topology.random_masks(plan, k, params))(jax.random.key(3)))
    assert bool((masks["a"] != masks["b"]).any())


def test_random_masks_are_uniform_over_positions():
    params = {"w": jnp.ones((4, 5))}
    plan = rx.make_plan(params, 0.6)
    keys = jax.random.split(jax.random.key(0), 2000)
    hits = jax.vmap(lambda key: topology.random_masks(plan, key, params)["w"])(keys).sum(0)
    variance = 2000 * 0.4 * 0.6
    chi2 = float((((hits - 800.0) ** 2) / variance).sum()) * 19 / 20
    assert chi2 < 43.8  # 19 degrees of freedom, p = 0.001


def test_params_that_do_not_fit_the_plan_are_named():
    plan = rx.make_plan({"a": jnp.ones((4, 4))}, 0.5)
    with refused("a"):
        topology.random_masks(plan, jax.random.key(0), {"a": jnp.ones((4, 5))})
    with refused("a", "b"):
        topology.random_masks(plan, jax.random.key(0), {"b": jnp.ones((4, 4))})
