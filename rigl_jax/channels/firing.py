"""Fire Together Wire Together (Elkerdawy et al. 2022): filters that are chosen for each input by a small head."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from rigl_jax import arguments as rules
from rigl_jax.arguments import arguments
from rigl_jax.base import Array, PyTree

_SILENT = 1e-5
"""A filter whose share is not above it does not fire; also the tolerance of the sum of shares."""


class Fired(NamedTuple):
    """What a layer with a head gives.

    Attributes:
      outputs: those of the layer, 0 for filters that the head switches off.
      loss: float32 scalar, to be added to the loss of the network: it trains the head and nothing else.
      mask: bool[batch, filters]: which filters the head leaves on; its mean is the share of the layer's work.
    """

    outputs: Array
    loss: Array
    mask: Array


class Gated(NamedTuple):
    """A layer with a head.

    Attributes:
      init: `(key, params, inputs) -> head`, of `{"kernel": float[inputs, filters], "bias": float[filters]}`.
      apply: `(params, head, inputs) -> Fired`.
    """

    init: Callable[[Array, PyTree, Any], dict[str, Array]]
    apply: Callable[[PyTree, dict[str, Array], Any], Fired]


@arguments(responses=rules.array(2), mass=rules.share)
def mass_targets(responses: Array, mass: float) -> Array:
    """The filters that a head should leave on: the strongest, as long as together they have at most a share of all.

    The filter that crosses the share is off, as in the authors' code (within 1e-5): of shares (0.6, 0.4) and mass 0.5
    none is on. At a mass of 1 all filters with a share above 1e-5 are on.

    Args:
      responses: float[batch, filters], at least 0, such as the largest absolute value of each feature map.
      mass: above 0, at most 1.

    Returns:
      bool[batch, filters]. Of equal filters the first goes first. Of an example whose responses are all 0 none is on
      (in the authors' code, which divides 0 by 0, all are).

    Raises:
      ValueError: a mass out of its range, responses of another rank.

    Example:
      >>> mass_targets(jnp.array([[2.0, 5.0, 3.0], [6.0, 4.0, 0.0]]), 0.9).tolist()
      [[False, True, True], [True, False, False]]
      >>> mass_targets(jnp.array([[6.0, 4.0, 0.0]]), 1.0).tolist()
      [[True, True, False]]
    """
    responses = jnp.asarray(responses, jnp.float32)
    total = jnp.sum(responses, 1, keepdims=True)
    shares = responses / jnp.where(total > 0, total, 1)
    if mass == 1:
        return shares > _SILENT
    order = jnp.argsort(-shares, axis=1, stable=True)
    within = jnp.cumsum(jnp.take_along_axis(shares, order, 1), 1) - mass <= _SILENT
    on = jnp.take_along_axis(within, jnp.argsort(order, axis=1), 1)
    return on & (total > 0)


@arguments(layer=rules.function, mass=rules.share, softmax=rules.flag)
def ftwt(layer: Callable[[PyTree, Any], Array], mass: float = 0.9, *, softmax: bool = False) -> Gated:
    """A layer whose filters are switched for each input, with a loss of its own for the head that does it (FTWT).

    The head is one linear layer on the inputs, averaged over positions. It learns, by binary cross-entropy, the
    `mass_targets` of what the layer gives, max over positions of |output|. The two are decoupled: the loss of the head
    has no gradient for the layer or its inputs, and that of the network none for the head. A filter is on where the
    logit of the head is above 0. Masks are 0 and 1 beside a dense product: they tell which filters an implementation
    that skips them would compute, and save no time by themselves.

    As the authors do: train heads with SGD at 0.1 without weight decay, and freeze them after half of the epochs.

    Args:
      layer: `(params, inputs[batch, ..., features]) -> [batch, ..., filters]`: convolution, normalisation and ReLU.
      mass: of `mass_targets`; near it is the share of responses, not of filters, that stays.
      softmax: whether the averaged inputs go through a softmax first, an option of the authors' code.

    Returns:
      Gated.

    Raises:
      ValueError: as `mass_targets`; when called: a layer whose outputs have no axis of filters.

    Example:
      >>> layer = lambda w, x: jax.nn.relu(x @ w)
      >>> w, x = jnp.array([[1.0, 0.1, -1.0]]), jnp.array([[1.0], [2.0]])
      >>> gated = ftwt(layer)
      >>> head = gated.init(jax.random.key(0), w, x) | {"bias": jnp.array([9.0, -9.0, -9.0])}
      >>> fired = gated.apply(w, head, x)
      >>> fired.outputs.tolist(), float(fired.mask.mean())
      ([[1.0, 0.0, 0.0], [2.0, 0.0, 0.0]], 0.3333333432674408)
    """

    def init(key: Array, params: PyTree, inputs: Any) -> dict[str, Array]:
        shape, n = _features(jax.eval_shape(layer, params, inputs)), jnp.shape(inputs)[-1]
        return {"kernel": jax.nn.initializers.lecun_uniform()(key, (n, shape[-1])), "bias": jnp.zeros(shape[-1])}

    def apply(params: PyTree, head: dict[str, Array], inputs: Any) -> Fired:
        outputs = layer(params, inputs)
        _features(outputs)
        places = tuple(range(1, outputs.ndim - 1))
        seen = jax.lax.stop_gradient(jnp.mean(inputs.astype(jnp.float32), tuple(range(1, inputs.ndim - 1))))
        seen = jax.nn.softmax(seen) if softmax else seen
        logits = seen @ head["kernel"].astype(jnp.float32) + head["bias"].astype(jnp.float32)[None]
        targets = mass_targets(jax.lax.stop_gradient(jnp.max(jnp.abs(outputs), places)), mass)
        loss = jnp.mean(optax.sigmoid_binary_cross_entropy(logits, targets.astype(jnp.float32)))
        mask = logits > 0
        return Fired(outputs * jnp.expand_dims(mask, places).astype(outputs.dtype), loss, mask)

    return Gated(init, apply)


def _features(outputs: Any) -> tuple[int, ...]:
    if len(shape := outputs.shape) < 2:
        raise ValueError(f"ftwt: layer must give [batch, ..., filters], got {shape}")
    return shape
