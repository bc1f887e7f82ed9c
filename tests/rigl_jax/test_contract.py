"""What every algorithm keeps with every structure. A new one needs no test of its own to pass this."""

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import rigl_jax as rx
from rigl_jax import topology

STRUCTURES = {"unstructured": rx.unstructured()}
CASES = [(a, s) for a in rx.ALGORITHMS for s in STRUCTURES]
SCHEDULE = {"period": 3, "stop": 30, "fraction": 0.5}


def problem():
    params = {
        "conv": {"kernel": jnp.zeros((3, 3, 4, 8)), "bias": jnp.zeros(8)},
        "dense": {"kernel": jnp.zeros((16, 8)), "bias": jnp.zeros(8)},
    }
    key = jax.random.key(1)
    return jax.tree.map(
        lambda n, p: p + jax.random.normal(rx.trees.leaf_key(key, n), p.shape), rx.trees.names(params), params
    )


def gradients(params, step):
    key = jax.random.fold_in(jax.random.key(2), step)
    return jax.tree.map(
        lambda n, p: jax.random.normal(rx.trees.leaf_key(key, n), p.shape), rx.trees.names(params), params
    )


def build(algorithm, structure, sparsity=0.75, inner=None):
    params = problem()
    rules = [(".*kernel", STRUCTURES[structure]), (".*", None)]
    plan = rx.make_plan(params, sparsity, rx.uniform, rules=rules)
    options = {} if algorithm == "static" else SCHEDULE
    method = rx.ALGORITHMS[algorithm](plan, **options)
    tx = rx.sparsify(inner or optax.adamw(0.1), method, key=jax.random.key(0))
    return plan, method, tx, params


def start(tx, params):
    state = tx.init(params)
    return rx.apply_masks(params, state.masks), state


@pytest.mark.parametrize(("algorithm", "structure"), CASES)
def test_counts_structure_zeros_and_one_trace(algorithm, structure):
    plan, _, tx, params = build(algorithm, structure)
    params, state = start(tx, params)
    update = jax.jit(tx.update)
    for step in range(8):
        updates, state = update(gradients(params, step), state, params)
        params = optax.apply_updates(params, updates)
        rx.check_masked(params, state.masks)
        masks = rx.trees.named_leaves(state.masks)
        assert masks.keys() == plan.keys()
        for name, leaf in plan.items():
            groups, units = topology.n_units(leaf)
            size = masks[name].size // (groups * units)
            assert int(masks[name].sum()) == groups * leaf.n_active * size
            pooled = leaf.structure.pool(masks[name].astype(jnp.float32)) > 0
            np.testing.assert_array_equal(leaf.structure.expand(pooled, leaf.shape), masks[name])
            assert (jnp.sum(pooled, axis=leaf.structure.axes(pooled.shape)) == leaf.n_active).all()
    assert update._cache_size() == 1
    chex.assert_tree_all_finite(params)


@pytest.mark.parametrize(("algorithm", "structure"), CASES)
def test_dense_leaves_train_as_without_us(algorithm, structure):
    _, method, tx, params = build(algorithm, structure, inner=optax.sgd(0.1))
    params, state = start(tx, params)
    expected = params["dense"]["bias"]
    for step in range(5):
        grads = gradients(params, step)
        updates, state = tx.update(grads, state, params, rewire=bool(method.due(step)))
        params = optax.apply_updates(params, updates)
        if not (method.skip_step and method.due(step)):
            expected = expected - 0.1 * grads["dense"]["bias"]
    chex.assert_trees_all_close(params["dense"]["bias"], expected, atol=1e-6)


@pytest.mark.parametrize(("algorithm", "structure"), CASES)
def test_static_branch_equals_in_graph_branch(algorithm, structure):
    _, method, tx, params = build(algorithm, structure)
    update = jax.jit(tx.update, static_argnames="rewire")
    a, b = start(tx, params), start(tx, params)
    for step in range(5):
        grads = gradients(params, step)
        updates, state = update(grads, a[1], a[0])
        a = (optax.apply_updates(a[0], updates), state)
        updates, state = update(grads, b[1], b[0], rewire=bool(method.due(step)))
        b = (optax.apply_updates(b[0], updates), state)
    chex.assert_trees_all_equal(a[0], b[0])
    chex.assert_trees_all_equal(a[1].masks, b[1].masks)


@pytest.mark.parametrize(("algorithm", "structure"), CASES)
def test_fresh_weights_start_anew(algorithm, structure):
    _, _, tx, params = build(algorithm, structure, inner=optax.adam(0.1))
    params, state = start(tx, params)
    for step in range(4):
        before = state.masks
        updates, state = tx.update(gradients(params, step), state, params)
        params = optax.apply_updates(params, updates)
        for moments in (state.inner[0].mu, state.inner[0].nu):
            arrays = rx.trees.named_leaves(moments)
            for name, mask in rx.trees.named_leaves(state.masks).items():
                fresh = np.asarray(mask & ~rx.trees.named_leaves(before)[name])
                assert not np.asarray(arrays[name])[fresh].any()
                assert not np.asarray(arrays[name])[~np.asarray(mask)].any()


@pytest.mark.parametrize(("algorithm", "structure"), CASES)
def test_state_is_arrays_and_survives_a_round_trip(algorithm, structure):
    _, _, tx, params = build(algorithm, structure)
    params, state = start(tx, params)
    shapes = jax.eval_shape(tx.init, params)
    chex.assert_trees_all_equal_structs(shapes, state)
    for leaf, shape in zip(jax.tree.leaves(state), jax.tree.leaves(shapes), strict=True):
        assert isinstance(leaf, jax.Array)
        assert (leaf.shape, leaf.dtype) == (shape.shape, shape.dtype)
    leaves, treedef = jax.tree.flatten(state)
    restored = jax.tree.unflatten(treedef, leaves)
    one = tx.update(gradients(params, 0), state, params)
    two = tx.update(gradients(params, 0), restored, params)
    chex.assert_trees_all_equal(one[0], two[0])


@pytest.mark.parametrize(("algorithm", "structure"), CASES)
def test_eight_devices_equal_one(algorithm, structure):
    _, _, tx, params = build(algorithm, structure)
    mesh = jax.make_mesh((8,), ("data",), axis_types=(jax.sharding.AxisType.Auto,))
    replicated = jax.NamedSharding(mesh, jax.P())
    x = jax.random.normal(jax.random.key(4), (16, 16))

    def loss(params, x):
        hidden = x @ params["dense"]["kernel"] + params["dense"]["bias"][None]
        return jnp.mean(hidden**2) + jnp.mean(params["conv"]["kernel"] ** 2 * x.mean()) + params["conv"]["bias"].sum()

    @jax.jit
    def step(params, state, x):
        updates, state = tx.update(jax.grad(loss)(params, x), state, params)
        return optax.apply_updates(params, updates), state

    one, many = start(tx, params), jax.device_put(start(tx, params), replicated)
    sharded = jax.device_put(x, jax.NamedSharding(mesh, jax.P("data")))
    for _ in range(5):
        one, many = step(*one, x), step(*many, sharded)
    chex.assert_trees_all_equal(jax.device_get(one[1].masks), jax.device_get(many[1].masks))
    chex.assert_trees_all_close(jax.device_get(one[0]), jax.device_get(many[0]), atol=1e-4)


@pytest.mark.parametrize(("algorithm", "structure"), CASES)
def test_same_key_same_masks(algorithm, structure):
    _, _, tx, params = build(algorithm, structure)
    chex.assert_trees_all_equal(tx.init(params).masks, tx.init(jax.tree.map(lambda p: 2 * p, params)).masks)
