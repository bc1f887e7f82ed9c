"""RigL and SET against Algorithm 1 worked by hand and in NumPy, option by option."""

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import rigl_jax as rx
from rigl_jax import values
from rigl_jax.base import Signals
from tests import oracles


def one_update(algorithm, masks, params, grads, step=0, seed=0):
    """The result of one rewiring, without an optimizer around it."""
    state = algorithm.init(jax.random.key(seed), params)._replace(masks=masks)
    key = jax.random.fold_in(jax.random.key(seed), step)
    return jax.jit(algorithm.update)(state, Signals(params, grads, jnp.int32(step), key))


# A worked example, 2 x 5 with 5 active weights and a fraction of 0.4, so K = 2:
W = {"w": jnp.array([[0.5, -0.1, 0.3, 0.0, 0.0], [0.2, -0.9, 0.0, 0.0, 0.0]])}
M = {"w": jnp.array([[1, 1, 1, 0, 0], [1, 1, 0, 0, 0]], bool)}
G = {"w": jnp.array([[9.0, 0.2, 9.0, -0.7, 0.1], [0.9, 9.0, 0.3, 0.0, -0.4]])}
# drop 0.1 and 0.2; candidates by |g|: (1,0) 0.9 just dropped, (0,3) 0.7, (1,4) 0.4, (1,2) 0.3, (0,1) 0.2, ...
PLAN = rx.make_plan(W, 0.5)
FIXED = optax.constant_schedule(0.4)


def as_ints(mask):
    return np.asarray(mask).astype(int).tolist()


def test_worked_example():
    result = one_update(rx.rigl(PLAN, fraction=FIXED), M, W, G)
    assert as_ints(result.state.masks["w"]) == [[1, 0, 1, 1, 0], [1, 1, 0, 0, 0]]
    # (1,0) was dropped and grown at once: it keeps its value.
    assert as_ints(result.fresh["w"]) == [[0, 0, 0, 1, 0], [0, 0, 0, 0, 0]]


def test_worked_example_regrown_restart():
    result = one_update(rx.rigl(PLAN, fraction=FIXED, keep_regrown=False), M, W, G)
    assert as_ints(result.state.masks["w"]) == [[1, 0, 1, 1, 0], [1, 1, 0, 0, 0]]
    assert as_ints(result.fresh["w"]) == [[0, 0, 0, 1, 0], [1, 0, 0, 0, 0]]


def test_worked_example_regrowth_forbidden():
    result = one_update(rx.rigl(PLAN, fraction=FIXED, regrow_dropped=False), M, W, G)
    assert as_ints(result.state.masks["w"]) == [[1, 0, 1, 1, 0], [0, 1, 0, 0, 1]]


def test_worked_example_through_the_optimizer():
    """Values after the step: kept, regrown, fresh and dropped weights, with and without a restart."""
    kept, restarted = [0.5, 0, 0.3, 0, 0, 0.2, -0.9, 0, 0, 0], [0.5, 0, 0.3, 0, 0, 0, -0.9, 0, 0, 0]
    for keep, expected in [(True, kept), (False, restarted)]:
        algorithm = rx.rigl(PLAN, fraction=FIXED, keep_regrown=keep)
        tx = rx.sparsify(optax.sgd(1.0, momentum=0.9), algorithm, key=jax.random.key(0))
        state = tx.init(W)
        momentum = (optax.TraceState({"w": jnp.where(M["w"], 5.0, 0.0)}), *state.inner[1:])
        state = state._replace(algorithm=state.algorithm._replace(masks=M), inner=momentum)
        updates, state = tx.update(G, state, W, rewire=True)
        new = optax.apply_updates(W, updates)["w"]
        np.testing.assert_allclose(new.ravel(), expected, rtol=1e-6)
        moments = np.where([1, 0, 1, 0, 0, keep, 1, 0, 0, 0], 5.0, 0.0)
        np.testing.assert_array_equal(state.inner[0].trace["w"].ravel(), moments)


def random_case(seed, n_active=40):
    rng = np.random.default_rng(seed)
    mask = oracles.top(rng.random((8, 12)), n_active)
    params = {"w": jnp.asarray(np.where(mask, rng.normal(size=(8, 12)), 0), jnp.float32)}
    grads = {"w": jnp.asarray(rng.normal(size=(8, 12)), jnp.float32)}
    return {"w": jnp.asarray(mask)}, params, grads


@pytest.mark.parametrize("step", [0, 30, 70, 100])
@pytest.mark.parametrize("regrow", [True, False])
def test_rigl_is_algorithm_1_in_numpy(step, regrow):
    masks, params, grads = random_case(step)
    plan = rx.make_plan(params, 1 - 40 / 96)
    assert plan["w"].n_active == 40
    algorithm = rx.rigl(plan, period=10, stop=100, fraction=0.5, regrow_dropped=regrow)
    result = one_update(algorithm, masks, params, grads, step)
    n_drop = int(np.float32(oracles.cosine_fraction(0.5, step, 100)) * 40)
    expected = oracles.drop_and_grow(masks["w"], np.abs(params["w"]), np.abs(grads["w"]), n_drop, regrow)
    np.testing.assert_array_equal(result.state.masks["w"], expected)


def test_set_grows_at_random_and_reads_no_gradient():
    masks, params, grads = random_case(1)
    algorithm = rx.set_(rx.make_plan(params, 1 - 40 / 96), fraction=optax.constant_schedule(0.25))
    first = one_update(algorithm, masks, params, grads).state.masks["w"]
    no_grads = jax.tree.map(lambda g: g * jnp.nan, grads)
    chex.assert_trees_all_equal(first, one_update(algorithm, masks, params, no_grads).state.masks["w"])
    kept = oracles.top(np.abs(params["w"]), 30, masks["w"])
    assert np.asarray(first)[kept].all()
    assert int(first.sum()) == 40
    other = one_update(algorithm, masks, params, grads, step=1).state.masks["w"]
    assert bool((first != other).any())
    assert not any(algorithm.dense_grads(step) for step in range(300))
    assert not algorithm.skip_step


def test_set_moves_weights_at_the_first_step():
    """The draws that made the masks must not come again: they would rank the dropped weights first."""
    params = {"w": jnp.zeros((30, 30))}
    tx = rx.sparsify(optax.sgd(0.1), rx.set_(rx.make_plan(params, 0.5)), key=jax.random.key(0))
    state = tx.init(params)
    _, after = tx.update(params, state, params, rewire=True)
    # 135 of 450 are dropped and 585 places are free: about 104 of the grown were not active before.
    assert 70 < int((after.masks["w"] & ~state.masks["w"]).sum()) < 130


def test_set_grows_uniformly_over_free_positions():
    masks, params, grads = random_case(2)
    algorithm = rx.set_(rx.make_plan(params, 1 - 40 / 96), fraction=optax.constant_schedule(0.25))
    state = algorithm.init(jax.random.key(0), params)._replace(masks=masks)
    grow = lambda key: algorithm.update(state, Signals(params, grads, jnp.int32(0), key)).state.masks["w"]  # noqa: E731
    hits = np.asarray(jax.jit(jax.vmap(grow))(jax.random.split(jax.random.key(0), 2000))).sum(0)
    kept = oracles.top(np.abs(params["w"]), 30, masks["w"])
    p = 10 / 66
    chi2 = ((hits[~kept] - 2000 * p) ** 2 / (2000 * p * (1 - p))).sum() * 65 / 66
    assert chi2 < 105.0  # 65 degrees of freedom, p = 0.001


def test_fraction_zero_changes_nothing():
    masks, params, grads = random_case(3)
    result = one_update(rx.rigl(rx.make_plan(params, 1 - 40 / 96), fraction=0.0), masks, params, grads)
    chex.assert_trees_all_equal(result.state.masks, masks)


def test_dense_leaves_have_nowhere_to_grow():
    params = {"w": jnp.ones((4, 4)), "v": jnp.ones((2, 2))}
    plan = rx.make_plan(params, 0.5, sparsities={"v": 0.0})
    algorithm = rx.rigl(plan, fraction=1.0)
    state = algorithm.init(jax.random.key(0), params)
    result = one_update(algorithm, state.masks, params, params)
    assert bool(result.state.masks["v"].all())


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({}, [0, 10, 20, 30]),
        ({"start": 10}, [10, 20, 30]),
        ({"include_stop": False}, [0, 10, 20]),
        ({"stop": None}, [0, 10, 20, 30, 40]),
        ({"count_skipped": False}, [0, 11, 22, 33]),
    ],
)
def test_when(options, expected):
    algorithm = rx.rigl(PLAN, **{"period": 10, "stop": 30, **options})
    assert [step for step in range(45) if algorithm.due(step)] == expected
    assert [step for step in range(45) if algorithm.dense_grads(step)] == expected


def test_uncounted_rewirings_anneal_by_weight_steps():
    masks, params, grads = random_case(4)
    plan = rx.make_plan(params, 1 - 40 / 96)
    counted = one_update(rx.rigl(plan, period=10, stop=30, fraction=0.5), masks, params, grads, step=20)
    uncounted = rx.rigl(plan, period=10, stop=30, fraction=0.5, count_skipped=False)
    chex.assert_trees_all_equal(one_update(uncounted, masks, params, grads, step=22).state.masks, counted.state.masks)


def test_fraction_starts_at_start():
    masks, params, grads = random_case(5)
    plan = rx.make_plan(params, 1 - 40 / 96)
    late = one_update(rx.rigl(plan, period=10, start=50, stop=150, fraction=0.5), masks, params, grads, step=100)
    early = one_update(rx.rigl(plan, period=10, stop=100, fraction=0.5), masks, params, grads, step=50)
    chex.assert_trees_all_equal(late.state.masks, early.state.masks)


GROW_VALUES = {
    "scaled_gradient": (
        values.scaled_gradient(-0.1),
        lambda w, g, v: np.testing.assert_allclose(v, -0.1 * g, rtol=1e-6),
    ),
    "gradient_sign": (
        values.gradient_sign(0.2),
        lambda w, g, v: np.testing.assert_allclose(v, 0.2 * np.sign(g), rtol=1e-6),
    ),
    "normal": (values.normal(0.5), lambda w, g, v: 0.02 < v.std() / w.std() < 1.5 or pytest.fail(str(v))),
    "uniform": (values.uniform(0.5), lambda w, g, v: np.abs(v).max() <= 0.5 * np.abs(w).mean() or pytest.fail(str(v))),
    "shuffled": (
        values.shuffled({"w": jnp.arange(1.0, 97.0).reshape(8, 12)}, 0.5),
        lambda w, g, v: set((v * 2).tolist()) <= set(range(1, 97)) or pytest.fail(str(v)),
    ),
}


@pytest.mark.parametrize("name", GROW_VALUES)
def test_grow_values_reach_fresh_weights_only(name):
    grow_values, check = GROW_VALUES[name]
    masks, params, grads = random_case(6)
    algorithm = rx.rigl(rx.make_plan(params, 1 - 40 / 96), fraction=0.5, grow_values=grow_values)
    tx = rx.sparsify(optax.sgd(0.1), algorithm, key=jax.random.key(1))
    state = tx.init(params)
    state = state._replace(algorithm=state.algorithm._replace(masks=masks))
    updates, after = tx.update(grads, state, params, rewire=True)
    new = optax.apply_updates(params, updates)
    rx.check_masked(new, after.masks)
    fresh = np.asarray(after.masks["w"] & ~masks["w"])
    assert fresh.sum() > 5
    check(np.asarray(params["w"]), np.asarray(grads["w"])[fresh], np.asarray(new["w"])[fresh])
    kept = np.asarray(after.masks["w"] & masks["w"])
    np.testing.assert_array_equal(np.asarray(new["w"])[kept], np.asarray(params["w"])[kept])


def test_drop_noise_breaks_ties_but_never_revives():
    from rigl_jax import scores

    params = {"w": jnp.zeros((8, 12))}  # all tied at zero, as right after growth
    masks = {"w": jnp.asarray(oracles.top(np.random.default_rng(0).random((8, 12)), 40))}
    plan = rx.make_plan(params, 1 - 40 / 96)
    grads = jax.tree.map(jnp.zeros_like, params)
    noisy = rx.rigl(plan, fraction=0.25, drop=scores.noisy(scores.magnitude, 1e-5))
    by_index = one_update(rx.rigl(plan, fraction=0.25, regrow_dropped=False), masks, params, grads).state.masks["w"]
    one, two = (one_update(noisy, masks, params, grads, seed=seed).state.masks["w"] for seed in (0, 1))
    assert int(one.sum()) == int(two.sum()) == int(by_index.sum()) == 40
    assert bool((one != two).any())


def test_the_network_computes_the_same_right_after_growth():
    """Fresh weights are zero, so growing changes no output: f(after) == f(after the drop alone)."""
    masks, params, grads = random_case(7)
    algorithm = rx.rigl(rx.make_plan(params, 1 - 40 / 96), fraction=0.3, keep_regrown=False)
    tx = rx.sparsify(optax.sgd(0.1), algorithm, key=jax.random.key(1))
    state = tx.init(params)
    state = state._replace(algorithm=state.algorithm._replace(masks=masks))
    updates, _ = tx.update(grads, state, params, rewire=True)
    kept = oracles.top(np.abs(params["w"]), 40 - int(np.float32(0.3) * 40), masks["w"])
    np.testing.assert_array_equal(optax.apply_updates(params, updates)["w"], np.where(kept, params["w"], 0))


def test_a_score_may_be_an_object_that_has_no_hash():
    """As a module of Equinox that holds arrays."""

    class Magnitude:
        __hash__ = None

        def __call__(self, signals):
            return rx.scores.magnitude(signals)

    own, plain = (
        one_update(rx.rigl(PLAN, drop=drop, fraction=FIXED), M, W, G) for drop in (Magnitude(), rx.scores.magnitude)
    )
    chex.assert_trees_all_equal(own, plain)
