"""SynFlow: its conservation law, its rounds in NumPy, and no layer cut off."""

import itertools

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import rigl_jax as rx
from rigl_jax import scores
from rigl_jax.base import Signals
from tests import oracles

KEY = jax.random.key(0)


def network(widths=(6, 8, 5, 3)):
    key = jax.random.key(1)
    return {
        f"w{i}": jax.random.normal(jax.random.fold_in(key, i), shape)
        for i, shape in enumerate(itertools.pairwise(widths))
    }


def flow(params):
    x = jnp.ones(params["w0"].shape[0])
    for name in sorted(params):
        x = jax.nn.relu(x @ params[name])
    return x.sum()


def in_numpy(params, final, rounds):
    """Rounds of scoring and pruning, layer by layer, in float64."""
    weights = {name: np.abs(np.asarray(w, np.float64)) for name, w in params.items()}
    masks = {name: np.ones(w.shape, bool) for name, w in weights.items()}
    for k in range(1, rounds + 1):
        left = [weights[name] * masks[name] for name in sorted(weights)]
        before = [np.ones(left[0].shape[0])]
        for w in left:
            before.append(before[-1] @ w)
        after = [np.ones(left[-1].shape[1])]
        for w in reversed(left):
            after.insert(0, w @ after[0])
        for i, name in enumerate(sorted(weights)):
            share = left[i] * before[i][:, None] * after[i + 1][None, :]
            size = share.size
            n = int(np.rint(size * (final[name] / size) ** (k / rounds)))
            masks[name] = oracles.top(share, n, among=masks[name])
    return masks


def test_flow_is_conserved_from_layer_to_layer():
    params = jax.tree.map(jnp.abs, network())
    shares = scores.snip(Signals(params, jax.grad(flow)(params), 0, KEY))
    for share in shares.values():
        assert float(share.sum()) == pytest.approx(float(flow(params)), rel=1e-5)


@pytest.mark.parametrize("rounds", [1, 7])
def test_rounds_are_those_of_the_definition(rounds):
    params = network()
    plan = rx.make_plan(params, 0.6, rx.uniform)
    masks = jax.jit(rx.synflow(plan, loss=flow, rounds=rounds).init)(KEY, params).masks
    expected = in_numpy(params, {name: leaf.n_active for name, leaf in plan.items()}, rounds)
    for name in params:
        np.testing.assert_array_equal(masks[name], expected[name])


def test_signs_and_scale_do_not_matter():
    params = network()
    plan = rx.make_plan(params, 0.6, rx.uniform)
    algorithm = rx.synflow(plan, loss=flow, rounds=5)
    other = {"w0": -params["w0"], "w1": 4 * params["w1"], "w2": params["w2"] / 2}
    chex.assert_trees_all_equal(algorithm.init(KEY, params).masks, algorithm.init(KEY, other).masks)
    log_flow = rx.synflow(plan, loss=lambda p: jnp.log(flow(p)), rounds=5)
    chex.assert_trees_all_equal(algorithm.init(KEY, params).masks, log_flow.init(KEY, params).masks)


def test_rounds_keep_every_layer_where_pruning_at_once_cuts_one_off():
    """Jointly, to 6 weights: at once the widest layer, whose flow is spread thinnest, has none; in rounds all have."""
    params = {"w0": jnp.ones((2, 30)), "w1": jnp.ones((30, 30)), "w2": jnp.ones((30, 2))}
    params = jax.tree.map(lambda p, q: p + 0.1 * jnp.abs(q), params, network((2, 30, 30, 2)))
    plan = rx.make_plan(params, 1 - 6 / 1020, rx.uniform)
    assert sum(leaf.n_active for leaf in plan.values()) <= 9
    few = {name: leaf._replace(n_active=2) for name, leaf in plan.items()}
    count = lambda rounds: {  # noqa: E731
        name: int(mask.sum())
        for name, mask in rx.synflow(few, loss=flow, rounds=rounds, jointly=True, min_active=0)
        .init(KEY, params)
        .masks.items()
    }
    assert count(1)["w1"] == 0
    in_rounds = count(100)
    assert sum(in_rounds.values()) == 6
    assert min(in_rounds.values()) >= 1


def test_it_never_rewires():
    plan = rx.make_plan(network(), 0.6)
    assert not any(rx.synflow(plan, loss=flow).due(step) for step in range(10))
