"""DSR: the threshold's control, shares by survivors, and totals that never change."""

import functools

import jax
import numpy as np
import optax

import rigl_jax as rx
from rigl_jax.algorithms import dsr
from rigl_jax.base import Signals


def weights(small):
    """The first `small` of 20 weights are small, the others big."""
    return jax.device_put(np.where(np.arange(20) < small, np.float32(0.01), 1).reshape(2, 10).astype(np.float32))


PARAMS = {"a": weights(4), "b": weights(2), "bias": jax.device_put(np.zeros(3, np.float32))}
PLAN = rx.make_plan(PARAMS, 0.4, rx.uniform)  # 12 of 20 each
FIRST = {"a": jax.device_put(np.arange(20).reshape(2, 10) < 12), "bias": None}
FIRST["b"] = FIRST["a"]
UPDATE = jax.jit(lambda state, key, algorithm: algorithm.update(state, Signals(PARAMS, None, 0, key)), static_argnums=2)


@functools.cache
def method(threshold, **options):
    """The same object for the same options: it is compiled once."""
    return dsr(PLAN, threshold=threshold, **options)


def one_update(threshold, seed=0, **options):
    algorithm = method(threshold, **options)
    state = algorithm.init(jax.random.key(0), PARAMS)._replace(masks=FIRST)
    return UPDATE(state, jax.random.key(seed), algorithm)


def counts(masks):
    return {name: int(masks[name].sum()) for name in ("a", "b")}


def test_worked_example():
    """4 of a and 2 of b are below 0.1; 8 and 10 survive, so 6 are shared as 2.67 and 3.33: 3 and 3."""
    result = one_update(0.1, target=0.15)
    assert counts(result.state.masks) == {"a": 11, "b": 13}
    for name, gone in (("a", 4), ("b", 2)):
        mask = np.asarray(result.state.masks[name]).ravel()
        assert mask[gone:12].all(), "what is above the threshold stays"
        assert not mask[:gone].any(), "what was just dropped does not come back while there is room"
        np.testing.assert_array_equal(np.flatnonzero(result.fresh[name]), np.flatnonzero(mask[12:]) + 12)
    assert result.state.masks["bias"] is None
    grown = [one_update(0.1, seed, target=0.15).state.masks["a"] for seed in range(3)]
    assert any((grown[0] != other).any() for other in grown[1:]), "growth is random"


def test_the_threshold_follows_its_target():
    """6 of 40 weights are dropped: 0.15. Within a tenth of its target the threshold stays."""
    factors = {0.15: 1.0, 0.163: 1.0, 0.14: 1.0, 0.20: 2.0, 0.10: 0.5}
    state = method(0.1).init(jax.random.key(0), PARAMS)._replace(masks=FIRST)

    @jax.jit
    def thresholds(state):
        signals = Signals(PARAMS, None, 0, jax.random.key(0))
        return [method(0.1, target=target).update(state, signals).state.threshold for target in factors]

    np.testing.assert_allclose(thresholds(state), [0.1 * factor for factor in factors.values()], rtol=1e-6)


def test_a_threshold_above_everything_leaves_one_weight_of_each_layer_and_the_total():
    result = one_update(5.0)
    assert sum(counts(result.state.masks).values()) == 24
    # 11 are dropped of either, one survives: equal shares, and only 8 free places in each, so some must come back.
    assert counts(result.state.masks) == {"a": 12, "b": 12}
    assert np.asarray(result.fresh["a"]).sum() == 11


def test_full_layers_and_empty_room():
    """Both layers full: what is dropped can only come back; nothing loops, nothing overflows."""
    plan = rx.make_plan(PARAMS, 0.0, rx.uniform)
    algorithm = dsr(plan, threshold=0.1)
    state = algorithm.init(jax.random.key(0), PARAMS)
    result = UPDATE(state, jax.random.key(0), algorithm)
    assert counts(result.state.masks) == {"a": 20, "b": 20}
    assert int(result.fresh["a"].sum()) == 4  # anew, from 0


def test_totals_and_threshold_over_a_run():
    rng = np.random.default_rng(0)
    params = {"a": rng.normal(size=(8, 10)).astype(np.float32), "b": 5 * rng.normal(size=(6, 5)).astype(np.float32)}
    algorithm = dsr(rx.make_plan(params, 0.6, rx.uniform), period=1, threshold=0.05, target=0.1)
    tx = rx.sparsify(optax.sgd(0.0), algorithm, key=jax.random.key(2))
    update, state = jax.jit(tx.update, static_argnames="rewire"), jax.jit(tx.init)(params)
    total = sum(int(m.sum()) for m in jax.tree.leaves(state.masks))
    moved = set()
    for _ in range(12):
        noisy = {name: p + np.float32(0.3) * rng.normal(size=p.shape).astype(np.float32) for name, p in params.items()}
        _, state = update(params, state, rx.apply_masks(noisy, state.masks), rewire=True)
        assert sum(int(m.sum()) for m in jax.tree.leaves(state.masks)) == total
        moved.add(int(state.masks["b"].sum()))
    assert len(moved) > 1
    assert float(state.algorithm.threshold) > 0.05  # it had to rise to reach its target
