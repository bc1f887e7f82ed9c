"""Criteria from the inputs of the products with weights."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from rigl_jax import checks, topology, trees
from rigl_jax.base import Array, Criterion, LayerPlan, Masks, Plan, PyTree
from rigl_jax.criteria.losses import of_inputs
from rigl_jax.masking import apply_masks
from rigl_jax.tracing import Captured, capture, from_matrix, to_matrix

Apply = Callable[[PyTree, Any], Any]


def wanda(apply: Apply) -> Criterion:
    """|w_ij| |x_i|_2: a weight by the norm of its input over the examples (Wanda, Sun et al. 2024, eq. 1).

    A row of the weight competes within one output in the paper: give its leaf the structure `rx.fan_in()`, or
    `rx.n_of_m(2, 4)`. The authors prune layer by layer and take the inputs from the pruned layers before; here all
    inputs are those of the given weights. `rx.prune(..., rounds=n)` takes them anew in each round.

    Args:
      apply: `(params, inputs) -> outputs`, with normalisation layers in inference mode; the batch is the inputs alone,
        without labels. Products are found by `rx.tracing.capture`. The inputs of a convolution are patches, so each tap
        has its norm. The squares of several products with a leaf add up. A leaf that is in no product, such as an
        embedding or a bias, scores |w|.

    >>> params = {"w": jnp.array([[3.0, -1.0], [1.0, 2.0]])}
    >>> wanda(lambda p, x: x @ p["w"])(params, jnp.array([[3.0, 0.0], [4.0, 1.0]]))["w"].tolist()  # norms 5, 1
    [[15.0, 5.0], [1.0, 2.0]]
    """
    checks.functions("wanda", apply=apply)

    def score(w: Array, used: tuple[Captured, ...]) -> Array:
        return jnp.abs(w) * jnp.sqrt(_summed(w, used, jnp.square))

    return _from_inputs(of_inputs("wanda", apply), score)


def mean_activation(apply: Apply) -> Criterion:
    """|w_ij| |E x_i|: a weight by the mean of its input, ShrinkBench's baseline (Blalock et al. 2020, section 7.2).

    As in the authors' code the mean comes first and its absolute value after it: an input with as many positive as
    negative values scores 0. Behind a ReLU that is E|x_i|. They average over the places of a feature map; here each tap
    of a convolution has the mean of the inputs that it sees, padding included. Their baseline of gradients, |g w|, is
    `snip`.

    Args:
      apply: as for `wanda`. Of several products with a leaf, the mean over all rows. A leaf that is in no product
        scores |w|.

    >>> params = {"w": jnp.array([[3.0, -1.0], [1.0, 2.0]])}
    >>> mean_activation(lambda p, x: x @ p["w"])(params, jnp.array([[1.0, 2.0], [-1.0, 4.0]]))["w"].tolist()
    [[0.0, 0.0], [3.0, 6.0]]
    """
    checks.functions("mean_activation", apply=apply)

    def score(w: Array, used: tuple[Captured, ...]) -> Array:
        return jnp.abs(w) * jnp.abs(_summed(w, used, lambda x: x)) / sum(p.x.shape[-2] for p in used)

    return _from_inputs(of_inputs("mean_activation", apply), score)


def nnrelief(apply: Apply) -> Criterion:
    """E|x_i| |w_ij| / sum_i E|x_i| |w_ij|: a weight's share of its output (NNrelief, Dekhovich et al. 2024, eq. 1).

    The authors keep in each neuron the fewest weights whose shares add up to alpha: `keep_mass` of these scores, with
    the structure `rx.fan_in()`. `rx.prune` keeps the counts of the plan. They also count a bias as one more weight,
    score whole kernels of convolutions (by the sum, or by the norm over positions), take all inputs of a stage from the
    unpruned network, and drop weights into units that nothing reads; here biases do not count, a convolution has a
    score for each tap, and `clean_up` drops what nothing reads. Their code drops the last weight of the fewest and all
    that tie with it; here the share that is kept is never less than alpha.

    Args:
      apply: as for `wanda`. Of several products with a leaf, the mean of the shares. A leaf that is in no product
        scores |w|.

    >>> params = {"w": jnp.array([[3.0, -1.0], [1.0, 1.0]])}
    >>> nnrelief(lambda p, x: x @ p["w"])(params, jnp.array([[1.0, 1.0], [-1.0, 1.0]]))["w"].tolist()
    [[0.75, 0.5], [0.25, 0.5]]
    """
    checks.functions("nnrelief", apply=apply)

    def share(w: Array, used: tuple[Captured, ...]) -> Array:
        shares = []
        for x, axes in map(_input, used):
            parts = jnp.mean(jnp.abs(x), -2)[..., None] * jnp.abs(to_matrix(w, axes).astype(x.dtype))
            total = jnp.sum(parts, -2, keepdims=True)
            shares.append(from_matrix(parts / jnp.where(total > 0, total, 1), axes, w.shape))
        return (functools.reduce(jnp.add, shares) / len(shares)).astype(w.dtype)

    return _from_inputs(of_inputs("nnrelief", apply), share)


def _summed(w: Array, used: tuple[Captured, ...], of: Callable[[Array], Array]) -> Array:
    """A function of the inputs of a weight, added up over the rows of all its products, as `_of_weight` has it."""
    sums = [_of_weight(jnp.sum(of(x), -2), axes, w) for x, axes in map(_input, used)]
    return functools.reduce(jnp.add, sums)


def _from_inputs(apply: Apply, score: Callable[[Array, tuple[Captured, ...]], Array]) -> Criterion:
    def criterion(params: PyTree, batch: Any) -> PyTree:
        _, products = capture(apply, params, batch)
        of_leaf = lambda name, w: score(jnp.asarray(w), products[name]) if name in products else jnp.abs(w)  # noqa: E731
        return jax.tree.map(of_leaf, trees.names(params), params)

    return criterion


def _input(product: Captured) -> tuple[Array, Any]:
    """The rows `[*stack, n, in]`, in at least float32, and the axes of the weight."""
    return product.x.astype(jnp.promote_types(product.x.dtype, jnp.float32)), product.axes


def _of_weight(of_inputs: Array, axes: Any, w: Array) -> Array:
    """What is known of each input, `[*stack, in]`, in the shape of the weight."""
    n = w.size // of_inputs.size
    return from_matrix(jnp.repeat(of_inputs[..., None], n, -1), axes, w.shape).astype(w.dtype)


def keep_mass(plan: Plan, scores: PyTree, mass: float) -> Masks:
    """In each group the fewest units whose scores add up to a share of the group's sum: masks of no fixed count.

    The rule of NNrelief (alpha), with its scores and the structure `rx.fan_in()`. To train what is left, give the masks
    to `rx.replace_masks`, which asks for no counts; `rx.static(plan, masks)` asks for the total of its plan.

    Args:
      plan: its structures and groups are read, its counts are not.
      scores: at least 0, parallel to params; a structure of several weights takes their mean.
      mass: the share to keep, in (0, 1]. At 1 all units with a positive score stay.

    Returns:
      Masks parallel to scores: bool, None for leaves that are not in the plan. Ties go to the lower index. A group
      whose scores are all 0 is empty.

    Raises:
      ValueError: a score that is negative or NaN; names the leaf.

    >>> import rigl_jax as rx
    >>> scores = {"w": jnp.array([[0.5], [0.1], [0.4]])}
    >>> keep_mass(rx.make_plan(scores, 0.5, rules=[("w", rx.fan_in())]), scores, 0.85)["w"].tolist()
    [[True], [False], [True]]
    """
    checks.plan("keep_mass", plan)
    mass = checks.number("keep_mass", "mass", mass, "must be above 0 and at most 1", lambda x: 0 < x <= 1)
    checks.of_plan("keep_mass", plan, scores=scores)
    names = trees.names(scores)
    return jax.tree.map(lambda name, s: _reach(plan[name], s, mass) if name in plan else None, names, scores)


def _reach(layer: LayerPlan, scores: Array, mass: float) -> Array:
    if not bool(jnp.all(scores >= 0)):
        raise ValueError(f"keep_mass: scores must be at least 0, got a negative one or NaN in leaf {layer.name!r}")
    pooled = np.asarray(layer.structure.pool(jnp.asarray(scores)), np.float64)
    axes = layer.structure.axes(pooled.shape)
    groups = np.moveaxis(pooled, axes, range(-len(axes), 0))
    groups = groups.reshape(*groups.shape[: groups.ndim - len(axes)], -1)
    reached = np.cumsum(-np.sort(-groups, axis=-1), axis=-1)
    enough = reached >= mass * reached[..., -1:]
    needed = np.where(reached[..., -1] > 0, np.argmax(enough, -1) + 1, 0)
    counts = np.expand_dims(needed, axes).astype(np.int32)
    return topology.prune(layer.structure, jnp.asarray(scores), jnp.asarray(counts))


def clean_up(apply: Apply, params: PyTree, masks: Masks, batch: Any) -> Masks:
    """Drops the weights on which no output depends: those into units that nothing reads, and out of silent ones.

    The backward pass of NNrelief (Dekhovich et al. 2024), in any network. A weight stays if the outputs for the batch
    have a derivative by it that is not 0. So weights out of an input that is always 0, and those of a ReLU that is
    never active on the batch, go too, as NNrelief drops all weights into a neuron of mean activation 0.

    Outputs on the batch stay as they are if all that reads such a ReLU has masks. A reader without masks keeps it, and
    would see the ReLU of the bias alone: an error is raised then.

    Args:
      apply: `(params, inputs) -> outputs`, with normalisation layers in inference mode.
      params: weights, 0 off the masks.
      masks: such as those of `keep_mass`; counts of structures do not hold afterwards.
      batch: inputs, without labels.

    Raises:
      ValueError: masks that do not fit, a batch that apply cannot read, or outputs that would change by more than
        rounding.

    >>> params = {"a": jnp.ones((2, 2)), "b": jnp.array([[1.0], [0.0]])}
    >>> masks = {"a": jnp.ones((2, 2), bool), "b": params["b"] != 0}  # nothing reads the second unit
    >>> clean_up(lambda p, x: x @ p["a"] @ p["b"], params, masks, jnp.ones((4, 2)))["a"].tolist()
    [[True, False], [True, False]]
    """
    who = "clean_up"
    checks.functions(who, apply=apply)
    masks = checks.masks(who, masks, params)
    weights, join = trees.floats(apply_masks(params, masks))
    model = of_inputs(who, apply)

    @jax.jit
    def read(weights: list[Array]) -> tuple[PyTree, list[Array]]:
        outputs, pull = jax.vjp(lambda given: model(join(given), batch), weights)
        keys = jax.random.split(jax.random.key(0), max(len(jax.tree.leaves(outputs)), 1))
        # Random directions: derivatives of several outputs do not cancel.
        leaves = [jax.random.normal(k, y.shape, y.dtype) for k, y in zip(keys, jax.tree.leaves(outputs), strict=False)]
        return outputs, pull(jax.tree.unflatten(jax.tree.structure(outputs), leaves))[0]

    _, place = trees.floats(params)
    before, slopes = read(weights)
    left = jax.tree.map(lambda mask, g: None if mask is None else mask & (g != 0), masks, place(slopes), is_leaf=_none)
    after, _ = read(trees.floats(apply_masks(params, left))[0])
    for old, new in zip(jax.tree.leaves(before), jax.tree.leaves(after), strict=True):
        if not np.allclose(old, new, rtol=1e-4, atol=1e-5):
            raise ValueError(f"{who}: masks must cover what reads a ReLU that is never active; outputs would change")
    return left


def _none(x: Any) -> bool:
    return x is None
