"""Scores: how much each weight is worth. `Signals -> tree`, higher is more worth keeping or growing.

A score sees weights one by one; the structure pools it over units. A NaN score ranks below every number (see
`topology.select`), but a training step does not act on it: the leaf keeps its mask (`topology.sound`).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp

from rigl_jax import trees
from rigl_jax.base import Array, PyTree, Score, Signals


def magnitude(signals: Signals) -> PyTree:
    """|w|: the drop criterion of SET, RigL and gradual pruning. What has no size, as a PRNG key, is handed on."""
    return jax.tree.map(
        lambda p: p if jnp.issubdtype(jnp.result_type(p), jax.dtypes.extended) else jnp.abs(p), signals.params
    )


def gradient(signals: Signals) -> PyTree:
    """|g| of the dense gradient: the growth criterion of RigL (Evci et al. 2020, section 3)."""
    return jax.tree.map(jnp.abs, signals.grads)


class Magnitudes(NamedTuple):
    """|x| is the score of an entry x. A native kernel takes the magnitude as it reads; no array of scores has to exist.

    Attributes:
      arrays: tree parallel to params, such as the weights; or the array of one leaf.
    """

    arrays: PyTree


class Draws(NamedTuple):
    """Scores drawn uniformly from [0, 1), as those of `random`. A native kernel draws as it ranks, without an array.

    Attributes:
      key: typed PRNG key, into which the name of each leaf is folded (`trees.leaf_key`); or that of one leaf.
      late: bool, tree parallel to the masks, or None. Where it is False, 1 is added: those come before all others.
    """

    key: Array
    late: PyTree = None


Scores = PyTree | Magnitudes | Draws
"""What is ranked: a tree of scores parallel to params, or what they follow from; or that of one leaf."""


def ranked(score: Score, signals: Signals) -> Scores:
    """What `score` ranks, for `topology.drop_and_grow`: what its scores follow from, where they need not be made.

    >>> signals = Signals({"w": jnp.array([-3.0])}, {"w": jnp.array([2.0])}, 0, jax.random.key(0))
    >>> ranked(magnitude, signals)
    Magnitudes(arrays={'w': Array([-3.], dtype=float32)})
    >>> ranked(snip, signals)["w"].tolist()
    [6.0]
    """
    if score is magnitude:
        return Magnitudes(signals.params)
    if score is gradient:
        return Magnitudes(signals.grads)
    return Draws(signals.key) if score is random else score(signals)


def of_leaves(given: Scores) -> Callable[[str], Scores]:
    """What is ranked in a leaf, by its name."""
    if isinstance(given, Magnitudes):
        arrays = trees.named_leaves(given.arrays)
        return lambda name: Magnitudes(arrays[name])
    if isinstance(given, Draws):
        late = trees.named_leaves(given.late)
        return lambda name: Draws(trees.leaf_key(given.key, name), late.get(name))
    arrays = trees.named_leaves(given)
    return arrays.__getitem__


def made(given: Scores, like: Array) -> Array:
    """The scores of one leaf.

    Args:
      given: what is ranked in it.
      like: an array of its shape, sharded as it is.
    """
    if isinstance(given, Magnitudes):
        return jnp.abs(given.arrays)
    if not isinstance(given, Draws):
        return given
    drawn = jax.random.uniform(given.key, jnp.shape(like), jnp.float32, out_sharding=trees.explicit_sharding(like))
    return drawn if given.late is None else drawn + (~given.late).astype(jnp.float32)


def random(signals: Signals) -> PyTree:
    """Independent uniform scores, one key for each leaf: the growth criterion of SET."""
    of_leaf = of_leaves(Draws(signals.key))
    return jax.tree.map(lambda name, p: made(of_leaf(name), p), trees.names(signals.params), signals.params)


def noisy(score: Score, scale: float) -> Score:
    """`score` plus normal noise of standard deviation `scale`: the tie-breaker of the authors' code (1e-5)."""

    def noised(signals: Signals) -> PyTree:
        def one(name: str, s: Array) -> Array:
            key, out = trees.leaf_key(signals.key, f"noise:{name}"), trees.explicit_sharding(s)
            return s + scale * jax.random.normal(key, s.shape, s.dtype, out_sharding=out)

        return jax.tree.map(one, trees.names(signals.params), score(signals))

    return noised


def snip(signals: Signals) -> PyTree:
    """|g w|: how fast the loss changes as a weight is scaled away (Lee et al. 2019, eq. 6, without the normalisation).

    It is |dL/dc| at c = 1 for the loss L(c w). Unlike |w| it does not change when a ReLU unit's inputs are scaled up
    and its outputs down. Dividing by the sum over all weights, as the paper does, changes no ranking.
    """
    return jax.tree.map(lambda g, p: jnp.abs(g * p), signals.grads, signals.params)


def taylor(signals: Signals) -> PyTree:
    """(g w)^2: the squared first-order change of the loss when a weight is set to 0 (Molchanov et al. 2019, eq. 8).

    Ranks single weights as `snip` does. They differ in what a structure pools over a unit: the sum of the squares here,
    the sum of the magnitudes there.
    """
    return jax.tree.map(lambda g, p: jnp.square(g * p), signals.grads, signals.params)


def gradient_flow(loss: Callable[[PyTree], Array]) -> Score:
    """W (H g): how much of the squared gradient norm would go with a weight (Wang et al. 2020, eq. 8).

    To first order, setting w to 0 changes |g|^2 by -2 w (H g): the paper removes the largest -w (H g). One
    forward-over-reverse pass, about the cost of two gradients; `signals.grads` is not read.

    Args:
      loss: `params -> scalar`, twice differentiable.

    >>> score = gradient_flow(lambda p: 2 * p["w"].sum() ** 2 / 2)  # g = 2 w, H = 2
    >>> score(Signals({"w": jnp.array([3.0])}, None, 0, jax.random.key(0)))["w"].tolist()
    [36.0]
    """

    def score(signals: Signals) -> PyTree:
        weights, join = trees.floats(signals.params)
        slope = jax.grad(lambda given: loss(join(given)))
        _, curved = jax.jvp(slope, (weights,), (slope(weights),))
        return join(jax.tree.map(jnp.multiply, weights, curved))

    return score


def gradient_of(loss: Callable[[PyTree], Array], params: PyTree) -> PyTree:
    """`jax.grad(loss)(params)`, with zeros for leaves that are not floats, such as counters.

    >>> gradient_of(lambda p: p["w"] ** 2, {"w": 3.0, "steps": 7})["w"].tolist()
    6.0
    """
    weights, join = trees.floats(params)
    _, place = trees.floats(jax.tree.map(jnp.zeros_like, params))
    return place(jax.grad(lambda given: loss(join(given)))(weights))
