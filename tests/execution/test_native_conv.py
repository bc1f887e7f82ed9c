"""The native convolution kernels against the masked dense convolution: values and gradients, every level."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from rigl_jax import native
from rigl_jax.execution.kernels.conv import conv
from rigl_jax.execution.kernels.moving import gather, scatter
from rigl_jax.execution.kernels.pattern import make_pattern

pytestmark = pytest.mark.skipif(native.library() is None, reason=f"native kernels: {native.reason()}")
LEVELS = [level for level in native.levels() if level != "avx512_bf16"]  # its products of float32 are those of avx512
MULTIPLY_HALVES = [level for level in native.levels() if native.multiplies_halves(level)]
CONVERT_HALVES = [level for level in native.levels() if not native.multiplies_halves(level)]
CASES = {
    "same": ((9, 5, 6, 10), (3, 3), 12, (1, 1), "SAME"),
    "same, stride 2": ((5, 8, 9, 3), (3, 3), 20, (2, 2), "SAME"),
    "valid": ((3, 7, 19, 4), (3, 3), 8, (1, 1), "VALID"),
    "valid, stride 2": ((17, 9, 12, 5), (3, 3), 6, (2, 2), "VALID"),
    "explicit, uneven": ((2, 11, 7, 3), (5, 3), 4, (3, 2), ((2, 1), (0, 3))),
    "padding beyond the window": ((2, 4, 4, 2), (1, 1), 3, (2, 2), ((2, 2), (3, 1))),
    "stride beyond the window": ((2, 5, 5, 2), (2, 2), 3, (3, 3), "SAME"),
    "margin beyond what is read": ((2, 1, 1, 2), (1, 1), 3, (5, 5), ((3, 0), (3, 0))),
    "stride beyond every buffer": ((1, 1, 1100, 2), (1, 2), 3, (1, 1500), "SAME"),
    "wide rows": ((1, 3, 150, 2), (3, 3), 3, (1, 1), "SAME"),
    "window larger than image": ((4, 2, 2, 3), (7, 7), 3, (2, 2), ((3, 3), (3, 3))),
}


GROUPED = {
    "blocks cross groups": ((9, 7, 6, 6), (3, 3), 9, (2, 2), "SAME", 3, {"block": 9, "block_t": 18}),
    "depthwise, two outputs each": ((2, 6, 7, 5), (3, 3), 10, (2, 1), "SAME", 5, {"block_t": 27}),
    "one by one": ((2, 3, 4, 6), (1, 1), 8, (1, 2), "VALID", 2, {}),
    "3-D": ((2, 5, 4, 6, 3), (3, 2, 3), 4, (2, 1, 2), "SAME", 1, {"block": 6}),
    "3-D, in groups": ((3, 4, 5, 3, 4), (2, 3, 1), 6, (1, 2, 1), ((2, 0), (1, 1), (0, 1)), 2, {}),
    "more outputs than a task writes": ((1, 2, 70, 10), (3, 1), 40, (1, 1), "SAME", 5, {}),
}


def dense_conv(x, kernel, strides, padding, dilation=None, groups=1):
    numbers = ("NHWC", "HWIO", "NHWC") if x.ndim == 4 else ("NDHWC", "DHWIO", "NDHWC")
    return jax.lax.conv_general_dilated(
        x, kernel, strides, padding, rhs_dilation=dilation, dimension_numbers=numbers, feature_group_count=groups
    )


def drawn(case, density, groups, **blocks):
    """(mask, x, dense kernel, pattern)."""
    image, window, out, *_ = case
    rng = np.random.default_rng(0)
    mask = rng.random((*window, image[-1] // groups, out)) < density
    mask[..., 0] = False  # an output without inputs
    dense = np.where(mask, rng.normal(size=mask.shape), 0).astype(np.float32)
    return mask, rng.normal(size=image).astype(np.float32), dense, make_pattern(mask, **blocks)


def check(case, *levels, density=0.3, dilation=None, groups=1, **blocks):
    *_, strides, padding = case
    mask, x, dense, pattern = drawn(case, density, groups, **blocks)

    def run_conv(level, x, v):
        options = {"strides": strides, "padding": padding, "dilation": dilation, "groups": groups, "level": level}
        return conv(x, v, pattern, **options)

    @jax.jit
    def run(x, values, dense):
        want, pull_dense = jax.vjp(lambda x, w: dense_conv(x, w, strides, padding, dilation, groups), x, dense)
        dy = jnp.cos(jnp.arange(want.size, dtype=jnp.float32)).reshape(want.shape)
        found = []
        for level in levels or ("auto",):
            y, pull = jax.vjp(functools.partial(run_conv, level), x, values)
            found.append((y, *pull(dy)))
        return found, (want, *pull_dense(dy))

    found, (want_y, want_dx, want_dw) = run(x, gather(dense, pattern), dense)
    for y, dx, dvalues in found:
        np.testing.assert_allclose(y, want_y, atol=1e-4)
        np.testing.assert_allclose(dx, want_dx, atol=1e-4)
        np.testing.assert_allclose(scatter(dvalues, pattern), want_dw * mask, atol=3e-4)


@pytest.mark.parametrize("case", CASES.values(), ids=CASES.keys())
def test_geometry(case):
    check(case)


@pytest.mark.parametrize("level", ["auto", "jax"])
@pytest.mark.parametrize("name", ["same, stride 2", "valid", "explicit, uneven", "window larger than image"])
def test_taps_that_lie_apart(name, level):
    check(CASES[name], level, dilation=(1, 2) if name == "window larger than image" else (2, 3))


@pytest.mark.parametrize("level", LEVELS)
@pytest.mark.parametrize("name", ["same", "same, stride 2"])
def test_every_level(level, name):
    check(CASES[name], level, block=18)


@pytest.mark.parametrize("name", GROUPED)
def test_groups_and_depths(name):
    *case, groups, blocks = GROUPED[name]
    levels = (*LEVELS, "jax") if name == "blocks cross groups" else ("auto", "jax")
    check(case, *levels, dilation={2: (1, 2), 3: (2, 1, 1)}[len(case[1])], groups=groups, **blocks)


@pytest.mark.parametrize("density", [0.0, 0.02, 1.0])
def test_densities(density):
    check(CASES["same"], density=density)


@pytest.mark.parametrize("width", range(1, 10))
def test_every_width_of_a_pass(width):
    check(((3, 2, width, 2), (3, 3), 3, (1, 1), "SAME"))


HALVES = {
    **CASES,
    **GROUPED,
    "1-D": ((7, 1, 21, 11), (1, 5), 9, (1, 2), "SAME"),
    "one image of many outputs": ((1, 5, 9, 3), (3, 3), 70, (1, 1), "SAME"),
    "whole vectors": ((16, 6, 5, 16), (3, 3), 24, (1, 1), "SAME"),
}


@pytest.mark.parametrize("level", CONVERT_HALVES)
@pytest.mark.parametrize("name", HALVES)
def test_bfloat16_is_float32_rounded_once(name, level):
    """The numbers of bfloat16 images and values, converted as a whole: the same sums, so the same bits."""
    case, options, blocks = halves_case(name)
    _, exact, found = in_both(case, options, blocks, [level])
    for short, wide in zip(found[0], exact, strict=True):
        assert short.dtype == jnp.bfloat16
        assert wide.dtype == jnp.float32
        np.testing.assert_array_equal(np.asarray(short, np.float32), np.asarray(wide.astype(jnp.bfloat16), np.float32))


@pytest.mark.skipif(not MULTIPLY_HALVES, reason="no level multiplies bfloat16")
@pytest.mark.parametrize(("name", "batch"), [*((name, 30) for name in HALVES), ("1-D", 64), ("whole vectors", 17)])
def test_products_in_bfloat16(name, batch):
    """Sums in another order, so not the same bits. Of 30 images a group has two too few."""
    case, options, blocks = halves_case(name)
    program, exact, found = in_both(((batch, *case[0][1:]), *case[1:]), options, blocks, MULTIPLY_HALVES)
    used = name != "stride beyond every buffer"
    for product in ("planes", "conv_forward", "conv_input_gradient", "conv_values_gradient"):
        assert (f"rigl_half_{product}" in program) == used
    for results in found:
        for short, wide in zip(results, exact, strict=True):
            assert short.dtype == jnp.bfloat16
            np.testing.assert_allclose(np.asarray(short, np.float32), wide, rtol=2**-8, atol=2e-3)


@pytest.mark.skipif(not MULTIPLY_HALVES, reason="no level multiplies bfloat16")
@pytest.mark.parametrize("width", range(1, 10))
def test_every_width_of_a_pass_in_bfloat16(width):
    options = {"strides": (1, 1), "padding": "SAME"}
    _, exact, found = in_both(((32, 2, width, 40), (3, 3), 7), options, {"block": 99}, MULTIPLY_HALVES)
    for results in found:
        for short, wide in zip(results, exact, strict=True):
            np.testing.assert_allclose(np.asarray(short, np.float32), wide, rtol=2**-8, atol=2e-3)


def halves_case(name):
    """(image, window and outputs), options of `conv`, blocks."""
    *case, strides, padding, groups, blocks = HALVES[name] if name in GROUPED else (*HALVES[name], 1, {})
    apart = (1,) * (len(strides) - 1) + (1 if name == "window larger than image" else 2,)
    return case, {"strides": strides, "padding": padding, "dilation": apart, "groups": groups}, blocks


def in_both(case, options, blocks, levels):
    """y and both gradients of numbers that are bfloat16: the lowered program, results in float32, and those in bfloat16
    at each level.
    """
    _, x, dense, pattern = drawn(case, 0.3, options.get("groups", 1), **blocks)
    x, values = jnp.asarray(x, jnp.bfloat16), gather(dense, pattern).astype(jnp.bfloat16)

    @functools.partial(jax.jit, static_argnums=3)
    def run(x, values, dy, levels):
        results = []
        for level in levels:
            y, pull = jax.vjp(lambda x, v, level=level: conv(x, v, pattern, **options, level=level), x, values)
            results.append((y, *pull(dy)))
        return results

    shape = jax.eval_shape(lambda x, v: conv(x, v, pattern, **options), x, values).shape
    operands = x, values, jnp.cos(jnp.arange(np.prod(shape))).reshape(shape).astype(jnp.bfloat16)
    wide = run(*(a.astype(jnp.float32) for a in operands), (levels[0],))
    return run.lower(*operands, tuple(levels)).as_text(), wide[0], run(*operands, tuple(levels))


@pytest.mark.parametrize("level", native.levels())
def test_bfloat16_that_is_not_finite_stays_so(level):
    x = jnp.asarray(np.random.default_rng(0).normal(size=(17, 2, 3, 9)), jnp.bfloat16)
    special = jnp.array([jnp.nan, jnp.inf, -jnp.inf, jnp.finfo(jnp.bfloat16).max, jnp.finfo(jnp.bfloat16).tiny])
    x = x.at[0, 1, 2, :5].set(special).at[16, 1, 2, 4:].set(special)  # of the last image, which is in no whole vector
    identity = make_pattern(np.eye(9, dtype=bool)[None, None])
    y = conv(x, jnp.ones(9, jnp.bfloat16), identity, padding=((0, 1), (0, 0)), level=level)
    assert not y[:, 2].any()
    np.testing.assert_array_equal(*(np.asarray(a, np.float32) for a in (y[:, :2], x)))


def test_no_bfloat16_images_are_converted_as_a_whole():
    _, x, dense, pattern = drawn(CASES["same"], 0.3, 1)

    def run(x, values):
        y, pull = jax.vjp(lambda x, v: conv(x, v, pattern), x, values)
        return y, *pull(y)

    program = {
        dtype: jax.jit(run).lower(jnp.asarray(x, dtype), gather(dense, pattern).astype(dtype)).as_text()
        for dtype in ("float32", "bfloat16")
    }
    for images in ("9x5x6x10xf32", "9x5x6x12xf32"):
        assert images in program["float32"]
        assert images not in program["bfloat16"]


def test_one_by_one_is_a_matrix_product():
    check(((3, 5, 4, 6), (1, 1), 7, (2, 1), "VALID"))


def test_short_floats_and_grad_of_vmap():
    rng = np.random.default_rng(0)
    mask = rng.random((3, 3, 4, 5)) < 0.4
    pattern = make_pattern(mask)
    values = jnp.asarray(rng.normal(size=pattern.nnz), jnp.bfloat16)
    x = jnp.asarray(rng.normal(size=(4, 6, 6, 4)), jnp.bfloat16)

    def each(values):  # one image at a time: vmap folds them into one call
        return jax.vmap(lambda image: conv(image[None], values, pattern)[0])(x).astype(jnp.float32)

    want = dense_conv(x.astype(jnp.float32), scatter(values.astype(jnp.float32), pattern), (1, 1), "SAME")
    np.testing.assert_allclose(each(values), want, rtol=2e-2, atol=2e-2)
    assert jax.grad(lambda v: each(v).sum())(values).dtype == jnp.bfloat16
