"""What primitives hold is read alike in every version of JAX."""

import jax
import jax.numpy as jnp
import pytest

from rigl_jax.tracing import primitives


@jax.custom_jvp
def doubled(x):
    return x * 2


doubled.defjvps(lambda t, out, x: t)


def the(name, f, *args):
    (eqn,) = [eqn for eqn in jax.make_jaxpr(f)(*args).eqns if eqn.primitive.name == name]
    return eqn


@pytest.mark.parametrize("consts", [0, 1, 2])
@pytest.mark.parametrize("carry", [0, 1, 2])
@pytest.mark.parametrize("scanned", [0, 1, 2])
def test_operands_of_a_scan(consts, carry, scanned):
    def f(constants, start, xs):
        def body(carried, x):
            used = sum(jnp.sum(a) for a in (*constants, *carried, *x))
            return tuple(a + used for a in carried), used

        return jax.lax.scan(body, start, xs, length=3)

    args = [tuple(jnp.ones(shape) for _ in range(n)) for shape, n in [((2,), consts), ((3,), carry), ((3, 4), scanned)]]
    found = primitives.scan(the("scan", f, *args))
    assert (found.consts, found.carry, len(found.body.jaxpr.invars)) == (consts, carry, consts + carry + scanned)


@pytest.mark.parametrize("tests", [0, 1, 2])
@pytest.mark.parametrize("consts", [0, 1, 2])
def test_operands_of_a_while_loop(tests, consts):
    def f(limits, steps, x):
        return jax.lax.while_loop(lambda c: c < 9 + sum(limits), lambda c: c + 1 + sum(steps), x)

    found = primitives.while_loop(the("while", f, (1.0,) * tests, (1.0,) * consts, 0.0))
    assert (found.condition_consts, found.body_consts) == (tests, consts)
    assert (len(found.condition.jaxpr.invars), len(found.body.jaxpr.invars)) == (tests + 1, consts + 1)


@pytest.mark.parametrize(
    ("name", "f"),
    [
        ("jit", jax.jit(jnp.sin)),
        ("remat2", jax.checkpoint(jnp.sin)),
        ("custom_jvp_call", doubled),
        ("add", lambda x: x + x),
    ],
)
def test_what_only_wraps_a_program_is_seen_through(name, f):
    inner = primitives.called(next(e for e in jax.make_jaxpr(f)(1.0).eqns if e.primitive.name == name))
    assert (inner is None) == (name == "add")
    assert inner is None or len(inner.jaxpr.invars) == 1


def test_branches_of_a_cond():
    eqn = the("cond", lambda i, x: jax.lax.switch(i, [jnp.sin, jnp.cos, jnp.tan], x), 0, 1.0)
    assert [b.jaxpr.eqns[-1].primitive.name for b in primitives.branches(eqn)] == ["sin", "cos", "tan"]
