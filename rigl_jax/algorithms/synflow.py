"""SynFlow: prune before training without any data, in rounds, so that no layer is cut off."""

from __future__ import annotations

from collections.abc import Callable

from rigl_jax import criteria
from rigl_jax.algorithms.one_shot import of_params, prune_at_init
from rigl_jax.base import Algorithm, Array, Plan, PyTree
from rigl_jax.criteria import losses


def synflow(
    plan: Plan,
    *,
    loss: Callable[[PyTree], Array],
    rounds: int = 100,
    jointly: bool = False,
    min_active: int = 1,
) -> Algorithm:
    """SynFlow (Tanaka et al. 2020): keep the weights through which the most synaptic flow passes, found in `init`.

    The flow R is the sum of the outputs for an input of ones when every weight is replaced by its magnitude; a
    weight's share of it is |w dR/dw|. Each round scores the network pruned so far and keeps the best: after round k of
    n, a share d^(k / n) of the weights, d being the density to reach. Pruning at once would cut off whole layers; in
    rounds, the scores of a layer increase as it gets sparser.

    Departures from the authors' code: they rank all layers together (`jointly=True`); here, by default, the plan's
    counts hold in each layer, and the rounds lead each layer there from its full size. Counts are exact. A pruned
    weight never comes back. The authors compute in float64; in float32 the flow of a deep network may overflow.
    In this case use smaller inputs or scaled weights: a factor changes no ranking within a layer, and none over all
    layers in a network without biases. A loss that returns the log of the sum gives the same ranking too.

    Training FLOPs a step: 3 f_S, after `rounds` gradients for a single input.

    Args:
      plan: from `make_plan`.
      loss: `params -> scalar`, R: the sum of the network's outputs for one input of ones, evaluated with normalisation
        layers in inference mode. It is called with the magnitudes of the masked params (of all leaves).
      rounds: at least 1; 1 prunes at once.
      jointly: one ranking over all layers; needs unstructured leaves.
      min_active: the least number of weights that stay in each leaf; only with `jointly`.

    >>> import jax, jax.numpy as jnp, rigl_jax as rx
    >>> params = {"a": jnp.array([[1.0, -2.0]]), "b": jnp.array([[3.0], [1.0]])}  # flow: 1 * 3 + 2 * 1
    >>> algorithm = synflow(rx.make_plan(params, 0.5, rx.uniform), loss=lambda p: (p["a"] @ p["b"]).sum(), rounds=2)
    >>> jax.tree.map(jnp.ravel, algorithm.init(jax.random.key(0), params).masks)
    {'a': Array([ True, False], dtype=bool), 'b': Array([ True, False], dtype=bool)}
    """
    flow = losses.at("synflow", of_params("synflow", loss))
    criterion = criteria.synflow(lambda params, batch: [flow(params, batch)])  # outputs of which R is the sum
    return prune_at_init("synflow", plan, lambda key: criterion, None, rounds, jointly, min_active)
