"""What methods that prune ask of their options, told on construction or on the first call, in one line."""

import jax
import jax.numpy as jnp
import pytest

import rigl_jax as rx
from tests.errors import refused

PARAMS = {"a": jnp.arange(1.0, 9.0).reshape(2, 4), "b": jnp.ones((4, 4))}
PLAN = rx.make_plan(PARAMS, 0.5, rx.uniform)  # 12 of 24
FAN_IN = rx.make_plan(PARAMS, 0.5, rx.uniform, rules=[("a", rx.fan_in()), ("b", rx.unstructured())])


def flow(params):
    return (params["a"] @ params["b"]).sum()


METHODS = {
    "snip": lambda plan, **options: rx.snip(plan, **{"loss": flow, **options}),
    "grasp": lambda plan, **options: rx.grasp(plan, **{"loss": flow, **options}),
    "synflow": lambda plan, **options: rx.synflow(plan, **{"loss": flow, **options}),
    "gmp": lambda plan, **options: rx.gmp(plan, stop=10, **options),
    "ac_dc": lambda plan, **options: rx.ac_dc(plan, period=2, stop=10, **options),
}


@pytest.mark.parametrize("name", METHODS)
def test_one_ranking_needs_single_weights_and_room(name):
    with refused("jointly", "a", "fan_in"):
        METHODS[name](FAN_IN, jointly=True)
    for min_active in (-1, 7, 1.5):  # 7 of each would be 14 of 12: the total would not be exact
        with refused("min_active"):
            METHODS[name](PLAN, jointly=True, min_active=min_active)
    METHODS[name](PLAN, jointly=True, min_active=6)


@pytest.mark.parametrize("name", ["snip", "grasp", "synflow"])
@pytest.mark.parametrize("loss", [3, lambda p: p["a"][0], lambda p: (flow(p), 1.0)])
def test_a_loss_is_a_function_to_one_number(name, loss):
    with refused("loss"):
        METHODS[name](PLAN, loss=loss).init(jax.random.key(0), PARAMS)
