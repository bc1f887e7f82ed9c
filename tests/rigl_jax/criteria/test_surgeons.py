"""OBS and M-FAC against dense inverses; a quadratic loss says what each removal must cost."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import rigl_jax as rx
from rigl_jax.criteria.m_fac import inverse_fisher
from tests.errors import refused

RNG = np.random.default_rng(0)
A = RNG.normal(size=(12, 12))
HESSIAN = A @ A.T / 12 + 0.1 * np.eye(12)
AT = RNG.normal(size=12)
PARAMS = {"a": AT[:8].reshape(2, 4), "bias": AT[8:]}
ROWS = RNG.normal(size=(6, 12))


@pytest.fixture(autouse=True)
def wide():
    with jax.enable_x64(True):
        yield


def flat(params):
    return np.concatenate([np.ravel(params["a"]), np.ravel(params["bias"])])


def loss(params, batch):
    away = jnp.concatenate([params["a"].ravel(), params["bias"]]) - AT
    return away @ HESSIAN @ away / 2


def planned(n_active, structure=None):
    plan = rx.make_plan(PARAMS, 0.5, rules=[("a", structure or rx.unstructured()), ("bias", None)])
    return {"a": plan["a"]._replace(n_active=n_active)}


def pruned(surgeon, n_active, structure=None, batch=None, **options):
    params = jax.tree.map(jnp.asarray, PARAMS)
    return rx.prune(planned(n_active, structure), params, surgeon, batch, **options)


def best_without(gone):
    """The least loss with these weights at 0, and where it is."""
    stay = [i for i in range(12) if i not in gone]
    w = np.zeros(12)
    w[stay] = np.linalg.solve(HESSIAN[np.ix_(stay, stay)], (HESSIAN @ AT)[stay])
    return (w - AT) @ HESSIAN @ (w - AT) / 2, w


def test_obs_removes_the_weight_whose_loss_can_be_made_up_for_best_one_after_the_other():
    gone = []
    for n in range(7, 3, -1):
        gone.append(min((i for i in range(8) if i not in gone), key=lambda i: best_without([*gone, i])[0]))
        found = pruned(rx.criteria.obs(loss, 1e-12), n)
        assert set(np.flatnonzero(~np.asarray(found.masks["a"]).ravel())) == set(gone)
        np.testing.assert_allclose(flat(found.params), best_without(gone)[1], atol=1e-8)


def test_one_removal_by_obs_costs_no_more_than_by_obd_and_its_cost_is_the_rise():
    obs, obd = pruned(rx.criteria.obs(loss, 1e-12), 7), pruned(rx.criteria.obd(loss), 7)
    inverse = np.linalg.inv(HESSIAN)
    np.testing.assert_allclose(loss(obs.params, None), np.min(AT[:8] ** 2 / 2 / np.diag(inverse)[:8]))
    np.testing.assert_allclose(loss(obd.params, None), np.min(AT[:8] ** 2 / 2 * np.diag(HESSIAN)[:8]))
    assert loss(obs.params, None) <= loss(obd.params, None)


@pytest.mark.parametrize("structure", [rx.fan_in(), rx.n_of_m(2, 4, axis=1)])
def test_obs_keeps_the_counts_of_groups_and_given_masks(structure):
    n = 1 if structure.name == "fan_in" else 2
    found = pruned(rx.criteria.obs(loss), n, structure)
    gone = np.flatnonzero(~np.asarray(found.masks["a"]).ravel())
    np.testing.assert_allclose(flat(found.params), best_without(gone)[1], atol=1e-2)
    start = rx.prune(planned(6), PARAMS)
    further = pruned(rx.criteria.obs(loss), 3, masks=start.masks, rounds=2)
    assert not np.any(further.masks["a"] & ~start.masks["a"])


def test_of_equal_costs_the_later_weight_goes():
    total = lambda params, batch: jnp.sum(params["a"] ** 2)  # noqa: E731
    params = {"a": jnp.ones((2, 4)), "bias": jnp.ones(4)}
    flatness = lambda params, batch: total(params, batch) + jnp.sum(params["bias"] ** 2)  # noqa: E731
    found = rx.prune(planned(3), params, rx.criteria.obs(flatness))
    assert np.asarray(found.masks["a"]).ravel().tolist() == [True] * 3 + [False] * 5


def fisher(rows, damping, block=None):
    dense = rows.T @ rows / len(rows)
    at = np.arange(rows.shape[1]) // (block or rows.shape[1])
    return np.where(at[:, None] == at, dense, 0) + damping * np.eye(rows.shape[1])


@pytest.mark.parametrize("block", [None, 5, 4, 1])
def test_the_inverse_is_that_of_the_dense_matrix_and_of_the_recursion(block):
    damping, x = 1e-3, RNG.normal(size=12)
    inverse, dense = inverse_fisher(ROWS, damping, block), np.linalg.inv(fisher(ROWS, damping, block))
    np.testing.assert_allclose(inverse.product(x), dense @ x, rtol=1e-8)
    np.testing.assert_allclose(inverse.diagonal, np.diag(dense), rtol=1e-8)
    other = inverse_fisher(ROWS[::-1], damping, block)
    np.testing.assert_allclose(other.diagonal, inverse.diagonal, rtol=1e-8)
    if block is None:  # the authors' algorithm 1
        directions, scales = [], []
        apply = lambda x: x / damping - sum(v * (v @ x) / q for v, q in zip(directions, scales, strict=True))  # noqa: E731
        for g in ROWS:
            v = apply(g)
            directions, scales = [*directions, v], [*scales, len(ROWS) + g @ v]
        np.testing.assert_allclose(apply(x), inverse.product(x), rtol=1e-7)


def slopes(params, batch):
    """The gradient of an example is the example."""
    return jnp.mean(batch @ jnp.concatenate([params["a"].ravel(), params["bias"]]))


def bent(params, batch):
    """Its gradients depend on the weights."""
    return jnp.mean(jnp.sin(batch @ jnp.concatenate([params["a"].ravel(), params["bias"]])))


@pytest.mark.parametrize("n_active", [7, 4])
def test_m_fac_in_one_step_is_its_formula(n_active):
    inverse = np.linalg.inv(fisher(ROWS[:, :8], 1e-2))
    w = AT[:8]
    gone = np.sort(np.argsort(w**2 / np.diag(inverse))[: 8 - n_active])
    found = pruned(rx.criteria.m_fac(slopes, 1e-2, None, 1, size=1), n_active, batch=jnp.asarray(ROWS))
    assert np.flatnonzero(~np.asarray(found.masks["a"]).ravel()).tolist() == gone.tolist()
    moved = w - sum(inverse[:, q] * w[q] / inverse[q, q] for q in gone)
    np.testing.assert_allclose(np.ravel(found.params["a"]), np.where(np.isin(np.arange(8), gone), 0, moved), rtol=1e-7)
    np.testing.assert_array_equal(found.params["bias"], PARAMS["bias"])


def test_m_fac_blocks_are_of_the_weights_that_are_left_and_steps_begin_anew():
    """Blocks of 3 in 6 weights that are left; two steps are two prunings, each with its own gradients."""
    batch, surgeon = jnp.asarray(ROWS), lambda steps: rx.criteria.m_fac(bent, 1e-2, 3, steps, size=1)
    start = rx.prune(planned(6), jax.tree.map(jnp.asarray, PARAMS))
    here = np.flatnonzero(np.asarray(start.masks["a"]).ravel())
    w = np.ravel(start.params["a"])[here]
    inverse = np.linalg.inv(
        fisher(
            np.asarray(jax.vmap(jax.grad(bent), (None, 0))(start.params, batch[:, None])["a"]).reshape(6, 8)[:, here],
            1e-2,
            3,
        )
    )
    once = rx.prune(planned(5), start.params, surgeon(1), batch, masks=start.masks)
    q = int(np.argmin(w**2 / np.diag(inverse)))
    np.testing.assert_allclose(np.ravel(once.params["a"])[here], w - inverse[:, q] * w[q] / inverse[q, q], atol=1e-12)
    first = rx.prune(planned(3), start.params, surgeon(1), batch, masks=start.masks)  # 6, 3, 2: geometric
    second = rx.prune(planned(2), first.params, surgeon(1), batch, masks=first.masks)
    both = rx.prune(planned(2), start.params, surgeon(2), batch, masks=start.masks)
    np.testing.assert_allclose(both.params["a"], second.params["a"], atol=1e-12)


def test_m_fac_with_much_damping_is_magnitude():
    batch = jnp.asarray(ROWS)
    for structure, n in ((rx.unstructured(), 3), (rx.fan_in(), 1), (rx.block(2, 2), 1), (rx.channel(), 2)):
        found = pruned(rx.criteria.m_fac(slopes, 1e9, 4, 2, size=3), n, structure, batch)
        squares = lambda params, batch: jax.tree.map(jnp.square, params)  # noqa: E731
        expected = pruned(squares, n, structure, batch, rounds=2)
        np.testing.assert_array_equal(found.masks["a"], expected.masks["a"])
        np.testing.assert_allclose(found.params["a"], expected.params["a"], rtol=1e-6)


def test_surgeons_leave_a_trained_network_with_less_loss_than_magnitude():
    """A regression on inputs that depend on each other, at its minimum."""
    x = RNG.normal(size=(256, 5)) @ RNG.normal(size=(5, 20)) + RNG.normal(size=(256, 20)) / 5
    y = x @ RNG.normal(size=(20, 4)) + RNG.normal(size=(256, 4))
    params = {"w": jnp.asarray(np.linalg.lstsq(x, y)[0])}
    fit = lambda p, batch: jnp.mean(jnp.sum((batch[0] @ p["w"] - batch[1]) ** 2, -1)) / 2  # noqa: E731
    plan, batch = rx.make_plan(params, 0.5), (jnp.asarray(x), jnp.asarray(y))
    found = {
        name: float(fit(rx.prune(plan, params, surgeon, batch).params, batch))
        for name, surgeon in (
            ("magnitude", rx.criteria.magnitude),
            ("m_fac", rx.criteria.m_fac(fit, 1e-4, 128, 8, size=1)),
            ("obs", rx.criteria.obs(fit, 1e-6)),
        )
    }
    assert found["obs"] < found["m_fac"] < found["magnitude"], found


def test_bad_input():
    flat_plan = rx.make_plan(PARAMS, 0.5, rules=[("a", rx.block(2, 2)), ("bias", None)])
    for call, words in (
        (lambda: rx.criteria.obs(None), "loss"),
        (lambda: rx.criteria.obs(len, 0.0), "damping"),
        (lambda: rx.prune(flat_plan, PARAMS, rx.criteria.obs(loss)), "a"),
        (lambda: pruned(rx.criteria.obs(lambda p, b: -loss(p, b)), 4), "damping"),
        (lambda: rx.criteria.m_fac(None), "loss"),
        *(
            (lambda options=options: rx.criteria.m_fac(len, **options), name)
            for name, options in zip(
                ("damping", "block", "steps", "size"),
                ({"damping": -1}, {"block": 0}, {"steps": 0}, {"size": 0}),
                strict=True,
            )
        ),
        (lambda: pruned(rx.criteria.m_fac(slopes, size=4), 4, batch=jnp.asarray(ROWS)), "batch"),
    ):
        with refused(words):
            call()
