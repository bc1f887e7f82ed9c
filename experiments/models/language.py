"""Character models: bytes in, logits of the next byte out. A GRU as in the RigL paper, and a small GPT."""

from __future__ import annotations

import math
from collections.abc import Sequence

import jax
from flax import linen as nn
from jax import Array
from jax import numpy as jnp

from experiments.rules import check_fields, sizes
from rigl_jax.arguments import whole


class CharGRU(nn.Module):
    """Embedding, one gated recurrent unit, ReLU layers, logits; with the default widths that of RigL's appendix.

    The kernels of the three gates are one array each: `input`, of the embedding, and `recurrent`, of the state.

    Attributes:
      num_classes: size of the vocabulary, 256 for bytes.
      embedding: width of the embedding.
      width: of the state.
      readout: widths of the layers between state and logits; may be empty.
    """

    num_classes: int
    embedding: int = 128
    width: int = 512
    readout: Sequence[int] = (256, 128)

    def __post_init__(self) -> None:
        """Checks the fields."""
        check_fields(self, embedding=whole(1), width=whole(1), readout=sizes)
        super().__post_init__()

    @nn.compact
    def __call__(self, x: Array, *, train: bool = False) -> Array:
        """Numbers of characters `[batch, time]` to float32 logits `[batch, time, num_classes]`."""
        x = nn.Embed(self.num_classes, self.embedding, name="embed")(x.astype(jnp.int32))
        inputs = nn.Dense(3 * self.width, name="input")(x).swapaxes(0, 1)  # of all times at once
        kernel = self.param("recurrent_kernel", nn.initializers.orthogonal(), (self.width, 3 * self.width))
        bias = self.param("recurrent_bias", nn.initializers.zeros, (3 * self.width,))

        def step(state: Array, given: Array) -> tuple[Array, Array]:
            z, r, n = jnp.split(given, 3, axis=-1)
            hz, hr, hn = jnp.split(state @ kernel + bias[None], 3, axis=-1)
            update = nn.sigmoid(z + hz)
            state = update * state + (1 - update) * jnp.tanh(n + nn.sigmoid(r + hr) * hn)
            return state, state

        _, states = jax.lax.scan(step, jnp.zeros((x.shape[0], self.width)), inputs)
        x = states.swapaxes(0, 1)
        for i, width in enumerate(self.readout):
            x = nn.relu(nn.Dense(width, name=f"readout{i}", kernel_init=nn.initializers.he_normal())(x))
        return nn.Dense(self.num_classes, name="logits")(x).astype(jnp.float32)


class GPT(nn.Module):
    """Causal transformer: learned positions, normalisation before attention and MLP, logits of their own.

    Attributes:
      num_classes: size of the vocabulary, 256 for bytes.
      width: of the residual stream, a multiple of `heads`.
      layers: blocks.
      heads: of attention.
      context: longest input.
      hidden: width of an MLP; None: four times `width`.
    """

    num_classes: int
    width: int = 64
    layers: int = 2
    heads: int = 4
    context: int = 64
    hidden: int | None = None

    def __post_init__(self) -> None:
        """Checks the fields.

        Raises:
          ValueError: the width is not a multiple of the number of heads.
        """
        check_fields(self, width=whole(1), layers=whole(1), heads=whole(1), context=whole(1))
        if self.width % self.heads:
            raise ValueError(f"GPT: width must be a multiple of heads={self.heads}, got {self.width}")
        super().__post_init__()

    @nn.compact
    def __call__(self, x: Array, *, train: bool = False) -> Array:
        """Numbers of characters `[batch, time]`, time at most `context`, to float32 logits `[batch, time, classes]`.

        Raises:
          ValueError: the input is longer than the context.
        """
        time = x.shape[1]
        if time > self.context:
            raise ValueError(f"GPT: expected at most context={self.context} characters, got {time}")
        small = nn.initializers.normal(0.02)
        places = self.param("positions", small, (self.context, self.width))
        x = nn.Embed(self.num_classes, self.width, name="embed")(x.astype(jnp.int32)) + places[None, :time]
        for i in range(self.layers):
            x = x + self._attention(nn.LayerNorm(name=f"norm{i}a")(x), i)
            hidden = nn.Dense(self.hidden or 4 * self.width, name=f"up{i}")(nn.LayerNorm(name=f"norm{i}b")(x))
            x = x + nn.Dense(self.width, name=f"down{i}")(nn.gelu(hidden))
        return nn.Dense(self.num_classes, name="logits")(nn.LayerNorm(name="norm")(x)).astype(jnp.float32)

    def _attention(self, x: Array, i: int) -> Array:
        batch, time, width = x.shape
        heads = nn.Dense(3 * width, name=f"attention{i}")(x).reshape(batch, time, 3, self.heads, -1)
        query, key, value = (heads[:, :, part] for part in range(3))
        scores = jnp.einsum("bqhd,bkhd->bhqk", query, key) / math.sqrt(width / self.heads)
        scores = jnp.where(jnp.tril(jnp.ones((1, 1, time, time), bool)), scores, -jnp.inf)
        mixed = jnp.einsum("bhqk,bkhd->bqhd", nn.softmax(scores), value).reshape(batch, time, width)
        return nn.Dense(width, name=f"project{i}")(mixed)
