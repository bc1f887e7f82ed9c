"""The README's ten lines, with each way of holding parameters."""

import equinox as eqx
import jax
import jax.numpy as jnp
import optax
import pytest
from flax import linen, nnx

import rigl_jax as rx

X, Y = jax.random.normal(jax.random.key(0), (16, 6)), jnp.arange(16) % 3


def cross_entropy(logits):
    return optax.softmax_cross_entropy_with_integer_labels(logits, Y).mean()


def ten_lines(params, loss):
    plan = rx.make_plan(params, sparsity=0.9, distribution=rx.erk)
    tx = rx.sparsify(optax.adamw(1e-2), rx.rigl(plan, period=5, stop=20, fraction=0.3), key=jax.random.key(0))
    state = tx.init(params)
    params = rx.apply_masks(params, state.masks)

    @jax.jit
    def step(params, state):
        value, grads = jax.value_and_grad(loss)(params)
        updates, state = tx.update(grads, state, params)
        return optax.apply_updates(params, updates), state, value

    values, first = [], state.masks
    for _ in range(25):
        params, state, value = step(params, state)
        values.append(float(value))
    rx.check_masked(params, state.masks)
    moved = sum(int((a != b).sum()) for a, b in zip(*map(jax.tree.leaves, (first, state.masks)), strict=True))
    assert moved > 0
    assert values[-1] < values[1]
    active = sum(int(m.sum()) for m in jax.tree.leaves(state.masks))
    assert active == sum(leaf.n_active for leaf in plan.values())
    return plan, state


class Net(linen.Module):
    @linen.compact
    def __call__(self, x):
        return linen.Dense(3)(linen.relu(linen.Dense(32)(x)))


def test_leaves_have_the_names_that_the_framework_gives():
    """Training with each of them is what docs/frameworks.md shows, and tests/test_docs.py runs."""
    params = jax.eval_shape(Net().init, jax.random.key(0), X)["params"]
    assert list(rx.make_plan(params, 0.9)) == ["Dense_0/kernel", "Dense_1/kernel"]
    params, _ = eqx.partition(eqx.nn.MLP(6, 3, 32, 1, key=jax.random.key(0)), eqx.is_inexact_array)
    assert list(rx.make_plan(params, 0.9)) == ["layers/0/weight", "layers/1/weight"]


class NnxNet(nnx.Module):
    def __init__(self, rngs):
        self.first, self.second = nnx.Linear(6, 32, rngs=rngs), nnx.Linear(32, 3, rngs=rngs)

    def __call__(self, x):
        return self.second(nnx.relu(self.first(x)))


def test_nnx_split_at_the_edge():
    graph, params = nnx.split(NnxNet(nnx.Rngs(0)), nnx.Param)
    plan, _ = ten_lines(params, lambda p: cross_entropy(nnx.merge(graph, p)(X)))
    assert list(plan) == ["first/kernel", "second/kernel"]


@pytest.mark.parametrize("container", [list, tuple])
def test_lists_and_tuples(container):
    params = container([jax.random.normal(jax.random.key(0), (6, 32)), jnp.zeros(32), jnp.ones((32, 3))])
    plan, _ = ten_lines(params, lambda p: cross_entropy(jax.nn.relu(X @ p[0] + p[1][None]) @ p[2]))
    assert list(plan) == ["0", "2"]
