"""What every selector of examples keeps. A new one is a row here."""

import functools
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from rigl_jax import coreset
from tests.errors import refused

N, K, CLASSES = 24, 5, 3
KEY = jax.random.key(0)
FEATURES = jax.random.normal(KEY, (N, CLASSES))


class Case(NamedTuple):
    """`(features [n, classes], key, k) -> index`; whether the key matters."""

    select: Callable
    random: bool = False


def dynamic(rule):
    def select(x, key, k):
        selector = coreset.dynamic_pruning(x.shape[0], k, rule, epsilon=None if rule == "random" else 0.4)
        stats = selector.update(selector.init(), jnp.arange(x.shape[0]), x[:, 0])
        return selector.select(stats, key).index

    return Case(select, random=True)


SELECTORS = {
    "top": Case(lambda x, key, k: coreset.top(x[:, 0], k)),
    "top with offset": Case(lambda x, key, k: coreset.top(x[:, 0], k, offset=2)),
    "k_center": Case(lambda x, key, k: coreset.k_center(x, k)),
    "balanced": Case(lambda x, key, k: coreset.balanced(x, k)),
    "kmeans_pp": Case(lambda x, key, k: coreset.kmeans_pp(key, x, k), random=True),
    "badge": Case(lambda x, key, k: coreset.badge(key, jax.nn.softmax(x), x, k), random=True),
    "k_means": Case(lambda x, key, k: coreset.k_means(key, x, k), random=True),
    "adaptive_bins": Case(lambda x, key, k: coreset.adaptive_bins(key, x[:, 0], k, bins=3).index, random=True),
    **{f"dynamic_pruning {rule}": dynamic(rule) for rule in coreset.RULES},
}
each = pytest.mark.parametrize("name", SELECTORS)


@functools.cache
def compiled(name):
    return jax.jit(SELECTORS[name].select, static_argnums=2)


@each
def test_exactly_k_different_examples_under_jit(name):
    found = compiled(name)(FEATURES, KEY, K)
    assert found.shape == (K,)
    assert found.dtype == jnp.int32
    assert len(set(found.tolist())) == K
    assert 0 <= int(found.min()) <= int(found.max()) < N


@each
def test_a_key_decides(name):
    first = compiled(name)(FEATURES, KEY, K)
    np.testing.assert_array_equal(compiled(name)(FEATURES, KEY, K), first)
    others = [compiled(name)(FEATURES, jax.random.key(seed), K).tolist() for seed in range(1, 6)]
    assert all(other == first.tolist() for other in others) != SELECTORS[name].random


@each
def test_examples_that_are_all_alike(name):
    """Still k different ones; the lowest where no key decides."""
    found = compiled(name)(jnp.ones_like(FEATURES), KEY, K).tolist()
    assert len(set(found)) == K
    if not SELECTORS[name].random:
        first = 2 if "offset" in name else 0
        assert sorted(found) == list(range(first, first + K))


@each
def test_more_than_there_are_is_refused(name):
    with refused(str(N)):
        jax.eval_shape(lambda x, key: SELECTORS[name].select(x, key, N + 1), FEATURES, KEY)


@pytest.mark.parametrize("name", ["k_center", "kmeans_pp", "badge", "k_means", "adaptive_bins"])
@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_what_is_not_finite_is_refused(name, bad):
    features = np.array(FEATURES)
    features[3, 0] = bad
    with refused("finite"):
        SELECTORS[name].select(jnp.asarray(features), KEY, K)


def test_indices_labels_chances_and_marks_are_checked():
    selector, track = coreset.dynamic_pruning(4, 2), coreset.forgetting(4)
    with refused("index", "4"):
        selector.update(selector.init(), jnp.array([0, 4]), jnp.ones(2))
    with refused("index"):
        selector.update(selector.init(), jnp.array([0.0, 1.0]), jnp.ones(2))
    with refused("correct", "bool"):
        track.update(track.init(), jnp.array([0, 1]), jnp.ones(2))
    with refused("labels", "2"):
        coreset.el2n(FEATURES[:2, :2], jnp.array([0, 2]))
    with refused("inclusion"):
        coreset.horvitz_thompson(jnp.ones(2), jnp.array([0.5, 0.0]), 4)


def test_a_loss_that_is_not_finite_changes_nothing():
    selector = coreset.dynamic_pruning(3, 1, "ucb")
    first = selector.update(selector.init(), jnp.array([0, 1]), jnp.array([1.0, 2.0]))
    after = selector.update(first, jnp.array([1, 2]), jnp.array([jnp.nan, jnp.inf]))
    jax.tree.map(np.testing.assert_array_equal, after, first)
    assert after.seen.tolist() == [True, True, False]


def test_exploration_is_never_rounded_to_nothing():
    selector = coreset.dynamic_pruning(10, 2, "epsilon_greedy")  # a tenth of 2
    stats = selector.update(selector.init(), jnp.arange(10), jnp.arange(10.0))
    chosen = selector.select(stats, KEY)
    assert sorted(chosen.weight.tolist()) == pytest.approx([2 / 10, 9 * 2 / 10])  # 1 of the 9 others by chance


def test_bins_of_many_examples_do_not_wrap():
    """n * bins is 2 ** 31."""
    n, bins = 2**19, 2**12
    found = coreset.adaptive_bins(KEY, jnp.arange(n, dtype=jnp.float32), bins, bins=bins)
    np.testing.assert_array_equal(np.asarray(found.index) // (n // bins), np.arange(bins))  # one of each bin


def test_x64_changes_no_type():
    with jax.enable_x64(True):
        features = jnp.asarray(np.asarray(FEATURES), jnp.float32)
        assert coreset.k_means(KEY, features, K).dtype == jnp.int32
        assert coreset.badge(KEY, jax.nn.softmax(features), features, K).dtype == jnp.int32
        assert coreset.k_center(features, 2, labelled=jnp.arange(N) < 2).dtype == jnp.int32
        assert coreset.el2n(features, jnp.zeros(N, jnp.int32)).dtype == jnp.float32
        assert coreset.dynamic_pruning(4, 2).init().mean.dtype == jnp.float32
