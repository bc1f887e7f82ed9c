"""Scores and selectors of examples against closed forms, brute force and NumPy."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.special

from rigl_jax import coreset
from rigl_jax.coreset import diversity
from tests.errors import refused

KEY = jax.random.key(0)
X = np.float32(np.random.default_rng(0).normal(size=(10, 4)))
Y = np.int32(np.random.default_rng(1).integers(0, 3, 10))
PROBS = np.float32(scipy.special.softmax(np.random.default_rng(2).normal(size=(5, 10, 3)), -1))


def random():
    return np.random.default_rng(3)


def test_grand_of_softmax_regression_is_el2n_times_the_length_of_the_input():
    draw = random()
    params = {"w": jnp.asarray(draw.normal(size=(4, 3)), jnp.float32), "b": jnp.array([0.1, 0.0, -0.2])}

    def loss(params, batch):
        x, y = batch
        logits = x @ params["w"] + params["b"][None]
        return -jnp.mean(jnp.take_along_axis(jax.nn.log_softmax(logits), y[:, None], 1))

    error = coreset.el2n(X @ params["w"] + params["b"][None], Y)
    found = jax.jit(lambda p, b: coreset.grand(loss, p, b, chunk=4))(params, (X, Y))  # 4 + 4 + 2
    np.testing.assert_allclose(found, error * jnp.sqrt(jnp.sum(X**2, axis=1) + 1), rtol=1e-5)


def test_forgetting_against_a_count_by_hand():
    draw = random()
    right = draw.random((12, 6)) < 0.5
    right[:, 5] = False
    track = coreset.forgetting(6)
    update, state = jax.jit(track.update), track.init()
    for t, half in itertools.product(range(12), (np.arange(3), np.arange(3, 6))):
        state = update(state, jnp.asarray(half), jnp.asarray(right[t, half]))
    expected = (right[:-1] & ~right[1:]).sum(0).astype(np.float32)
    expected[~right.any(0)] = np.inf
    np.testing.assert_array_equal(track.scores(state), expected)
    assert np.isinf(expected[5])


# --- dynamic data pruning


def test_random_draws_cover_the_data_as_independent_draws_do():
    selector = coreset.dynamic_pruning(2000, 600)
    draws = jax.jit(jax.vmap(lambda key: selector.select(selector.init(), key).index))(jax.random.split(KEY, 5))
    assert len(np.unique(draws)) / 2000 == pytest.approx(1 - 0.7**5, abs=0.02)


@pytest.mark.parametrize(("rule", "epsilon"), [("random", None), ("ucb", 0.3)])
def test_weights_make_the_mean_loss_unbiased(rule, epsilon):
    draw = random()
    n, keep = 30, 10
    losses = jnp.asarray(draw.exponential(size=n), jnp.float32)
    selector = coreset.dynamic_pruning(n, keep, rule, epsilon=epsilon)

    @jax.jit
    def means(seen, keys):
        def of(key):
            index, weight = selector.select(coreset.SampleStats(losses, 0 * losses, seen), key)
            return jnp.mean(weight * losses[index]), jnp.mean(losses[index])

        return jax.vmap(of)(keys)

    keys = jax.random.split(KEY, 2000)
    for seen in (np.ones(n, bool), np.arange(n) < 26):
        weighted, plain = map(np.asarray, means(seen, keys))
        assert abs(weighted.mean() - losses.mean()) < 4 * weighted.std() / 2000**0.5
        assert rule == "random" or plain.mean() > 1.2 * losses.mean()  # hard ones are preferred


def test_moving_statistics_against_a_loop_and_without_exploring_the_highest_are_kept():
    draw = random()
    n, rate = 8, 0.25
    selector = coreset.dynamic_pruning(n, 3, "ucb", c=2.0, rate=rate)
    stats, update = selector.init(), jax.jit(selector.update)
    mean, var, seen = np.zeros(n), np.zeros(n), np.zeros(n, bool)
    for _ in range(6):
        index = draw.permutation(n - 1)[:4]  # the last one is never seen
        losses = draw.exponential(size=4)
        stats = update(stats, jnp.asarray(index), jnp.asarray(losses, jnp.float32))
        for i, loss in zip(index, losses, strict=True):
            old = mean[i] if seen[i] else loss
            mean[i] = (1 - rate) * old + rate * loss
            var[i] = (1 - rate) * var[i] + rate * (loss - old) * (loss - mean[i])
            seen[i] = True
    np.testing.assert_allclose(stats.mean, mean, rtol=1e-5)
    np.testing.assert_allclose(stats.var, var, rtol=1e-4, atol=1e-6)
    np.testing.assert_array_equal(stats.seen, seen)
    score = np.where(seen, mean + 2 * var, np.inf)
    np.testing.assert_array_equal(selector.select(stats, KEY).index, np.sort(np.argsort(-score)[:3]))
    again = jax.tree.unflatten(jax.tree.structure(stats), [np.asarray(x) for x in jax.tree.leaves(stats)])  # a file
    np.testing.assert_array_equal(selector.select(again, KEY).index, selector.select(stats, KEY).index)


def test_odd_options_of_dynamic_pruning():
    for given, named in (({"rule": "best"}, "rule"), ({"epsilon": 0.5}, "epsilon"), ({"rate": 0.0}, "rate")):
        with refused("dynamic_pruning", named):
            coreset.dynamic_pruning(4, 2, **given)


# --- complexity gap


def test_the_complexity_gap_is_what_leaving_one_out_changes():
    draw = random()
    x, y = draw.normal(size=(15, 3)), draw.choice([-1, 1], 15)
    unit = x / np.linalg.norm(x, axis=1, keepdims=True)
    t = np.clip(unit @ unit.T, -1, 1)
    kernel = t * (np.pi - np.arccos(t)) / (2 * np.pi)
    np.fill_diagonal(kernel, 0.5 + 1e-6)
    whole = y @ np.linalg.solve(kernel, y)
    for i, gap in enumerate(coreset.complexity_gap(x, y)):
        rest = np.delete(np.arange(15), i)
        assert gap == pytest.approx(whole - y[rest] @ np.linalg.solve(kernel[np.ix_(rest, rest)], y[rest]), rel=1e-8)
        assert gap >= 0
    assert np.isfinite(coreset.complexity_gap(np.ones((4, 2)), np.array([1, -1, 1, 1]))).all()


def test_wrong_labels_have_high_gaps():
    draw = random()
    labels = np.arange(120) % 3
    x = draw.normal(size=(120, 10)) + 4 * np.eye(10)[labels]
    wrong = draw.permutation(120) < 12
    noisy = np.where(wrong, (labels + 1) % 3, labels)
    scores = coreset.complexity_gap_per_class(x, noisy, KEY, repeats=3)
    above = scores[wrong][:, None] > scores[~wrong][None]
    assert above.mean() > 0.9  # the area under the ROC curve
    np.testing.assert_array_equal(scores, coreset.complexity_gap_per_class(x, noisy, KEY, repeats=3))
    with refused("complexity_gap", "x"):
        coreset.complexity_gap(np.zeros((2, 2)), np.array([1, -1]))


# --- uncertainty


def test_uncertainty_in_closed_form():
    one = jax.jit(lambda p: (coreset.entropy(p), coreset.margin(p), coreset.least_confidence(p)))
    many = jax.jit(lambda p: (coreset.bald(p), coreset.mean_std(p), coreset.variation_ratio(p)))
    found = one(jnp.array([[1.0, 0, 0, 0], [0.25] * 4]))  # sure, even
    np.testing.assert_allclose(found, [[0, np.log(4)], [-1, 0], [0, 0.75]], rtol=1e-6)
    p = np.asarray(PROBS, np.float64)
    h = lambda p: -(p * np.log(p)).sum(-1)  # noqa: E731
    votes = np.array([max(np.bincount(column)) / 5 for column in p.argmax(2).T])
    expected = h(p.mean(0)) - h(p).mean(0), p.std(0).mean(1), 1 - votes
    np.testing.assert_allclose(many(PROBS), expected, rtol=1e-3)
    agree = many(np.repeat(PROBS[:1], 5, axis=0))
    np.testing.assert_allclose(agree, 0, atol=1e-6)


# --- diversity


def test_k_center_is_within_twice_the_least_radius():
    draw = random()
    x = np.asarray(draw.normal(size=(9, 2)), np.float32)
    apart = np.linalg.norm(x[:, None] - x[None], axis=2)
    labelled = np.arange(9) == 4
    radius = lambda chosen: apart[:, [4, *chosen]].min(1).max()  # noqa: E731
    best = min(radius(chosen) for chosen in itertools.combinations(range(9), 2))
    found = jax.jit(coreset.k_center, static_argnums=1)(x, 2, labelled=labelled).tolist()
    assert 4 not in found
    assert best <= radius(found) <= 2 * best
    assert found[0] == apart[:, 4].argmax()
    with refused("k_center", "k"):
        coreset.k_center(x, 9, labelled=labelled)


def test_badge_draws_as_k_means_plus_plus_on_the_outer_products():
    p, h = PROBS[0], X
    outer = ((p - np.eye(3, dtype="f")[p.argmax(1)])[:, :, None] * h[:, None]).reshape(10, -1)
    first = np.int32(np.sum(outer**2, axis=1).argmax())
    plain = jax.jit(lambda key: diversity._plus_plus(key, diversity._euclidean(outer), 10, first, 6))
    factored = jax.jit(lambda key: coreset.badge(key, p, h, 6))
    for seed in range(5):
        np.testing.assert_array_equal(factored(jax.random.key(seed)), plain(jax.random.key(seed)))


def test_k_means_finds_separate_clusters_the_biggest_first():
    draw = random()
    centres = np.repeat(np.eye(3) * 20, [12, 5, 7], axis=0)
    x = jnp.asarray(centres + draw.normal(size=centres.shape), jnp.float32)
    found = jax.jit(coreset.k_means, static_argnums=2)(KEY, x, 3)
    assert [int(np.argmax(centres[i])) for i in found] == [0, 2, 1]


def test_moving_by_the_distance_ties_the_logits_and_quotas_are_exact():
    draw = random()
    kernel, bias = draw.normal(size=(4, 3)).astype(np.float32), np.array([0.3, -0.2, 0.0], np.float32)
    distance = np.asarray(coreset.boundary_distance(X, jnp.asarray(kernel), jnp.asarray(bias)))
    for x, row in zip(np.asarray(X), distance, strict=True):
        p = int((x @ kernel + bias).argmax())
        for c in {0, 1, 2} - {p}:
            away = kernel[:, c] - kernel[:, p]
            logits = (x + row[c] * away / np.linalg.norm(away)) @ kernel + bias
            assert logits[c] == pytest.approx(logits[p], abs=1e-4)
        assert row[p] == min(row[c] for c in {0, 1, 2} - {p})
    found = np.asarray(coreset.balanced(jnp.asarray(distance), 5))
    free = set(range(10))
    for own, count in ((0, 2), (1, 2), (2, 1)):
        nearest = sorted(free, key=lambda i: (distance[i, own], i))[:count]
        assert found[:count].tolist() == sorted(nearest)
        found, free = found[count:], free - set(nearest)


# --- sampling


def test_adaptive_bins_are_unbiased_and_greed_costs_variance():
    n, k = 60, 20
    predicted = jnp.arange(n) / 20
    values = predicted + jnp.asarray(random().normal(size=n), jnp.float32)

    def estimate(key, alpha):
        index, inclusion = coreset.adaptive_bins(key, predicted, k, bins=6, alpha=alpha)
        return coreset.horvitz_thompson(values[index], inclusion, n), inclusion, jnp.sum(values[index])

    many = jax.jit(jax.vmap(estimate, (0, None)))
    keys = jax.random.split(KEY, 1000)
    (even, chance, reward), (greedy, positive, more) = many(keys, 0.0), many(keys, 20.0)
    for found in (even, greedy):
        assert abs(float(found.mean() - values.mean())) < 4 * float(found.std()) / 1000**0.5
    np.testing.assert_allclose(chance.mean(), k / n, atol=0.05)
    assert float(positive.min()) > 0
    assert float(greedy.std()) > 1.3 * float(even.std())
    assert float(more.mean()) > 1.3 * float(reward.mean())
    with refused("adaptive_bins", "k"):
        coreset.adaptive_bins(KEY, predicted, 5, bins=6)


# --- teachers


def test_self_training_moves_the_boundary_to_where_the_data_is():
    """Two labels far from the middle of their clusters; the unlabelled rest says where the clusters lie."""
    draw = random()
    truth = np.arange(200) % 2
    unlabelled = (draw.normal(size=(200, 1)) * 0.6 + 6 * truth[:, None]).astype(np.float32)

    def fit(x, y, key):  # each class is where the mean of its examples is
        means = np.array([x[y == c].mean() for c in (0, 1)]) + 0.1 * float(jax.random.normal(key))
        return lambda new: np.asarray(jax.nn.softmax(-((np.asarray(new) - means[None]) ** 2)))

    inputs, labels = np.array([[-3.0], [5.0]], np.float32), np.array([0, 1])
    found = coreset.self_training(fit, inputs, labels, unlabelled, KEY, teachers=3, threshold=0.9)
    accuracy = lambda predict: (predict(unlabelled).argmax(1) == truth).mean()  # noqa: E731
    assert len(found.teachers) == 3
    assert 0.5 < found.pseudo.accepted.mean() < 1
    assert accuracy(found.student) >= max(map(accuracy, found.teachers))
    assert accuracy(found.student) > 0.99


def test_an_ensemble_finds_pairs_that_do_not_fit_better_than_one_member():
    draw = random()
    fits = np.arange(400) >= 80
    scores = jnp.asarray(fits + draw.normal(size=(10, 400)), jnp.float32)
    right = lambda kept: (np.asarray(kept) == fits).mean()  # noqa: E731
    assert right(coreset.confident(scores, 0.5)) > 0.9 > right(coreset.confident(scores[:1], 0.5))
    found = coreset.top(scores.mean(axis=0), 320)
    assert right(np.isin(np.arange(400), found)) > 0.9
