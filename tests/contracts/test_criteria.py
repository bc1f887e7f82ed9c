"""What every criterion keeps, under `rx.prune`, with every structure. A new one is a row of the registry, no line here.

One network serves all: a perceptron of three layers, whose hidden units can be exchanged, with a loss and an `apply`.
"""

import functools

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import rigl_jax as rx
from rigl_jax.criteria import CRITERIA
from tests import oracles
from tests.errors import refused

SHAPES = {"a": (8, 12), "b": (12, 6), "c": (6, 4)}
STRUCTURES = {
    "unstructured": rx.unstructured(),
    "block": rx.block(2, 2),
    "n_of_m": rx.n_of_m(2, 4, axis=0),
    "fan_in": rx.fan_in(),
    "channel": rx.channel(),
}
KEY = jax.random.key(0)
PARAMS = {n: jax.random.normal(jax.random.fold_in(KEY, i), s) for i, (n, s) in enumerate(SHAPES.items())}
PARAMS["bias"] = jnp.linspace(-1.0, 1.0, 12)
BATCH = jax.random.normal(jax.random.key(1), (16, 8))
each = pytest.mark.parametrize("name", CRITERIA)


def apply(params, x):
    hidden = jax.nn.relu(x @ params["a"].astype(x.dtype) + params["bias"].astype(x.dtype)[None])
    return jax.nn.relu(hidden @ params["b"].astype(x.dtype)) @ params["c"].astype(x.dtype)


def loss(params, x):
    return jnp.mean((apply(params, x) - x[:, :4]) ** 2)


@functools.cache
def made(name, loss=loss, apply=apply):
    return jax.jit(CRITERIA[name].make(loss=loss, apply=apply, key=KEY))  # one compilation, not one an operation


@functools.cache
def scores(name):
    return made(name)(PARAMS, BATCH)


def plan(structure="unstructured", sparsity=0.5):
    rules = [("a", STRUCTURES[structure]), ("[bc]", rx.unstructured()), ("bias", None)]
    return rx.make_plan(PARAMS, sparsity, rx.uniform, rules=rules)


def groups(layer, mask):
    return np.asarray(jnp.sum(layer.active(mask), axis=layer.structure.axes(layer.units)))


@each
def test_scores_are_floats_parallel_to_params_and_higher_is_kept(name):
    found = scores(name)
    for leaf, shape in SHAPES.items():
        assert found[leaf].shape == shape
        assert jnp.issubdtype(found[leaf].dtype, jnp.floating)
        assert len(np.unique(found[leaf])) > found[leaf].size // 2
    masks = rx.prune(plan(), PARAMS, lambda params, batch: found).masks
    for leaf, layer in plan().items():
        np.testing.assert_array_equal(masks[leaf], oracles.top(found[leaf], layer.n_active))


@each
@pytest.mark.parametrize("structure", STRUCTURES)
def test_counts_are_exact_in_every_structure_and_pruned_weights_are_0(name, structure):
    planned, found = plan(structure), scores(name)
    pruned = rx.prune(planned, PARAMS, lambda params, batch: found)
    rx.check_masked(pruned.params, pruned.masks, planned)
    for leaf, layer in planned.items():
        assert (groups(layer, pruned.masks[leaf]) == layer.n_active).all()
        kept = np.asarray(pruned.masks[leaf])
        np.testing.assert_array_equal(np.asarray(pruned.params[leaf])[kept], np.asarray(PARAMS[leaf])[kept])
    assert pruned.masks["bias"] is None
    np.testing.assert_array_equal(pruned.params["bias"], PARAMS["bias"])


@each
def test_one_ranking_over_all_layers_has_the_exact_total_and_empties_no_layer(name):
    planned = plan(sparsity=0.95)
    masks = rx.prune(planned, PARAMS, made(name), BATCH, scope="global", min_active=2).masks
    counts = {leaf: int(masks[leaf].sum()) for leaf in planned}
    assert sum(counts.values()) == sum(layer.active_weights for layer in planned.values())
    assert min(counts.values()) >= 2


@pytest.mark.parametrize(("name", "scope"), [*((name, "layer") for name in CRITERIA), ("magnitude", "global")])
def test_what_is_pruned_never_returns(name, scope):
    """In rounds, from the masks of another pruning."""
    first = rx.prune(plan(sparsity=0.3), PARAMS, lambda params, batch: scores(name))
    second = rx.prune(plan(sparsity=0.8), first.params, made(name), BATCH, scope=scope, masks=first.masks, rounds=3)
    for leaf in SHAPES:
        assert not np.any(second.masks[leaf] & ~first.masks[leaf])
    assert sum(int(second.masks[leaf].sum()) for leaf in SHAPES) == sum(
        layer.active_weights for layer in plan(sparsity=0.8).values()
    )


@pytest.mark.parametrize("name", [name for name, entry in CRITERIA.items() if not entry.random])
def test_ties_go_to_the_lower_index(name):
    """All weights alike: a loss and a network in which every weight is worth the same."""
    params = {leaf: jnp.ones(shape) for leaf, shape in SHAPES.items()}
    total = lambda params, x=None: sum(jnp.sum(params[leaf] ** 2) for leaf in SHAPES) / 2  # noqa: E731
    planned = {leaf: layer for leaf, layer in plan().items() if leaf in SHAPES}
    masks = rx.prune(planned, params, made(name, total, lambda params, x: [total(params)]), jnp.ones((1, 8))).masks
    for leaf, layer in planned.items():
        np.testing.assert_array_equal(masks[leaf].ravel(), np.arange(layer.size) < layer.n_active)


@pytest.mark.parametrize("name", [name for name, entry in CRITERIA.items() if not entry.random])
def test_units_that_change_places_take_their_scores_along(name):
    order = np.random.default_rng(0).permutation(12)
    exchanged = {**PARAMS, "a": PARAMS["a"][:, order], "b": PARAMS["b"][order], "bias": PARAMS["bias"][order]}
    found = made(name)(exchanged, BATCH)
    chex.assert_trees_all_close(found["a"], scores(name)["a"][:, order], rtol=1e-3, atol=1e-5)
    chex.assert_trees_all_close(found["b"], scores(name)["b"][order], rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize("name", [name for name in CRITERIA if name not in ("magnitude", "random", "synflow")])
def test_a_batch_without_examples_is_refused(name):
    """All scores would be alike, and weights would go by their index. SynFlow reads the shape of an example only."""
    with refused(name.removesuffix("_2"), "batch"):
        jax.eval_shape(CRITERIA[name].make(loss=loss, apply=apply, key=KEY), PARAMS, BATCH[:0])


@each
def test_types_of_weights(name):
    """Twice the precision changes no mask. Half of it is traced: counts are exact whatever the scores are."""
    expected = rx.prune(plan(), PARAMS, lambda params, batch: scores(name)).masks
    with jax.enable_x64(True):
        wide = jax.tree.map(lambda x: jnp.asarray(np.asarray(x, np.float64)), (PARAMS, BATCH))
        chex.assert_trees_all_equal(rx.prune(plan(), wide[0], made(name), wide[1]).masks, expected)
    half = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, jnp.bfloat16), (PARAMS, BATCH))
    found = jax.eval_shape(made(name), *half)
    assert all(found[leaf].shape == s and jnp.issubdtype(found[leaf].dtype, jnp.floating) for leaf, s in SHAPES.items())


def test_weights_keep_their_type():
    half = jax.tree.map(lambda x: x.astype(jnp.bfloat16), (PARAMS, BATCH))
    pruned = rx.prune(plan(), half[0], made("taylor"), half[1])
    assert pruned.params["a"].dtype == jnp.bfloat16
    rx.check_masked(pruned.params, pruned.masks, plan())


@pytest.mark.parametrize("name", ["magnitude", "synflow"])
def test_it_can_prune_before_training(name):
    algorithm = rx.algorithms.one_shot(plan(), made(name), BATCH, rounds=2)
    masks = jax.jit(algorithm.init)(KEY, PARAMS).masks
    chex.assert_trees_all_equal(masks, rx.prune(plan(), PARAMS, made(name), BATCH, rounds=2).masks)
    assert algorithm.keeps_counts
    assert not algorithm.due(0)
