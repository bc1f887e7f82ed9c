"""The report on single leaves: what it says of what, not how fast."""

import importlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import rigl_jax as rx
from rigl_jax.execution import Whole, explain, fastest, kernels


def weights():
    rng = np.random.default_rng(0)
    shapes = {"conv": (3, 3, 2, 4), "depth": (2, 3, 3, 2, 4), "hidden": (16, 32), "runs": (16, 32), "bias": (32,)}
    params = {name: jnp.asarray(rng.standard_normal(shape, dtype=np.float32)) for name, shape in shapes.items()}
    masks = {name: None if p.ndim < 2 else jnp.asarray(rng.random(p.shape) < 0.2) for name, p in params.items()}
    masks["runs"] = jnp.repeat(masks["hidden"][:, ::16], 16, axis=1)
    return params, masks


def test_a_row_for_every_masked_leaf():
    packed = rx.pack(*weights())
    report = explain(packed, batch=4, image=4, repeats=1)
    rows = {row.name: row for row in report.rows}
    assert set(rows) == {"conv", "depth", "hidden", "runs"}
    assert rows["runs"].kernel.startswith("runs of 16")
    assert rows["conv"].shape == (3, 3, 2, 4)
    for row in rows.values():
        assert 0 <= row.break_even <= 1
        assert row.dense_ms > 0
        assert row.sparse_ms > 0
    lines = str(report).splitlines()
    assert len(lines) == 5
    assert "break-even" in lines[0]


def test_a_leaf_stored_dense_says_so():
    params, masks = weights()
    packed = rx.pack(params, masks, choose=lambda name, mask: None)
    report = explain(packed, batch=2, image=4, repeats=1)
    assert {row.kernel for row in report.rows} == {"dense"}
    assert "stored as" in str(report).splitlines()[0]
    for seconds, advised in ((1.0, True), (3.0, False)):  # of the sparse kernel; dense takes 2
        rows = tuple(row._replace(dense_ms=2.0, sparse_ms=seconds) for row in report.rows)
        note = str(report._replace(rows=rows)).splitlines()[-1]
        assert note.startswith("stored as dense:")
        assert ("fastest(plan=plan, batch=...)" in note) is advised


@pytest.mark.parametrize("sparse_wins", [True, False])
def test_fastest_keeps_dense_what_would_be_slower(monkeypatch, sparse_wins):
    seconds = (2.0, 1.0) if sparse_wins else (1.0, 2.0)
    module = importlib.import_module("rigl_jax.execution.explain")  # the package's `explain` is the function
    monkeypatch.setattr(module, "_seconds", lambda *arguments: seconds)
    packed = rx.pack(*weights(), choose=fastest(batch=4))
    found = jax.tree.leaves(packed.patterns, is_leaf=lambda x: isinstance(x, Whole) or hasattr(x, "nnz"))
    assert [isinstance(p, Whole) for p in found] == [not sparse_wins] * 4


def test_fastest_reads_the_axes_of_a_plan(monkeypatch):
    module = importlib.import_module("rigl_jax.execution.explain")
    monkeypatch.setattr(module, "_seconds", lambda *arguments: (2.0, 1.0))
    params, mask = {"w": jnp.ones((6, 4, 3, 3))}, np.random.default_rng(0).random((6, 4, 3, 3)) < 0.2
    apply = lambda params, x: jax.lax.conv_general_dilated(x, params["w"], (1, 1), "SAME")  # noqa: E731
    plan = rx.make_plan(params, 0.8, rx.uniform, apply=apply, inputs=(jnp.ones((1, 4, 5, 5)),))
    assert isinstance(fastest(plan=plan)("w", mask), kernels.Moved)
