"""What every criterion of channels keeps. A new one is a row of the registry, no line here.

One network serves all: a convolution, a maximum over windows, a grouped branch that is added, two dense layers.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import rigl_jax as rx
from rigl_jax.channels import CRITERIA
from tests.channels.models import Draw, conv, dense, pool

each = pytest.mark.parametrize("name", CRITERIA)
KEY = jax.random.key(0)


@pytest.fixture(autouse=True)
def any_ranks():
    """The model broadcasts."""
    with jax.numpy_rank_promotion("allow"):
        yield


def apply(p, x):
    x = pool(jax.nn.relu(conv(p["a"], x)))
    x = jax.nn.relu(conv(p["b"], x) + conv(p["c"], x)).reshape(x.shape[0], -1)
    return jax.nn.relu(dense(p["d"], x)) @ p["e"]


def loss(params, batch):
    x, y = batch
    return -jnp.take_along_axis(jax.nn.log_softmax(apply(params, x)), y[:, None], -1).mean()


def made(seed=0):
    d = Draw(seed)
    params = {"a": d.conv(3, 3, n=2, m=6), "b": d.conv(1, 1, n=6, m=5), "c": d.conv(3, 3, n=6, m=5)}
    params |= {"d": d.dense(20, 7), "e": d(7, 3)}
    for name in "abcd":
        params[name]["bias"] = 1.0 + jnp.abs(params[name]["bias"])  # no channel is dead
    return params


PARAMS = made()
BATCH = Draw(1)(12, 4, 4, 2), jnp.arange(12) % 3
with jax.numpy_rank_promotion("allow"):
    GROUPS = rx.channels.groups(apply, PARAMS, BATCH[0])
FREE = [g for g, group in enumerate(GROUPS) if not group.why]


@functools.cache
def criterion(name):
    """Compiled once. Params and batches of the same shapes use it again."""
    function = CRITERIA[name].make(loss=loss, apply=apply, key=KEY)
    scored = functools.partial(function, GROUPS)
    return scored if name.startswith("magnitude") else jax.jit(scored)


def changed(params, change):
    """Params in which `change(group, array with its axis first, positions)` was made in all members."""
    leaves = {name: np.array(leaf) for name, leaf in rx.trees.named_leaves(params).items()}
    for g in FREE:
        for leaf, axis, positions in GROUPS[g].members:
            change(g, np.moveaxis(leaves[leaf], axis, 0), positions)
    return jax.tree.unflatten(jax.tree.structure(params), [jnp.asarray(leaf) for leaf in leaves.values()])


def test_the_groups_are_those_of_the_model():
    assert [GROUPS[g].size for g in FREE] == [6, 5, 7]


@each
def test_scores_are_one_finite_float_for_each_channel_of_each_group(name):
    scores = criterion(name)(PARAMS, BATCH)
    assert isinstance(scores, tuple)
    assert [np.shape(s) for s in scores] == [(group.size,) for group in GROUPS]
    assert all(np.issubdtype(np.asarray(s).dtype, np.floating) and np.isfinite(s).all() for s in scores)
    assert all(len(np.unique(scores[g])) > 1 for g in FREE)
    keep = rx.channels.select(GROUPS, scores, remove=0.5, scope="layer")
    for g in FREE:
        leaf, axis, positions = GROUPS[g].members[0]
        best = np.sort(np.argsort(-np.asarray(scores[g]), kind="stable")[: len(keep[leaf][axis]) // positions.shape[1]])
        np.testing.assert_array_equal(keep[leaf][axis], np.sort(positions[best].reshape(-1)))


@pytest.mark.parametrize("name", [name for name, entry in CRITERIA.items() if not entry.random])
def test_channels_that_change_places_take_their_scores_along(name):
    orders = {g: np.random.default_rng(g).permutation(GROUPS[g].size) for g in FREE}

    def exchange(g, rows, positions):
        rows[positions] = rows[positions[orders[g]]]

    before, after = criterion(name)(PARAMS, BATCH), criterion(name)(changed(PARAMS, exchange), BATCH)
    noise = 0.15 if name == "mutual_information" else 0  # the drawn values stay in place
    for g in FREE:
        np.testing.assert_allclose(after[g], before[g][orders[g]], rtol=2e-3 + noise, atol=1e-5)


@pytest.mark.parametrize("name", [name for name, entry in CRITERIA.items() if not entry.random])
def test_a_channel_without_weights_is_worth_least(name):
    def empty(g, rows, positions):
        rows[positions[2]] = 0

    scores = criterion(name)(changed(PARAMS, empty), BATCH)
    if name == "sosp_i":  # one order over all groups
        assert sorted(float(scores[g][2]) for g in FREE) == [0, 1, 2]
    else:
        assert all(scores[g][2] <= np.delete(scores[g], 2).min() for g in FREE)
