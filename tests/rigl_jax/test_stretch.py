"""Training M times longer: schedules slow down, the period does not."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import rigl_jax as rx
from rigl_jax.schedules import stretch

M = 5
SCHEDULES = {
    "piecewise": optax.piecewise_constant_schedule(1.6, {30: 0.1, 70: 0.1, 90: 0.1}),
    "warm_up": optax.warmup_cosine_decay_schedule(0.0, 1.0, 10, 100),
    "joined": optax.join_schedules([optax.linear_schedule(0, 1, 5), optax.constant_schedule(0.5)], [5]),
    "cosine": optax.cosine_decay_schedule(0.3, 75),
}


@pytest.mark.parametrize("name", SCHEDULES)
def test_what_happened_at_a_step_happens_m_times_later(name):
    schedule = SCHEDULES[name]
    slow = jax.vmap(stretch(schedule, M))(jnp.arange(0, 101 * M))
    steps = np.arange(101)
    np.testing.assert_allclose(slow[::M], jax.vmap(schedule)(jnp.asarray(steps)), rtol=1e-6, atol=1e-7)


def test_anchors_move_exactly():
    slow = stretch(SCHEDULES["piecewise"], M)
    for anchor in (30, 70, 90):
        before, at, after = (float(slow(M * anchor + d)) for d in (-1, 0, 1))
        step_before, step_at, step_after = (float(SCHEDULES["piecewise"](anchor + d)) for d in (-1, 0, 1))
        assert (before, after) == (step_before, step_after)
        assert at == step_at


@pytest.mark.parametrize("factor", [3, 6, 7, 0.5, 2.5, 49])
def test_anchors_are_exact_when_compiled(factor):
    slow = jax.jit(stretch(lambda position: position, factor))
    for anchor in range(0, 1000, 10):
        assert float(slow(jnp.int32(anchor * factor))) == anchor


def test_rigl_5x_tries_5_times_as_many_topologies():
    params = {"w": jnp.zeros((8, 8))}
    plan = rx.make_plan(params, 0.5)
    once, long = rx.rigl(plan, period=100, stop=2_000), rx.rigl(plan, period=100, stop=M * 2_000)
    rewirings = lambda algorithm: int(algorithm.due(np.arange(20_000)).sum())  # noqa: E731
    assert rewirings(once) - 1 == 20
    assert rewirings(long) - 1 == M * 20


def test_it_is_an_optimizers_schedule():
    params = jnp.ones(3)
    tx = optax.sgd(stretch(optax.piecewise_constant_schedule(1.0, {1: 0.5}), 2))
    state, seen = tx.init(params), []
    for _ in range(4):
        updates, state = jax.jit(tx.update)(params, state)
        seen.append(-float(updates[0]))
    assert seen == [1.0, 1.0, 0.5, 0.5]  # the fast one halves at step 1
