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
