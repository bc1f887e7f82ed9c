"""Hard-concrete L0 gates and variational dropout, the probabilistic methods of Gale, Elsen & Hooker (2019)."""

from __future__ import annotations

import math

import jax
import jax.numpy as jnp

from rigl_jax import checks, trees
from rigl_jax.base import Array, PyTree
from rigl_jax.messages import shown

# The hard concrete distribution as in Louizos et al.: temperature, and the interval it is stretched to.
BETA, GAMMA, ZETA = 2 / 3, -0.1, 1.1


def hard_concrete(key: Array, log_alpha: Array) -> Array:
    """A random gate in [0, 1], exactly 0 or 1 with positive probability, with a gradient (Louizos et al. 2018, eq. 11).

    Multiply weights, or better units, by it: `kernel * hard_concrete(key, log_alpha)[None, :]` gates outputs. A new key
    each step; one draw a batch, as in the authors' code. They gate the inputs of a dense layer and the outputs of a
    convolution; draw log_alpha from N(log((1 - p) / p), 0.01^2), p = 0.5 (0.2 before the first layer); clip it to
    [log 0.01, log 100] after each step; and evaluate an average of the parameters (0.999).

    Args:
      key: PRNG key.
      log_alpha: float[...], the gates' parameter: the larger, the more open.

    Returns:
      float[...] in [0, 1].

    >>> gates = hard_concrete(jax.random.key(0), jnp.array([-20.0, 0.0, 20.0]))
    >>> gates[0].item(), gates[2].item()
    (0.0, 1.0)
    """
    key = checks.key("hard_concrete", key)
    if not jnp.issubdtype(getattr(log_alpha, "dtype", object), jnp.floating):
        raise ValueError(f"hard_concrete: log_alpha must be an array of floats, got {shown(log_alpha)}")
    # Away from 0 and 1, where the logit is infinite. In float32 at least: 1 - 1e-6 is 1 in bfloat16.
    u = jax.random.uniform(key, log_alpha.shape, jnp.float32, 1e-6, 1 - 1e-6)
    open_ = jax.nn.sigmoid((jnp.log(u) - jnp.log1p(-u) + log_alpha) / BETA)
    return _stretched(open_).astype(log_alpha.dtype)


def hard_concrete_mean(log_alpha: Array) -> Array:
    """The gate to use once trained: no noise, still exactly 0 or 1 at the ends (eq. 13).

    >>> hard_concrete_mean(jnp.array([-5.0, 0.0, 5.0])).tolist()
    [0.0, 0.5, 1.0]
    """
    return _stretched(jax.nn.sigmoid(log_alpha))


def _stretched(open_: Array) -> Array:
    return jnp.clip(open_ * (ZETA - GAMMA) + GAMMA, 0, 1)


def probability_open(log_alpha: Array) -> Array:
    """The probability that a gate is not 0: sigmoid(log_alpha - beta log(-gamma / zeta)) (eq. 12).

    >>> round(float(probability_open(jnp.array(0.3))), 4)
    0.8697
    """
    return jax.nn.sigmoid(log_alpha - BETA * math.log(-GAMMA / ZETA))


def expected_l0(log_alphas: PyTree) -> Array:
    """Expected number of gates that are not 0, f32 scalar: the penalty, to be scaled and added to the loss.

    Args:
      log_alphas: tree of gate parameters. Where a gate stands for many weights see `l0_penalty`.

    >>> round(float(expected_l0({"a": jnp.array([0.3]), "b": jnp.array([100.0, -100.0])})), 4)
    1.8697
    """
    opens = [jnp.sum(probability_open(leaf), dtype=jnp.float32) for leaf in jax.tree.leaves(log_alphas)]
    return sum(opens, start=jnp.zeros((), jnp.float32))


def l0_penalty(log_alphas: PyTree, weights: PyTree, strength: float, precision: float = 0.0) -> Array:
    """The regulariser of Louizos et al. (2018), eq. 8 with the gated L2 term of its appendix; f32 scalar.

    A gate of n weights w costs P(gate > 0) (strength n + precision |w|^2 / 2): by the number of its weights, and the L2
    term counts while the gate is open. Divide by the number of training examples and add it to the mean loss, with
    precision = that number times the weight decay, as the authors do. Their LeNet-5 leaves out that number, and their
    biases of convolutions enter with the other sign; neither is copied.

    Args:
      log_alphas: tree of gate parameters, each of a shape that broadcasts to that of its weight, of the same rank:
        [in, 1] gates the inputs of a dense kernel, [1, 1, 1, out] the outputs of a convolution.
      weights: tree parallel to it.
      strength: lambda, at least 0.
      precision: of the L2 term, at least 0.

    Raises:
      ValueError: trees that are not parallel, or shapes that do not broadcast; names the leaf.

    >>> gates, weights = {"w": jnp.array([[100.0], [-100.0]])}, {"w": jnp.array([[1.0, 2.0, 2.0], [5.0, 5.0, 5.0]])}
    >>> float(l0_penalty(gates, weights, 0.5, precision=2.0))  # 0.5 * 3 + 2 * 9 / 2
    10.5
    """
    who, total = "l0_penalty", jnp.zeros((), jnp.float32)
    for name, value in (("strength", strength), ("precision", precision)):
        if not isinstance(value, jax.Array):
            checks.number(who, name, value, "must be at least 0", lambda found: found >= 0)
    gates, gated = trees.named_leaves(log_alphas), trees.named_leaves(weights)
    if gates.keys() != gated.keys():
        raise ValueError(f"{who}: weights must be parallel to log_alphas, got other leaves")
    for name, gate in gates.items():
        shape, whole = jnp.shape(gate), jnp.shape(gated[name])
        if len(shape) != len(whole) or any(n not in (1, m) for n, m in zip(shape, whole, strict=True)):
            raise ValueError(f"{who}: log_alphas of leaf {name!r} must broadcast to {whole}, got {shape}")
        shared = tuple(axis for axis, n in enumerate(shape) if n == 1)
        squares = jnp.sum(jnp.square(gated[name].astype(jnp.float32)), axis=shared, keepdims=True)
        cost = strength * (math.prod(whole) / max(math.prod(shape), 1)) + precision * squares / 2
        total += jnp.sum(probability_open(gate.astype(jnp.float32)) * cost)
    return total


def log_alpha(weights: Array, log_sigma2: Array) -> Array:
    """log(sigma^2 / w^2), the dropout rate of each weight; prune where it is above 3 (Molchanov et al. 2017).

    Args:
      weights: float[...], the means.
      log_sigma2: float[...], the log of the variances, a parameter trained with them; the authors begin at -10.

    Returns:
      float[...], clipped to [-8, 8] as in the authors' code, so that a weight of 0 has a gradient and a finite value.

    >>> log_alpha(jnp.array([1.0, 0.0]), jnp.array([-2.0, 0.0])).tolist()
    [-2.0, 8.0]
    """
    checks.same_shape("log_alpha", jnp.shape(weights), weights=weights, log_sigma2=log_sigma2)
    return jnp.clip(log_sigma2 - jnp.log(jnp.square(weights) + 1e-8), -8, 8)


def variational_kl(log_alphas: PyTree) -> Array:
    """KL divergence of the weights' posterior from the log-uniform prior, summed over a tree, f32 scalar.

    The authors' approximation (eq. 14), within 0.01 a weight; it goes to 0 as log alpha goes to infinity.

    Args:
      log_alphas: tree of `log_alpha(weights, log_sigma2)`. Scale the sum by 1 / (size of the data set) and add it to
        the mean loss; the authors raise that scale from 0 at epoch 5 to all of it at epoch 20.

    >>> round(float(variational_kl({"w": jnp.array([-2.0, 0.0])})), 4)  # about 1.5405 + 0.4312
    1.9718
    """

    def one(a: Array) -> Array:
        a = a.astype(jnp.float32)
        kept = 0.63576 * jax.nn.sigmoid(1.87320 + 1.48695 * a) - 0.5 * jax.nn.softplus(-a)
        return jnp.sum(0.63576 - kept)

    return sum((one(leaf) for leaf in jax.tree.leaves(log_alphas)), start=jnp.zeros((), jnp.float32))


def variational_matmul(key: Array, x: Array, weights: Array, log_sigma2: Array) -> Array:
    """`x @ w` for w ~ N(weights, sigma^2), by drawing the result and not the weights (local reparametrisation).

    Less noise in the gradients, and independent noise for each example. Once trained, use `x @ weights` with the
    pruned weights; there are no zeros before that. The authors' scripts also set means to 0 where log alpha is above 3
    while they train.

    Args:
      key: PRNG key.
      x: float[batch, in].
      weights: float[in, out].
      log_sigma2: float[in, out].

    Returns:
      float[batch, out].

    >>> x, w = jnp.array([[1.0, 2.0]]), jnp.array([[1.0], [1.0]])
    >>> variational_matmul(jax.random.key(0), x, w, jnp.full((2, 1), -30.0)).round(2).tolist()
    [[3.0]]
    """
    checks.same_shape("variational_matmul", jnp.shape(weights), weights=weights, log_sigma2=log_sigma2)
    if jnp.ndim(weights) != 2 or jnp.ndim(x) < 1 or jnp.shape(x)[-1] != weights.shape[0]:
        raise ValueError(
            f"variational_matmul: x must be [batch, in] and weights [in, out], got {jnp.shape(x)} and {weights.shape}"
        )
    mean, variance = x @ weights, jnp.square(x) @ jnp.exp(log_sigma2)
    # The root has no gradient at 0, where all of x is.
    return mean + jnp.sqrt(variance + 1e-8) * jax.random.normal(key, mean.shape, mean.dtype)
