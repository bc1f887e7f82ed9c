"""A state goes with its algorithm, optimizer and leaves; that of another run is refused by name."""

import jax
import jax.numpy as jnp
import optax
import pytest

import rigl_jax as rx
from tests.errors import refused

PARAMS = {"a": jnp.ones((4, 4)), "b": jnp.ones((4, 6)), "bias": jnp.ones(6)}
PLAN = rx.make_plan(PARAMS, 0.5)


def built(inner=None, algorithm=None):
    inner = optax.adam(0.1) if inner is None else inner
    return rx.sparsify(inner, rx.rigl(PLAN) if algorithm is None else algorithm, key=jax.random.key(0))


def only(names):
    return rx.make_plan(PARAMS, 0.5, rules=[("|".join(names), rx.unstructured())] + [(".*", None)] * (len(names) < 3))


OTHERS = {
    "sgd": (built(optax.sgd(0.1)), "0/count"),
    "momentum": (built(optax.sgd(0.1, momentum=0.9)), "0/count"),
    "adam of other params": (built(optax.masked(optax.adam(0.1), {"a": True, "b": False, "bias": True})), "0/count"),
    "itop": (built(algorithm=rx.itop(PLAN)), "ItopState"),
    "top_kast": (built(algorithm=rx.top_kast(PLAN)), "TopKastState"),
    "accumulated": (built(algorithm=rx.accumulate_growth(rx.rigl(PLAN), 2)), "AccumulatedState"),
    "gmp, dense at first": (built(algorithm=rx.gmp(PLAN, stop=100)), "PruningState"),
    "snip, dense at first": (built(algorithm=rx.snip(PLAN)), "PruningState"),
    "ste, whose weights live on": (built(algorithm=rx.ste(PLAN)), "LatentState"),
    "fewer leaves": (built(algorithm=rx.rigl(only(["a"]))), "b"),
    "more leaves": (
        built(algorithm=rx.rigl(only(["a", "b", "bias"]))),
        "bias",
    ),
}


@pytest.mark.parametrize("jitted", [False, True])
@pytest.mark.parametrize("other", OTHERS)
def test_the_state_of_another_run_is_refused(other, jitted):
    tx, named = OTHERS[other]
    update = jax.jit(built().update) if jitted else built().update
    with refused("sparsify", "state", named):
        update(PARAMS, tx.init(PARAMS), PARAMS)


def test_the_state_within_an_accumulation_is_checked_too():
    theirs = built(algorithm=rx.accumulate_growth(rx.itop(PLAN), 2)).init(PARAMS)
    with refused("ItopState"):
        built(algorithm=rx.accumulate_growth(rx.rigl(PLAN), 2)).update(PARAMS, theirs, PARAMS)


def test_what_is_meant_goes_on():
    tx = built()
    params, state = rx.replace_masks(
        optax.adam(0.1), tx.init(PARAMS), PARAMS, {**tx.init(PARAMS).masks, "a": jnp.eye(4, dtype=bool)}
    )
    _, state = tx.update(PARAMS, state, params)
    assert int(state.masks["a"].sum()) == 4
    later = built(optax.adam(0.3), rx.set_(PLAN, period=7))  # of one kind of state
    later.update(PARAMS, state, params)


def test_a_new_plan_on_an_old_state_is_told_by_the_check():
    state = built().init(PARAMS)
    params = rx.apply_masks(PARAMS, state.masks)
    rx.check_masked(params, state.masks, PLAN)
    with refused("plan"):
        rx.check_masked(params, state.masks, rx.make_plan(PARAMS, 0.8))
    with refused("b"):
        rx.check_masked(params, state.masks, {"a": PLAN["a"]})
