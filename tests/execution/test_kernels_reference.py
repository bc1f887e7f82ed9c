"""Patterns, the plain-JAX products and how they transform: what holds with and without the native library."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType
from jax.sharding import PartitionSpec as P

from rigl_jax import native
from rigl_jax.execution import kernels
from rigl_jax.execution.kernels import pattern as patterns
from rigl_jax.execution.kernels import reference
from rigl_jax.native.build import units

PLAIN = pytest.param("jax", id="plain")
LEVELS = [PLAIN, pytest.param("auto", marks=pytest.mark.skipif(native.library() is None, reason=native.reason()))]


def problem(inputs=20, outputs=24, density=0.3, height=1, seed=0):
    rng = np.random.default_rng(seed)
    mask = np.repeat(rng.random((inputs, outputs // height)) < density, height, axis=1)
    dense = np.where(mask, rng.normal(size=mask.shape), 0).astype(np.float32)
    return mask, dense, jnp.asarray(rng.normal(size=(6, inputs)), jnp.float32)


@pytest.fixture
def no_library(monkeypatch):
    monkeypatch.setattr(native, "library", lambda: None)


# ---- patterns


@pytest.mark.parametrize("shape", [(20, 24), (3, 3, 5, 8), (1, 1, 7, 4)])
@pytest.mark.parametrize("block", [None, 9])
def test_gather_and_scatter_are_inverse(shape, block):
    rng = np.random.default_rng(0)
    mask = rng.random(shape) < 0.3
    dense = np.where(mask, rng.normal(size=shape), 0).astype(np.float32)
    pattern = kernels.make_pattern(mask, block=block)
    values = jax.jit(kernels.gather)(dense, pattern)
    assert values.shape == (mask.sum(),) == (pattern.nnz,)
    np.testing.assert_array_equal(jax.jit(kernels.scatter)(values, pattern), dense)
    np.testing.assert_array_equal(jax.jit(kernels.gather)(jax.jit(kernels.scatter)(values, pattern), pattern), values)


@pytest.mark.parametrize(("shape", "height"), [((20, 24), 1), ((20, 32), 8), ((3, 3, 5, 8), 1)])
def test_numpy_and_native_sort_alike(monkeypatch, shape, height):
    if native.library() is None:
        pytest.skip(native.reason())
    mask = np.repeat(np.random.default_rng(0).random((*shape[:-1], shape[-1] // height)) < 0.3, height, axis=-1)
    block = 9
    first = kernels.make_pattern(mask, height=height, block=block)
    monkeypatch.setattr(patterns, "best_block", lambda *_: first.block_t)
    monkeypatch.setattr(native, "library", lambda: None)
    second = kernels.make_pattern(mask, height=height, block=block)
    jax.tree.map(np.testing.assert_array_equal, first, second)


def test_positions_make_the_pattern_of_their_mask():
    mask, _, _ = problem()
    first, second = kernels.make_pattern(mask), kernels.make_pattern_at(np.flatnonzero(mask), mask.shape)
    jax.tree.map(np.testing.assert_array_equal, first, second)


def test_segments_hold_the_mask():
    mask, _, _ = problem()
    pattern = kernels.make_pattern(mask, block=7)
    rows, outs = patterns.coordinates(pattern)
    found = np.zeros_like(mask)
    found[np.asarray(rows), np.asarray(outs)] = True
    np.testing.assert_array_equal(found, mask)
    order = np.lexsort((rows, outs, np.asarray(rows) // 7))
    np.testing.assert_array_equal(order, np.arange(len(order)))


# ---- products


def values_and_grads(f, *args):
    y, pull = jax.vjp(f, *args)
    return y, *pull(jnp.cos(jnp.arange(y.size, dtype=y.dtype)).reshape(y.shape))


@pytest.mark.parametrize("height", [1, 4])
@pytest.mark.parametrize("csr", [True, False])
def test_plain_products(no_library, height, csr):
    mask, dense, x = problem(outputs=32, height=height)
    pattern = kernels.make_pattern(mask, height=height, block=None if csr else 7)
    run = jax.jit(functools.partial(values_and_grads, lambda x, v: kernels.matmul(x, v, pattern)))
    y, dx, dvalues = run(x, kernels.gather(dense, pattern))
    want_y, want_dx, want_dw = values_and_grads(jnp.matmul, x, jnp.asarray(dense))
    np.testing.assert_allclose(y, want_y, atol=1e-5)
    np.testing.assert_allclose(dx, want_dx, atol=1e-5)
    np.testing.assert_allclose(kernels.scatter(dvalues, pattern), want_dw * mask, atol=1e-5)


@pytest.mark.parametrize("height", [1, 4])
@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_products_without_a_dense_matrix(monkeypatch, height, dtype):
    mask, dense, x = problem(height=height)
    pattern, dy = kernels.make_pattern(mask, height=height), jnp.sin(jnp.arange(144.0)).reshape(6, 24)
    values = kernels.gather(jnp.asarray(dense, dtype), pattern)
    want = {"forward": np.asarray(x) @ dense, "input_gradient": np.asarray(dy) @ dense.T}
    want["values_gradient"] = (np.asarray(x).T @ dy) * mask
    monkeypatch.setattr(reference, "DENSE_LIMIT", 0)
    monkeypatch.setattr(reference, "SLAB", 60)

    @jax.jit
    def run(x, dy, values):
        x, dy = x.astype(dtype), dy.astype(dtype)
        dvalues = reference.run("values_gradient", x, dy, pattern, None)
        return {
            "forward": reference.run("forward", x, values, pattern, None),
            "input_gradient": reference.run("input_gradient", dy, values, pattern, None),
            "values_gradient": kernels.scatter(dvalues, pattern),
        }

    for kind, got in run(x, dy, values).items():
        assert got.dtype == dtype
        np.testing.assert_allclose(np.float32(got), want[kind], atol=1e-5 if dtype == jnp.float32 else 0.1)


def test_plain_convolution(no_library):
    rng = np.random.default_rng(0)
    mask = rng.random((3, 3, 4, 5)) < 0.4
    pattern, dense = kernels.make_pattern(mask), np.where(mask, rng.normal(size=mask.shape), 0).astype(np.float32)
    x = jnp.asarray(rng.normal(size=(2, 5, 6, 4)), jnp.float32)

    def masked(x, kernel):
        return jax.lax.conv_general_dilated(x, kernel, (2, 1), "SAME", dimension_numbers=("NHWC", "HWIO", "NHWC"))

    run = functools.partial(kernels.conv, pattern=pattern, strides=(2, 1))
    got = jax.jit(functools.partial(values_and_grads, run))(x, kernels.gather(dense, pattern))
    want = jax.jit(functools.partial(values_and_grads, masked))(x, dense)
    np.testing.assert_allclose(got[0], want[0], atol=1e-5)
    np.testing.assert_allclose(got[1], want[1], atol=1e-5)
    np.testing.assert_allclose(kernels.scatter(got[2], pattern), want[2] * mask, atol=1e-5)


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
@pytest.mark.parametrize("density", [0.0, 0.4, 1.0])
def test_tiles(dtype, density):
    rng = np.random.default_rng(0)
    mask = np.kron(rng.random((5, 3)) < density, np.ones((4, 8))).astype(bool)
    dense = jnp.asarray(np.where(mask, rng.normal(size=mask.shape), 0), dtype)
    pattern = kernels.make_block_pattern(mask, (4, 8))
    x = jnp.asarray(rng.normal(size=(2, 3, 20)), dtype)
    values = kernels.gather(dense, pattern)
    np.testing.assert_array_equal(kernels.scatter(values, pattern), dense)
    run = jax.jit(functools.partial(values_and_grads, lambda x, v: kernels.matmul(x, v, pattern)))
    y, dx, dvalues = run(x, values)
    want_y, want_dx, want_dw = values_and_grads(jnp.matmul, x.astype(jnp.float32), dense.astype(jnp.float32))
    tolerance = 1e-5 if dtype == jnp.float32 else 0.1
    assert y.dtype == dx.dtype == dvalues.dtype == dtype
    np.testing.assert_allclose(y.astype(jnp.float32), want_y, atol=tolerance)
    np.testing.assert_allclose(dx.astype(jnp.float32), want_dx, atol=tolerance)
    got = kernels.scatter(dvalues, pattern).astype(jnp.float32)
    np.testing.assert_allclose(got, want_dw * mask, atol=2 * tolerance)


@pytest.mark.parametrize("width", [1, 4])
def test_n_of_m(width):
    rng = np.random.default_rng(0)
    order = rng.random((5, 4, 12 // width)).argsort(axis=1).argsort(axis=1)
    mask = np.repeat((order < 2).reshape(20, -1), width, axis=1)
    dense = jnp.asarray(np.where(mask, rng.normal(size=mask.shape), 0), jnp.float32)
    pattern = kernels.make_nm_pattern(mask, 2, 4, width=width)
    x, values = jnp.asarray(rng.normal(size=(3, 2, 20)), jnp.float32), kernels.gather(dense, pattern)
    np.testing.assert_array_equal(kernels.scatter(values, pattern), dense)
    run = jax.jit(functools.partial(values_and_grads, lambda x, v: kernels.matmul(x, v, pattern)))
    y, dx, dvalues = run(x, values)
    want_y, want_dx, want_dw = jax.jit(functools.partial(values_and_grads, jnp.matmul))(x, dense)
    np.testing.assert_allclose(y, want_y, atol=1e-5)
    np.testing.assert_allclose(dx, want_dx, atol=1e-5)
    np.testing.assert_allclose(kernels.scatter(dvalues, pattern), want_dw * mask, atol=1e-5)


# ---- transformations


@pytest.mark.parametrize("level", LEVELS)
def test_forward_mode_and_second_derivatives(level):
    mask, dense, x = problem()
    pattern = kernels.make_pattern(mask)
    values = kernels.gather(dense, pattern)

    def loss(product, x, w):
        return (jnp.tanh(product(x, w)) ** 2).sum()

    sparse = functools.partial(loss, lambda x, v: kernels.matmul(x, v, pattern, level=level))
    masked = functools.partial(loss, lambda x, v: x @ kernels.scatter(v, pattern))
    tangents = (jnp.ones_like(x), jnp.cos(values))
    for of in (lambda f: f, lambda f: jax.grad(f, (0, 1))):
        got, want = (jax.jit(functools.partial(jax.jvp, of(f)))((x, values), tangents) for f in (sparse, masked))
        jax.tree.map(functools.partial(np.testing.assert_allclose, rtol=1e-4, atol=1e-4), got, want)


@pytest.mark.parametrize("level", LEVELS)
def test_vmap_over_the_batch_folds_before_it_is_differentiated(level):
    mask, dense, x = problem()
    pattern = kernels.make_pattern(mask)
    values = kernels.gather(dense, pattern)

    def loss(values):
        return (jax.vmap(lambda row: kernels.matmul(row, values, pattern, level=level))(x) ** 2).sum()

    want = 2 * (x.T @ (x @ dense)) * mask
    np.testing.assert_allclose(kernels.scatter(jax.jit(jax.grad(loss))(values), pattern), want, rtol=1e-4, atol=1e-4)
    shapes = [v.aval.shape for eqn in jax.make_jaxpr(jax.grad(loss))(values).eqns for v in eqn.outvars]
    assert (len(x), pattern.nnz) not in shapes  # no gradient an example


@pytest.mark.parametrize("level", LEVELS)
def test_per_example_gradients_and_batched_values(level):
    mask, dense, x = problem()
    pattern = kernels.make_pattern(mask)
    values = kernels.gather(dense, pattern)

    def loss(values, row):
        return (kernels.matmul(row, values, pattern, level=level) ** 2).sum()

    per_example = jax.jit(jax.vmap(jax.grad(loss), (None, 0)))(values, x)
    for row, got in zip(np.asarray(x), np.asarray(per_example), strict=True):
        want = 2 * np.outer(row, row @ dense)
        np.testing.assert_allclose(kernels.scatter(got, pattern), want * mask, rtol=1e-4, atol=1e-5)
    got = jax.jit(jax.vmap(lambda v: kernels.matmul(x, v, pattern, level=level)))(np.stack([values, 2 * values]))
    want = np.asarray(x) @ dense
    np.testing.assert_allclose(got, np.stack([want, 2 * want]), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("level", LEVELS)
def test_scan_remat_and_leading_axes(level):
    mask, dense, _ = problem(24, 24)
    pattern = kernels.make_pattern(mask)
    values, x = kernels.gather(dense, pattern), jnp.ones((2, 3, 24)) / 24

    @jax.checkpoint
    def layer(h, _):
        return jnp.tanh(kernels.matmul(h, values, pattern, level=level)), None

    got = jax.jit(jax.grad(lambda x: jax.lax.scan(layer, x, None, length=3)[0].sum()))(x)

    @jax.jit
    @jax.grad
    def plain(x):
        for _ in range(3):
            x = jnp.tanh(x @ dense)
        return x.sum()

    np.testing.assert_allclose(got, plain(x), rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("level", LEVELS)
def test_an_unused_gradient_is_never_computed(level):
    mask, dense, x = problem()
    pattern = kernels.make_pattern(mask)
    values = kernels.gather(dense, pattern)
    loss = jax.grad(lambda v: (kernels.matmul(x, v, pattern, level=level) ** 2).sum())
    kinds = [eqn.params["kind"] for eqn in jax.make_jaxpr(loss)(values).eqns if "kind" in eqn.params]
    assert kinds == ["forward", "values_gradient"]


@pytest.mark.parametrize("level", LEVELS)
@pytest.mark.parametrize("check_vma", [True, False])
def test_shard_map_sums_the_gradient_of_replicated_values(level, check_vma):
    mask, dense, _ = problem()
    pattern = kernels.make_pattern(mask)
    values, x = kernels.gather(dense, pattern), jnp.sin(jnp.arange(8 * 20.0)).reshape(8, 20)
    mesh = jax.make_mesh((4,), ("data",), axis_types=(jax.sharding.AxisType.Auto,))
    spec = jax.sharding.PartitionSpec

    def local(x, values):
        return jax.lax.psum((kernels.matmul(x, values, pattern, level=level) ** 2).sum(), "data")

    over = jax.shard_map(local, mesh=mesh, in_specs=(spec("data"), spec()), out_specs=spec(), check_vma=check_vma)
    want = jax.jit(jax.grad(lambda v: ((x @ kernels.scatter(v, pattern)) ** 2).sum()))(values)
    np.testing.assert_allclose(jax.jit(jax.grad(over, 1))(x, values), want, rtol=1e-4, atol=1e-5)


# ---- what there is


def test_backends_say_what_there_is_and_why_not(monkeypatch):
    assert kernels.backends()["jax"].available
    assert kernels.backends()["native"].detail
    monkeypatch.setattr(native, "levels", dict)
    monkeypatch.setattr(native, "reason", lambda: "not built")
    assert kernels.backends()["native"] == kernels.Backend(False, "not built")


def test_a_level_is_built_with_its_own_flags_only():
    flags = {unit.name: unit.flags for unit in units("x86_64")}
    assert not any(flag.startswith("-mavx") for flag in (*flags["rigl_portable"], *flags["linear.cc"]))
    assert "-mavx512f" in flags["rigl_avx512"]
    assert [name for name, given in flags.items() if "-mavx512bf16" in given] == ["rigl_half"]
    assert [unit.name for unit in units("aarch64") if "rigl" in unit.name] == ["rigl_portable"]
    everything = " ".join(flag for unit in units("x86_64") for flag in unit.flags)
    assert "native" not in everything
    assert "fast-math" not in everything


# ---- several devices


def _conv(**options):
    taps = np.random.default_rng(0).random((3, 3, 4, 8)) < 0.3
    return kernels.make_pattern(taps), (8, 5, 5, 4), functools.partial(kernels.conv, **options)


def _pairs(width):
    pairs = np.tile(np.array([1, 0, 1, 0], bool)[:, None], (2, 8))
    return kernels.make_nm_pattern(pairs, 2, 4, width=width), (8, 8), kernels.matmul


WEIGHTS = np.random.default_rng(0).random((8, 8)) < 0.5
TILES = np.kron(np.random.default_rng(1).random((4, 4)) < 0.5, np.ones((2, 2), bool))
ON_DEVICES = {
    "linear": lambda: (kernels.make_pattern(WEIGHTS), (8, 8), kernels.matmul),
    "folded": lambda: (kernels.Folded(kernels.make_pattern(WEIGHTS), (8, 2, 4), 1), (8, 8), kernels.matmul),
    "conv": _conv,
    "conv, strided": functools.partial(_conv, strides=(2, 2), padding="VALID"),
}
PLAIN_ON_DEVICES = {
    "block": lambda: (kernels.make_block_pattern(TILES, (2, 2)), (8, 8), kernels.matmul),
    "n of m": functools.partial(_pairs, 1),
    "n of m, wide": functools.partial(_pairs, 4),
}


def check_gradients_on_devices(pattern, shape, product):
    """Each of 4 devices has a part of the batch and the whole weight; both gradients are those of one device."""
    rng = np.random.default_rng(1)
    x, values = np.float32(rng.normal(size=shape)), np.float32(rng.normal(size=pattern.nnz))
    mesh = jax.make_mesh((4,), ("data",), axis_types=(AxisType.Auto,))
    one = lambda x, values: product(x, values, pattern)  # noqa: E731
    split = jax.shard_map(one, mesh=mesh, in_specs=(P("data"), P()), out_specs=P("data"))
    loss = lambda product: lambda x, values: jnp.sum(jnp.sin(product(x, values)))  # noqa: E731
    expected = jax.jit(jax.grad(loss(one), (0, 1)))(x, values)
    for got, wanted in zip(jax.jit(jax.grad(loss(split), (0, 1)))(x, values), expected, strict=True):
        np.testing.assert_allclose(got, wanted, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("name", ON_DEVICES)
@pytest.mark.parametrize("level", LEVELS)
def test_gradients_are_summed_over_devices_once(name, level):
    pattern, shape, product = ON_DEVICES[name]()
    check_gradients_on_devices(pattern, shape, functools.partial(product, level=level))


@pytest.mark.parametrize("name", PLAIN_ON_DEVICES)
def test_gradients_of_kernels_without_levels_are_summed_over_devices_once(name):
    check_gradients_on_devices(*PLAIN_ON_DEVICES[name]())
