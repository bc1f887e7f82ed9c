"""Paths between solutions."""

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import rigl_jax as rx
from rigl_jax.landscape import barrier, bezier, bezier_path, interpolate, path_losses
from tests.errors import refused

KEY = jax.random.key(0)
TS = jnp.linspace(0, 1, 33)


def ends():
    keys = jax.random.split(KEY, 2)
    return [{"w": jax.random.normal(k, (6, 4)), "b": jnp.zeros(4)} for k in keys]


def convex(p):
    return jnp.sum((p["w"] - 0.3) ** 2) + jnp.sum(p["b"] ** 2)


def two_wells(p):
    return jnp.mean((jnp.sum(p["w"] ** 2, axis=0) - 4.0) ** 2) + jnp.sum(p["b"] ** 2)


@pytest.mark.parametrize("degree", [1, 2, 3])
def test_the_ends_are_exact(degree):
    a, b = ends()
    points = [a, *[ends()[0]] * (degree - 1), b]
    chex.assert_trees_all_equal(bezier(points, 0.0), a)
    chex.assert_trees_all_equal(bezier(points, 1.0), b)


def test_a_line_in_numpy():
    a, b = ends()
    ts = np.linspace(-0.2, 1.2, 8)
    expected = [float(two_wells(jax.tree.map(lambda x, y, t=t: (1 - t) * x + t * y, a, b))) for t in ts]
    np.testing.assert_allclose(interpolate(two_wells, a, b, ts), expected, rtol=1e-5)


def test_a_convex_loss_has_no_barrier():
    assert float(barrier(interpolate(convex, *ends(), TS))) <= 0


@pytest.mark.parametrize("degree", [2, 3])
def test_a_bent_path_lowers_the_barrier(degree):
    a = ends()[0]
    b = jax.tree.map(lambda x: -x + 0.2, a)  # the line goes through the middle
    points = bezier_path(two_wells, a, b, steps=400, key=KEY, degree=degree)
    assert len(points) == degree + 1
    line = float(barrier(interpolate(two_wells, a, b, TS)))
    assert line > 0
    assert float(barrier(path_losses(two_wells, points, TS))) < line


def test_a_sparse_path_stays_in_the_union_of_the_supports():
    a, b = ends()
    first, second = (jax.random.uniform(k, (6, 4)) < 0.4 for k in jax.random.split(jax.random.key(1)))
    a, b = rx.apply_masks(a, {"w": first, "b": None}), rx.apply_masks(b, {"w": second, "b": None})
    union = first | second
    shifted = lambda p: two_wells({**p, "w": p["w"] + 0.5})  # noqa: E731  pulls at pruned weights too
    points = bezier_path(shifted, a, b, {"w": union, "b": None}, steps=20, key=KEY)
    outside = ~np.asarray(union)
    for t in TS:
        assert not np.asarray(bezier(points, t)["w"])[outside].any()
    assert (np.asarray(points[1]["w"]) != np.asarray(bezier((a, b), 0.5)["w"])).any()
    chex.assert_trees_all_equal((points[0], points[-1]), (a, b))
    assert np.asarray(bezier_path(shifted, a, b, steps=20, key=KEY)[1]["w"])[outside].all()  # through dense space


def test_bad_input():
    a, b = ends()
    with refused("b", "w"):
        interpolate(convex, a, {**b, "w": jnp.ones(2)}, TS)
    with refused("b", "a"):
        bezier_path(convex, a, {"w": b["w"]}, steps=1, key=KEY)
    with refused("degree"):
        bezier_path(convex, a, b, steps=1, key=KEY, degree=1)
    with refused("w"):
        bezier_path(convex, a, b, {"w": jnp.ones((2, 2), bool), "b": None}, steps=1, key=KEY)
