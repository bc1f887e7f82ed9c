"""The rule of AP on top of magnitude, by the numbers of a round of ten weights."""

import jax.numpy as jnp
import numpy as np

import rigl_jax as rx

START = jnp.array([0.5, -0.2, 0.3, -0.4, 0.1, -0.6, 0.25, -0.15, 0.7, -0.05])
TRAINED = jnp.array([0.6, -0.25, 0.05, -0.1, 0.12, -0.62, 0.2, -0.5, 0.9, -0.02])


def test_a_round_removes_the_smallest_and_then_the_negative_weights_that_moved_least():
    plan = rx.make_plan({"w": TRAINED}, 0.5, rules=[("w", rx.unstructured())])
    at = lambda n: {"w": plan["w"]._replace(n_active=n)}  # noqa: E731
    base = rx.prune(at(9), {"w": TRAINED}, scope="global")
    assert np.flatnonzero(~np.asarray(base.masks["w"])).tolist() == [9]
    rule = rx.criteria.least_moved_negative({"w": START})
    both = rx.prune(at(7), base.params, rule, masks=base.masks, scope="global")
    assert np.asarray(both.masks["w"]).astype(int).tolist() == [1, 0, 1, 1, 1, 0, 1, 1, 1, 0]
