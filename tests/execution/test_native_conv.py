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
LEVELS = [level for level in native.levels() if level != "avx512_bf16"]  # its convolutions are those of avx512
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


def check(case, *levels, density=0.3, dilation=None, groups=1, **blocks):
    image, window, out, strides, padding = case
    rng = np.random.default_rng(0)
    mask = rng.random((*window, image[-1] // groups, out)) < density
    mask[..., 0] = False  # an output without inputs
    dense = np.where(mask, rng.normal(size=mask.shape), 0).astype(np.float32)
    x = rng.normal(size=image).astype(np.float32)
    pattern = make_pattern(mask, **blocks)

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
