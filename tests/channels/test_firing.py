"""Filters switched by a head: its targets by brute force, and what each loss trains."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import optax

import rigl_jax as rx
from tests.errors import refused

C = rx.channels


def test_targets_are_the_largest_set_of_strongest_filters_within_the_mass():
    responses = np.random.default_rng(0).random((20, 6)).astype("f") ** 3
    responses[0] = 0
    some = responses > 1e-5 * responses.sum(1, keepdims=True)
    assert 0 < some[1:].mean() < 1
    for mass, on in ((0.3, mass_of(responses, 0.3)), (0.8, mass_of(responses, 0.8)), (1.0, some)):
        np.testing.assert_array_equal(C.mass_targets(responses, mass), on)
    assert not np.any(C.mass_targets(jnp.array([[0.6, 0.4]]), 0.5))
    with refused("mass"):
        C.mass_targets(responses, 1.5)


def mass_of(responses, mass):
    """Of all sets of the strongest filters whose mass is at most this the largest."""
    found = np.zeros(responses.shape, bool)
    for row, on in zip(responses, found, strict=True):
        for chosen in itertools.chain.from_iterable(itertools.combinations(range(6), n) for n in range(1, 7)):
            rest = np.delete(row, chosen)
            strongest = not rest.size or row[list(chosen)].min() >= rest.max()
            if row.sum() and strongest and row[list(chosen)].sum() <= mass * row.sum() and len(chosen) > on.sum():
                on[:] = np.isin(range(6), chosen)
    return found


def test_the_head_learns_its_targets_and_each_loss_trains_its_own():
    rng = np.random.default_rng(0)
    w, x = (jnp.asarray(rng.normal(size=s), jnp.float32) for s in ((5, 8), (64, 3, 5)))
    layer = lambda w, x: jax.nn.relu(x @ w)  # noqa: E731
    gated = C.ftwt(layer, 0.7, softmax=True)
    head, tx = gated.init(jax.random.key(0), w, x), optax.sgd(0.5)

    @jax.jit
    def trained(w, head, x):
        def step(carry, _):
            head, state = carry
            (fired, grads) = jax.value_and_grad(lambda h: gated.apply(w, h, x).loss)(head)
            updates, state = tx.update(grads, state)
            return (optax.apply_updates(head, updates), state), fired

        (after, _), losses = jax.lax.scan(step, (head, tx.init(head)), length=100)
        own = jax.grad(lambda w, x: gated.apply(w, head, x).loss, (0, 1))(w, x)
        task = jax.grad(lambda h, w: gated.apply(w, h, x).outputs.sum(), (0, 1))(head, w)
        return losses, own, task, gated.apply(w, after, x)

    losses, own, task, fired = trained(w, head, x)
    assert losses[-1] < 0.9 * losses[0]
    assert not any(np.any(g) for g in jax.tree.leaves((own, task[0])))
    assert np.any(task[1])
    np.testing.assert_array_equal(fired.outputs, np.maximum(x @ w, 0) * np.asarray(fired.mask)[:, None])
    assert 0 < fired.mask.mean() < 1


def test_a_layer_without_filters():
    with refused("layer"):
        C.ftwt(lambda w, x: x.sum()).init(jax.random.key(0), None, jnp.ones((2, 3)))
