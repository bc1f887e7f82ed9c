"""What every surgeon keeps, under `rx.prune`. A new one is a row of the registry, no line here."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import rigl_jax as rx
from rigl_jax.criteria import SURGEONS
from tests.errors import refused

KEY = jax.random.key(0)
X = jax.random.normal(KEY, (40, 5)) @ jax.random.normal(jax.random.key(1), (5, 8))
X += jax.random.normal(jax.random.key(2), (40, 8)) / 10  # inputs that depend on each other
PARAMS = {"w": jax.random.normal(jax.random.key(3), (8, 6)), "bias": jnp.ones(6)}
STRUCTURES = {"unstructured": rx.unstructured(), "n_of_m": rx.n_of_m(2, 4, axis=0), "fan_in": rx.fan_in()}
each = pytest.mark.parametrize("name", SURGEONS)


def apply(params, x):
    return x @ params["w"].astype(x.dtype) + params["bias"].astype(x.dtype)[None]


def loss(params, x):
    """A quadratic loss at its minimum: the outputs of the network that is pruned. Examples are those of X."""
    target = x @ PARAMS["w"].astype(x.dtype) + PARAMS["bias"].astype(x.dtype)[None]
    noise = jnp.sin(1e3 * x[:, :6])  # the gradients of single examples are not 0
    return jnp.mean((apply(params, x) - target - noise) ** 2)


def made(name):
    return SURGEONS[name].make(loss=loss, apply=apply, key=KEY)


def plan(structure="unstructured", sparsity=0.5):
    return rx.make_plan(PARAMS, sparsity, rules=[("w", STRUCTURES[structure]), ("bias", None)])


@each
@pytest.mark.parametrize("structure", STRUCTURES)
def test_counts_are_exact_and_the_weights_that_stay_move(name, structure):
    planned = plan(structure)
    pruned = rx.prune(planned, PARAMS, made(name), X)
    rx.check_masked(pruned.params, pruned.masks, planned)
    kept = np.asarray(pruned.masks["w"])
    assert np.any(np.abs(np.asarray(pruned.params["w"] - PARAMS["w"])[kept]) > 1e-2)
    assert pruned.masks["bias"] is None


@each
def test_what_is_pruned_never_returns_and_types_stay(name):
    half = jax.tree.map(lambda p: p.astype(jnp.bfloat16), PARAMS)
    first = rx.prune(plan(sparsity=0.3), half, made(name), X)
    assert first.params["w"].dtype == jnp.bfloat16
    further = plan(sparsity=0.75)
    second = rx.prune(further, first.params, made(name), X, masks=first.masks, rounds=2)
    rx.check_masked(second.params, second.masks, further)
    assert not np.any(second.masks["w"] & ~first.masks["w"])


@each
def test_what_a_surgeon_cannot_read_is_refused(name):
    """No examples, values that jit hides, and NaN: no weights go by their index."""
    spoiled = PARAMS | {"w": PARAMS["w"].at[0, 0].set(jnp.nan)}
    with refused("batch"):
        rx.prune(plan(), PARAMS, made(name), X[:0])
    with refused("jit"):
        jax.eval_shape(lambda params: rx.prune(plan(), params, made(name), X), PARAMS)
    with refused("'w'"):
        rx.prune(plan(), spoiled, made(name), X)
