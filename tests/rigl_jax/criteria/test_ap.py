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


def test_on_top_of_any_pruner():
    plan = rx.make_plan({"w": TRAINED}, 0.5, rules=[("w", rx.unstructured())])
    aim = {"w": plan["w"]._replace(n_active=7)}
    both = rx.prune(aim, {"w": TRAINED}, rx.criteria.activating(rx.criteria.magnitude, {"w": START}, 2 / 3))
    assert np.asarray(both.masks["w"]).astype(int).tolist() == [1, 0, 1, 1, 1, 0, 1, 1, 1, 0]
    alone = rx.prune(aim, {"w": TRAINED}, rx.criteria.activating(rx.criteria.magnitude, {"w": START}, 0))
    np.testing.assert_array_equal(alone.masks["w"], rx.prune(aim, {"w": TRAINED}).masks["w"])
    # Of 8 that go by the rule only 5 are negative; the smallest of the rest make up for it.
    most = rx.prune(
        {"w": plan["w"]._replace(n_active=2)},
        {"w": TRAINED},
        rx.criteria.activating(rx.criteria.magnitude, {"w": START}, 1),
    )
    assert np.flatnonzero(most.masks["w"]).tolist() == [0, 8]


def test_fewer_negative_weights_leave_fewer_units_silent():
    """Inputs are not negative: no pre-activation falls, so no ReLU falls silent (of one layer, before rewinding)."""
    rng = np.random.default_rng(0)
    x, w = np.abs(rng.normal(size=(50, 20))), rng.normal(size=(20, 30))
    params = {"w": jnp.asarray(w, jnp.float32)}
    base = rx.prune(rx.make_plan(params, 0.5), params)
    rule = rx.criteria.least_moved_negative({"w": jnp.zeros_like(params["w"])})
    both = rx.prune(rx.make_plan(params, 0.7), base.params, rule, masks=base.masks)
    before, after = (x @ np.asarray(pruned.params["w"]) for pruned in (base, both))
    assert np.all(after >= before - 1e-5)
    assert np.mean(after <= 0) < np.mean(before <= 0)
