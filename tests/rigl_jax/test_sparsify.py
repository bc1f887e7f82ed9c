"""The bridge to optax: exact zeros and fresh starts, whatever the optimizer."""

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import rigl_jax as rx
from rigl_jax.tracing.invariants import rests
from tests.errors import refused
from tests.traces import jit_once


def problem():
    params = {"a": {"kernel": jnp.ones((6, 8)), "bias": jnp.zeros(8)}, "b": {"kernel": jnp.ones((8, 4))}}
    names = rx.trees.names(params)
    key = jax.random.key(7)
    return jax.tree.map(lambda n, p: p * jax.random.normal(rx.trees.leaf_key(key, n), p.shape), names, params)


@jax.jit
def gradients(params, step):
    key = jax.random.fold_in(jax.random.key(11), step)
    return jax.tree.map(
        lambda n, p: jax.random.normal(rx.trees.leaf_key(key, n), p.shape, p.dtype), rx.trees.names(params), params
    )


def kernels_only(params):
    return jax.tree.map(lambda p: p.ndim > 1, params)


OPTIMIZERS = {
    "sgd": lambda: optax.sgd(0.1),
    "momentum": lambda: optax.sgd(0.1, momentum=0.9, nesterov=True),
    "adam": lambda: optax.adam(0.1),
    "adamw": lambda: optax.adamw(0.1, weight_decay=0.1),
    "lamb": lambda: optax.lamb(0.1, weight_decay=0.1),
    "lion": lambda: optax.lion(0.01, weight_decay=0.1),
    "rmsprop": lambda: optax.rmsprop(0.1, momentum=0.9),
    "adagrad": lambda: optax.adagrad(0.1),
    "adabelief": lambda: optax.adabelief(0.1),
    "adafactor": lambda: optax.adafactor(0.1, min_dim_size_to_factor=128, weight_decay_rate=0.1),
    "adafactor_factored": lambda: optax.adafactor(0.1, min_dim_size_to_factor=2),
    "sophia": lambda: optax.contrib.sophia(0.1),
    "muon": lambda: optax.contrib.muon(0.1),
    "clip": lambda: optax.chain(optax.clip_by_global_norm(1.0), optax.add_decayed_weights(0.1), optax.adam(0.1)),
    "inject": lambda: optax.inject_hyperparams(optax.adamw)(learning_rate=0.1, weight_decay=0.1),
    "masked": lambda: optax.chain(optax.masked(optax.trace(0.9), kernels_only), optax.scale(-0.1)),
    "partition": lambda: optax.partition({True: optax.adam(0.1), False: optax.sgd(0.1, momentum=0.9)}, kernels_only),
    "multi_steps": lambda: optax.MultiSteps(optax.adam(0.1), every_k_schedule=3),
    "scheduled": lambda: optax.adam(optax.cosine_decay_schedule(0.1, 100)),
    "noise": lambda: optax.chain(optax.add_noise(0.1, 0.5, key=0), optax.adam(0.1)),
    "lookahead_like": lambda: optax.contrib.schedule_free_adamw(0.1, warmup_steps=2),
    "amsgrad": lambda: optax.amsgrad(0.1),
    "apply_if_finite": lambda: optax.apply_if_finite(optax.adam(0.1), 3),
}


def half_square(params):
    return sum(jnp.vdot(p, p) / 2 for p in jax.tree.leaves(params))


def moments(inner, state, params):
    """Arrays the optimizer keeps for each weight: those of the weight's shape, leaf by leaf."""
    found = []

    def visit(value, p):
        if not isinstance(value, optax.MaskedNode) and jnp.shape(value) == p.shape:
            found.append((value, p))
        return value

    optax.tree.map_params(inner.init, visit, state, params, is_leaf=lambda x: isinstance(x, optax.MaskedNode))
    return found


# Every optimizer of optax with its defaults goes through test_every_optimizer.
ELSEWHERE = {"sgd", "lamb", "lion", "rmsprop", "adabelief", "sophia", "muon", "lookahead_like", "amsgrad"}


@pytest.mark.parametrize("name", [name for name in OPTIMIZERS if name not in ELSEWHERE])
def test_pruned_weights_and_their_moments_are_zero(name):
    params = problem()
    plan = rx.make_plan(params, 0.6)
    inner = OPTIMIZERS[name]()
    algorithm = rx.rigl(plan, period=4, stop=40, fraction=0.5, skip_step=name != "momentum")
    tx = rx.sparsify(inner, algorithm, key=jax.random.key(0))
    state = tx.init(params)
    params = rx.apply_masks(params, state.masks)
    update = jit_once(tx.update)
    start = inner.init(jax.tree.map(jnp.zeros_like, params))
    changed = 0
    for step in range(10):
        before = state.masks
        updates, state = update(gradients(params, step), state, params)
        params = optax.apply_updates(params, updates)
        rx.check_masked(params, state.masks)
        changed += any(bool((m != b).any()) for m, b in zip(*map(jax.tree.leaves, (state.masks, before)), strict=True))
        masks = jax.tree.map(lambda p, m: jnp.ones(p.shape, bool) if m is None else m, params, state.masks)
        now = moments(inner, state.inner, masks)
        assert len(now) > 0 or name == "adafactor_factored"
        for (value, mask), (first, _) in zip(now, moments(inner, start, masks), strict=True):
            np.testing.assert_array_equal(np.asarray(value)[~np.asarray(mask)], np.asarray(first)[~np.asarray(mask)])
            if name != "adagrad":
                assert not np.asarray(value)[~np.asarray(mask)].any()
        counts = {n: int(m.sum()) for n, m in rx.trees.named_leaves(state.masks).items()}
        assert counts == {n: leaf.n_active for n, leaf in plan.items()}
    assert changed == 3  # steps 0, 4 and 8
    chex.assert_tree_all_finite(params)


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16])
def test_zeros_are_exact_in_short_floats(dtype):
    params = jax.tree.map(lambda p: (p * 1.2345).astype(dtype), problem())
    plan = rx.make_plan(params, 0.6)
    tx = rx.sparsify(optax.adamw(0.1, mu_dtype=jnp.float32), rx.rigl(plan, period=2, stop=9), key=jax.random.key(0))
    state = tx.init(params)  # params deliberately not masked: the first update does it
    update = jax.jit(tx.update, static_argnames="rewire")
    for step in range(4):
        updates, state = update(gradients(params, step), state, params, rewire=step % 2 == 0)
        params = optax.apply_updates(params, updates)
        rx.check_masked(params, state.masks)
        assert params["a"]["kernel"].dtype == dtype


def test_sparse_updates_equal_the_inner_optimizer_on_active_weights():
    params = problem()
    tx = rx.sparsify(optax.adam(0.1), rx.static(rx.make_plan(params, 0.5)), key=jax.random.key(0))
    state = tx.init(params)
    params = rx.apply_masks(params, state.masks)
    inner = optax.adam(0.1)
    expected, inner_state = params, inner.init(params)
    for step in range(3):
        grads = gradients(params, step)
        updates, state = tx.update(grads, state, params)
        params = optax.apply_updates(params, updates)
        u, inner_state = inner.update(rx.apply_masks(grads, state.masks), inner_state, expected)
        expected = optax.apply_updates(expected, u)
    chex.assert_trees_all_close(params, expected, atol=1e-6)


def run(rewire, skip_step, steps=9):
    params = problem()
    algorithm = rx.rigl(rx.make_plan(params, 0.6), period=3, stop=20, fraction=0.5, skip_step=skip_step)
    tx = rx.sparsify(optax.adam(0.1), algorithm, key=jax.random.key(0))
    state = tx.init(params)
    params = rx.apply_masks(params, state.masks)
    update = jax.jit(tx.update, static_argnames="rewire")
    for step in range(steps):
        decided = {} if rewire is None else {"rewire": bool(algorithm.due(step))}
        updates, state = update(gradients(params, step), state, params, **decided)
        params = optax.apply_updates(params, updates)
    return params, state


@pytest.mark.parametrize("skip_step", [True, False])
def test_static_branch_equals_in_graph_branch(skip_step):
    chex.assert_trees_all_equal(run(None, skip_step), run("static", skip_step))


RESTING = {
    name: name not in ("adagrad", "adabelief", "adafactor", "adafactor_factored", "sophia", "noise")
    for name in OPTIMIZERS
}


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_which_optimizers_leave_a_pruned_weight_alone(name):
    """Sophia averages an estimate of its own, which only masks make zero; the others that do not rest add something."""
    extra = {"obj_fn": half_square} if name == "sophia" else {}
    assert rests(optax.with_extra_args_support(OPTIMIZERS[name]()), problem(), **extra) == RESTING[name]


def test_scan_equals_loop():
    params = problem()
    tx = rx.sparsify(optax.adam(0.1), rx.rigl(rx.make_plan(params, 0.6), period=3), key=jax.random.key(0))
    state = tx.init(params)
    start = (rx.apply_masks(params, state.masks), state)

    def body(carry, step):
        params, state = carry
        updates, state = tx.update(gradients(params, step), state, params)
        return (optax.apply_updates(params, updates), state), None

    scanned, _ = jax.lax.scan(body, start, jnp.arange(7))
    looped = start
    for step in range(7):
        looped, _ = jax.jit(body)(looped, jnp.int32(step))
    chex.assert_trees_all_equal(scanned[0], looped[0])
    chex.assert_trees_all_equal(scanned[1].masks, looped[1].masks)


def test_skipped_step_leaves_weights_and_optimizer_alone():
    params = problem()
    tx = rx.sparsify(optax.adam(0.1), rx.rigl(rx.make_plan(params, 0.6), period=5), key=jax.random.key(0))
    state = tx.init(params)
    params = rx.apply_masks(params, state.masks)
    updates, after = tx.update(gradients(params, 0), state, params, rewire=True)
    new = optax.apply_updates(params, updates)
    for name, p in rx.trees.named_leaves(new).items():
        old, mask = rx.trees.named_leaves(params)[name], rx.trees.named_leaves(after.masks).get(name)
        np.testing.assert_array_equal(p, old if mask is None else jnp.where(mask, old, 0))
    assert int(optax.tree.get(after.inner, "count")) == 0
    assert int(after.step) == 1


def test_sparsity_zero_is_the_inner_optimizer():
    params = problem()
    algorithm = rx.rigl(rx.make_plan(params, 0.0), period=2, stop=10, skip_step=False)
    tx, inner = rx.sparsify(optax.adamw(0.1), algorithm, key=jax.random.key(0)), optax.adamw(0.1)
    state, inner_state, expected = tx.init(params), inner.init(params), params
    for step in range(5):
        updates, state = tx.update(gradients(params, step), state, params)
        u, inner_state = inner.update(gradients(expected, step), inner_state, expected)
        params, expected = optax.apply_updates(params, updates), optax.apply_updates(expected, u)
    chex.assert_trees_all_close(params, expected, atol=1e-6)


def test_a_donated_state_does_not_take_the_callers_key():
    key = jax.random.key(0)
    params = problem()
    tx = rx.sparsify(optax.sgd(0.1), rx.set_(rx.make_plan(params, 0.5), period=2), key=key)
    for _ in range(2):  # a second init must not find its key donated either
        state = tx.init(params)
        step = jax.jit(lambda s, p, g: tx.update(g, s, p), donate_argnums=(0,))
        step(state, params, gradients(params, 0))
        assert jax.random.uniform(key) >= 0


def test_legacy_keys_give_the_same_masks():
    params = problem()
    plan = rx.make_plan(params, 0.5)
    old = rx.sparsify(optax.sgd(0.1), rx.static(plan), key=jax.random.key_data(jax.random.key(5)))
    new = rx.sparsify(optax.sgd(0.1), rx.static(plan), key=jax.random.key(5))
    chex.assert_trees_all_equal(old.init(params).masks, new.init(params).masks)


def test_init_under_eval_shape_and_jit():
    params = problem()
    tx = rx.sparsify(optax.adam(0.1), rx.rigl(rx.make_plan(params, 0.5)), key=jax.random.key(0))
    shapes = jax.eval_shape(tx.init, params)
    state = jax.jit(tx.init)(params)
    chex.assert_trees_all_equal_shapes_and_dtypes(shapes.inner, state.inner)
    chex.assert_trees_all_equal(state.masks, tx.init(params).masks)


def test_extra_arguments_reach_the_inner_optimizer():
    params = {"w": jnp.ones((3, 3))}
    inner = optax.contrib.reduce_on_plateau(patience=1, factor=0.5)
    tx = rx.sparsify(inner, rx.static(rx.make_plan(params, 0.5)), key=jax.random.key(0))
    state = tx.init(params)
    _, state = tx.update(params, state, params, value=jnp.float32(1.0))
    assert float(state.inner.best_value) == 1.0


@pytest.mark.eight_devices
def test_inside_pmap_and_shard_map_masks_follow_the_mean_gradient():
    params = problem()
    tx = rx.sparsify(optax.adam(0.1), rx.rigl(rx.make_plan(params, 0.6), period=1), key=jax.random.key(0))
    state = tx.init(params)
    params = rx.apply_masks(params, state.masks)
    grads = [gradients(params, i) for i in range(8)]
    mean = jax.tree.map(lambda *g: sum(g) / 8, *grads)
    _, expected = tx.update(mean, state, params)
    stacked = jax.tree.map(lambda *g: jnp.stack(g), *grads)

    def step(grads, state, params):
        return tx.update(jax.lax.pmean(grads, "batch"), state, params)[1].masks

    replicated = jax.pmap(step, axis_name="batch", in_axes=(0, None, None))(stacked, state, params)
    for device in range(8):
        chex.assert_trees_all_equal(jax.tree.map(lambda m, d=device: np.asarray(m[d]), replicated), expected.masks)

    mesh = jax.make_mesh((8,), ("batch",), axis_types=(jax.sharding.AxisType.Auto,))
    one = lambda g, s, p: step(jax.tree.map(lambda x: x[0], g), s, p)  # noqa: E731
    mapped = jax.shard_map(
        one, mesh=mesh, in_specs=(jax.P("batch"), jax.P(), jax.P()), out_specs=jax.P(), check_vma=False
    )
    chex.assert_trees_all_equal(jax.jit(mapped)(stacked, state, params), expected.masks)


def test_a_transformation_around_sparsify_is_found():
    params = problem()
    tx = optax.chain(
        rx.sparsify(optax.sgd(0.1), rx.rigl(rx.make_plan(params, 0.5), period=1), key=jax.random.key(0)),
        optax.scale(0.5),
    )
    state = tx.init(params)
    params = rx.apply_masks(params, state[0].masks)
    updates, state = tx.update(gradients(params, 0), state, params)
    params = optax.apply_updates(params, updates)
    with refused("a/kernel"):
        rx.check_masked(params, state[0].masks)


def test_straight_through():
    params = {"w": jnp.array([1.0, 2.0]), "b": jnp.array([3.0])}
    masks = {"w": jnp.array([True, False]), "b": None}
    loss = lambda p: (rx.straight_through(p, masks)["w"] ** 2).sum() + p["b"].sum()  # noqa: E731
    grads = jax.grad(loss)(params)
    assert float(loss(params)) == 4.0
    assert grads["w"].tolist() == [2.0, 0.0]  # d(w_masked ** 2), passed to every weight; off-mask its value is 0
    assert grads["b"].tolist() == [1.0]


def test_sparsity_measures():
    assert float(rx.sparsity({"w": jnp.array([True, False, False, False]), "b": None})) == 0.75
    assert float(rx.sparsity({"w": jnp.zeros((3, 3)), "v": jnp.ones(9)})) == 0.5


@pytest.mark.parametrize("value", [jnp.inf, -jnp.inf, jnp.nan])
def test_infinite_and_nan_weights_off_the_mask_are_told_from_others(value):
    masks = {"w": jnp.array([True, False, False])}
    with refused("w", "NaN"):
        rx.check_masked({"w": jnp.array([1.0, value, 2.0])}, masks)
    rx.check_masked({"w": jnp.array([value, 0.0, 0.0])}, masks)


def moving(plan, delta, *, values=None, **facts):
    """RigL that also adds `delta` to the weights that stay."""
    inner = rx.rigl(plan, period=1, skip_step=False)

    def update(state, signals):
        return inner.update(state, signals)._replace(delta=delta, values=values)

    return inner._replace(update=update, **facts)


def test_a_change_of_kept_weights_leaves_their_moments_and_all_other_weights_alone():
    params = problem()
    plan = rx.make_plan(params, 0.5)
    delta = {"a": {"kernel": jnp.full((6, 8), 2.0).at[0].set(jnp.nan), "bias": None}, "b": {"kernel": None}}
    values = jax.tree.map(lambda p: jnp.full_like(p, 9.0), params)
    results = []
    for change in (None, delta):
        tx = rx.sparsify(optax.adam(0.1), moving(plan, change, values=values), key=jax.random.key(0))
        state = tx.init(params)
        start = rx.apply_masks(params, state.masks)
        updates, after = tx.update(gradients(params, 0), state, start)
        results.append((optax.apply_updates(start, updates), after))
    (plain, state), (moved, other) = results
    chex.assert_trees_all_equal(state, other)
    mask, old = state.masks["a"]["kernel"], tx.init(params).masks["a"]["kernel"]
    kept, fresh = mask & old, mask & ~old
    assert fresh.any()
    added = np.where(kept & (jnp.arange(6)[:, None] > 0), 2.0, 0.0)
    np.testing.assert_allclose(moved["a"]["kernel"], plain["a"]["kernel"] + added, rtol=1e-6)
    np.testing.assert_array_equal(moved["a"]["kernel"][~mask], 0)
    np.testing.assert_array_equal(moved["a"]["kernel"][fresh], 9)
    chex.assert_trees_all_equal(moved["b"], plain["b"])


def test_a_frozen_leaf_is_not_changed_either():
    params = problem()
    plan = rx.make_plan(params, 0.5)
    frozen = lambda params: jax.tree.map(lambda name: name == "b/kernel", rx.trees.names(params))  # noqa: E731
    inner = optax.partition({True: optax.set_to_zero(), False: optax.sgd(0.1)}, frozen)
    tx = rx.sparsify(inner, moving(plan, jax.tree.map(jnp.ones_like, params)), key=jax.random.key(0))
    state = tx.init(params)
    start = rx.apply_masks(params, state.masks)
    updates, _ = tx.update(gradients(params, 0), state, start)
    assert not updates["b"]["kernel"].any()
    assert updates["a"]["kernel"].any()


def test_further_keywords_reach_the_algorithm():
    params = problem()
    plan = rx.make_plan(params, 0.5)
    seen = []

    def observe(state, signals):
        seen.append(signals.extra)
        return state

    tx = rx.sparsify(optax.sgd(0.1), rx.static(plan)._replace(observe=observe), key=jax.random.key(0))
    tx.update(params, tx.init(params), params, value=3.0)
    assert seen == [{"value": 3.0}]


def test_an_algorithm_that_stores_more_than_its_masks_says_so():
    params = problem()
    method = rx.ste(rx.make_plan(params, 0.5))
    with refused("latent"):
        rx.sparsify(optax.sgd(0.1), method._replace(latent=False), key=jax.random.key(0)).init(params)


WRONG = {
    "init": lambda key, params: {"masks": 1},
    "observe": lambda state, signals: None,
    "update": lambda state, signals: state,
}


@pytest.mark.parametrize("function", WRONG)
def test_a_function_of_an_algorithm_that_returns_something_else_is_named(function):
    params = problem()
    method = rx.set_(rx.make_plan(params, 0.5), period=1)._replace(**{function: WRONG[function]})
    tx = rx.sparsify(optax.sgd(0.1), method, key=jax.random.key(0))
    with refused("sparsify", function):
        tx.update(params, tx.init(params), params, rewire=True)
