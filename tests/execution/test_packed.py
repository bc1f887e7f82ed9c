"""Packing: exact inverses, and which kernel a leaf gets."""

import math

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import rigl_jax as rx
from rigl_jax.execution import Packed, best_pattern, kernels, masks_of, nbytes
from rigl_jax.execution.repacking import same_kernels
from tests.errors import refused

SHAPES = [(), (3,), (4, 5), (3, 3, 2, 4), (2, 3, 4), (3, 2, 2, 3, 2)]


def tree(density, seed):
    rng = np.random.default_rng(seed)
    params = {str(i): np.float32(rng.standard_normal(shape)) for i, shape in enumerate(SHAPES)}
    masks = {name: None if p.ndim < 2 else rng.random(p.shape) < density for name, p in params.items()}
    return params, masks


@pytest.mark.parametrize("density", [0.0, 0.35, 1.0])
def test_unpack_inverts_pack_exactly(density):
    params, masks = tree(density, 0)
    packed = rx.pack(params, masks)
    chex.assert_trees_all_equal(rx.unpack(packed), rx.apply_masks(params, masks))
    chex.assert_trees_all_equal(masks_of(packed), masks)


def test_only_active_values_are_kept():
    params, masks = tree(0.35, 0)
    packed = rx.pack(params, masks)
    for name in ("2", "3", "4", "5"):  # a matrix, a convolution's kernel, one of three axes, one of five
        assert packed.values[name].shape == (int(masks[name].sum()),)
    for shape in ((2, 2, 2, 2, 2, 2), (300, 300, 1, 1)):  # no kernel has six axes, or so large a window
        mask = np.arange(math.prod(shape)).reshape(shape) % 3 == 0
        assert best_pattern("w", mask) is None
    assert packed.patterns["0"] is packed.patterns["1"] is None


def test_values_keep_their_dtype():
    params, masks = tree(0.35, 0)
    params = jax.tree.map(lambda p: p.astype(jnp.bfloat16), params)
    packed = rx.pack(params, masks)
    assert {v.dtype for v in jax.tree.leaves(packed.values)} == {jnp.dtype(jnp.bfloat16)}
    chex.assert_trees_all_equal(rx.unpack(packed), rx.apply_masks(params, masks))


def test_runs_of_outputs_are_found():
    runs = np.repeat(np.random.default_rng(0).random((8, 3)) < 0.3, 16, axis=1)
    assert best_pattern("w", runs).height == 16
    assert best_pattern("w", runs[:, :40]).height == 8
    runs[0, 0] ^= True
    assert best_pattern("w", runs).height == 1


def test_what_is_nearly_dense_stays_dense():
    assert best_pattern("w", np.ones((8, 8), bool)) is None
    assert best_pattern("w", np.zeros((8, 8), bool)) is None


def test_repacking_keeps_every_static_size():
    params, masks = tree(0.35, 0)
    first = rx.pack(params, masks)
    moved = jax.tree.map(lambda m: np.roll(m, 1, axis=0), masks)
    second = rx.pack(params, moved, choose=same_kernels(first, moved, best_pattern))
    assert jax.tree.structure(first) == jax.tree.structure(second)
    assert [x.shape for x in jax.tree.leaves(first)] == [x.shape for x in jax.tree.leaves(second)]
    chex.assert_trees_all_equal(masks_of(second), moved)


def test_bytes_follow_density():
    mask = jnp.asarray(np.random.default_rng(0).random((256, 256)) < 0.05)
    packed = rx.pack({"w": jnp.ones((256, 256))}, {"w": mask})
    assert nbytes(packed.values) == 4 * int(mask.sum())
    assert nbytes(packed) < 0.2 * 4 * 256 * 256


def test_errors_name_the_leaf():
    params, masks = {"a": {"w": jnp.ones((2, 3))}}, {"a": {"w": jnp.ones((2, 3), bool)}}
    half = {"a": {"w": jnp.array([[True, False, False], [False, True, False]])}}
    with refused("a/w"):
        rx.pack(params, half, choose=lambda name, mask: kernels.make_pattern(np.roll(mask, 1, axis=1)))
    with refused("pattern", "a/w"):
        rx.pack(params, masks, choose=lambda name, mask: kernels.make_pattern(~mask))


def test_packed_is_a_pytree_that_jit_takes():
    params, masks = tree(0.35, 0)
    packed = rx.pack(params, masks)
    doubled = jax.jit(lambda p: Packed(jax.tree.map(lambda v: 2 * v, p.values), p.patterns))(packed)
    expected = jax.tree.map(lambda p: 2 * p, rx.apply_masks(params, masks))
    chex.assert_trees_all_close(rx.unpack(doubled), expected)


def test_the_axes_of_a_plan_say_how_a_leaf_is_used():
    axes = {
        "taps": rx.Axes((1,), (2,), window=(0,)),
        "heads first": rx.Axes((2,), (0, 1)),
        "inputs twice": rx.Axes((0, 1), (2, 3)),
        "outputs first": rx.Axes((1,), (0,), window=(2,)),
        "not in order": rx.Axes((1,), (0, 2)),
    }
    shapes = [(16, 4, 8), (2, 2, 64), (3, 2, 2, 4), (8, 4, 16), (4, 2, 32)]
    params = {name: jnp.ones(shape) for name, shape in zip(axes, shapes, strict=True)}
    masks = {name: np.arange(p.size).reshape(p.shape) % 7 < 2 for name, p in params.items()}
    packed = rx.pack(params, masks, plan=rx.make_plan(params, 0.5, axes=axes))
    found = [getattr(packed.patterns[name], "split", getattr(packed.patterns[name], "axes", None)) for name in axes]
    assert found == [2, 2, 2, (2, 1, 0), kernels.squarest_split((4, 2, 32))]
    chex.assert_trees_all_equal(jax.jit(rx.unpack)(packed), rx.apply_masks(params, masks))


def test_a_plan_beside_a_choice_is_refused():
    params, masks = {"w": jnp.ones((4, 4))}, {"w": jnp.eye(4, dtype=bool)}
    with refused("pack", "plan"):
        rx.pack(params, masks, choose=lambda name, mask: None, plan=rx.make_plan(params, 0.75))
