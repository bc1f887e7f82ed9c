"""Networks of more than 2**31 weights in all, each leaf smaller. Nothing here makes an array of such a size."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import rigl_jax as rx
from rigl_jax import topology
from rigl_jax.algorithms.itop import ItopState
from rigl_jax.topology import apportion
from tests.errors import refused

pytestmark = pytest.mark.eight_devices

SHAPE = (2**15, 2**15)
FLOATS = {name: jax.ShapeDtypeStruct(SHAPE, jnp.float32) for name in "abcd"}
MASKS = {name: jax.ShapeDtypeStruct(SHAPE, jnp.bool_) for name in "abcd"}
TOO_LARGE = jax.ShapeDtypeStruct((2, 2**30), jnp.float32)
PLAN = rx.make_plan(FLOATS, 0.9, rx.uniform)  # 4.3e9 weights, 4.3e8 of them active
HALF = rx.make_plan(FLOATS, 0.4, rx.uniform)  # more active than int32 holds


@pytest.mark.parametrize(
    ("amount", "weights", "room", "expected"),
    [
        (10, [1, 1, 1, 1], [2**30] * 4, [3, 3, 2, 2]),
        (2**31 - 1, [1], [2**31 - 1], [2**31 - 1]),
        (2**31 - 1, [1, 0, 0], [5, 2**31 - 1, 2**31 - 1], None),
        (2**31 - 1, [3, 2, 1], [2**31 - 1] * 3, None),
        (np.int64(7), [0, 0], np.array([2**40, 2**40]), [4, 3]),
        (7, [1, 1], np.array([3, 100], np.int8), [3, 4]),
    ],
)
def test_shares_are_exact_however_much_room_there_is(amount, weights, room, expected):
    traced = () if isinstance(room, np.ndarray) else (np.array(room, np.int32),)
    share = jax.jit(lambda weights, room=room: apportion.redistribute(amount, weights, room))
    shares = share(np.float32(weights), *traced)
    assert shares.dtype == jnp.int32
    found = np.asarray(shares, np.int64)
    assert found.sum() == amount
    assert (found >= 0).all()
    assert (found <= np.asarray(room)).all()
    assert expected is None or found.tolist() == expected


def test_sums_stop_where_they_would_wrap():
    rng = np.random.default_rng(0)
    for most in (2**31 - 1, 2**28, 100):
        counts = rng.integers(0, most, 40)
        expected = np.minimum(np.cumsum(counts), 2**31 - 1)
        np.testing.assert_array_equal(apportion.running(jnp.asarray(counts, jnp.int32)), expected)
        assert int(apportion.total(jnp.asarray(counts, jnp.int32))) == expected[-1]


def test_measures_are_traced():
    assert jax.eval_shape(rx.sparsity, MASKS).dtype == jnp.float32
    assert jax.eval_shape(rx.explored, ItopState(MASKS, MASKS)).dtype == jnp.float32


@pytest.mark.parametrize(
    "method",
    [
        rx.dsr,
        rx.snfs,
        functools.partial(rx.granet, stop=2000, initial_sparsity=0.8),
        functools.partial(rx.snip, jointly=True),
        functools.partial(rx.gmp, stop=2000, jointly=True, initial=0.8),
        functools.partial(rx.ac_dc, period=5, stop=20, jointly=True),
    ],
)
def test_a_rewiring_over_all_leaves_is_traced(method):
    algorithm = method(PLAN)
    key = jax.eval_shape(lambda: jax.random.key(0))
    state = jax.eval_shape(algorithm.init, key, FLOATS)
    signals = rx.Signals(FLOATS, FLOATS, jax.ShapeDtypeStruct((), jnp.int32), key)
    after = jax.eval_shape(algorithm.update, state, signals).state
    assert jax.tree.structure(after) == jax.tree.structure(state)


@pytest.mark.parametrize(
    ("who", "call"),
    {
        "dsr": lambda: rx.dsr(HALF),
        "snfs": lambda: rx.snfs(HALF),
        "granet": lambda: rx.granet(PLAN, stop=2000, initial_sparsity=0.0),
        "snip": lambda: rx.snip(HALF, jointly=True),
        "ac_dc": lambda: rx.ac_dc(HALF, period=5, stop=20, jointly=True),
        "gmp": lambda: rx.gmp(PLAN, stop=2000, jointly=True),
        "synflow": lambda: rx.synflow(PLAN, loss=lambda p: 0.0, jointly=True),
        "prune_jointly": lambda: jax.eval_shape(lambda s: topology.prune_jointly(HALF, s), FLOATS),
        "select_jointly": lambda: jax.eval_shape(lambda s: topology.select_jointly([*s.values()], 2**31), FLOATS),
        "select": lambda: jax.eval_shape(lambda s: topology.select(s, 1), TOO_LARGE),
        "redistribute": lambda: topology.redistribute(2**31, jnp.ones(3), jnp.ones(3, int)),
        "sparsity": lambda: jax.eval_shape(rx.sparsity, [TOO_LARGE]),
    }.items(),
)
def test_counts_that_do_not_fit_are_refused(who, call):
    with refused(who):
        call()


def test_more_than_there_are_is_all():
    scores = jnp.arange(6.0)
    for k in (2**31 - 1, 2**40, np.uint64(2**63), jnp.uint32(2**31 + 5)):
        assert topology.select(scores, k).all()
        assert all(chosen.all() for chosen in topology.select_jointly([scores, scores], k))
    assert not topology.select(scores, -(2**40)).any()
    assert int(topology.select(scores, np.int8(5)).sum()) == 5
    assert int(topology.count(1.0, 2**31 - 1)) == 2**31 - 1
