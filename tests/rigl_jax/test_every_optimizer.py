"""Every optimizer that optax ships either keeps the invariant or is refused with the reason."""

import inspect

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import optax.contrib
import pytest

import rigl_jax as rx
from tests.errors import refused
from tests.rigl_jax.test_sparsify import moments

REFUSED = {"lbfgs", "sm3", "galore"}
# These ask for the loss beside the gradient.
WITH_VALUE = {"momo", "momo_adam", "polyak_sgd"}
# Not plain-gradient optimizers: they want a gradient for each example, or rest on another optimizer given to them.
OTHERS = {"dpsgd", "sam", "scale_by_learning_rate", "optimistic_adam"}  # the last is deprecated


def problem():
    return {"w": jnp.sin(jnp.arange(48.0)).reshape(6, 8), "b": jnp.zeros(8)}


def gradients(params, step):
    wave = lambda p: jnp.cos((step + 1.0) * (1.0 + jnp.arange(p.size, dtype=jnp.float32))).reshape(p.shape)  # noqa: E731
    return jax.tree.map(wave, params)


def shipped():
    """Name -> constructor of all that takes a learning rate and needs nothing else."""
    found = {}
    for module in (optax, optax.contrib):
        for name, function in vars(module).items():
            if name.startswith("_") or not inspect.isfunction(function) or name in OTHERS:
                continue
            parameters = inspect.signature(function).parameters
            required = [p.name for p in parameters.values() if p.default is p.empty and p.kind is not p.VAR_KEYWORD]
            returns = str(inspect.signature(function).return_annotation)
            if (
                "GradientTransformation" in returns
                and "learning_rate" in parameters
                and required in ([], ["learning_rate"])
            ):
                found[name] = function
    return found


SHIPPED = shipped()


def build(name):
    arguments = {"learning_rate": 0.01}
    if "key" in inspect.signature(SHIPPED[name]).parameters:
        arguments["key"] = jax.random.key(3)
    return SHIPPED[name](**arguments)


def test_the_table_is_not_empty():
    assert {"adam", "lamb", "muon", "prodigy", "schedule_free_adamw", "sm3", "lbfgs"} <= SHIPPED.keys()


@pytest.mark.parametrize("name", sorted(SHIPPED.keys() - REFUSED))
def test_zeros_and_counts_hold_over_50_steps_and_5_rewirings(name):
    params = problem()
    plan = rx.make_plan(params, 0.6)
    inner = build(name)
    tx = rx.sparsify(inner, rx.rigl(plan, period=10, stop=45, fraction=0.5), key=jax.random.key(0))

    @jax.jit
    def run(params):
        state = tx.init(params)

        def step(carry, i):
            params, state = carry
            grads = gradients(params, i)
            extra = {"value": jnp.float32(1.0)} if name in WITH_VALUE else {}
            if name == "sophia":
                extra = {"obj_fn": lambda p: sum(jnp.vdot(x, x) for x in jax.tree.leaves(p))}
            updates, state = tx.update(grads, state, params, **extra)
            params = optax.apply_updates(params, updates)
            stray = jnp.sum((params["w"] != 0) & ~state.masks["w"])
            return (params, state), stray

        return jax.lax.scan(step, (rx.apply_masks(params, state.masks), state), jnp.arange(50))

    (after, state), stray = run(params)
    assert not np.asarray(stray).any()
    chex.assert_tree_all_finite(after)
    masks = rx.trees.named_leaves(state.masks)
    assert {n: int(m.sum()) for n, m in masks.items()} == {n: leaf.n_active for n, leaf in plan.items()}
    full = jax.tree.map(lambda p, m: jnp.ones(p.shape, bool) if m is None else m, after, state.masks)
    start = inner.init(jax.tree.map(jnp.zeros_like, after))
    for (value, mask), (first, _) in zip(moments(inner, state.inner, full), moments(inner, start, full), strict=True):
        off = ~np.asarray(mask)
        np.testing.assert_array_equal(np.asarray(value)[off], np.asarray(first)[off])


@pytest.mark.parametrize("name", sorted(REFUSED))
def test_refused_by_name(name):
    params = problem()
    tx = rx.sparsify(build(name), rx.static(rx.make_plan(params, 0.5)), key=jax.random.key(0))
    with refused("sparsify", "inner"):
        tx.init(params)


def test_a_history_of_weights_is_refused():
    params = problem()
    tx = rx.sparsify(optax.scale_by_lbfgs(memory_size=3), rx.static(rx.make_plan(params, 0.5)), key=jax.random.key(0))
    with refused("b"):
        tx.init(params)


def test_a_users_own_optimizer_works():
    """One that optax has never heard of, with its own state type and conventions like optax's."""

    def init(params):
        return {"speed": jax.tree.map(jnp.zeros_like, params), "n": jnp.zeros((), jnp.int32)}

    def update(updates, state, params=None):
        speed = jax.tree.map(lambda v, g: 0.5 * v - 0.1 * g + 1e-3, state["speed"], updates)  # never rests
        return speed, {"speed": speed, "n": state["n"] + 1}

    params = problem()
    inner = optax.GradientTransformation(init, update)
    tx = rx.sparsify(inner, rx.rigl(rx.make_plan(params, 0.6), period=2), key=jax.random.key(0))
    state = tx.init(params)
    step = jax.jit(tx.update)
    for i in range(5):
        updates, state = step(gradients(params, i), state, params)
        params = optax.apply_updates(params, updates)
        rx.check_masked(params, state.masks)
        rx.check_masked(state.inner["speed"], state.masks)
    assert int(state.inner["n"]) == 2  # three of five steps rewired
