"""Errors stay one line of bounded length, whatever was given and however much of it."""

import re

import jax
import jax.numpy as jnp
import optax
import pytest

import rigl_jax as rx
from tests.errors import refused


class Strange:
    def __repr__(self):
        raise RuntimeError("no repr")


class Long:
    def __repr__(self):
        return "line\n" * 10_000


VALUES = {
    "list": [0.5] * 200_000,
    "text": "x" * 200_000,
    "strange": Strange(),
    "lines": Long(),
    "array": jnp.ones((50, 50)),
}
PARAMS = {"w": jnp.ones((4, 4))}
PLAN = rx.make_plan(PARAMS, 0.5)
CALLS = {
    "period": lambda v: rx.rigl(PLAN, period=v),
    "start": lambda v: rx.rigl(PLAN, start=v),
    "stop": lambda v: rx.rigl(PLAN, stop=v),
    "fraction": lambda v: rx.rigl(PLAN, fraction=v),
    "drop": lambda v: rx.rigl(PLAN, drop=v),
    "plan": rx.static,
    "sparsity": lambda v: rx.make_plan(PARAMS, v),
    "rules": lambda v: rx.make_plan(PARAMS, 0.5, rules=[(v, None)]),
    "structure": lambda v: rx.make_plan(PARAMS, 0.5, rules=[("w", v)]),
    "sparsities": lambda v: rx.make_plan(PARAMS, 0.5, sparsities={"w": v}),
    "block": lambda v: rx.block(v, 2),
    "channel": rx.channel,
    "erk": lambda v: rx.erk({"w": v}, 0.5),
    "optimizer": lambda v: rx.sparsify(v, rx.static(PLAN), key=jax.random.key(0)),
    "algorithm": lambda v: rx.sparsify(optax.sgd(0.1), v, key=jax.random.key(0)),
    "key": lambda v: rx.sparsify(optax.sgd(0.1), rx.static(PLAN), key=v),
    "gamma": lambda v: rx.srigl(PLAN, min_salient=v),
    "masks": lambda v: rx.apply_masks(PARAMS, v),
    "all rules": lambda v: rx.make_plan(PARAMS, 0.5, rules=v),
    "batch": lambda v: rx.run_packed(lambda p: p, batch=v),
    "sharding": lambda v: rx.packed_training(optax.sgd(0.1), rx.rigl(PLAN), key=jax.random.key(0), sharding=v),
    "tiles": lambda v: rx.execution.rewire_streamed(optax.sgd(0.1), {}, None, None, 0.3, block=v),
    "score": lambda v: rx.topology.select(PARAMS["w"], v),
}


@pytest.mark.parametrize("call", CALLS)
@pytest.mark.parametrize("value", VALUES)
def test_whatever_was_given_is_told_in_one_short_line(call, value):
    with refused() as error:
        CALLS[call](VALUES[value])
    assert len(str(error.value)) < 800


def many(n):
    return {f"layer{i}": jax.ShapeDtypeStruct((2, 2), jnp.float32) for i in range(n)}


@pytest.mark.parametrize(
    "call",
    [
        lambda params: rx.make_plan(params, 0.5, rules=[("nothing", None), (".*", rx.unstructured())]),
        lambda params: rx.make_plan(params, 0.5, rules=[(".*", rx.unstructured()), ("layer.*", None)]),
        lambda params: rx.make_plan(params, 0.5, rules=[(".*", None)]),
        lambda params: rx.topology.check_fit(PLAN, params),
    ],
)
def test_of_many_leaves_the_first_are_told(call):
    with refused("488") as error:
        call(many(500))
    assert len(str(error.value)) < 800


def test_each_rule_is_compiled_once(monkeypatch):
    compiled, compile_ = [], re._compiler.compile
    monkeypatch.setattr(re._compiler, "compile", lambda *args: (compiled.append(args[0]), compile_(*args))[1])
    re.purge()
    params = many(600)
    rx.make_plan(params, 0.5, rules=[(f"layer{i}", rx.unstructured()) for i in range(600)])
    assert sum(str(pattern).startswith("layer") for pattern in compiled) == 600


@pytest.mark.parametrize("name", ["a\nb", "a\x1b[2J", "a\u2028b", "a\r\t"], ids=ascii)
def test_a_name_is_told_in_one_line_whatever_it_holds(name):
    with refused(ascii(name)[1:-1]) as error:
        rx.make_plan({name: PARAMS["w"]}, 0.5, rules=[("x", None)])
    assert str(error.value).isprintable()
