"""Integers of NumPy's narrow types are numbers like any others: what is computed from them does not wrap."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import rigl_jax as rx
from rigl_jax import arguments, schedules, structures
from rigl_jax.execution import Factors, explain, kernels, random_pattern, rewire_streamed, streaming
from rigl_jax.execution.kernels import pallas

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


WIDE, TALL = np.ones((200, 100), bool), np.ones((128, 128), bool)
KERNEL = kernels.make_pattern(np.ones((2, 2, 2, 1), bool))
TILES = kernels.make_block_pattern(np.ones((4, 4), bool), (2, 2))
FACTORS = Factors(np.arange(8, dtype=np.float32).reshape(2, 4), np.ones((2, 200), np.float32))
FLAT = kernels.make_pattern(np.eye(4, 200, dtype=bool))


def streamed(of):
    inner, params, masks = optax.sgd(0.1), {"w": jnp.eye(4, 200)}, {"w": np.eye(4, 200, dtype=bool)}
    choose = lambda name, mask: kernels.make_pattern(mask)  # noqa: E731
    training = rx.packed_training(inner, rx.static(rx.make_plan(params, 0.9)), key=jax.random.key(0), choose=choose)
    packed = rx.pack(params, masks, choose=choose)
    return rewire_streamed(inner, {"w": FACTORS}, training.init(params)[1], packed, 0.5, block=of(100))[0]


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize(
    "function",
    [
        lambda of: random_pattern(jax.random.key(0), (of(120), of(120)), of(100)),
        lambda of: random_pattern(jax.random.key(0), (of(2), of(2), of(100), of(100)), of(100)),
        lambda of: kernels.make_pattern_at(np.array([0, 1, 119 * 120]), (of(120), of(120))),
        lambda of: kernels.make_pattern_at(np.array([0, 1, 119]), (of(120), of(112)), height=of(16), block=of(9)),
        lambda of: kernels.make_pattern(TALL, height=of(16)),
        lambda of: kernels.make_pattern(WIDE, block=of(9)),
        lambda of: kernels.make_block_pattern(TALL, (of(32), of(32))),
        lambda of: kernels.make_nm_pattern(TALL, of(64), of(64), width=of(64)).rows,
        lambda of: kernels.as_matrix((of(100), of(100), of(100)), of(2)),
        lambda of: kernels.squarest_split((of(120), of(8), of(100))),
        lambda of: kernels.conv(np.ones((1, 200, 4, 2), "f"), np.ones(8, "f"), KERNEL, strides=(of(100), of(1))),
        lambda of: pallas.matmul(np.ones((200, 4), "f"), np.ones(16, "f"), TILES, rows=of(100)),
        lambda of: streaming.top_products(FACTORS, of(100), exclude=np.arange(3), pattern=FLAT, block=of(100)),
        lambda of: explain(rx.pack({}, {}), batch=of(100), image=of(100), repeats=of(100)),
        streamed,
        lambda of: arguments.arguments(n=arguments.shapes)(lambda n: np.prod(n["w"]))({"w": (of(100), of(100))}),
    ],
)
def test_sizes_of_patterns_and_kernels(function):
    """Patterns are compared with their static fields and the types of these."""
    narrow, wide = function(N), function(int)
    assert repr(jax.tree.structure(narrow)) == repr(jax.tree.structure(wide))
    for one, other in zip(*map(jax.tree.leaves, (narrow, wide)), strict=True):
        np.testing.assert_array_equal(one, other)


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
