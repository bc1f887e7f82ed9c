import hypothesis
import hypothesis.strategies as st
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import rigl_jax as rx
from rigl_jax import schedules
from tests import oracles


@hypothesis.given(st.integers(1, 20), st.integers(0, 30), st.integers(0, 60), st.booleans())
def test_every_is_the_authors_counter(period, start, length, include_stop):
    stop = start + length
    due = schedules.every(period, start=start, stop=stop, include_stop=include_stop)
    expected, last = [], -period
    for step in range(150):  # as written in the authors' optimizer: begin <= step <= end and step >= last + period
        before_end = step <= stop if include_stop else step < stop
        if start <= step and before_end and step >= last + period:
            expected.append(step)
            last = step
    assert [step for step in range(150) if due(step)] == expected
    assert np.flatnonzero(due(np.arange(150))).tolist() == expected


def test_due_answers_ints_with_bools_and_traces():
    due = schedules.every(10, stop=50)
    assert due(20) is True
    assert due(21) is False
    assert bool(jax.jit(due)(20))
    assert schedules.never(3) is False
    assert schedules.always(3) is True


@hypothesis.given(
    st.integers(1, 9), st.integers(0, 12), st.integers(0, 40) | st.none(), st.booleans(), st.integers(0, 60)
)
def test_due_steps_are_counted_in_closed_form(period, start, length, include_stop, steps):
    stop = None if length is None else start + length
    due = schedules.every(period, start=start, stop=stop, include_stop=include_stop)
    assert due.before(steps) == sum(bool(due(step)) for step in range(steps))


@hypothesis.given(st.integers(1, 9), st.integers(0, 12), st.integers(0, 40) | st.none(), st.booleans())
def test_uncounted_is_a_step_that_stands_still(period, start, length, include_stop):
    stop = None if length is None else start + length
    base = schedules.every(period, start=start, stop=stop, include_stop=include_stop)
    due, clock = schedules.uncounted(period, start=start, stop=stop, include_stop=include_stop)
    weight_step, rewired_at = 0, None
    for call in range(120):  # TF1: a rewiring takes the batch and leaves the global step where it was
        rewires = bool(base(weight_step)) and rewired_at != weight_step
        assert bool(due(call)) == rewires, call
        assert int(clock(call)) == weight_step, call
        if rewires:
            rewired_at = weight_step
        else:
            weight_step += 1


def test_cosine():
    fraction = schedules.cosine(0.3, 200)
    for step in (0, 50, 100, 199, 200):
        assert float(fraction(step)) == pytest.approx(oracles.cosine_fraction(0.3, step, 200), abs=1e-7)
    assert float(fraction(300)) == 0
    assert float(schedules.cosine(0.3, None)(10**6)) == pytest.approx(0.3)


def test_inverse_power():
    fraction = schedules.inverse_power(0.4, 100, power=3)
    assert float(fraction(0)) == pytest.approx(0.4)
    assert float(fraction(50)) == pytest.approx(0.4 / 8)
    assert float(fraction(100)) == 0


def test_the_ports_that_count_before_they_ask_are_told_right():
    """`step += 1; if step % period == 0 and step < t_end` of rigl-torch and SRigL, and their cosine over (0, t_end)."""
    period, t_end = 10, 60
    theirs = [(call, step) for call, step in enumerate(range(1, 100)) if step % period == 0 and step < t_end]
    due = schedules.every(period, start=period - 1, stop=t_end - 1, include_stop=False)
    assert [call for call in range(99) if due(call)] == [call for call, _ in theirs]
    cosine = schedules.cosine(0.3, t_end)
    for call, step in theirs:
        assert float(cosine(call + 1)) == pytest.approx(0.15 * (1 + np.cos(np.pi * step / t_end)), abs=1e-6)


def test_the_original_set_rewires_at_the_end_of_each_epoch():
    plan = rx.make_plan({"w": jnp.ones((4, 4))}, 0.5)
    method = rx.set_(plan, period=5, start=4, fraction=lambda step: 0.3, two_sided=True)
    assert [step for step in range(16) if method.due(step)] == [4, 9, 14]
