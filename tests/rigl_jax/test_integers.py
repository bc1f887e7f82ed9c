"""Integers of NumPy's narrow types are numbers like any others: what is computed from them does not wrap."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import rigl_jax as rx
from rigl_jax import schedules, structures

PLAN = rx.make_plan({"w": jnp.zeros((24, 24)), "v": jnp.zeros((24, 6))}, 0.5)
N = np.int8


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize(
    "method",
    [
        lambda of: rx.rigl(PLAN, period=of(5), start=of(10), stop=of(120)),
        lambda of: rx.rigl(PLAN, period=of(5), start=of(10), stop=of(120), count_skipped=False),
        lambda of: rx.set_(PLAN, period=of(100), start=of(100)),
        lambda of: rx.granet(PLAN, period=of(5), start=of(10), stop=of(120), prune_stop=of(100)),
        lambda of: rx.gmp(PLAN, period=of(3), start=of(10), stop=of(120)),
        lambda of: rx.gmp(PLAN, period=of(3), start=of(10), stop=of(120), jointly=True, min_active=of(100)),
        lambda of: rx.ac_dc(PLAN, period=of(30), start=of(10), stop=of(120)),
        lambda of: rx.snip(PLAN, start=of(120)),
        lambda of: rx.accumulate_growth(rx.rigl(PLAN, period=of(100)), of(50)),
    ],
)
def test_schedules(method):
    narrow, wide = method(N), method(int)
    steps = [*range(300), 1000, 30_000]
    for said in ("due", "dense_grads"):
        assert [bool(getattr(narrow, said)(i)) for i in steps] == [bool(getattr(wide, said)(i)) for i in steps]
    params = {"w": jnp.arange(576.0).reshape(24, 24), "v": jnp.arange(144.0).reshape(24, 6)}
    signals = rx.Signals(params, params, jnp.int32(100), jax.random.key(0))
    after = [m.update(m.init(jax.random.key(0), params), signals).state.masks for m in (narrow, wide)]
    for one, other in zip(*map(jax.tree.leaves, after), strict=True):
        np.testing.assert_array_equal(one, other)


@pytest.mark.parametrize(
    "schedule",
    [
        lambda of: schedules.cosine(0.3, of(120)),
        lambda of: schedules.inverse_power(0.3, of(120)),
        lambda of: schedules.cubic(0.0, 0.9, of(-100), of(100)),
    ],
)
def test_values(schedule):
    for step in (0, 60, 1000):
        assert float(schedule(N)(step)) == float(schedule(int)(step))


@pytest.mark.parametrize(
    "structure", [lambda of: structures.block(of(2), 2), lambda of: structures.n_of_m(of(2), of(4), axis=of(0))]
)
def test_structures(structure):
    for shape in ((512, 256), (24, 8)):
        assert structure(N).units(shape) == structure(int).units(shape)
    assert structure(N).name == structure(int).name
    scores = jnp.arange(512.0 * 256).reshape(512, 256)
    np.testing.assert_array_equal(structure(N).pool(scores), structure(int).pool(scores))


@pytest.mark.parametrize("distribution", [rx.uniform, rx.erk, rx.erdos_renyi])
def test_shapes(distribution):
    shapes = {"a": (100, 90), "b": (90, 10)}
    narrow = {name: tuple(map(N, shape)) for name, shape in shapes.items()}
    assert distribution(narrow, 0.9) == distribution(shapes, 0.9)


@pytest.mark.parametrize("power", [50, 100, -100])
@pytest.mark.parametrize("sparsity", [0.5, 0.9])
def test_extreme_powers_of_erk_fill_layers_one_after_another(power, sparsity):
    """Powers that leave the range of floats: what is sparsest by far is all but empty, and the total is right."""
    shapes = {"small": (64, 64), "large": (4096, 4096), "huge": (16_384, 16_384)}
    found = rx.erk(shapes, sparsity, power=power)
    assert all(0 <= s < 1 for s in found.values())
    size = {name: n * m for name, (n, m) in shapes.items()}
    zeros = sum(s * size[name] for name, s in found.items())
    assert zeros == pytest.approx(sparsity * sum(size.values()), rel=1e-6)
    first = min(found, key=found.get)
    assert first == ("small" if power > 0 else "huge")
    params = {name: jax.ShapeDtypeStruct(shape, "float32") for name, shape in shapes.items()}
    plan = rx.make_plan(params, sparsity, functools.partial(rx.erk, power=power))
    assert all(leaf.n_active >= 1 for leaf in plan.values())
