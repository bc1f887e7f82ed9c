"""Training without jit, as the README's loop: nothing is compiled once every kind of step has been seen."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import rigl_jax as rx
from rigl_jax.algorithms import METHODS
from rigl_jax.algorithms.registry import FIXED

compiled = []
jax.monitoring.register_event_duration_secs_listener(
    lambda event, _, **__: compiled.append(event) if "backend_compile" in event else None
)
PARAMS = {f"layer{i}": {"kernel": jnp.linspace(-1.0, 2.0, 24).reshape(4, 6) + i, "bias": jnp.ones(6)} for i in range(3)}

ALIKE = {"set", "rigl_inverted", "itop", "grasp", "synflow", "dnw"}


def loss(params):
    return sum(jnp.sum((p - 0.3) ** 2) for p in jax.tree.leaves(params))


def construct(algorithm, plan):
    options = {"period": 2, "stop": 6, "fraction": 0.5, "loss": loss}
    return METHODS[algorithm].example(plan, **options)


def train(tx, params, steps, update):
    state = tx.init(params)
    params = rx.apply_masks(params, state.masks)
    counts = []
    for step in range(steps):
        grads = jax.tree.map(lambda p, step=step: jnp.sin(7 * p + step), params)
        before = len(compiled)
        updates, state = update(grads, state, params)
        counts.append(len(compiled) - before)
        params = optax.apply_updates(params, updates)
    return params, state, counts


# Those left out differ from one of these in the scores only.
@pytest.mark.parametrize("algorithm", [name for name in rx.ALGORITHMS if name not in ALIKE])
def test_the_fourth_update_and_later_ones_compile_nothing(algorithm):
    method = construct(algorithm, rx.make_plan(PARAMS, 0.5))
    tx = rx.sparsify(optax.adam(0.1), method, key=jax.random.key(0))
    _, _, counts = train(tx, PARAMS, 7, tx.update)
    assert counts[3:] == [0] * 4
    assert any(method.due(i) for i in range(3, 7)) or METHODS[algorithm].family == FIXED


def with_a_keyword():
    by = lambda grads, state, params, *, value: (jax.tree.map(lambda g: g * value, grads), state)  # noqa: E731
    return optax.chain(optax.adam(0.1), optax.GradientTransformationExtraArgs(lambda _: optax.EmptyState(), by))


@pytest.mark.parametrize("optimizer", ["adam", "adabelief", "with a keyword"])
def test_structures_and_optimizers_of_every_kind_compile_nothing_either(optimizer):
    structures = [rx.block(2, 3), rx.n_of_m(2, 4, axis=0), rx.fan_in()]
    rules = [*((f"layer{i}/kernel", structure) for i, structure in enumerate(structures)), (".*", None)]
    plan = rx.make_plan(PARAMS, 0.5, rx.uniform, rules=rules)
    special = optimizer == "with a keyword"
    inner, extra = (with_a_keyword(), {"value": 0.5}) if special else (getattr(optax, optimizer)(0.1), {})
    tx = rx.sparsify(inner, rx.rigl(plan, period=2, fraction=0.5), key=jax.random.key(0))
    _, _, counts = train(tx, PARAMS, 6, lambda g, s, p: tx.update(g, s, p, **extra))
    assert counts[3:] == [0] * 3


def test_the_loop_does_what_the_compiled_one_does():
    plan = rx.make_plan(PARAMS, 0.5)
    tx = rx.sparsify(optax.adam(0.1), rx.rigl(plan, period=2, stop=4, fraction=0.5), key=jax.random.key(0))
    ours, eager, _ = train(tx, PARAMS, 6, tx.update)
    theirs, jitted, _ = train(tx, PARAMS, 6, jax.jit(tx.update))
    jax.tree.map(np.testing.assert_array_equal, eager.masks, jitted.masks)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6), ours, theirs)
    assert int(eager.step) == 6


def test_an_optimizer_that_asks_for_concrete_numbers_trains_and_rewires():
    params = {"w": jnp.arange(1.0, 9.0).reshape(2, 4)}

    def descend(grads, state, params):
        scale = -0.5 if float(jnp.max(grads["w"])) > 1 else -1.0
        return jax.tree.map(lambda g: scale * g, grads), state

    inner = optax.GradientTransformation(lambda params: optax.EmptyState(), descend)
    tx = rx.sparsify(inner, rx.rigl(rx.make_plan(params, 0.5), period=1, fraction=0.5), key=jax.random.key(0))
    start = tx.init(params)
    params = rx.apply_masks(params, start.masks)
    for rewire in (True, False):
        updates, state = tx.update({"w": jnp.where(start.masks["w"], 0.0, 2.0)}, start, params, rewire=rewire)
        assert bool(jnp.array_equal(state.masks["w"], start.masks["w"])) is not rewire
        rx.check_masked(optax.apply_updates(params, updates), state.masks)
