"""The kernels of tiles for GPUs: interpreted against NumPy, and their form for other platforms."""

import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental.pallas import mosaic_gpu as plgpu

from rigl_jax.execution.kernels import block, mosaic
from tests.errors import refused

PARAMETERS = getattr(plgpu, "InterpretGPUParams", None)  # older interpreters do not transpose
GRID = np.array([[0, 1, 1], [0, 0, 1]], bool)  # a column without a tile, and columns of one and of two


def case(side, dtype, batch):
    rng = np.random.default_rng(0)
    pattern = block.make_block_pattern(np.kron(GRID, np.ones((side, side), bool)), (side, side), capacity=5)  # one more
    draw = lambda *shape: jnp.asarray(np.round(rng.standard_normal(shape) * 4) / 4, dtype)  # noqa: E731
    return draw(batch, 2 * side), draw(pattern.nnz), draw(batch, 3 * side), pattern


def expected(x, values, dy, pattern):
    x, dy = (np.asarray(a, np.float64) for a in (x, dy))
    weight = np.asarray(block.scatter(values, pattern), np.float64)
    whole = jnp.asarray(x.T @ dy, jnp.float32)
    return {"forward": x @ weight, "input_gradient": dy @ weight.T, "values_gradient": block.gather(whole, pattern)}


@pytest.mark.skipif(PARAMETERS is None, reason="the interpreter of this JAX does not transpose")
@pytest.mark.parametrize(("dtype", "side", "batch"), [("bfloat16", 64, 70), ("float32", 64, 9)])
def test_interpreted_kernels(dtype, side, batch):
    x, values, dy, pattern = case(side, dtype, batch)
    at = mosaic.tile_pattern(pattern)
    for kind, wanted in expected(x, values, dy, pattern).items():
        a, b = {"forward": (x, values), "input_gradient": (dy, values), "values_gradient": (x, dy)}[kind]
        got = mosaic.run(kind, a, b, at, interpret=PARAMETERS())
        assert got.dtype == dtype
        np.testing.assert_allclose(np.asarray(got, np.float32), wanted, rtol=1e-2 if dtype == "bfloat16" else 1e-5)


def test_other_platforms():
    x, values, dy, pattern = case(4, "float32", 3)

    def loss(x, values):
        return jnp.vdot(mosaic.matmul(x, values, pattern), dy)

    y = mosaic.matmul(x, values, pattern)
    dx, dvalues = jax.jit(jax.grad(loss, argnums=(0, 1)))(x, values)
    for got, wanted in zip((y, dx, dvalues), expected(x, values, dy, pattern).values(), strict=True):
        np.testing.assert_allclose(got, wanted, atol=1e-5)


@pytest.mark.parametrize(("capability", "ours"), [("8.0", False), ("9.0", True), (None, True)])
def test_the_kernels_are_for_hopper(monkeypatch, capability, ours):
    x, values, _, pattern = case(64, "float32", 3)
    made = []
    monkeypatch.setattr(mosaic, "run", lambda *args: made.append("ours"))
    monkeypatch.setattr(mosaic, "_plain", lambda *args: made.append("plain"))

    def devices(platform):
        if capability is None:
            raise RuntimeError(f"no {platform}")
        return [types.SimpleNamespace(compute_capability=capability)]

    monkeypatch.setattr(jax, "devices", devices)
    mosaic._run_cuda("forward", x, values, mosaic.TilePattern(pattern, *[None] * 4), None)
    assert made == ["ours" if ours else "plain"]


def test_errors():
    x, values, _, pattern = case(4, "float32", 3)
    with refused("x"):
        mosaic.matmul(x[:, 1:], values, pattern)
    with refused("values"):
        mosaic.matmul(x, values[1:], pattern)
