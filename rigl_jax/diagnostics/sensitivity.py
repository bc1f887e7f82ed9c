"""How much of each layer the loss needs: rank of its gradients, noise that it tolerates, units that are dead.

From ranks and tolerances `rx.proportional` makes a distribution of sparsity over layers.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from rigl_jax import arguments as rules
from rigl_jax import contents
from rigl_jax.arguments import arguments
from rigl_jax.base import Array, PyTree
from rigl_jax.criteria import losses
from rigl_jax.linear_algebra import energy_rank
from rigl_jax.messages import kind, shown
from rigl_jax.tracing.products import Captured, capture

Loss = Callable[[PyTree, Any], Array]
"""`(params, batch) -> scalar`, in inference mode."""
_NAMES = rules.optional(rules.one_of((list, tuple, set, frozenset, Mapping), "names of leaves"))


class DeadRate(NamedTuple):
    """What `dead_rate` counts; both are shares of all units, and their sum is the dead neuron rate.

    Attributes:
      static: units that are 0 on every example.
      dynamic: the mean over examples of the other units that are 0 on the example.
    """

    static: Array
    dynamic: Array


@arguments(activations=rules.finite(host=True))
def dead_rate(activations: Any) -> DeadRate:
    """The dead neuron rate of a layer (Liu et al. 2023, AP): the mean share of units whose output is 0 on an example.

    Defined from the paper's abstract; the authors' code does not compute it. AP is `rx.criteria.activating`.

    Args:
      activations: [examples, ..., units], outputs of a ReLU. A channel of an image counts where it is 0 everywhere.

    Returns:
      DeadRate of float32 scalars.

    Raises:
      ValueError: fewer than 2 axes, or none of some size. Outside of jit also: a value below 0, which no ReLU gives, or
        one that is not finite.

    >>> rate = dead_rate([[0.0, 0.0, 1.0], [0.0, 2.0, 3.0]])
    >>> [round(float(share), 4) for share in rate]  # the first of 3; the second on one of 2 examples
    [0.3333, 0.1667]
    """
    activations = jnp.asarray(activations)
    if activations.ndim < 2:
        raise ValueError(f"dead_rate: activations must be [examples, ..., units], got {shown(activations)}")
    contents.every("dead_rate", "activations", "outputs of a ReLU, at least 0", activations, lambda x: x >= 0)
    zero = jnp.all(activations == 0, axis=tuple(range(1, activations.ndim - 1)))
    static = jnp.all(zero, axis=0)
    return DeadRate(jnp.mean(static, dtype=jnp.float32), jnp.mean(zero & ~static[None], dtype=jnp.float32))


@arguments(loss=rules.function, energy=rules.share, leaves=_NAMES)
def gradient_ranks(
    loss: Loss, params: PyTree, batch: Any, *, energy: float = 0.99, leaves: Iterable[str] | None = None
) -> dict[str, float]:
    """The effective rank of the gradients of each layer's outputs, as a share of the outputs (after Zhou et al. 2022).

    The matrix of a layer has a row for each example (of a convolution: for each position of each example) and a column
    for each output: the derivative of the loss by what the weight's product gives. What its rank lacks of the outputs
    is redundant. The text of the paper was not at hand, and how it makes a matrix of a convolution is not known:
    this is in its style. `rx.proportional(gradient_ranks(...))` is a distribution for `rx.make_plan`.

    Args:
      loss: `(params, batch) -> scalar`, a mean or sum over examples.
      params: the weights of a trained network.
      batch: examples, more than a layer has outputs: the rank is at most their number.
      energy: share of the squares of the singular values, see `effective_rank`.
      leaves: names of the weights; None: all that are found in products. They are read as `rx.tracing.capture` reads.

    Returns:
      `{name: share from 0 to 1}`. Of a weight in several products, or of a stack, the mean.

    Raises:
      ValueError: as `rx.tracing.capture`; loss gives no scalar, or a gradient is not finite.

    >>> loss = lambda params, x: jnp.mean((x @ params["a"] @ params["b"]) ** 2)
    >>> params = {"a": jnp.eye(4)[:, :3], "b": jnp.ones((3, 1))}
    >>> {name: round(share, 2) for name, share in gradient_ranks(loss, params, jnp.eye(4)).items()}  # a row (1, 1, 1)
    {'a': 0.33, 'b': 1.0}
    """
    _check_params("gradient_ranks", params)
    loss = losses.at("gradient_ranks", loss)
    given = None if leaves is None else tuple(leaves)
    products = jax.eval_shape(lambda: capture(loss, params, batch, leaves=given)[1])
    zeros = {name: [jnp.zeros(p.y.shape, p.y.dtype) for p in used] for name, used in products.items()}

    @jax.jit
    def shares(params: PyTree, batch: Any) -> dict[str, Array]:
        grads = jax.grad(lambda add: capture(loss, params, batch, leaves=given, add=add)[0].astype(jnp.float32))(zeros)
        return {name: jnp.mean(jnp.stack([_rank_share(g, energy) for g in used])) for name, used in grads.items()}

    found = shares(params, batch)
    return _numbers("gradient_ranks", {name: float(found[name]) for name in products})


def _rank_share(grads: Array, energy: float) -> Array:
    matrices = grads.astype(jnp.float32).reshape(-1, *grads.shape[-2:])
    share = jnp.mean(jax.vmap(lambda matrix: energy_rank(matrix, energy))(matrices)) / grads.shape[-1]
    return jnp.where(jnp.all(jnp.isfinite(matrices)), share, jnp.nan)


def _numbers(who: str, found: dict[str, float]) -> dict[str, float]:
    """What was found, if the gradients that it comes from were finite."""
    for name, value in found.items():
        if not math.isfinite(value):
            raise ValueError(
                f"{who}: loss must have finite gradients, which it has not at the outputs of leaf {name!r}"
            )
    return found


@arguments(key=rules.key, y=rules.finite(host=True), sigma=rules.scalar)
def agn(key: Array, y: Any, sigma: Any) -> Array:
    """Additive Gaussian noise (Trommer et al. 2022): `y + |sigma| std(y) noise`, the model of inexact hardware.

    Args:
      key: PRNG key.
      y: float array, the outputs of a layer. Its standard deviation is over all entries and counts as a constant for
        derivatives.
      sigma: scalar, relative; 0 changes nothing.

    Returns:
      Of the shape of y.

    Raises:
      ValueError: y is no array of floats, empty, or not finite (seen outside of jit only).

    >>> agn(jax.random.key(0), jnp.array([1.0, 2.0]), 0.0).tolist()
    [1.0, 2.0]
    """
    y = jnp.asarray(y)
    if not jnp.issubdtype(y.dtype, jnp.floating):
        raise ValueError(f"agn: y must be floats, got {shown(y)}")
    return y + _noise(key, y, sigma)


def _noise(key: Array, y: Array, sigma: Any) -> Array:
    scale = jnp.abs(sigma) * jax.lax.stop_gradient(jnp.std(y.astype(jnp.float32)))
    return (scale * jax.random.normal(key, y.shape)).astype(y.dtype)


@arguments(
    loss=rules.function,
    key=rules.key,
    weight=rules.positive,
    largest=rules.positive,
    start=rules.positive,
    learning_rate=rules.positive,
    steps=rules.whole(1),
    leaves=_NAMES,
)
def noise_tolerance(
    loss: Loss,
    params: PyTree,
    batch: Any,
    key: Array,
    *,
    weight: float = 0.3,
    largest: float = 1.0,
    start: float = 0.1,
    learning_rate: float = 0.02,
    steps: int = 200,
    leaves: Iterable[str] | None = None,
) -> dict[str, float]:
    """The noise that each layer tolerates, learned (Trommer et al. 2022, agn-approx).

    Minimises `loss with noise - weight sum_l share_l min(|sigma_l|, largest)` over sigma by Adam, where each product
    with a weight gets `agn` of its sigma, and `share_l` is its share of all multiplications. A layer that tolerates
    little noise is sensitive: `rx.proportional({name: 1 / sigma})` gives it more weights. The authors use the noise to
    choose approximate multipliers (`error_std`), not a sparsity: that use is ours.

    The authors train the weights together with sigma, over the training set; here weights stay, and the batch is the
    same in every step. Defaults are ours.

    Args:
      loss: `(params, batch) -> scalar`.
      params: the weights of a trained network.
      batch: examples.
      key: PRNG key of the noise.
      weight: of the reward for noise; more gives larger sigma.
      largest: the sigma beyond which there is no reward.
      start: sigma of all layers at first.
      learning_rate: of Adam.
      steps: of Adam, each with new noise.
      leaves: names of the weights; None: all that are found in products.

    Returns:
      `{name: sigma}`, at least 0, relative to the standard deviation of the layer's output.

    Raises:
      ValueError: as `rx.tracing.capture`; loss gives no scalar, or it or a gradient is not finite.

    >>> loss = lambda params, x: jnp.mean((x @ params["a"]) ** 2 + 4 * (x @ params["b"]) ** 2)
    >>> params, x = {"a": jnp.eye(2), "b": jnp.eye(2)}, jnp.tile(jnp.array([1.0, -1.0]), (200, 1))
    >>> found = noise_tolerance(loss, params, x, jax.random.key(0))
    >>> found["a"] > found["b"]
    True
    """
    _check_params("noise_tolerance", params)
    loss = losses.at("noise_tolerance", loss)
    given = None if leaves is None else tuple(leaves)
    names, costs = _multiplications(jax.eval_shape(lambda: capture(loss, params, batch, leaves=given)[1]))
    adam = optax.adam(learning_rate)

    def objective(sigmas: Array, params: PyTree, batch: Any, key: Array) -> Array:
        _, products = capture(loss, params, batch, leaves=given)
        add = {
            name: [
                _noise(jax.random.fold_in(jax.random.fold_in(key, i), j), p.y, sigmas[i]) for j, p in enumerate(used)
            ]
            for i, (name, used) in enumerate((name, products[name]) for name in names)
        }
        noisy = capture(loss, params, batch, leaves=given, add=add)[0]
        return noisy.astype(jnp.float32) - weight * jnp.sum(costs * jnp.minimum(jnp.abs(sigmas), largest))

    @jax.jit
    def learn(params: PyTree, batch: Any, key: Array) -> Array:
        def step(i: Array, state: tuple[Array, Any]) -> tuple[Array, Any]:
            sigmas, inner = state
            grads = jax.grad(objective)(sigmas, params, batch, jax.random.fold_in(key, i))
            updates, inner = adam.update(grads, inner)
            return sigmas + jnp.asarray(updates), inner

        sigmas = jnp.full(len(names), start, jnp.float32)
        return jax.lax.fori_loop(0, steps, step, (sigmas, adam.init(sigmas)))[0]

    found = np.abs(np.asarray(learn(params, batch, key)))
    return _numbers("noise_tolerance", dict(zip(names, found.tolist(), strict=True)))


def _multiplications(products: Mapping[str, Sequence[Captured]]) -> tuple[list[str], np.ndarray]:
    """The names, and each one's share of the multiplications."""
    counts = np.array([sum(float(p.y.size) * p.x.shape[-1] for p in used) for used in products.values()])
    return list(products), (counts / counts.sum()).astype(np.float32)


def _check_params(who: str, params: PyTree) -> None:
    leaves = jax.tree.leaves(params)
    if not leaves or not all(hasattr(leaf, "dtype") for leaf in leaves):
        raise ValueError(f"{who}: params must be a tree of arrays, got {kind(params)}")


@arguments(
    error_map=rules.finite_host_array(2), p_x=rules.host_array(1), p_w=rules.host_array(1), fan_in=rules.whole(1)
)
def error_std(error_map: Any, p_x: Any, p_w: Any, fan_in: int) -> float:
    """The standard deviation of a layer's error with an approximate multiplier (Trommer et al. 2022).

    `sqrt(fan_in (sum_xw p_x p_w e^2 - (sum_xw p_x p_w e)^2))`: products are independent. The layer tolerates the
    multiplier if this is at most its `noise_tolerance` times the standard deviation of its output.

    The authors use 512 local histograms of the activations, and index histograms by the value plus the minimum, which
    is right for int8 alone; here there is one histogram, indexed as the map is.

    Args:
      error_map: [values of x, values of w], what the multiplier's product is too large by.
      p_x: probability of each value of x; adds up to 1.
      p_w: probability of each value of w.
      fan_in: how many products are added.

    Raises:
      ValueError: the histograms do not fit the map, or are no probabilities; an error is not finite.

    >>> error_std([[1.0, -1.0]], [1.0], [0.5, 0.5], 4)
    2.0
    """
    for name, p, size in (("p_x", p_x, error_map.shape[0]), ("p_w", p_w, error_map.shape[1])):
        if p.shape != (size,) or not (p >= 0).all() or abs(float(p.sum()) - 1) > 1e-3:
            raise ValueError(f"error_std: {name} must be {size} probabilities, got {shown(p)}")
    error = np.asarray(error_map, np.float64)
    mean, square = (float(p_x @ power @ p_w) for power in (error, error**2))
    return float(np.sqrt(fan_in * max(square - mean**2, 0.0)))
