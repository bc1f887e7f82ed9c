"""What a user stores or sends to another process comes back as it was: plans and states."""

import copy
import io
import pickle

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import serialization

import rigl_jax as rx

STRUCTURES = {
    "unstructured": rx.unstructured(),
    "block": rx.block(2, 3),
    "n_of_m": rx.n_of_m(2, 4),
    "fan_in": rx.fan_in(),
    "channel": rx.channel(),
}
COPIES = {"pickle": lambda x: pickle.loads(pickle.dumps(x)), "deepcopy": copy.deepcopy}


@pytest.mark.parametrize("how", COPIES)
def test_a_plan_is_copied_with_its_structures(how):
    params = {name: jnp.zeros((8, 6)) for name in STRUCTURES}
    plan = rx.make_plan(params, 0.6, rx.uniform, rules=list(STRUCTURES.items()))
    copied = COPIES[how](plan)
    assert rx.describe(copied) == rx.describe(plan)
    scores = jax.random.normal(jax.random.key(0), (8, 6))
    for name, leaf in plan.items():
        ours, theirs = leaf.structure, copied[name].structure
        assert theirs.units((8, 6)) == ours.units((8, 6))
        assert theirs.axes(theirs.units((8, 6))) == ours.axes(ours.units((8, 6)))
        pooled = theirs.pool(scores)
        assert (pooled == ours.pool(scores)).all()
        assert (theirs.expand(pooled > 0, (8, 6)) == ours.expand(pooled > 0, (8, 6))).all()


def through_flax(state, like):
    return serialization.from_bytes(like, serialization.to_bytes(state))


def through_equinox(state, like):
    file = io.BytesIO()
    eqx.tree_serialise_leaves(file, state)
    file.seek(0)
    return eqx.tree_deserialise_leaves(file, like)


STATES = {name: lambda state, _, copied=copied: copied(state) for name, copied in COPIES.items()} | {
    "cloudpickle": lambda state, _: pickle.loads(pytest.importorskip("cloudpickle").dumps(state)),
    "flax": through_flax,
    "equinox": through_equinox,
    "typed key": lambda state, _: state._replace(key=jax.random.wrap_key_data(state.key)),  # as states once held it
}
PARAMS = {"w": jnp.linspace(-1.0, 1.0, 48).reshape(8, 6), "b": jnp.ones(6)}


def go_on(tx, params, state, steps):
    for step in steps:
        updates, state = tx.update(jax.tree.map(lambda p, step=step: jnp.cos(9 * p + step), params), state, params)
        params = optax.apply_updates(params, updates)
    return params, state


def algorithms():
    plan = rx.make_plan(PARAMS, 0.5)
    key = jax.random.key(3)
    langevin = rx.algorithms.langevin(0.1, temperature=1e-3, key=key)
    return {
        "set": (optax.adam(0.1), rx.set_(plan, period=2)),
        "deep_r": (optax.chain(optax.sgd(0.1), langevin), rx.deep_r(plan)),
        "accumulated": (optax.sgd(0.1, momentum=0.9), rx.accumulate_growth(rx.rigl(plan, period=2), 2)),
    }


@pytest.mark.parametrize("how", STATES)
@pytest.mark.parametrize("algorithm", algorithms())
def test_training_goes_on_from_a_stored_state_bit_by_bit(algorithm, how):
    tx = rx.sparsify(*algorithms()[algorithm], key=jax.random.key(0))
    params, state = go_on(tx, PARAMS, tx.init(PARAMS), range(3))
    stored = STATES[how](state, tx.init(PARAMS))
    expected, ours = go_on(tx, params, state, range(3, 6)), go_on(tx, params, stored, range(3, 6))
    if how == "typed key":
        assert jnp.issubdtype(ours[1].key.dtype, jax.dtypes.prng_key)
        ours = ours[0], ours[1]._replace(key=jax.random.key_data(ours[1].key))
    assert jax.tree.structure(ours) == jax.tree.structure(expected)
    jax.tree.map(np.testing.assert_array_equal, ours, expected)


def test_a_transformation_goes_to_another_process_by_cloudpickle():
    cloudpickle = pytest.importorskip("cloudpickle")
    tx = rx.sparsify(*algorithms()["set"], key=jax.random.key(0))
    theirs = pickle.loads(cloudpickle.dumps(tx))
    expected = go_on(tx, PARAMS, tx.init(PARAMS), range(3))
    jax.tree.map(np.testing.assert_array_equal, go_on(theirs, PARAMS, theirs.init(PARAMS), range(3)), expected)
