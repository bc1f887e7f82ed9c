"""The data study: its measures, and the page of its records."""

import jax.numpy as jnp
import numpy as np
import pytest

from experiments.studies import claims, data, data_noise, data_page, data_pairs, data_training
from experiments.studies.data_training import Images, Problem


def test_detection_is_counted_with_ties():
    flipped = np.array([True, True, False, False])
    assert data_noise.detection(np.array([3.0, 2.0, 1.0, 0.0]), flipped) == (1.0, 1.0)
    assert data_noise.detection(np.array([0.0, 1.0, 2.0, 3.0]), flipped) == (0.0, 0.0)
    assert data_noise.detection(np.zeros(4), flipped) == (0.5, 0.5)
    assert data_noise.detection(np.array([np.inf, 1.0, 1.0, 0.0]), flipped) == (0.75, 0.875)


@pytest.fixture(scope="module")
def problem():
    x = np.random.default_rng(0).normal(size=(20, 4))
    images = Images(jnp.asarray(x, jnp.float32), jnp.arange(20) % 10)
    return Problem(images, images, x, (4, 6, 10), batch=4, epochs=1, rate=0.1)


def test_labels_are_flipped_to_another_class(problem):
    labels, flipped = data_noise.flip(problem, 0.3, 1)
    assert flipped.sum() == 6
    np.testing.assert_array_equal(labels != np.asarray(problem.train.y), flipped)


def test_examples_are_read_pass_by_pass_each_by_its_weight(problem):
    index = jnp.asarray([[0, 1, 2, 3, 4, 5, 6, 7, 8]])
    batches = data_training.shuffled(data_training.keys(0, [0]), index, steps=4, batch=4)
    for part in np.split(np.asarray(batches[0]), 2):
        assert len(set(part.ravel())) == 8
    trainer = data_training.make_trainer(problem, 4)
    state = trainer.init(data_training.keys(0, [0]))
    y = problem.train.y[None]
    still = trainer.train(state, y, batches, jnp.zeros((1, 20)), 0, 1)
    moved = trainer.train(state, y, batches, jnp.ones((1, 20)), 0, 1)
    bias = lambda found: np.abs(found.params["dense_1"]["bias"]).max()  # noqa: E731
    assert (bias(still), bias(moved) > 0) == (0, True)
    first = data_training.take(state.params, 0)
    rows = np.asarray(batches[0, 0])
    expected = data_training.losses(first, problem.train.x[rows], y[0][rows])
    np.testing.assert_allclose(moved.stats.mean[0, rows], expected, rtol=1e-5)
    assert int(moved.stats.seen.sum()) == 4


def test_pairs_become_alike_but_for_those_that_do_not_count():
    """Two clusters; of the pairs that count for nothing half have the other name, and are told by their scores."""
    cluster = jnp.arange(40) % 2
    x = jnp.asarray(np.random.default_rng(0).normal(size=(40, 4)), jnp.float32) / 4 + 2 * cluster[:, None] - 1
    images = Images(x, cluster)
    problem = Problem(images, images, np.asarray(x), (4, 16, 2), batch=10, epochs=10, rate=0.1)
    names = jnp.where(jnp.arange(40) < 10, 1 - cluster, cluster)
    weight = (jnp.arange(40) >= 20).astype(jnp.float32)
    seeds = len(data_training.SEEDS)
    names, weight = (jnp.tile(a[None], (seeds, 1)) for a in (names, weight))
    params = data_pairs.train(problem, data_training.keys(0), names, weight, epochs=10)
    scores = data_pairs._scores(params, x, names)
    assert float(scores[:, 10:].min()) > 0.5 > float(scores[:, :10].max())
    assert data_pairs._accuracy(params, images).tolist() == [1.0] * seeds


def test_claims_come_out_as_numbers_say():
    low, high = np.array([1.0, 1.1, 0.9, 1.05, 1.0]), np.array([2.0, 2.2, 1.9, 2.1, 2.0])
    claim = claims.Claim("a", high, low)
    lower = claim._replace(lower=True)
    near = claim._replace(theirs=high + np.array([0.1, -0.1, 0.1, -0.1, 0.0]))
    found = [claims.outcome(c) for c in (claim, lower, near, claim._replace(theirs=None))]
    assert found == ["yes", "the opposite", "not told apart", "not run"]


def test_the_page_of_data_is_up_to_date():
    records = data.read()
    assert data_page.PAGE.read_text() == data_page.page(records)
    assert records.keys() <= set(data.cells())
