"""Network Slimming: the penalty, exact zeros, and channels whose scale and bias are 0."""

import jax
import jax.numpy as jnp
import numpy as np
import optax

import rigl_jax as rx
from tests.channels.models import make
from tests.errors import refused

PARAMS = {"n": {"scale": jnp.array([0.5, -0.25, 1.0])}, "k": jnp.ones((2, 3))}


def test_the_gradient_is_that_of_the_penalty():
    loss = lambda p: (p["k"] @ p["n"]["scale"]).sum()  # noqa: E731
    penalised = lambda p: loss(p) + 0.3 * jnp.abs(p["n"]["scale"]).sum()  # noqa: E731
    tx = rx.channels.slimming(0.3, "scale")
    updated = lambda p: tx.update(jax.grad(loss)(p), tx.init(p), p)[0]  # noqa: E731
    got, want = jax.jit(lambda p: (updated(p), jax.grad(penalised)(p)))(PARAMS)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-6), got, want)


def test_it_passes_through_momentum():
    tx = optax.chain(rx.channels.slimming(0.5, "scale"), optax.sgd(1.0, momentum=0.5))
    state, zeros = tx.init(PARAMS), jax.tree.map(jnp.zeros_like, PARAMS)
    steps = []
    for _ in range(2):
        updates, state = jax.jit(tx.update)(zeros, state, PARAMS)
        steps.append(updates["n"]["scale"].tolist())
    assert steps == [[-0.5, 0.5, -0.5], [-0.75, 0.75, -0.75]]


def test_the_proximal_step_reaches_exactly_0():
    params = jax.jit(lambda p: rx.channels.soft_threshold(p, 0.25, "scale"))(PARAMS)
    assert params["n"]["scale"].tolist() == [0.25, 0.0, 0.75]
    assert (params["k"] == 1).all()


def test_channels_of_scale_and_bias_0_go_without_a_change():
    with jax.numpy_rank_promotion("allow"):
        params, apply, x = make("resnet")
        groups = rx.channels.groups(apply, params, x)
        dead = np.arange(16) % 2 == 1
        for name in ("n2", "n3"):  # both sides of the residual sum
            params[name] |= {leaf: jax.device_put(np.where(dead, 0, params[name][leaf])) for leaf in ("scale", "bias")}
        scores = rx.channels.scores(groups, params, rx.channels.only("scale"))
        only = [group if "n2" in str(group.members) else group._replace(why="not asked") for group in groups]
        keep = rx.channels.select(only, scores, remove=0.5, scope="layer")
        assert keep["n2/scale"][0].tolist() == list(range(0, 16, 2))
        small = rx.channels.shrink(apply, params, keep, x)
        got, want = jax.jit(lambda p, q: (small.apply(p, x), apply(q, x)))(small.params, params)
        np.testing.assert_allclose(got, want, rtol=1e-6, atol=1e-6)


def test_bad_arguments():
    with refused("leaves"):
        rx.channels.only("bias")(PARAMS, None)
    tx = rx.channels.slimming(0.1, "scale")
    with refused("params"):
        tx.update(PARAMS, tx.init(PARAMS))
