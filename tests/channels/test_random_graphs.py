"""Random graphs of operations on features: what is dead goes without a change, and what is left is consistent."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import rigl_jax as rx

BATCH, TIME = 2, 3


def operations(rng, params):
    """Random functions of one or two arrays [BATCH, TIME, features]; dense ones add their kernels to params."""

    def dense(x):
        name, m = f"w{len(params)}", int(rng.choice([4, 6, 8, 12]))
        params[name] = jax.device_put((rng.normal(size=(x.shape[-1], m)) / 2).astype(np.float32))
        return lambda p, x: x @ p[name]

    def scaled(x):
        name, n = f"w{len(params)}", x.shape[-1]
        params[name] = jax.device_put(rng.normal(size=n).astype(np.float32))
        return lambda p, x: x * p[name]

    def added(x, y):
        return (lambda p, x, y: x + y) if x.shape == y.shape else (lambda p, x, y: jnp.concatenate([x, y], -1))

    def gated(x):
        return lambda p, x: (lambda a, b: a * jnp.tanh(b))(*jnp.split(x, 2, -1))

    def heads(x):
        def mixed(p, x):
            h = x.reshape(BATCH, TIME, 2, -1)
            return jnp.einsum("bqhd,bkhd,bkhe->bqhe", h, h, h).reshape(x.shape)

        return mixed

    def shuffled(x):
        return lambda p, x: x.reshape(BATCH, TIME, 2, -1).swapaxes(2, 3).reshape(x.shape)

    def normed(x):
        return lambda p, x: (x - x.mean(-1, keepdims=True)) / jnp.sqrt(1e-3 + x.var(-1, keepdims=True))

    def grouped(x):
        def over_groups(p, x):
            h = x.reshape(BATCH, TIME, -1, 2)
            return (h * jax.lax.rsqrt(0.1 + (h * h).mean((1, 3), keepdims=True))).reshape(x.shape)

        return over_groups

    order = lambda n: np.random.default_rng(n).permutation(n)  # noqa: E731
    one = [dense, dense, dense, scaled, gated, heads, shuffled, normed, grouped]
    one += [
        lambda x: lambda p, x: jax.nn.relu(x),
        lambda x: lambda p, x: jnp.tanh(x)[..., ::-1],
        lambda x: lambda p, x: jnp.roll(x, 1, -1),
        lambda x: lambda p, x: x[..., order(x.shape[-1])],
        lambda x: lambda p, x: x[..., 1:-1],
        lambda x: lambda p, x: jnp.pad(x, ((0, 0), (0, 0), (1, 1))),
        lambda x: lambda p, x: jnp.repeat(x, 2, -1)[..., : x.shape[-1]],
        lambda x: lambda p, x: x * jax.nn.softmax(x, -1),
        lambda x: lambda p, x: x + x.sum(-1, keepdims=True),
        lambda x: lambda p, x: jax.lax.scan(lambda c, row: (jnp.tanh(c + row), c), 0 * x[0], x)[1],
        lambda x: lambda p, x: jnp.concatenate([x[:, :1], x[:, 1:] * 2], 1),
    ]  # fmt: skip
    return one, added


def graph(seed):
    """(params, apply, x): a dozen operations on values made before, ended by a dense layer."""
    rng = np.random.default_rng(seed)
    params, steps, values = {}, [], [jnp.asarray(rng.normal(size=(BATCH, TIME, 4)), jnp.float32)]
    one, two = operations(rng, params)
    x = values[0]
    while len(steps) < 14:
        a, b = (int(rng.integers(max(0, len(values) - 3), len(values))) for _ in range(2))
        both = rng.random() < 0.25
        made = two(values[a], values[b]) if both else one[0 if not steps else int(rng.integers(len(one)))](values[a])
        args = (a, b) if both else (a,)
        y = jax.eval_shape(made, params, *(values[i] for i in args))
        if 4 <= y.shape[-1] <= 24 and y.shape[-1] % 2 == 0 and y.shape[:2] == (BATCH, TIME):
            values.append(y)
            steps.append((made, args))
    last = one[0](values[-1])

    def apply(p, x):
        values = [x]
        for made, args in steps:
            values.append(made(p, *(values[i] for i in args)))
        return last(p, values[-1])

    return params, apply, x


@pytest.mark.parametrize("seed", range(20))
def test_a_random_graph(seed):
    with jax.numpy_rank_promotion("allow"):
        params, apply, x = graph(seed)
        groups = rx.channels.groups(apply, params, x)
        assert not any(group.unknown for group in groups)
        exact = [group if group.exact else group._replace(why="changes the function") for group in groups]
        scores = [np.random.default_rng(i).random(group.size) for i, group in enumerate(exact)]
        keep = rx.channels.select(exact, scores, remove=0.5)
        dead = {name: np.array(leaf) for name, leaf in params.items()}
        for leaf, axes in keep.items():
            for axis, positions in axes.items():
                np.moveaxis(dead[leaf], axis, 0)[np.delete(np.arange(dead[leaf].shape[axis]), positions)] = 0
        small = rx.channels.shrink(apply, dead, keep, x)
        got, want = jax.jit(lambda p, q: (small.apply(p, x), apply(q, x)))(small.params, dead)
        np.testing.assert_allclose(got, want, rtol=1e-4, atol=1e-5 * max(1, np.abs(want).max()))
        # all that can be removed, halved: shapes fit, costs are as counted
        keep = rx.channels.select(groups, [np.zeros(group.size) for group in groups], remove=0.5)
        small = rx.channels.shrink(apply, params, keep, x, fold=False)
        assert jax.eval_shape(small.apply, small.params, x).shape == want.shape
        assert small.macs[1] == pytest.approx(rx.flops(small.apply, small.params, x).total)
