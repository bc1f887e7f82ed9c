"""What a user stores or sends to another process comes back as it was: plans and states."""

import copy
import pickle

import jax
import jax.numpy as jnp
import pytest

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
