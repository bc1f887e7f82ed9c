"""Partial training, with partitions around `sparsify` and inside it; params in the containers of each framework."""

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

import rigl_jax as rx
from tests.errors import refused


class Net(nnx.Module):
    def __init__(self, rngs):
        self.first, self.second = nnx.Linear(8, 8, rngs=rngs), nnx.Linear(8, 8, rngs=rngs)

    def __call__(self, x):
        return self.second(nnx.relu(self.first(x)))


def as_dict():
    rng = np.random.default_rng(0)
    make = lambda: {"kernel": rng.normal(size=(8, 8)).astype(np.float32), "bias": np.ones(8, np.float32)}  # noqa: E731
    params = jax.device_put({"first": make(), "second": make()})
    return params, lambda p, x: jax.nn.relu(x @ p["first"]["kernel"] + p["first"]["bias"][None]) @ p["second"]["kernel"]


def as_nnx():
    graph, state = nnx.split(Net(nnx.Rngs(0)), nnx.Param)
    return state, lambda p, x: nnx.merge(graph, p)(x)


def as_equinox():
    model = eqx.nn.MLP(8, 8, 8, 1, key=jax.random.key(0))
    params, rest = eqx.partition(model, eqx.is_inexact_array)
    return params, lambda p, x: jax.vmap(eqx.combine(p, rest))(x)


CONTAINERS = {"dict": as_dict, "nnx": as_nnx, "equinox": as_equinox}
X = jnp.ones((2, 8))


def masks_of(params, fraction=0.5):
    """Masks made by hand for every leaf of two axes, and None elsewhere."""
    name = lambda p: jnp.arange(p.size).reshape(p.shape) % 2 == 0 if p.ndim > 1 else None  # noqa: E731
    return jax.tree.map(name, params)


@pytest.mark.parametrize("container", CONTAINERS)
def test_every_function_takes_every_container(container):
    params, apply = CONTAINERS[container]()
    masks = masks_of(params)
    other = rx.trees.named_leaves(masks)
    expected = {n: np.where(other[n], p, 0) if n in other else p for n, p in rx.trees.named_leaves(params).items()}

    def same(tree):
        assert jax.tree.structure(tree) == jax.tree.structure(params)
        jax.tree.map(np.testing.assert_array_equal, rx.trees.named_leaves(tree), expected)

    masked = rx.apply_masks(params, masks)
    same(masked)
    same(rx.straight_through(params, masks))
    same(rx.sparse_average(masked, params, masks, 0.5))
    rx.check_masked(masked, masks)
    assert rx.describe(rx.make_plan(params, 0.5))
    assert float(rx.sparsity(masks)) == 0.5
    first = "layers/0/weight" if container == "equinox" else "first/kernel"
    assert rx.flops(apply, params, X, masks=masks).density[first] == 0.5
    same(rx.unpack(rx.pack(params, masks)))
    assert jax.tree.structure(rx.rescale_init(params, masks)) == jax.tree.structure(params)
    tx = rx.sparsify(optax.adam(0.1), rx.rigl(rx.make_plan(params, 0.5), period=2), key=jax.random.key(0))
    replaced, state = rx.replace_masks(optax.adam(0.1), tx.init(params), params, masks)
    same(replaced)
    _, state = tx.update(params, state, replaced)
    assert float(rx.sparsity(state.masks)) == 0.5


def test_masks_of_one_container_serve_another():
    state, _ = as_nnx()
    pure = nnx.to_pure_dict(state)
    masks = masks_of(pure)
    masked = rx.apply_masks(state, masks)
    rx.check_masked(masked, masks)
    assert float(rx.sparsity(masked["first"]["kernel"])) == 0.5
    tx = rx.sparsify(optax.adam(0.1), rx.rigl(rx.make_plan(state, 0.5)), key=jax.random.key(0))
    before = tx.init(state)
    replaced, after = rx.replace_masks(optax.adam(0.1), before, state, masks)
    rx.check_masked(replaced, masks)
    assert jax.tree.structure(after.masks) == jax.tree.structure(before.masks)


def sparse(names):
    """`sparsify` whose plan holds leaves of these names, on Adam."""
    params, _ = as_dict()
    plan = rx.make_plan(params, 0.5, rules=[*((name, rx.unstructured()) for name in names), (".*", None)])
    return rx.sparsify(optax.adam(0.1), rx.rigl(plan, period=2, fraction=0.5), key=jax.random.key(0))


def labelled(frozen):
    """Labels parallel to params, a prefix of them for the second layer."""
    return {"first": {"kernel": "sparse", "bias": "dense"}, "second": frozen}


AROUND = {
    "partition": lambda: optax.partition(
        {"sparse": sparse(["first/kernel"]), "dense": optax.sgd(0.1), "frozen": optax.set_to_zero()}, labelled("frozen")
    ),
    "masked": lambda: optax.chain(
        optax.masked(sparse(["first/kernel"]), {"first": {"kernel": True, "bias": False}, "second": False}),
        optax.masked(optax.sgd(0.1), {"first": {"kernel": False, "bias": True}, "second": False}),
        optax.masked(optax.set_to_zero(), {"first": False, "second": True}),
    ),
    "multi_transform": lambda: getattr(optax, "multi_transform", optax.partition)(
        {"sparse": sparse(["first/kernel"]), "dense": optax.sgd(0.1), "frozen": optax.set_to_zero()}, labelled("frozen")
    ),
}


def sparse_state(state):
    is_one = lambda x: isinstance(x, rx.SparseState)  # noqa: E731
    return next(x for x in jax.tree.leaves(state, is_leaf=is_one) if is_one(x))


def train(tx, params, steps=5, update=None):
    state = tx.init(params)
    first = sparse_state(state).masks
    start = params = rx.apply_masks(params, first)
    for step in range(steps):
        grads = jax.tree.map(lambda p, step=step: jnp.sin(7 * p + step), params)
        updates, state = (update or tx.update)(grads, state, params)
        params = optax.apply_updates(params, updates)
        rx.check_masked(params, sparse_state(state).masks)
    return start, params, first, sparse_state(state).masks


@pytest.mark.parametrize("nesting", AROUND)
def test_sparsify_within_a_partition_trains_its_part_alone(nesting):
    params, apply = as_dict()
    _, after, first, masks = train(AROUND[nesting](), params)
    assert (np.asarray(first["first"]["kernel"]) != np.asarray(masks["first"]["kernel"])).any()
    for name in ("kernel", "bias"):
        np.testing.assert_array_equal(after["second"][name], params["second"][name])
    # sgd moves a bias by 0.1 sin(7 p + step), whatever happens elsewhere
    bias = params["first"]["bias"]
    for step in range(5):
        bias = bias - 0.1 * jnp.sin(7 * bias + step)
    np.testing.assert_allclose(after["first"]["bias"], bias, rtol=1e-6)
    assert rx.flops(apply, after, X, masks=masks).density == {
        "first/kernel": 0.5,
        "first/bias": 1.0,
        "second/kernel": 1.0,
        "second/bias": 1.0,
    }
    packed = rx.pack(after, masks)
    jax.tree.map(np.testing.assert_array_equal, rx.unpack(packed), after)
    jax.tree.map(np.testing.assert_array_equal, rx.straight_through(after, masks), after)


def freezing(kind):
    """Adam on the first layer; the second is frozen."""
    first, second = {"first": True, "second": False}, {"first": False, "second": True}
    if kind == "masked":
        return optax.chain(optax.masked(optax.adam(0.1), first), optax.masked(optax.set_to_zero(), second))
    if kind == "freeze" and hasattr(optax, "freeze"):
        return optax.chain(optax.adam(0.1), optax.freeze(second))
    return optax.partition({True: optax.adam(0.1), False: optax.set_to_zero()}, first)


METHODS = {
    "rigl": lambda plan: rx.rigl(plan, period=2, fraction=0.5),
    "itop": lambda plan: rx.itop(plan, period=2, fraction=0.5),
    "mest": lambda plan: rx.mest(plan, period=2, fraction=0.5),
    "accumulated": lambda plan: rx.accumulate_growth(rx.rigl(plan, period=2, fraction=0.5), 2),
}


@pytest.mark.parametrize(
    ("kind", "method", "jitted"),
    [
        *((kind, "rigl", True) for kind in ("partition", "masked", "freeze")),
        *(("partition", m, False) for m in METHODS),
    ],
)
def test_a_leaf_that_the_optimizer_freezes_keeps_mask_and_weights(kind, method, jitted):
    params, _ = as_dict()
    tx = rx.sparsify(freezing(kind), METHODS[method](rx.make_plan(params, 0.5)), key=jax.random.key(0))
    start, after, first, masks = train(tx, params, update=jax.jit(tx.update) if jitted else None)
    jax.tree.map(np.testing.assert_array_equal, after["second"], start["second"])
    np.testing.assert_array_equal(masks["second"]["kernel"], first["second"]["kernel"])
    assert (np.asarray(first["first"]["kernel"]) != np.asarray(masks["first"]["kernel"])).any()
    assert int(masks["first"]["kernel"].sum()) == int(first["first"]["kernel"].sum())


def test_what_was_never_active_in_a_frozen_leaf_is_not_explored():
    params, _ = as_dict()
    tx = rx.sparsify(freezing("partition"), METHODS["itop"](rx.make_plan(params, 0.5)), key=jax.random.key(0))
    state = tx.init(params)
    for _ in range(3):
        _, state = tx.update(params, state, params)
    explored, masks = state.algorithm.explored, state.masks
    np.testing.assert_array_equal(explored["second"]["kernel"], masks["second"]["kernel"])
    assert int(explored["first"]["kernel"].sum()) > int(masks["first"]["kernel"].sum())


def test_a_method_that_moves_counts_is_refused_a_frozen_leaf():
    params, _ = as_dict()
    tx = rx.sparsify(freezing("partition"), rx.dsr(rx.make_plan(params, 0.5)), key=jax.random.key(0))
    with refused("second/kernel"):
        jax.eval_shape(lambda params: tx.update(params, tx.init(params), params), params)


def test_a_learning_rate_of_zero_freezes_nothing():
    params, _ = as_dict()
    tx = rx.sparsify(optax.sgd(0.0), METHODS["rigl"](rx.make_plan(params, 0.5)), key=jax.random.key(0))
    _, _, first, masks = train(tx, params)
    assert (np.asarray(first["second"]["kernel"]) != np.asarray(masks["second"]["kernel"])).any()


def test_an_optimizer_that_trains_nothing_freezes_nothing():
    params, _ = as_dict()
    tx = rx.sparsify(optax.set_to_zero(), METHODS["rigl"](rx.make_plan(params, 0.5)), key=jax.random.key(0))
    _, _, first, masks = train(tx, params)
    assert (np.asarray(first["second"]["kernel"]) != np.asarray(masks["second"]["kernel"])).any()
