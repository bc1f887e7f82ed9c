"""Matrices in slabs: values and masks come back bit for bit, and products are those of the dense matrix."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import Mesh, NamedSharding, PartitionSpec

import rigl_jax as rx
from rigl_jax.execution import kernels
from rigl_jax.execution.explain import name_of
from tests.errors import refused

RNG = np.random.default_rng(0)
SHAPE, SLABS = (10, 24), 3


def blocks(height, width):
    """A mask of tiles, less and less dense from slab to slab."""
    tiles = RNG.random((SHAPE[0] // height, SHAPE[1] // width)) < np.linspace(0.8, 0, SHAPE[1] // width)
    return np.repeat(np.repeat(tiles, height, axis=0), width, axis=1)


def two_of_five(width):
    places = RNG.random((2, 5, SHAPE[1] // width)).argsort(axis=1) < 2
    return np.repeat(places.reshape(SHAPE[0], -1), width, axis=1)


KINDS = {
    "single weights": (blocks(1, 1), kernels.make_pattern),
    "runs": (blocks(1, 4), functools.partial(kernels.make_pattern, height=4)),
    "tiles": (blocks(5, 4), functools.partial(kernels.make_block_pattern, tile=(5, 4))),
    "n:m": (two_of_five(1), functools.partial(kernels.make_nm_pattern, n=2, m=5)),
    "n:m in runs": (two_of_five(2), functools.partial(kernels.make_nm_pattern, n=2, m=5, width=2)),
}


def of_kind(name="single weights"):
    """A mask and its slabs."""
    mask, make = KINDS[name]
    return mask, kernels.make_slabs(mask, make(mask), SLABS, "model")


@pytest.mark.parametrize("name", KINDS)
def test_values_and_masks_come_back(name):
    mask, at = of_kind(name)
    dense = np.float32(RNG.standard_normal(SHAPE)) * mask
    values = kernels.gather(dense, at)
    np.testing.assert_array_equal(kernels.scatter(values, at), dense)
    kernels.check("me", at, content=True)
    assert values.shape == (at.nnz,) == (SLABS * kernels.capacity(at) * np.prod(at.entry),)
    assert (kernels.count(at), at.number) == (mask.sum(), SLABS)
    np.testing.assert_array_equal(kernels.clear_padding(jnp.ones(at.nnz), at), kernels.gather(np.float32(mask), at))


@pytest.mark.parametrize("name", KINDS)
def test_products_are_those_of_the_matrix(name):
    mask, at = of_kind(name)
    dense = np.float32(RNG.standard_normal(SHAPE)) * mask
    x, dy, dx = (np.float32(RNG.standard_normal((5, n))) for n in (10, 24, 10))

    def both(product, w):
        y, pull = jax.vjp(product, x, w)
        return y, *pull(dy), *jax.vjp(lambda y, w: product(y, w, transpose=True), y, w)[1](dx)

    def plain(x, w, *, transpose=False):
        return x @ (w.T if transpose else w)

    got, wanted = jax.jit(lambda v, w: (both(lambda *a, **k: kernels.matmul(*a, at, **k), v), both(plain, w)))(
        kernels.gather(dense, at), dense
    )
    for a, b in zip(got, wanted, strict=True):
        np.testing.assert_allclose(a, kernels.gather(b, at) if b.shape == SHAPE else b, rtol=1e-4, atol=1e-5)


@pytest.mark.skipif(jax.device_count() < 4, reason="needs four devices")
@pytest.mark.parametrize("groups", [1, 4])
def test_convolutions_in_slabs(groups):
    """Two devices for the batch, two for the outputs; and all slabs on one device."""
    mesh = Mesh(np.array(jax.devices()[:4]).reshape(2, 2), ("data", "model"))
    mask = RNG.random((3, 3, 8 // groups, 8)) < 0.5
    kernel, x = np.float32(RNG.standard_normal(mask.shape)), np.float32(RNG.standard_normal((4, 5, 5, 8)))
    slabs = lambda name, mask: kernels.make_slabs(mask, kernels.make_pattern(mask), 2, "model")  # noqa: E731
    packed = rx.pack({"w": kernel}, {"w": mask}, choose=slabs)
    np.testing.assert_array_equal(rx.unpack(packed)["w"], kernel * mask)
    options = {"dimension_numbers": ("NHWC", "HWIO", "NHWC"), "feature_group_count": groups}

    def loss(params, x):
        return jnp.sum(jnp.sin(jax.lax.conv_general_dilated(x, params["w"], (1, 1), "SAME", **options)))

    def gradients(loss):
        return jax.grad(lambda values, x: loss(packed._replace(values=values), x), (0, 1))

    split = NamedSharding(mesh, PartitionSpec("data"))
    over = jax.jit(gradients(rx.run_packed(loss, batch=split)))(packed.values, jax.device_put(x, split))
    alone = jax.jit(gradients(rx.run_packed(loss)))(packed.values, x)
    dw, dx = jax.grad(loss, (0, 1))({"w": kernel * mask}, x)
    for dvalues, got in (over, alone):
        np.testing.assert_allclose(dvalues["w"], kernels.gather(dw["w"], packed.patterns["w"]), rtol=1e-4, atol=1e-4)
        np.testing.assert_allclose(got, dx, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(("name", "named"), [("single weights", "single weights"), ("tiles", "blocks 5 x 4")])
def test_sizes_stay_while_the_slabs_fit(name, named):
    mask, at = of_kind(name)
    moved = np.roll(mask, 5, axis=0)
    assert kernels.rebuild(at, moved).nnz == at.nnz
    assert kernels.rebuild(at, np.ones(SHAPE, bool)).nnz == np.prod(SHAPE)
    assert name_of(at).startswith(f"3 slabs of {named}")


def test_a_folded_weight_in_slabs():
    mask, at = of_kind()
    folded = kernels.Folded(at, (10, 6, 4), 1)
    dense = np.float32(RNG.standard_normal((10, 6, 4))) * mask.reshape(10, 6, 4)
    np.testing.assert_array_equal(kernels.scatter(kernels.gather(dense, folded), folded), dense)
    assert kernels.rebuild(folded, mask.reshape(10, 6, 4)).nnz == at.nnz
    assert kernels.count(folded) == mask.sum()


def test_what_is_no_slab():
    mask, at = of_kind()
    with refused("make_slabs", "mask"):
        kernels.make_slabs(mask, kernels.make_pattern(mask), 5, "model")
    with refused("scatter", "Slabs"):
        kernels.scatter(jnp.ones(at.nnz), dataclasses.replace(at, shape=(10, 16)))
    other = dataclasses.replace(at.parts, starts=at.parts.starts[:, ::-1])
    tiles, make = KINDS["tiles"]
    with refused("make_slabs", "mask"):
        kernels.make_slabs(tiles, make(tiles), 4, "model")
    with refused("me", "pattern"):
        kernels.check("me", dataclasses.replace(at, parts=other), content=True)
