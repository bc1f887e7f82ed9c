"""Patterns with room for more entries: padding changes nothing, and counts may change without a new compilation."""

import dataclasses
import functools

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import rigl_jax as rx
from rigl_jax.execution import Factors, Packed, best_pattern, kernels, masks_of, packed_training, rewire_streamed
from rigl_jax.execution.repacking import same_kernels
from tests.errors import refused
from tests.execution.test_training import PRODUCTS, check_together, loss_of_products

ROOM = 7
RNG = np.random.default_rng(0)


def runs(height):
    return np.repeat(RNG.random((40, 48 // height)) < 0.3, height, axis=1)


def tiles(mask):
    return kernels.make_block_pattern(mask, (5, 8))


CASES = {
    "matrix": (runs(1), kernels.make_pattern, (20, 40), {}),
    "one row": (runs(1), kernels.make_pattern, (1, 40), {}),
    "runs": (runs(8), functools.partial(kernels.make_pattern, height=8), (20, 40), {}),
    "convolution": (RNG.random((3, 3, 4, 6)) < 0.3, kernels.make_pattern, (3, 5, 5, 4), {"strides": (2, 2)}),
    "tiles": (np.repeat(runs(8)[:8], 5, axis=0), tiles, (20, 40), {}),
}


@pytest.mark.parametrize(("case", "level"), [*((case, "auto") for case in CASES), ("matrix", "jax"), ("runs", "jax")])
def test_padding_takes_part_in_nothing(case, level):
    """Not even where its values are NaN; its gradient is 0."""
    mask, make, shape, options = CASES[case]
    exact = make(mask)
    padded = kernels.rebuild(exact, mask, capacity=kernels.capacity(exact) + ROOM)
    assert (padded.nnz, kernels.count(padded)) == (exact.nnz + ROOM * np.prod(exact.entry), exact.nnz)
    kernels.check("me", padded, content=True)
    dense, x = (np.float32(RNG.normal(size=size)) for size in (mask.shape, shape))
    product = functools.partial(kernels.conv if mask.ndim == 4 else kernels.matmul, level=level, **options)

    @jax.jit
    def run(values, at):
        y, pull = jax.vjp(lambda x, v: product(x, v, at), x, values)
        return kernels.scatter(values, at), y, *pull(jnp.cos(y))

    values = kernels.gather(dense, padded)
    np.testing.assert_array_equal(values[exact.nnz :], 0)
    *found, gradient = run(values.at[exact.nnz :].set(jnp.nan), padded)
    *wanted, exact_gradient = run(values[: exact.nnz], exact)
    chex.assert_trees_all_close(found, wanted, atol=1e-5)
    np.testing.assert_allclose(gradient[: exact.nnz], exact_gradient, atol=1e-5)
    np.testing.assert_array_equal(gradient[exact.nnz :], 0)


def test_a_network_that_is_pruned_in_many_steps_is_compiled_for_few_sizes():
    """And its masks are those of a masked run. With counts that fit exactly, each of nine prunings has its size."""
    plan = rx.make_plan(PRODUCTS, 0.85, rules=[("v", None), ("w", rx.unstructured())])
    algorithm = rx.gmp(plan, start=0, stop=16, period=2, initial=0.65)
    inputs = np.random.default_rng(1).standard_normal((18, 12, 16), np.float32)
    traces = []
    check_together(loss_of_products, PRODUCTS, algorithm, optax.sgd(0.05, 0.9), inputs, traces)
    assert len(traces) <= 4


def test_sizes_are_chosen_anew_where_a_quarter_is_padding_or_a_leaf_does_not_fit():
    def sizes(density, like=None):
        """The patterns of two leaves, the size and the count of each."""
        masks = {name: RNG.random((32, 32)) < density for name in "ab"}
        choose = best_pattern if like is None else same_kernels(like, masks, best_pattern, padded=True)
        patterns = {name: choose(name, mask) for name, mask in masks.items()}
        values = {name: np.zeros(pattern.nnz) for name, pattern in patterns.items()}
        counts = {name: int(mask.sum()) for name, mask in masks.items()}
        assert counts == {name: kernels.count(pattern) for name, pattern in patterns.items()}
        return Packed(values, patterns), {name: v.size for name, v in values.items()}, counts

    first, before, _ = sizes(0.35)
    kept, after, counts = sizes(0.30, first)
    assert after == before != counts
    _, after, counts = sizes(0.2, kept)
    assert after == counts
    small, _, _ = sizes(0.1)
    _, after, counts = sizes(0.2, small)
    assert all(counts[name] < after[name] <= 1.3 * counts[name] for name in counts)


def test_streamed_growth_keeps_the_room_of_a_leaf():
    mask, params = RNG.random((16, 16)) < 0.3, {"w": np.float32(RNG.normal(size=(16, 16)))}
    count, inner = int(mask.sum()), optax.sgd(0.1)
    algorithm = rx.rigl(rx.make_plan(params, 0.7, rules=[("w", rx.unstructured())]))
    _, state = packed_training(inner, algorithm, key=jax.random.key(0)).init(params)
    choose = lambda name, mask: kernels.make_pattern(mask, capacity=count + ROOM)  # noqa: E731
    packed = rx.pack(params, {"w": jnp.asarray(mask)}, choose=choose)
    gradient = {"w": Factors(*(jnp.float32(RNG.normal(size=(4, 16))) for _ in range(2)))}
    after, _ = rewire_streamed(inner, gradient, state, packed, 0.3)
    assert jax.tree.map(jnp.shape, after) == jax.tree.map(jnp.shape, packed)
    now, then = np.asarray(masks_of(after)["w"]), np.asarray(rx.unpack(after)["w"])
    assert now.sum() == count
    assert 0 < (now & ~mask).sum() <= 0.3 * count
    np.testing.assert_array_equal(then, np.where(now & mask, params["w"], 0))


def test_a_pattern_whose_padding_was_lost_is_refused():
    pattern = kernels.make_pattern(runs(1), capacity=700)
    cut = jax.tree.map(jnp.zeros_like, pattern.indices)
    lost = dataclasses.replace(pattern, indices=cut)
    with refused("w"):
        rx.unpack(Packed({"w": jnp.ones(700)}, {"w": lost}))
    assert jnp.isnan(jax.jit(kernels.scatter)(jnp.ones(700), lost)).any()
    with refused("make_pattern_at", "capacity"):
        kernels.make_pattern(runs(1), capacity=3)


def test_padding_of_tiles_does_not_read_an_infinite_input():
    mask = np.kron(np.array([[1, 0], [0, 0]], bool), np.ones((2, 2), bool))
    x = jnp.array([[1.0, 2.0, jnp.inf, 3.0]])
    for transpose in (False, True):
        exact, padded = (kernels.make_block_pattern(mask, (2, 2), capacity=n) for n in (1, 3))
        y, wanted = (
            kernels.matmul(x, kernels.gather(jnp.ones((4, 4)), at), at, transpose=transpose) for at in (padded, exact)
        )
        np.testing.assert_array_equal(y, wanted)
        assert np.isfinite(wanted).all()
