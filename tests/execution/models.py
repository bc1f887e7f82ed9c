"""Small models that know nothing of sparsity, as users have them."""

import functools
import math

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

import rigl_jax as rx


class ConvNet(nn.Module):
    """Convolutions with and without stride, logits."""

    @nn.compact
    def __call__(self, x):
        x = nn.relu(nn.Conv(8, (3, 3))(x))
        x = nn.relu(nn.Conv(8, (3, 3), strides=(2, 2))(x))
        return nn.Dense(4)(x.reshape(x.shape[0], -1))


def drawn(layer, x, rng):
    """Random params of a linen layer; nothing is compiled."""
    shapes = jax.eval_shape(layer.init, jax.random.key(0), x)["params"]
    scale = lambda shape: max(1, math.prod(shape[:-1])) ** -0.5  # noqa: E731
    return jax.tree.map(lambda s: rng.standard_normal(s.shape, np.float32) * np.float32(scale(s.shape)), shapes)


@functools.cache
def problem(sparsity=0.8):
    """(loss(params, image), params, plan, image): the model above on random images."""
    model, rng = ConvNet(), np.random.default_rng(0)
    image, label = rng.standard_normal((8, 6, 6, 3), np.float32), np.arange(8) % 4
    params = drawn(model, image, rng)

    def loss(params, image):
        logits = model.apply({"params": params}, image)
        return -jnp.mean(jax.nn.log_softmax(logits)[jnp.arange(8), label])

    return loss, params, rx.make_plan(params, sparsity), image
