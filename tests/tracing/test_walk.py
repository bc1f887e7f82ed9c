"""The interpreter: what it knows itself, and what its tables and their owners say."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.extend.core import Primitive
from jax.interpreters import mlir

import rigl_jax as rx
from rigl_jax.channels import rules
from rigl_jax.execution import run
from rigl_jax.tracing import channels, flops, invariants, primitives, uses
from rigl_jax.tracing.walk import Walker, branches

RNG = np.random.default_rng(0)
X = jnp.asarray(RNG.standard_normal((3, 4)), jnp.float32)
W = jnp.asarray(RNG.standard_normal((4, 4)), jnp.float32)


def concrete(rules, unknown=None):
    """A walker over arrays, which are what they are."""
    return Walker(rules, unknown or (lambda walker, eqn, xs: primitives.bind(eqn, xs)), lambda value, aval: value)


def walked(walker, f, *args):
    return walker(jax.make_jaxpr(f)(*args), args)


inner = jax.jit(jnp.sin)


@jax.custom_jvp
def one_more(x):
    return x + 1


one_more.defjvp(lambda x, t: (one_more(*x), 3 * t[0]))

CALLS = {
    "jit": jax.jit(lambda x: jnp.sin(x) + 1),
    "checkpoint": jax.checkpoint(lambda x: jnp.sin(x) + 1),
    "nested": jax.jit(lambda x: jax.jit(jnp.sin)(x) + 1),
    "with a constant": jax.jit(lambda x: jnp.sin(x) + np.ones((3, 4), np.float32)),
    "custom_jvp": lambda x: one_more(jnp.sin(x)),
}


@pytest.mark.parametrize("name", CALLS)
def test_calls_are_walked_in_their_place(name):
    (y,) = walked(concrete({"sin": lambda walker, eqn, xs: [jnp.cos(xs[0])]}), CALLS[name], X)
    np.testing.assert_allclose(y, jnp.cos(X) + 1, rtol=1e-6)


def test_a_call_that_is_made_twice():
    (y,) = walked(concrete({"sin": lambda walker, eqn, xs: [2 * xs[0]]}), lambda x: inner(inner(x)), X)
    np.testing.assert_allclose(y, 4 * X, rtol=1e-6)


def test_a_rule_comes_before_what_the_interpreter_knows():
    walker = concrete({"jit": lambda walker, eqn, xs: [xs[0] * 0]})
    assert (walked(walker, CALLS["jit"], X)[0] == 0).all()


def test_branches_are_joined():
    f = lambda x: jax.lax.cond(x[0, 0] > 0, lambda: (x, x), lambda: (x, -x))  # noqa: E731
    walker = Walker({"cond": branches(all), "neg": lambda walker, eqn, ins: [False]}, None, lambda *_: True)
    walker = walker._replace(unknown=lambda walker, eqn, ins: [True] * len(eqn.outvars))
    assert walker(jax.make_jaxpr(f)(X), [True]) == [True, False]


def test_a_shortcut_is_asked_first():
    asked = []
    walker = concrete({})._replace(shortcut=lambda eqn, xs: asked.append(eqn.primitive.name))
    walked(walker, CALLS["jit"], X)
    assert asked == ["jit", "sin", "add"]


# ---- a primitive that nobody here has heard of


twice_p = Primitive("twice_times")
twice_p.def_impl(lambda x, w: 2 * (x @ w))
twice_p.def_abstract_eval(lambda x, w: jax.core.ShapedArray((x.shape[0], w.shape[1]), x.dtype))
mlir.register_lowering(twice_p, mlir.lower_fun(lambda x, w: 2 * (x @ w), multiple_results=False))


def model(params, x):
    return jnp.tanh(twice_p.bind(x, params["w"])) @ params["v"]


PARAMS = {"v": W, "w": W}


def test_a_rule_for_a_new_primitive_is_one_function_in_one_place(monkeypatch):
    def counted(walker, eqn, ins):
        (rows, terms), (_, outputs) = (atom.aval.shape for atom in eqn.invars)
        flops.charge(walker, ins, 2 * rows * terms * outputs, rows * outputs)
        return [None]

    assert rx.flops(model, PARAMS, X).macs == {"v": 48, "w": 0}
    monkeypatch.setitem(flops.RULES, "twice_times", counted)
    assert rx.flops(model, PARAMS, X).macs == {"v": 48, "w": 96}
    assert rx.flops(lambda p, x: jax.lax.scan(lambda c, _: (model(p, c), None), x, None, 5)[0], PARAMS, X).total == 720


def test_a_rule_for_a_new_primitive_of_a_packed_run(monkeypatch):
    mask = jnp.asarray(RNG.random((4, 4)) < 0.5)
    packed = rx.pack(PARAMS, {"v": None, "w": mask})

    def sparse(walker, eqn, operands):
        x, weight = operands
        return [2 * rx.execution.kernels.matmul(x, weight.values, weight.pattern)]

    monkeypatch.setitem(run.RULES, "twice_times", sparse)  # a warning is an error
    expected = model({"v": W, "w": jnp.where(mask, W, 0)}, X)
    np.testing.assert_allclose(rx.run_packed(model)(packed, X), expected, rtol=1e-5)


def test_a_rule_for_a_new_primitive_of_channels(monkeypatch):
    def joined(walker, eqn, ins):
        x, w = ins
        walker.context.channels.join(x[-1], w[0])
        return [(*x[:-1], w[1])]

    f = lambda p, x: twice_p.bind(jnp.tanh(x @ p["v"]), p["w"])  # noqa: E731
    removable = lambda: [g.name for g in rx.channels.groups(f, PARAMS, X) if not g.why]  # noqa: E731
    assert removable() == []
    monkeypatch.setitem(rules.RULES, "twice_times", joined)
    assert removable() == ["v[1]"]


def test_what_a_primitive_without_a_rule_does_is_for_the_owner_of_the_table():
    refusing = concrete({}, unknown=lambda walker, eqn, xs: (_ for _ in ()).throw(KeyError(eqn.primitive.name)))
    with pytest.raises(KeyError, match="twice_times"):
        walked(refusing, lambda x: twice_p.bind(x, W), X)
    # a packed run makes the weight dense and says so
    packed = rx.pack({"w": W}, {"w": W > 0})
    with pytest.warns(UserWarning, match="'w' meets twice_times"):
        rx.run_packed(lambda p, x: twice_p.bind(x, p["w"]))(packed, X)
    # roles: of the leaf nothing is known from there
    program = jax.make_jaxpr(lambda w, x: twice_p.bind(x, w))(W[:, :2], X)  # (3, 4) x (4, 2)
    walker, owned = uses.weights({"w": (4, 2)})
    assert walker(program, [*owned, uses.Data({})]) == [uses.Data({})]
    assert [use.kind for use in walker.context.uses["w"]] == ["unknown"]
    # invariants: the result is not shown to be 0
    assert invariants.ZERO(program, [True, True]) == [False]
    # channels: what meets it stays
    labels, joined = channels.read_channels(rx.tracing.program.trace(lambda w, x: twice_p.bind(x, w), W, X), 1)
    assert not joined.roots().any()
    assert len(labels) == 3
    # flops: it is free, unless it holds products
    assert rx.flops(lambda p, x: twice_p.bind(x, p["w"]), PARAMS, X).total == 0


def test_a_bug_in_an_optimizer_is_not_taken_for_an_invariant_that_does_not_hold():
    def update(updates, state, params=None, **extra):
        raise RuntimeError("a bug")

    broken = optax.GradientTransformationExtraArgs(lambda params: {"m": params}, update)
    with pytest.raises(RuntimeError, match="a bug"):
        invariants.rests(broken, PARAMS)


def test_an_optimizer_that_asks_for_numbers_is_not_shown_to_rest():
    def update(updates, state, params=None, **extra):
        return updates, state if float(state["m"]["w"].sum()) > 0 else {"m": updates}

    asking = optax.GradientTransformationExtraArgs(lambda params: {"m": params}, update)
    assert not invariants.rests(asking, PARAMS)
