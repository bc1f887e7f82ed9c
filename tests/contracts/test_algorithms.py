"""What every algorithm keeps with every structure. A new one needs no test of its own to pass this.

One plan holds a leaf of each structure, so that each algorithm is compiled once for all of them; the tests read what
its one run recorded. Options are found by the names that constructors share.
"""

import functools
import math
from typing import NamedTuple

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax import lax

import rigl_jax as rx
from rigl_jax import structures
from rigl_jax.algorithms.registry import FIXED, METHODS
from tests import xla
from tests.errors import refused

SHAPES = {
    "unstructured": (3, 3, 2, 4),
    "another": (10, 6),  # unstructured too: methods that move counts between leaves have somewhere to move them
    "block": (2, 2, 4, 6),
    "n_of_m": (8, 4),
    "fan_in": (6, 5),
    "channel": (6, 8),
}
STRUCTURES = {
    "unstructured": structures.unstructured(),
    "another": structures.unstructured(),
    "block": structures.block(2, 3),
    "n_of_m": structures.n_of_m(2, 4),
    "fan_in": structures.fan_in(),
    "channel": structures.channel(),
}
CASES = [(a, s) for a in rx.ALGORITHMS for s in STRUCTURES]
STEPS = 8
jit = functools.partial(jax.jit, compiler_options=xla.COMPILER_OPTIONS)
each_case = pytest.mark.parametrize(("algorithm", "structure"), CASES)
each_algorithm = pytest.mark.parametrize("algorithm", rx.ALGORITHMS)


def start_params():
    key = jax.random.key(1)
    shapes = {**{name: {"kernel": shape} for name, shape in SHAPES.items()}, "bias": (5,)}
    is_shape = lambda x: isinstance(x, tuple)  # noqa: E731
    names = rx.trees.names(jax.tree.map(math.prod, shapes, is_leaf=is_shape))
    return jax.tree.map(lambda n, s: jax.random.normal(rx.trees.leaf_key(key, n), s), names, shapes)


PARAMS = jit(start_params)()
INPUTS = np.asarray(jax.random.normal(jax.random.key(2), (STEPS, 16, 2)))
INNER = optax.adamw(0.05)


def loss(params, x=INPUTS[0]):
    """A gradient that differs from weight to weight; that of the bias depends on the bias alone."""
    flat = jnp.concatenate([params[name]["kernel"].reshape(-1) for name in SHAPES])
    features = jnp.sin(x[:, :1] * jnp.arange(flat.size, dtype=jnp.float32)[None] + x[:, 1:])
    return jnp.mean((features @ flat - 3.0) ** 2) / flat.size + jnp.sum((params["bias"] - x.mean()) ** 2)


COMMON = {"period": 2, "stop": 6, "fraction": 0.5, "loss": loss, "rounds": 4}


def construct(algorithm, plan, **others):
    return METHODS[algorithm].example(plan, **COMMON | others)


def build(algorithm, key=jax.random.key(0)):  # noqa: B008
    rules = [*((f"{name}/kernel", structure) for name, structure in STRUCTURES.items()), ("bias", None)]
    plan = rx.make_plan(PARAMS, 0.6, rx.uniform, rules=rules)
    method = construct(algorithm, plan)
    return plan, method, rx.sparsify(INNER, method, key=key)


class Snapshot(NamedTuple):
    params: dict
    masks: dict
    stored: dict
    trained: dict
    moments: tuple


class Run(NamedTuple):
    """A run of one algorithm on one device, whether to rewire decided in the graph: what is there after each step."""

    plan: dict
    method: rx.Algorithm
    init: object
    first: tuple
    steps: list
    traces: int


def snapshot(method, params, state):
    get = lambda tree: rx.trees.named_leaves(jax.device_get(tree))  # noqa: E731
    stored, trained = method.stored(state.algorithm), method.trained(state.algorithm)
    adam = state.inner[0]
    return Snapshot(get(params), get(state.masks), get(stored), get(trained), (get(adam.mu), get(adam.nu)))


def to_host_and_back(state):
    flat, treedef = jax.tree.flatten(state)
    return jax.tree.unflatten(treedef, [jnp.asarray(np.asarray(x)) for x in flat])


def step_of(tx, params, state, x, rewire=None):
    grads = jax.grad(lambda p: loss(rx.straight_through(p, state.masks), x))(params)
    updates, state = tx.update(grads, state, params, rewire=rewire)
    return optax.apply_updates(params, updates), state


@functools.cache
def run(algorithm):
    plan, method, tx = build(algorithm)
    traces = []

    def init(key, params):  # not under jit: its operations are compiled once for all algorithms
        state = rx.sparsify(INNER, method, key=key).init(params)
        return rx.trees.map_masked(
            lambda mask, p: jnp.where(mask, p, 0.0), method.stored(state.algorithm), params
        ), state

    @jit
    def step(params, state, x):
        traces.append(x)
        return step_of(tx, params, state, x)

    params, state = first = init(jax.random.key(0), PARAMS)
    steps = [snapshot(method, params, state)]
    for i in range(STEPS):
        if i == STEPS // 2:
            state = to_host_and_back(state)
        params, state = step(params, state, INPUTS[i])
        steps.append(snapshot(method, params, state))
    return Run(plan, method, init, first, steps, len(traces))


def per_group(leaf, mask):
    """How many units are active in each group."""
    pooled = np.asarray(leaf.structure.pool(jnp.asarray(mask, jnp.float32))) > 0
    return pooled.sum(axis=leaf.structure.axes(pooled.shape)).ravel()


@each_case
def test_masks_stay_inside_their_structure(algorithm, structure):
    result = run(algorithm)
    name = f"{structure}/kernel"
    leaf = result.plan[name]
    for now in result.steps:
        assert now.masks.keys() == result.plan.keys()
        assert now.masks[name].dtype == bool
        pooled = leaf.structure.pool(jnp.asarray(now.masks[name], jnp.float32))
        assert set(np.unique(pooled)) <= {0, 1}, "a unit lives or dies as a whole"
        assert now.masks[name].any()


@each_algorithm
@pytest.mark.parametrize("structure", ["n_of_m", "fan_in"])
def test_groups_end_with_equal_counts(algorithm, structure):
    """Those that live (SRigL ablates some) have the same number of units."""
    result = run(algorithm)
    leaf = result.plan[f"{structure}/kernel"]
    counts = per_group(leaf, result.steps[-1].masks[leaf.name])
    live = counts[counts > 0]
    assert len(set(live.tolist())) == 1
    if len(counts) > 1:  # counts of such leaves move nowhere: what ablated groups lose goes to the others, by floor
        assert live[0] == leaf.n_active * len(counts) // len(live)


@each_algorithm
def test_the_total_ends_exact(algorithm):
    """In weights, whatever moved between leaves."""
    result = run(algorithm)
    total = lost = 0
    for leaf in result.plan.values():
        counts = per_group(leaf, result.steps[-1].masks[leaf.name])
        total += leaf.active_units * math.prod(leaf.shape) // (leaf.groups * leaf.group_size)
        lost += leaf.active_units % int((counts > 0).sum())  # none unless groups were ablated
    assert sum(int(mask.sum()) for mask in result.steps[-1].masks.values()) == total - lost


def test_counts_are_kept_where_a_method_says_so():
    claimed = [algorithm for algorithm in rx.ALGORITHMS if build(algorithm)[1].keeps_counts]
    assert {"static", "set", "rigl", "mest", "itop"} <= {*claimed}
    for result in map(run, claimed):
        for now in result.steps:
            for leaf in result.plan.values():
                assert (per_group(leaf, now.masks[leaf.name]) == leaf.n_active).all()


@pytest.mark.parametrize(
    "algorithm", [e.name for e in METHODS.values() if e.family == FIXED and "jointly" in e.options]
)
def test_one_ranking_over_all_layers_does_not_claim_to_keep_counts(algorithm):
    params = {"small": jnp.full((4, 4), 0.1), "large": jnp.full((4, 1), 3.0)}
    plan = rx.make_plan(params, 0.5, rx.uniform)
    method = construct(algorithm, plan, jointly=True, loss=lambda p: (p["small"] ** 3 @ p["large"] ** 3).sum())
    masks = method.init(jax.random.key(0), params).masks
    if algorithm != "snip":  # which prunes on its first step
        assert {name: int(mask.sum()) for name, mask in masks.items()} != {"small": 8, "large": 2}
    assert not method.keeps_counts


@each_case
def test_what_is_not_stored_is_exactly_zero(algorithm, structure):
    result = run(algorithm)
    name = f"{structure}/kernel"
    for now in result.steps:
        p = now.params[name]
        assert np.isfinite(p).all()
        if name in now.stored:
            assert not p[~now.stored[name]].any()


@each_case
def test_moments_of_what_is_not_trained_or_was_just_born_are_zero(algorithm, structure):
    result = run(algorithm)
    name = f"{structure}/kernel"
    for before, now in zip(result.steps[:-1], result.steps[1:], strict=True):
        if name not in now.trained:
            continue
        stored_before = before.stored.get(name, np.ones(SHAPES[structure], bool))
        born = now.trained[name] & ~stored_before
        for moments in now.moments:
            assert not moments[name][~now.trained[name]].any()
            assert not moments[name][born].any()


def steps_that_train(method):
    return np.array([not (method.skip_step and method.due(i)) for i in range(STEPS)])


@functools.partial(jit, static_argnums=(0, 1))
def dense(inner, gradient, params, trains):
    """Training by the inner optimizer alone, on some of the steps."""

    def step(carry, now):
        i, trains = now
        params, state = carry
        updates, state = inner.update(gradient(params, i), state, params)
        after = optax.apply_updates(params, updates), state
        return jax.tree.map(lambda new, old: jnp.where(trains, new, old), after, carry), None

    return lax.scan(step, (params, inner.init(params)), (jnp.arange(STEPS), trains))[0]


def gradient_of_bias(bias, i):
    return 2 * (bias - jnp.asarray(INPUTS).mean((1, 2))[i])


@each_algorithm
def test_dense_leaves_train_as_without_us(algorithm):
    result = run(algorithm)
    bias, _ = dense(INNER, gradient_of_bias, PARAMS["bias"], steps_that_train(result.method))
    np.testing.assert_allclose(result.steps[-1].params["bias"], bias, atol=1e-5)


@pytest.mark.eight_devices
@pytest.mark.parametrize("algorithm", ["rigl", "snfs", "gmp", "top_kast"])
def test_static_branch_on_eight_devices_equals_in_graph_branch_on_one(algorithm):
    """One of each kind. `rewire` is a Python bool, and the batch is split among the devices; for weights that are split
    `tests/rigl_jax/test_sharding.py` does the same with every algorithm.
    """
    result, (_, method, tx) = run(algorithm), build(algorithm)
    mesh = jax.make_mesh((8,), ("data",), axis_types=(jax.sharding.AxisType.Auto,))
    replicated, split = jax.NamedSharding(mesh, jax.P()), jax.NamedSharding(mesh, jax.P("data"))
    traces = []

    @functools.partial(jit, static_argnums=3, in_shardings=(replicated, replicated, split), out_shardings=replicated)
    def step(params, state, x, rewire):
        traces.append(rewire)
        return step_of(tx, params, state, x, rewire)

    params, state = jax.device_put(result.first, replicated)
    due = [bool(method.due(i)) for i in range(STEPS)]
    for i, one in enumerate(result.steps[1:]):
        params, state = step(params, state, jax.device_put(INPUTS[i], split), due[i])
        eight = snapshot(method, params, state)
        chex.assert_trees_all_equal(one.masks, eight.masks)
        chex.assert_trees_all_equal(one.stored, eight.stored)
        chex.assert_trees_all_close(one.params, eight.params, atol=1e-4)
    assert sorted(traces) == sorted({*due})


FIRST_MASKS = ("static", "snip", "grasp", "synflow", "ste", "top_kast")
"""A method of each kind of first masks: random, by the loss, by the weights."""


@each_algorithm
def test_double_precision_changes_no_mask_and_no_type(algorithm):
    """Under `jax_enable_x64`, with float64 weights: the types after a step of either kind, and the first masks."""
    first = run(algorithm).steps[0].masks
    with jax.enable_x64(True):
        params = jax.tree.map(lambda p: jnp.asarray(np.asarray(p, np.float64)), PARAMS)
        _, _, tx = build(algorithm)
        state = jax.eval_shape(tx.init, params)
        after = jax.eval_shape(lambda p, s: tx.update(p, s, p), params, state)  # which holds both kinds of steps
        chex.assert_trees_all_equal_shapes_and_dtypes(after, (params, state))
        if algorithm in FIRST_MASKS:
            masks = jax.device_get(jit(lambda params: tx.init(params).masks)(params))
            chex.assert_trees_all_equal(rx.trees.named_leaves(masks), first)


@each_algorithm
def test_another_generator_of_random_numbers(algorithm):
    """Every use of the key takes it, in `init` and on a step that rewires."""
    _, _, tx = build(algorithm, jax.random.key(0, impl="rbg"))
    state = jax.eval_shape(tx.init, PARAMS)
    after = jax.eval_shape(lambda p, s: tx.update(p, s, p, rewire=True), PARAMS, state)
    chex.assert_trees_all_equal_shapes_and_dtypes(after, (PARAMS, state))


@each_algorithm
def test_one_trace(algorithm):
    assert run(algorithm).traces == 1


@each_algorithm
def test_the_state_is_arrays_known_before_it_exists(algorithm):
    result = run(algorithm)
    state, shapes = result.first[1], jax.eval_shape(build(algorithm)[2].init, PARAMS)
    chex.assert_trees_all_equal_structs(shapes, state)
    for leaf, shape in zip(jax.tree.leaves(state), jax.tree.leaves(shapes), strict=True):
        assert isinstance(leaf, jax.Array)
        assert (leaf.shape, leaf.dtype) == (shape.shape, shape.dtype)


@each_algorithm
def test_rewiring_is_due_where_an_int_and_a_tracer_say_so(algorithm):
    method = run(algorithm).method
    for rule in (method.due, method.dense_grads):
        said = [rule(i) for i in range(STEPS)]
        assert [bool(rule(jnp.int32(i))) for i in range(STEPS)] == [bool(s) for s in said]
        assert all(isinstance(s, bool) for s in said)


@each_algorithm
def test_first_masks_come_from_the_key_or_from_the_weights(algorithm):
    """Same key and weights, same masks; another key, or other weights where the method looks at those, other masks."""
    result = run(algorithm)
    first = result.steps[0].masks
    masks = lambda key, params: rx.trees.named_leaves(result.init(key, params)[1].masks)  # noqa: E731
    chex.assert_trees_all_equal(masks(jax.random.key(0), PARAMS), first)
    others = masks(jax.random.key(1), PARAMS), masks(jax.random.key(0), jax.tree.map(jnp.flip, PARAMS))
    for name, mask in first.items():
        assert mask.all() or any((mask != other[name]).any() for other in others), name


START = {"w": 3.0 + PARAMS["another"]["kernel"][:4, :3] / 10, "b": PARAMS["bias"]}
SLOW = optax.adamw(0.01)


def square(params):
    return sum(jnp.sum((x - 2.5) ** 2 / jnp.arange(1.0, x.size + 1).reshape(x.shape)) for x in jax.tree.leaves(params))


def gradient_of_square(params, i):
    return jax.grad(square)(params)


@each_algorithm
def test_sparsity_0_is_the_inner_optimizer(algorithm):
    """As long as no weight comes near 0, which some methods take for a reason to start it anew."""
    method = construct(algorithm, rx.make_plan(START, 0.0), loss=square)
    tx = rx.sparsify(SLOW, method, key=jax.random.key(0))

    @jit
    def sparse(params):
        def step(carry, _):
            params, state = carry
            updates, state = tx.update(jax.grad(square)(params), state, params)
            return (optax.apply_updates(params, updates), state), None

        return lax.scan(step, (params, tx.init(params)), length=STEPS)[0]

    params, state = sparse(START)
    assert all(mask.all() for mask in jax.tree.leaves(state.masks))
    expected = dense(SLOW, gradient_of_square, START, steps_that_train(method))
    chex.assert_trees_all_close((params, state.inner), expected, atol=1e-6)


@each_algorithm
def test_params_of_another_plan_are_refused(algorithm):
    _, _, tx = build(algorithm)
    with refused("another/kernel"):
        jax.eval_shape(tx.init, {**PARAMS, "another": {"kernel": jnp.zeros((5, 6))}})
