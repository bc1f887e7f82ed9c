"""The Pallas kernel, interpreted, against the plain XLA form."""

import jax
import jax.export
import jax.numpy as jnp
import numpy as np
import pytest

from rigl_jax.execution.kernels import block, pallas
from tests.errors import refused

CASES = {
    "ordinary": ((4, 3), 0.4, 16),
    "odd batch": ((2, 3), 0.5, 5),
    "all tiles": ((2, 2), 1.0, 8),
    "one tile": ((3, 4), 0.01, 8),
    "padded": ((4, 3), 0.4, 16),
}


def case(name):
    (down, across), density, batch = CASES[name]
    rng = np.random.default_rng(0)
    grid = rng.random((down, across)) < density
    grid[1, 1] = True  # and often a column and a row of tiles without any
    room = int(grid.sum()) + (3 if name == "padded" else 0)
    pattern = block.make_block_pattern(np.kron(grid, np.ones((8, 16), bool)), (8, 16), capacity=room)
    x = jnp.asarray(rng.standard_normal((batch, 8 * down), dtype=np.float32))
    values = jnp.asarray(rng.standard_normal(pattern.nnz, dtype=np.float32))
    return x, values, pattern


@pytest.mark.parametrize("name", CASES)
def test_values_and_gradients(name):
    x, values, pattern = case(name)

    def both(matmul):
        def total(x, values):
            y = matmul(x, values, pattern)
            return jnp.sum(jnp.sin(y)), y

        return jax.jit(jax.value_and_grad(total, argnums=(0, 1), has_aux=True))(x, values)

    ((_, expected), gradients), ((_, got), got_gradients) = both(block.matmul), both(pallas.matmul)
    np.testing.assert_allclose(got, expected, atol=1e-5)
    for a, b in zip(got_gradients, gradients, strict=True):
        np.testing.assert_allclose(a, b, atol=1e-4)


def test_bfloat16_sums_in_float32():
    x, values, pattern = case("ordinary")
    y = pallas.matmul(x.astype(jnp.bfloat16), values.astype(jnp.bfloat16), pattern)
    assert y.dtype == jnp.bfloat16
    expected = block.matmul(x.astype(jnp.bfloat16), values.astype(jnp.bfloat16), pattern)
    np.testing.assert_allclose(y.astype(jnp.float32), expected.astype(jnp.float32), rtol=0.02, atol=0.02)


def test_errors():
    x, values, pattern = case("ordinary")
    with refused("x"):
        pallas.matmul(x[:, :31], values, pattern)
    with refused("values"):
        pallas.matmul(x, values[1:], pattern)


@pytest.mark.parametrize("tile", [(128, 128), (256, 128), (8, 128), (128, 8), (64, 64)])
def test_tiles_that_a_tpu_compiles(tile):
    """Pallas lowers for TPUs on any machine: what it takes is taken, what it does not is refused in one line."""
    pattern = block.make_block_pattern(np.ones((2 * tile[0], tile[1]), bool), tile)
    loss = lambda x, values: pallas.matmul(x, values, pattern, interpret=False).sum()  # noqa: E731
    shapes = [jax.ShapeDtypeStruct(shape, "float32") for shape in [(8, 2 * tile[0]), (pattern.nnz,)]]
    if tile[0] % 128 == 0 == tile[1] % 128:
        jax.export.export(jax.jit(jax.grad(loss, argnums=(0, 1))), platforms=["tpu"])(*shapes)
    else:
        with refused("tiles"):
            jax.eval_shape(loss, *shapes)
