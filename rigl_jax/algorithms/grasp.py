"""GraSP: prune before training so that the gradient keeps flowing."""

from __future__ import annotations

from collections.abc import Callable

import jax.numpy as jnp

from rigl_jax import scores, topology
from rigl_jax.algorithms import selection
from rigl_jax.algorithms.static import MaskState, static
from rigl_jax.base import Algorithm, Array, Plan, PyTree, Signals


def grasp(
    plan: Plan,
    *,
    loss: Callable[[PyTree], Array],
    jointly: bool = False,
    min_active: int = 1,
) -> Algorithm:
    """GraSP (Wang, Zhang & Grosse 2020): remove the weights with the largest -w (H g), once, in `init`.

    H g is one product of the Hessian with the gradient (`jvp` of `grad`), exact for the loss that is given. The caller
    chooses the data and the temperature: the authors divide the logits by T = 200 and use 10 examples a class.
    Large data sets are split by averaging losses inside `loss`. The score has a sign: what is kept includes weights
    whose removal would hurt the gradient most, and magnitudes play no part.

    Departures from the authors' code: they rank all layers together (`jointly=True`); here, by default, the plan's
    counts hold in each layer. They keep all that ties with the threshold, here the count is exact. They re-draw the
    fully connected weights before scoring; do that to the params, if wanted.

    Training FLOPs a step: 3 f_S, after about 2 gradients of the dense network (6 f_D) on the scoring batch.

    Args:
      plan: from `make_plan`.
      loss: `params -> scalar`, twice differentiable; traced once, in `init`.
      jointly: one ranking over all layers; needs unstructured leaves.
      min_active: so many weights of each leaf stay whatever their score; only with `jointly`.

    >>> import jax
    >>> import rigl_jax as rx
    >>> params = {"w": jnp.array([[1.0, 2.0], [3.0, 4.0]])}  # the loss below has g = w^2 and H = 2 w: w (H g) = 2 w^4
    >>> algorithm = grasp(rx.make_plan(params, 0.5), loss=lambda p: (p["w"] ** 3).sum() / 3)
    >>> algorithm.init(jax.random.key(0), params).masks["w"].tolist()
    [[False, False], [True, True]]
    """
    min_active = selection.check_jointly("grasp", plan, jointly, min_active)
    selection.check_callable("grasp", loss)
    score = scores.gradient_flow(loss)

    def init(key: Array, params: PyTree) -> MaskState:
        topology.check_fit(plan, params)
        selection.check_loss("grasp", loss, params)
        ranked = score(Signals(params, None, jnp.int32(0), key))
        return MaskState(selection.best(plan, ranked, jointly=jointly, min_active=min_active))

    return static(plan)._replace(init=init, keeps_counts=not jointly)
