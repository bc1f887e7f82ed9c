"""What every selector of examples keeps. A new one is a row here."""

import functools
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from rigl_jax import contents, coreset
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


# --- what is refused, by every member that takes such an argument

PROBS = np.asarray(jax.nn.softmax(FEATURES))
LOGITS = np.asarray(FEATURES)
ROW = LOGITS[:, 0]
OF_PROBS = {
    **{name: getattr(coreset, name) for name in ("entropy", "margin", "least_confidence")},
    "bald": lambda p: coreset.bald(p[None]),
    "mean_std": lambda p: coreset.mean_std(p[None]),
    "variation_ratio": lambda p: coreset.variation_ratio(p[None]),
    "pseudo_labels": lambda p: coreset.pseudo_labels(p[None], 0.5),
    "badge": lambda p: coreset.badge(KEY, p, np.ones((len(p), 2), np.float32), 1),
}
NO_PROBS = {
    "logits": LOGITS,
    "NaN": np.where(np.arange(N)[:, None] == 3, np.nan, PROBS),
    "percent": 100 * PROBS,
    "nothing": PROBS[:0],
    "no class": PROBS[:, :0],
    "one class": np.ones_like(PROBS[:, :1]),
    "a one-hot row of integers": np.eye(3, dtype=int),
    "another rank": PROBS[0],
}


@pytest.mark.parametrize("kind", NO_PROBS)
@pytest.mark.parametrize("name", OF_PROBS)
def test_what_is_no_probability_is_refused(name, kind):
    with refused(name, "probs"):
        OF_PROBS[name](NO_PROBS[kind])


@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "float32", "float64"])
def test_a_softmax_of_low_precision_is_one(dtype):
    logits = 3 * np.random.default_rng(0).normal(size=(50, 1000))
    rounded = np.exp(logits - logits.max(1, keepdims=True)).astype(jnp.dtype(dtype)).astype(np.float64)
    probs = (rounded / rounded.sum(1, keepdims=True).astype(jnp.dtype(dtype)).astype(np.float64)).astype(
        jnp.dtype(dtype)
    )
    assert contents.probabilities("f", "probs", probs) is probs


OF_NUMBERS = {
    "k_center embeddings": lambda x: coreset.k_center(x, K),
    "kmeans_pp embeddings": lambda x: coreset.kmeans_pp(KEY, x, K),
    "k_means embeddings": lambda x: coreset.k_means(KEY, x, K),
    "badge embeddings": lambda x: coreset.badge(KEY, PROBS, x, K),
    "boundary_distance embeddings": lambda x: coreset.boundary_distance(x, LOGITS[:3], ROW[:3]),
    "boundary_distance kernel": lambda x: coreset.boundary_distance(LOGITS[:, :3], x[:3], ROW[:3]),
    "boundary_distance bias": lambda x: coreset.boundary_distance(LOGITS[:, :3], LOGITS[:3], x[3]),
    "adaptive_bins predicted": lambda x: coreset.adaptive_bins(KEY, x[:, 0], K, bins=3),
    "confident scores": lambda x: coreset.confident(x, 0.5),
    "complexity_gap x": lambda x: coreset.complexity_gap(x, np.ones(N, int)),
    "el2n logits": lambda x: coreset.el2n(x, np.zeros(N, int)),
    "horvitz_thompson values": lambda x: coreset.horvitz_thompson(x[:, 0], np.ones(N, np.float32), N),
}


def spoilt(value):
    features = LOGITS.astype(np.float64)
    features[:4] = value
    return features


@pytest.mark.parametrize("value", [np.nan, np.inf, 1e200])
@pytest.mark.parametrize("name", OF_NUMBERS)
def test_what_is_not_finite_is_refused(name, value):
    if np.isnan(value) or name.split()[0] not in ("complexity_gap", "el2n", "horvitz_thompson"):  # these may hold more
        with refused(*name.split()):
            OF_NUMBERS[name](spoilt(value))


@pytest.mark.parametrize("name", ["k_center", "kmeans_pp", "k_means"])
def test_the_unit_of_embeddings_does_not_matter(name):
    for scale in (2.0**100, 2.0**-100):
        np.testing.assert_array_equal(compiled(name)(scale * FEATURES, KEY, K), compiled(name)(FEATURES, KEY, K))


SELECTOR, TRACK = coreset.dynamic_pruning(4, 2), coreset.forgetting(4)
UPDATES = {
    "dynamic_pruning update": lambda index: SELECTOR.update(SELECTOR.init(), index, jnp.ones(2)),
    "forgetting update": lambda index: TRACK.update(TRACK.init(), index, jnp.ones(2, bool)),
}


@pytest.mark.parametrize("name", UPDATES)
def test_indices_out_of_range_are_refused_and_dropped_under_jit(name):
    for bad in ([0, 4], [0, -1], [1, 1], [0.0, 1.0]):
        with refused(*name.split(), "index"):
            UPDATES[name](np.array(bad))
    update = jax.jit(UPDATES[name])
    found, one = update(np.array([-1, 4])), update(np.array([1, -1]))
    nothing = (SELECTOR if "dynamic" in name else TRACK).init()
    jax.tree.map(np.testing.assert_array_equal, found, nothing)
    changed = [np.flatnonzero(a != b).tolist() for a, b in zip(one, nothing, strict=True)]
    assert [1] in changed
    assert all(places in ([], [1]) for places in changed)


def test_a_state_is_of_its_examples():
    with refused("dynamic_pruning", "update", "stats", "4", "5"):
        SELECTOR.update(coreset.dynamic_pruning(5, 2).init(), jnp.array([0]), jnp.ones(1))
    with refused("forgetting", "scores", "state", "4", "5"):
        TRACK.scores(coreset.forgetting(5).init())
    with refused("correct", "bool"):
        TRACK.update(TRACK.init(), jnp.array([0, 1]), jnp.ones(2))


def test_labels_chances_and_options_are_checked_and_shown():
    for labels, shown in (([0, 3], "3"), ([-1, 0], "-1"), ([0.0, 1.0], "float64"), ([0], "labels")):
        with refused("el2n", "labels", shown):
            coreset.el2n(LOGITS[:2], np.array(labels))
    with refused("el2n", "logits"):
        coreset.el2n(LOGITS[:2, :1], np.array([0, 0]))
    with refused("self_training", "labels", "7"):
        coreset.self_training(
            lambda x, y, key: lambda new: PROBS[: len(new)], LOGITS[:2], np.array([0, 7]), LOGITS, KEY
        )
    with refused("self_training", "fit"):
        coreset.self_training(
            lambda x, y, key: lambda new: LOGITS[: len(new)], LOGITS[:2], np.array([0, 1]), LOGITS, KEY
        )
    with refused("complexity_gap", "y", "2"):
        coreset.complexity_gap(LOGITS, np.full(N, 2))
    with refused("complexity_gap_per_class", "labels", "[5]"):
        coreset.complexity_gap_per_class(LOGITS, np.full(N, 5), KEY)
    with refused("horvitz_thompson", "inclusion", "0.0"):
        coreset.horvitz_thompson(np.ones(2), np.array([0.5, 0.0]), 4)
    with refused("horvitz_thompson", "n"):
        coreset.horvitz_thompson(np.ones(2), np.ones(2), 1)
    with refused("dynamic_pruning", "c", "finite"):
        coreset.dynamic_pruning(4, 2, "ucb", c=np.inf)
    with refused("adaptive_bins", "alpha", "finite"):
        coreset.adaptive_bins(KEY, ROW, K, bins=3, alpha=np.inf)
    with refused("k_center", "k", str(N)):
        coreset.k_center(LOGITS, 1, labelled=np.ones(N, bool))


def test_top_takes_counts_and_refuses_what_it_cannot_rank():
    assert coreset.top(np.array([5, 2, 7]), 2).tolist() == [0, 2]
    for bad in (np.full(3, np.nan), np.array([1, 2**24 + 1]), np.ones(3, bool)):
        with refused("top", "scores"):
            coreset.top(bad, 1)


def test_grand_of_odd_losses_and_of_gradients_whose_squares_vanish():
    params = {"w": np.ones((3, 2), np.float32), "steps": np.int32(3)}
    scales = np.float32([1e-25, 1e25])
    found = coreset.grand(lambda p, x: jnp.sum(x @ p["w"]), params, np.outer(scales, np.float32([3, 0, 4])))
    np.testing.assert_allclose(found, scales * np.float32(50**0.5), rtol=1e-5)
    with refused("grand", "loss"):
        coreset.grand(lambda p, x: x @ p["w"], params, LOGITS)
    with refused("grand", "batch", "24", "5"):
        coreset.grand(lambda p, x: 0.0, params, (LOGITS, LOGITS[:5]))
    with refused("grand", "params"):
        coreset.grand(lambda p, x: 0.0, {"steps": np.int32(3)}, LOGITS)


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
