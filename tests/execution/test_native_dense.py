"""Between dense weights and their values: the native library moves the same bits as plain JAX."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from rigl_jax import native
from rigl_jax.execution import kernels
from rigl_jax.execution.kernels import moving
from rigl_jax.topology import topk

pytestmark = pytest.mark.skipif(native.library() is None, reason=f"native kernels: {native.reason()}")


@pytest.fixture(autouse=True)
def on_one_cpu(monkeypatch):
    monkeypatch.setattr(topk, "one_cpu", lambda: True)


def made(shape, height, density, room=0, seed=0):
    runs = np.random.default_rng(seed).random((*shape[:-1], shape[-1] // height)) < density
    mask = np.repeat(runs, height, axis=-1)
    return mask, kernels.make_pattern(mask, height=height, capacity=int(runs.sum()) + room)


@pytest.mark.parametrize(
    ("shape", "height", "density", "room", "dtype"),
    [
        ((300, 70), 1, 0.3, 0, "float32"),
        ((300, 70), 1, 0.02, 5, "float32"),  # few entries: moved one by one
        ((40, 1200), 1, 0.3, 3, "bfloat16"),  # more columns than a strip has
        ((40, 1200), 1, 0.01, 0, "bool"),
        ((50, 96), 4, 0.3, 2, "float16"),
        ((50, 96), 16, 0.03, 0, "float32"),
        ((3, 3, 20, 24), 1, 0.3, 4, "float32"),
        ((3, 2, 20, 24), 1, 0.02, 0, "int32"),
        ((2, 3, 2, 10, 24), 1, 0.2, 0, "float32"),
    ],
)
def test_same_bits_as_plain_jax(shape, height, density, room, dtype):
    mask, at = made(shape, height, density, room)
    dense = jnp.asarray(np.random.default_rng(1).normal(size=shape) * 9, dtype)
    values = kernels.gather(dense, at)
    np.testing.assert_array_equal(values, moving.plain_gather(dense, at))
    assert values.dtype == dense.dtype
    assert not np.asarray(values)[kernels.count(at) :].any()
    stored = jnp.ones_like(values).at[: kernels.count(at)].set(values[: kernels.count(at)])  # padding is never read
    back = kernels.scatter(stored, at)
    np.testing.assert_array_equal(back, np.where(mask, dense, np.zeros((), dense.dtype)))
    np.testing.assert_array_equal(back, moving.plain_scatter(stored, at))


def test_derivatives_of_both_modes_and_vmap():
    mask, at = made((12, 8), 1, 0.4)
    dense = jnp.asarray(np.random.default_rng(1).normal(size=(3, 12, 8)), jnp.float32)

    @jax.jit
    def both(dense):
        once = lambda d: kernels.scatter(jnp.sin(kernels.gather(d, at)), at)  # noqa: E731
        return jax.vmap(once)(dense), jax.jvp(once, (dense[0],), (dense[1],))[1], jax.vjp(once, dense[0])[1](dense[1])

    wide, forward, (backward,) = both(dense)
    np.testing.assert_allclose(wide, np.where(mask, np.sin(dense), 0), rtol=1e-6)
    np.testing.assert_allclose(forward, np.where(mask, np.cos(dense[0]) * dense[1], 0), rtol=1e-5)
    np.testing.assert_allclose(backward, forward, rtol=1e-6)


def test_native_code_is_used():
    _, at = made((12, 8), 1, 0.4)
    assert "rigl_take" in jax.jit(kernels.gather).lower(jnp.ones((12, 8)), at).as_text()
    assert "rigl_fill" in jax.jit(kernels.scatter).lower(jnp.ones(at.nnz), at).as_text()
