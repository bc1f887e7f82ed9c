"""Small models that know nothing of sparsity, as users have them."""

import functools

import flax.linen as nn
import jax
import jax.numpy as jnp

import rigl_jax as rx


class ConvNet(nn.Module):
    """Convolutions with and without stride, a hidden layer, logits."""

    @nn.compact
    def __call__(self, x):
        x = nn.relu(nn.Conv(8, (3, 3))(x))
        x = nn.relu(nn.Conv(8, (3, 3), strides=(2, 2))(x))
        x = nn.relu(nn.Dense(32)(x.reshape(x.shape[0], -1)))
        return nn.Dense(4)(x)


@functools.cache
def problem(sparsity=0.8):
    """(loss(params, image), params, plan, image): the model above on random images."""
    model, image = ConvNet(), jax.random.normal(jax.random.key(0), (8, 6, 6, 3))
    label = jnp.arange(8) % 4
    params = jax.jit(model.init)(jax.random.key(1), image)["params"]

    def loss(params, image):
        logits = model.apply({"params": params}, image)
        return -jnp.mean(jax.nn.log_softmax(logits)[jnp.arange(8), label])

    return loss, params, rx.make_plan(params, sparsity), image
