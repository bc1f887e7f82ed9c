"""The native matrix kernels against the masked dense product: values, gradients, every instruction-set level."""

import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from rigl_jax import native
from rigl_jax.execution.kernels.linear import matmul
from rigl_jax.execution.kernels.moving import gather, scatter
from rigl_jax.execution.kernels.pattern import make_pattern

pytestmark = pytest.mark.skipif(native.library() is None, reason=f"native kernels: {native.reason()}")
LEVELS = [level for level in native.levels() if level != "avx512_bf16"]  # in float32 it is avx512
HALVES = [level for level in ("avx2_wide", "avx512_bf16") if level in native.levels()]
"""Levels that multiply in bfloat16; avx2_wide does so without instructions for it."""


def problem(batch, inputs, outputs, density, height=1, seed=0):
    rng = np.random.default_rng(seed)
    mask = np.repeat(rng.random((inputs, outputs // height)) < density, height, axis=1)
    mask[inputs // 2] = False  # an input that nobody reads
    mask[:, :height] = False  # an output without inputs
    dense = np.where(mask, rng.normal(size=mask.shape), 0).astype(np.float32)
    x, dy = rng.normal(size=(batch, inputs)), rng.normal(size=(batch, outputs))
    return mask, dense, x.astype(np.float32), dy.astype(np.float32)


@jax.jit
def oracle(x, dense, dy):
    y, pull = jax.vjp(jnp.matmul, x, dense)
    return y, *pull(dy)


def check(mask, dense, x, dy, level="auto", height=1, block=None, tolerance=2e-5):
    pattern = make_pattern(mask, height=height, block=block)

    @jax.jit
    def run(x, values, pattern, dy):
        y, pull = jax.vjp(lambda x, values: matmul(x, values, pattern, level=level), x, values)
        return y, *pull(dy)

    y, dx, dvalues = run(x, gather(dense, pattern), pattern, dy)
    want_y, want_dx, want_dw = oracle(x, dense, dy)
    scale = np.sqrt(max(dense.shape[0], dense.shape[1], len(x)))
    for got, want in ((y, want_y), (dx, want_dx), (scatter(dvalues, pattern), want_dw * mask)):
        np.testing.assert_allclose(got, want, rtol=tolerance, atol=tolerance * scale)


@pytest.mark.parametrize("level", LEVELS)
@pytest.mark.parametrize("height", [1, 4, 8, 16])
def test_every_level_and_height(level, height):
    # Tiles have 64 rows. Some are taken together; of the last one there is a part, which may be rounded up to 64.
    check(*problem(330 if height == 16 else 126, 50, 48, 0.3, height), level, height, block=17)


@pytest.mark.parametrize("level", LEVELS)
@pytest.mark.parametrize("batch", [1, 2, 12, 40, 49, 61, 63, 64, 127, 130])
def test_every_batch_and_level(level, batch):
    check(*problem(batch, 33, 19, 0.2), level)


@pytest.mark.parametrize("height", [1, 4, 8, 16])
def test_one_row_in_several_blocks(height):
    check(*problem(1, 113, 48, 0.4, height), height=height, block=50)


@pytest.mark.parametrize(("inputs", "outputs"), [(1, 1), (1, 200), (200, 1), (3, 257), (300, 17)])
def test_odd_sizes(inputs, outputs):
    mask, dense, x, dy = problem(70, inputs, outputs, 0.5)
    mask[0, -1], dense[0, -1] = True, 1.5
    check(mask, dense, x, dy)


@pytest.mark.parametrize("density", [0.0, 0.01, 1.0])
def test_densities(density):
    check(*problem(65, 40, 24, density))


def test_full_mask():
    _, _, x, dy = problem(65, 24, 16, 1.0)
    dense = np.random.default_rng(1).normal(size=(24, 16)).astype(np.float32)
    check(np.ones((24, 16), bool), dense, x, dy)


def test_many_blocks_and_threads():
    check(*problem(256, 500, 400, 0.1))
    check(*problem(200, 500, 400, 0.1, height=8), height=8)


def in_halves(batch, inputs, outputs, density, level, block=None, height=1, whole=False, room=0):
    """y and both gradients in bfloat16, and those in float32 of the same numbers, which may be made whole ones."""
    mask, dense, x, dy = problem(batch, inputs, outputs, density, height)
    if whole:
        dense, x, dy = (np.round(4 * a) for a in (dense, x, dy))
    pattern = make_pattern(mask, block=block, height=height, capacity=int(mask.sum()) // height + room)
    values = gather(dense, pattern).astype(jnp.bfloat16)
    x, dy = jnp.asarray(x, jnp.bfloat16), jnp.asarray(dy, jnp.bfloat16)

    @functools.partial(jax.jit, static_argnames="level")
    def run(x, values, dy, level):
        y, pull = jax.vjp(lambda x, values: matmul(x, values, pattern, level=level), x, values)
        return y, *pull(dy)

    exact = run(*(a.astype(jnp.float32) for a in (x, values, dy)), level="auto")
    return run, (x, values, dy), exact


@pytest.mark.parametrize("level", HALVES)
@pytest.mark.parametrize(
    ("batch", "inputs", "outputs", "block"),
    [
        (64, 50, 48, 17),
        (52, 33, 19, None),
        (128, 70, 131, 64),
        (320, 64, 40, 30),
        (250, 97, 33, None),
        (256, 3, 5, None),
    ],
)
def test_products_in_bfloat16_have_sums_in_float32(level, batch, inputs, outputs, block):
    """Batches of part of a tile, of one, of four that are taken together and one more; rows by 32 and what is left."""
    run, (x, values, dy), exact = in_halves(batch, inputs, outputs, 0.3, level, block)
    assert "rigl_half_tile" in run.lower(x, values, dy, level=level).as_text()
    for got, want in zip(run(x, values, dy, level=level), exact, strict=True):
        assert got.dtype == jnp.bfloat16
        # Rounded once: half a unit in the last place of eight bits, and that of the sums in float32.
        np.testing.assert_allclose(np.asarray(got, np.float32), want, rtol=2**-8, atol=1e-4)


@pytest.mark.parametrize("level", HALVES)
@pytest.mark.parametrize("height", [4, 8, 16])
@pytest.mark.parametrize(
    ("batch", "halves"),
    [(1, False), (49, False), (50, True), (63, True), (64, True), (65, False), (127, True), (330, True)],
)
def test_runs_in_bfloat16(level, height, batch, halves):
    """Sums of whole numbers are exact in float32, so one rounding gives one result. With padding."""
    run, operands, exact = in_halves(batch, 75, 112, 0.3, level, block=17, height=height, whole=True, room=3)
    assert ("rigl_half_tile" in run.lower(*operands, level=level).as_text()) == halves
    for got, want in zip(run(*operands, level=level), exact, strict=True):
        np.testing.assert_array_equal(got, want.astype(jnp.bfloat16))


@pytest.mark.parametrize("level", HALVES)
@pytest.mark.parametrize(
    ("batch", "inputs", "outputs", "density"), [(1100, 20, 32, 0.5), (64, 700, 16, 0.9), (64, 1100, 32, 0.1)]
)
def test_long_runs_in_bfloat16(level, batch, inputs, outputs, density):
    """More tiles than are summed together, more entries than are paired at a time, two blocks."""
    run, operands, exact = in_halves(batch, inputs, outputs, density, level, height=8, whole=True)
    for got, want in zip(run(*operands, level=level), exact, strict=True):
        np.testing.assert_array_equal(got, want.astype(jnp.bfloat16))


@pytest.mark.parametrize("level", LEVELS)
@pytest.mark.parametrize("height", [1, 4, 8, 16])
@pytest.mark.parametrize("block", [17, None])
def test_values_in_bfloat16_of_one_row(level, height, block):
    """y reads them as they are. Segments of all lengths, of which eight entries and four are taken together."""
    run, (x, values, dy), exact = in_halves(1, 75, 112, 0.3, level, block=block, height=height, whole=True, room=3)
    program = run.lower(x, values, dy, level=level).as_text()
    assert f"tensor<{values.size}xbf16>" in re.search("@rigl_gather.*", program)[0]
    for got, want in zip(run(x, values, dy, level=level), exact, strict=True):
        np.testing.assert_array_equal(got, want.astype(jnp.bfloat16))


@pytest.mark.parametrize("level", HALVES)
@pytest.mark.parametrize("height", [1, 4, 16])
def test_what_is_no_number_in_bfloat16_goes_where_it_belongs(level, height):
    run, (x, values, dy), _ = in_halves(64, 40, 32, 0.3, level, height=height)
    x = x.at[5].set(jnp.nan).at[20, 1].set(jnp.inf)
    want = run(*(a.astype(jnp.float32) for a in (x, values, dy)), level="auto")
    for got, exact in zip(run(x, values, dy, level=level), want, strict=True):
        got, exact = np.asarray(got, np.float32), np.asarray(exact.astype(jnp.bfloat16), np.float32)
        np.testing.assert_array_equal(np.isnan(got), np.isnan(exact))
        np.testing.assert_array_equal(np.isinf(got), np.isinf(exact))


@pytest.mark.parametrize("level", LEVELS)
@pytest.mark.parametrize("height", [1, 16])
def test_bfloat16_is_rounded_once(level, height):
    """Activations in bfloat16 are read and written as they are: the sums are those of float32, then rounded."""
    mask, dense, x, dy = problem(77, 50, 48, 0.3, height)
    pattern = make_pattern(mask, height=height)
    values = gather(dense, pattern).astype(jnp.bfloat16)
    x[5], x[6, 1], x[7] = np.nan, np.inf, 3e38  # NaN stays NaN, and what overflows becomes infinite
    x, dy = jnp.asarray(x, jnp.bfloat16), jnp.asarray(dy, jnp.bfloat16)

    @jax.jit
    def run(x, values, dy):
        y, pull = jax.vjp(lambda x, values: matmul(x, values, pattern, level=level), x, values)
        return jax.tree.map(lambda a: a.astype(jnp.bfloat16), (y, *pull(dy)))

    exact = run(*(a.astype(jnp.float32) for a in (x, values, dy)))
    for got, want in zip(run(x, values, dy), exact, strict=True):
        np.testing.assert_array_equal(np.asarray(got, np.float32), np.asarray(want, np.float32))


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16])
def test_short_floats_accumulate_in_float32(dtype):
    mask, dense, x, _ = problem(64, 200, 16, 0.5)
    pattern = make_pattern(mask)
    x, dense = jnp.asarray(x, dtype), jnp.asarray(dense, dtype)
    y = jax.jit(matmul)(x, gather(dense, pattern), pattern)
    assert y.dtype == dtype
    want = x.astype(jnp.float32) @ dense.astype(jnp.float32)
    np.testing.assert_allclose(y.astype(jnp.float32), want, rtol=2 * jnp.finfo(dtype).eps, atol=1e-3)
    grads = jax.grad(lambda x, v: matmul(x, v, pattern).astype(jnp.float32).sum(), (0, 1))(x, gather(dense, pattern))
    assert [g.dtype for g in grads] == [dtype, dtype]


def test_result_does_not_depend_on_the_block_size():
    mask, dense, x, _ = problem(64, 100, 32, 0.3)
    results = []
    for block in (1, 7, 100):
        pattern = make_pattern(mask, block=block)
        results.append(jax.jit(matmul)(x, gather(dense, pattern), pattern))
    np.testing.assert_allclose(results[0], results[1], atol=1e-4)
    np.testing.assert_allclose(results[0], results[2], atol=1e-4)


def test_rewiring_at_equal_nnz_compiles_nothing():
    traces = []

    @jax.jit
    def run(x, values, pattern):
        traces.append(1)
        return matmul(x, values, pattern)

    rng = np.random.default_rng(0)
    for _ in range(3):
        mask = rng.permutation(np.arange(600) < 60).reshape(20, 30)
        dense = np.where(mask, rng.normal(size=mask.shape), 0).astype(np.float32)
        x, pattern = rng.normal(size=(8, 20)).astype(np.float32), make_pattern(mask)
        np.testing.assert_allclose(run(x, gather(dense, pattern), pattern), x @ dense, atol=1e-5)
    assert len(traces) == 1


def test_concurrent_calls_share_the_pool_without_deadlock():
    mask, dense, x, _ = problem(128, 300, 200, 0.3)
    pattern, xs = make_pattern(mask), [np.roll(x, i, axis=0) for i in range(6)]

    @jax.jit
    def run(xs, values):
        return [matmul(x, values, pattern) for x in xs]

    for _ in range(20):
        results = run(xs, gather(dense, pattern))
    for result, x in zip(results, xs, strict=True):
        np.testing.assert_allclose(result, x @ dense, atol=1e-3)
