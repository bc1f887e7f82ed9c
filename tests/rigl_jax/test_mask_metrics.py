"""`rx.metrics` against counting by hand, and `rx.plot`: what a picture holds is what it was given."""

import sys

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from matplotlib.figure import Figure

import rigl_jax as rx
from tests.errors import refused


def two_masks():
    rng = np.random.default_rng(0)
    old, new = ({"a": rng.random((2, 4, 3)) < 0.3, "b": None, "c": rng.random((5, 6)) < 0.3} for _ in range(2))
    new["a"][0, 1] = False  # of the first layer, along its output axis
    return old, new


def test_against_counting_by_hand():
    old, new = two_masks()
    plan = rx.make_plan({n: np.zeros(m.shape) for n, m in new.items() if m is not None}, 0.7, axes={"a": _axes()})
    found = rx.metrics(new, old, plan=plan, explored={n: m if m is None else m | new[n] for n, m in old.items()})
    was, now = (sum(int(m.sum()) for m in tree.values() if m is not None) for tree in (old, new))
    assert found["sparsity"] == pytest.approx(1 - now / 54)
    assert found["dropped_fraction"] == sum((old[n] & ~new[n]).sum() for n in "ac") / was
    assert found["grown_fraction"] == sum((new[n] & ~old[n]).sum() for n in "ac") / was
    assert found["explored"] == sum((new[n] | old[n]).sum() for n in "ac") / 54
    assert found["density"] == {"a": new["a"].mean(), "c": new["c"].mean()}
    dead = {"a": int((~new["a"].any(axis=2)).sum()), "c": int((~new["c"].any(axis=0)).sum())}
    assert found["dead_units"] == dead
    assert dead["a"] >= 1
    assert "step" not in found


def _axes():
    return rx.base.Axes(inputs=(2,), outputs=(1,), stack=(0,))


def test_of_a_state_and_what_is_not_known_is_left_out():
    params = {"w": jnp.ones((4, 4))}
    for algorithm, known in ((rx.itop, True), (rx.set_, False)):
        tx = rx.sparsify(optax.sgd(0.1), algorithm(rx.make_plan(params, 0.5)), key=jax.random.key(0))
        state = tx.init(params)
        found = rx.metrics(state)
        assert found["step"] == 0
        assert found["sparsity"] == 0.5
        assert ("explored" in found) == known
        assert not {"dropped", "dropped_fraction", "grown_fraction"} & set(found)
        assert rx.metrics(state, state)["dropped_fraction"] == 0
        kinds = {type(value) for value in jax.tree.leaves(found)}
        assert kinds <= {int, float}  # for json, W&B, TensorBoard


def test_what_is_no_mask_is_refused():
    old, new = two_masks()
    with refused("state"):
        rx.metrics({"w": jnp.ones(3)})
    with refused("previous", "c"):
        rx.metrics(new, {"a": old["a"], "b": None, "c": old["c"][:, :2]})
    with refused("explored", "c"):
        rx.metrics(new, explored={"a": old["a"], "b": None, "c": None})
    with refused("state", "w"):
        jax.jit(lambda m: rx.metrics(m)["sparsity"])({"w": jnp.ones((2, 2), bool)})


def test_a_plot_holds_the_numbers_that_it_was_given():
    mask = np.random.default_rng(1).random((2, 3, 4)) < 0.5
    axes = rx.plot.masks(mask, Figure().subplots(), of=rx.base.Axes((1,), (2,), stack=(0,)))
    np.testing.assert_array_equal(axes.images[0].get_array(), mask.reshape(6, 4))
    axes = rx.plot.masks(mask[0], Figure().subplots(), of=rx.base.Axes((1,), (0,)))  # (out, in), as in Equinox
    np.testing.assert_array_equal(axes.images[0].get_array(), mask[0].T)
    axes = rx.plot.densities({"b": 0.1, "a": 0.2}, Figure().subplots(), planned={"a": 0.3})
    grey, bars = axes.containers
    assert [bar.get_height() for bar in bars] == [0.2, 0.1]
    assert grey[0].get_height() == 0.3
    history = [{"step": 0, "explored": 0.1}, {"step": 5, "dropped_fraction": 0.3, "grown_fraction": 0.2}]
    dropped, grown = rx.plot.churn(history, Figure().subplots()).lines
    assert (dropped.get_xydata().tolist(), grown.get_xydata().tolist()) == ([[5, 0.3]], [[5, 0.2]])
    (line,) = rx.plot.explored(history, Figure().subplots(), label="run").lines
    assert line.get_xydata().tolist() == [[0, 0.1]]
    axes = rx.plot.accuracy({"SET": [(0.9, 0.5), (0.9, 0.7), (0.8, 1.0)]}, Figure().subplots())
    np.testing.assert_allclose(axes.lines[0].get_xydata(), [[80, 1.0], [90, 0.6]])
    low, high = np.ptp(axes.collections[0].get_paths()[0].vertices[:, 1]), 2 * np.std([0.5, 0.7], ddof=1)
    assert low >= high - 1e-9


def test_long_names_below_bars_are_turned():
    for names, angle in (("abcd", 0), ([f"params/Dense_{i}/kernel" for i in range(4)], 60)):
        axes = rx.plot.densities(dict.fromkeys(names, 0.1), Figure().subplots())
        assert {text.get_rotation() for text in axes.get_xticklabels()} == {angle}


def test_a_plot_refuses_what_it_cannot_draw():
    axes = Figure().subplots()
    with refused("mask"):
        rx.plot.masks(np.ones((2, 2)), axes)
    with refused("density"):
        rx.plot.densities({}, axes)
    with refused("history"):
        rx.plot.churn([{"dropped_fraction": 0.1}], axes)
    for draw, history in ((rx.plot.churn, [{"step": 0}]), (rx.plot.explored, [{"step": 0, "explored": None}])):
        with refused("history", draw.__name__):
            draw(history, axes)
    with refused("explored", "itop"):
        rx.plot.explored([], axes)
    with refused("results"):
        rx.plot.accuracy({"a": [(90, 0.5)]}, axes)


def test_without_matplotlib_the_error_says_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib.pyplot", None)
    with pytest.raises(ImportError, match=r"rigl_jax\[plot\]"):
        rx.plot.masks(np.ones((2, 2), bool))


def test_reports_are_tables_in_notebooks_and_names_are_escaped():
    params = {"<b>&": jnp.ones((64, 64))}
    plan = rx.make_plan(params, 0.5)
    packed = rx.pack(params, {"<b>&": jnp.eye(64, dtype=bool)})
    reports = (
        rx.describe(plan),
        rx.describe(plan, params),
        rx.flops(lambda p, x: x @ p["<b>&"], params, jnp.ones((1, 64))),
        rx.execution.explain(packed, batch=1, repeats=1),
    )
    for report in reports:
        page = report._repr_html_()
        assert page.startswith("<table><tr><th")
        assert "&lt;b&gt;&amp;" in page
        assert "<b>" not in page
        assert page.count("<tr>") == len(str(report).splitlines())
