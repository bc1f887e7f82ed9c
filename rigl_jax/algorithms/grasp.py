"""GraSP: prune before training so that the gradient keeps flowing."""

from __future__ import annotations

from collections.abc import Callable

from rigl_jax import criteria
from rigl_jax.algorithms.one_shot import of_params, prune_at_init
from rigl_jax.base import Algorithm, Array, Plan, PyTree


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
    fully connected weights before scoring; here the caller does this with the params, if wanted.

    Training FLOPs a step: 3 f_S, after about 2 gradients of the dense network (6 f_D) on the scoring batch.

    Args:
      plan: from `make_plan`.
      loss: `params -> scalar`, twice differentiable; traced once, in `init`.
      jointly: one ranking over all layers; needs unstructured leaves.
      min_active: the least number of weights that stay in each leaf; only with `jointly`.

    >>> import jax, jax.numpy as jnp
    >>> import rigl_jax as rx
    >>> params = {"w": jnp.array([[1.0, 2.0], [3.0, 4.0]])}  # the loss below has g = w^2 and H = 2 w: w (H g) = 2 w^4
    >>> algorithm = grasp(rx.make_plan(params, 0.5), loss=lambda p: (p["w"] ** 3).sum() / 3)
    >>> algorithm.init(jax.random.key(0), params).masks["w"].tolist()
    [[False, False], [True, True]]
    """
    criterion = criteria.grasp(of_params("grasp", loss))
    return prune_at_init("grasp", plan, lambda key: criterion, jointly=jointly, min_active=min_active)
