"""Criteria from inputs, and SparseGPT against the authors' loops written in NumPy with explicit inverses."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import rigl_jax as rx
from rigl_jax.criteria.sparsegpt import sparsegpt
from tests.errors import refused

RNG = np.random.default_rng(0)
MIXED = np.eye(8) + RNG.normal(size=(8, 8)) / 2  # inputs that depend on each other
X = RNG.normal(size=(40, 8)) @ MIXED
W = RNG.normal(size=(8, 6))


@pytest.fixture(autouse=True)
def wide():
    with jax.enable_x64(True):
        yield


def linear(params, x):
    return x @ params["w"]


def transposed(params, x):
    return jnp.einsum("nsi,soi->nso", x, params["w"])


def scored(criterion, params, x):
    return jax.jit(criterion)(jax.tree.map(jnp.asarray, params), jnp.asarray(x))


def test_wanda_of_a_layer_a_stack_and_a_convolution():
    norms = np.linalg.norm(X, axis=0)
    np.testing.assert_allclose(scored(rx.criteria.wanda(linear), {"w": W}, X)["w"], np.abs(W) * norms[:, None])
    x, w = RNG.normal(size=(5, 3, 4)), RNG.normal(size=(3, 2, 4))
    found = scored(rx.criteria.wanda(transposed), {"w": w}, x)["w"]
    np.testing.assert_allclose(found, np.abs(w) * np.linalg.norm(x, axis=0)[:, None, :])
    image, kernel = RNG.normal(size=(2, 7, 3)), RNG.normal(size=(2, 3, 4))
    conv = lambda p, x: jax.lax.conv_general_dilated(x, p["w"], (2,), "VALID", dimension_numbers=("NWC", "WIO", "NWC"))  # noqa: E731
    patches = np.stack([image[:, i : i + 2] for i in (0, 2, 4)], 1)
    np.testing.assert_allclose(
        scored(rx.criteria.wanda(conv), {"w": kernel}, image)["w"],
        np.abs(kernel) * np.sqrt((patches**2).sum((0, 1)))[:, :, None],
    )


def test_wanda_of_inputs_of_one_size_is_magnitude_and_uses_add_up():
    twice = lambda p, x: (x @ p["w"], (2 * x) @ p["w"], p["b"])  # noqa: E731
    found = scored(rx.criteria.wanda(twice), {"w": W, "b": W[0]}, np.ones((4, 8)))
    np.testing.assert_allclose(found["w"], np.abs(W) * np.sqrt(4 + 16))
    np.testing.assert_array_equal(found["b"], np.abs(W[0]))


def test_mean_activation_takes_the_mean_first():
    """ShrinkBench's numbers, and two products with one leaf."""
    found = scored(rx.criteria.mean_activation(linear), {"w": np.ones((2, 3))}, np.array([[1.0, 2.0], [-1.0, 4.0]]))
    np.testing.assert_array_equal(found["w"], [[0.0] * 3, [3.0] * 3])
    twice = lambda p, x: (x @ p["w"], (-3 * x[:10]) @ p["w"])  # noqa: E731
    mean = np.abs(X.sum(0) - 3 * X[:10].sum(0)) / 50
    np.testing.assert_allclose(scored(rx.criteria.mean_activation(twice), {"w": W}, X)["w"], np.abs(W) * mean[:, None])


def shares():
    parts = np.mean(np.abs(X), 0)[:, None] * np.abs(W)
    return parts / parts.sum(0)


def test_nnrelief_is_the_share_of_the_output():
    np.testing.assert_allclose(scored(rx.criteria.nnrelief(linear), {"w": W}, X)["w"], shares())
    scale = np.exp(RNG.normal(size=8))
    found = scored(rx.criteria.nnrelief(linear), {"w": W / scale[:, None]}, X * scale)["w"]
    np.testing.assert_allclose(found, shares())


@pytest.mark.parametrize("mass", [0.5, 0.8, 0.95, 1.0])
def test_the_mass_that_is_kept_is_enough_and_no_weight_could_go(mass):
    """And outputs change by no more than what went (the triangle inequality)."""
    plan = rx.make_plan({"w": W}, 0.5, rules=[("w", rx.fan_in())])
    mask = np.asarray(rx.criteria.keep_mass(plan, {"w": shares()}, mass)["w"])
    kept = np.where(mask, shares(), 0)
    assert np.all(kept.sum(0) >= mass - 1e-12)
    assert np.all(kept.sum(0) - np.where(mask, shares(), np.inf).min(0) < mass)
    change = np.abs(X @ np.where(mask, 0, W)).mean(0)
    total = (np.mean(np.abs(X), 0)[:, None] * np.abs(W)).sum(0)
    assert np.all(change <= (1 - mass) * total + 1e-12)
    assert mask.all() == (mass == 1.0)


def test_the_mass_of_the_authors_examples_and_of_nothing():
    plan = rx.make_plan({"w": np.ones((4, 1))}, 0.5, rules=[("w", rx.fan_in())])
    keep = lambda scores, mass: rx.criteria.keep_mass(plan, {"w": np.array(scores)[:, None]}, mass)["w"][:, 0].tolist()  # noqa: E731
    assert keep([0.4, 0.3, 0.2, 0.1], 0.95) == [True] * 4
    assert keep([0.25] * 4, 0.5) == [True, True, False, False]
    assert keep([0.0] * 4, 0.5) == [False] * 4
    with refused("w"):
        keep([-1.0, 1.0, 1.0, 1.0], 0.5)
    with refused("mass"):
        keep([1.0] * 4, 1.5)


def reference(w, x, keep, block, mask=None):
    """SparseGPT: `keep(scores of a block of inputs, first input) -> bool`, or a mask that is given. Damping 0.01."""
    w, h = w.copy(), x.T @ x
    dead = np.diag(h) == 0
    h[dead, dead] = 1
    w[dead] = 0
    h += 0.01 * np.mean(np.diag(x.T @ x)) * np.eye(len(h))
    kept = np.zeros(w.shape, bool)
    for start in range(0, len(w), block):
        for i in range(start, min(start + block, len(w))):
            inverse = np.linalg.inv(h[i:, i:])  # without the inputs before
            if i == start:
                here = slice(start, start + block)
                costs = np.array([np.linalg.inv(h[j:, j:])[0, 0] for j in range(*here.indices(len(w)))])
                kept[here] = keep(w[here] ** 2 / costs[:, None], start) if mask is None else mask[here]
            gone = np.where(kept[i], 0, w[i])
            w[i:] -= np.outer(inverse[:, 0] / inverse[0, 0], gone)
    return np.where(kept, w, 0), kept


def best(scores, n):
    kept = np.zeros(scores.size, bool)
    kept[np.argsort(-scores.ravel(), kind="stable")[:n]] = True
    return kept.reshape(scores.shape)


def pruned(rule, sparsity=0.5, block=128, w=W, x=X, apply=linear, **options):
    params = {"w": jnp.asarray(w)}
    plan = rx.make_plan(params, sparsity, rules=[("w", rule)], apply=apply, inputs=(jnp.asarray(x),))
    return rx.prune(plan, params, sparsegpt(apply, block=block), jnp.asarray(x), **options)


@pytest.mark.parametrize("block", [8, 4, 3])
def test_sparsegpt_unstructured_is_the_authors_algorithm(block):
    found = pruned(rx.unstructured(), block=block)
    ends = np.rint(24 * np.minimum(np.arange(0, 8 + block, block), 8) / 8)
    expected, kept = reference(W, X, lambda s, start: best(s, int(np.diff(ends)[start // block])), block)
    np.testing.assert_array_equal(found.masks["w"], kept)
    np.testing.assert_allclose(found.params["w"], expected, atol=1e-10)


def test_sparsegpt_changes_the_outputs_less_than_magnitude_where_inputs_depend_on_each_other():
    x, w = RNG.normal(size=(100, 8)) @ RNG.normal(size=(8, 40)), RNG.normal(size=(40, 6))
    x += RNG.normal(size=x.shape) / 10
    change = lambda kept: np.sum((x @ (np.asarray(kept) - w)) ** 2)  # noqa: E731
    assert change(pruned(rx.unstructured(), w=w, x=x).params["w"]) < change(np.where(best(np.abs(w), 120), w, 0)) / 5


def test_sparsegpt_of_two_in_four_is_the_authors_algorithm():
    found = pruned(rx.n_of_m(2, 4, axis=0))
    expected, kept = reference(W, X, lambda s, start: np.stack([best(c, 2) for c in s.T], 1), 4)
    np.testing.assert_array_equal(found.masks["w"], kept)
    np.testing.assert_allclose(found.params["w"], expected, atol=1e-10)


@pytest.mark.parametrize("structure", [rx.fan_in(), rx.block(2, 2), rx.channel(), rx.n_of_m(2, 4, axis=1)])
def test_sparsegpt_moves_the_weights_as_the_mask_demands_in_every_structure(structure):
    found = pruned(structure, w=W[:, :4], block=3)
    kept = np.asarray(found.masks["w"])
    expected, _ = reference(W[:, :4], X, None, 1, mask=kept)
    np.testing.assert_allclose(found.params["w"], expected, atol=1e-10)


def test_sparsegpt_layer_by_layer_in_the_order_of_execution_and_with_masks():
    """Names are against the order; an input is silent; a stack is pruned layer by layer; what was pruned stays."""
    x = X * (np.arange(8) != 2)
    two = lambda p, x: jax.nn.relu(x @ p["z"]) @ p["a"]  # noqa: E731
    params = {"z": jnp.asarray(W), "a": jnp.asarray(W[:6, :4])}
    plan = rx.make_plan(params, 0.5, rx.uniform)
    first = rx.prune(plan, params, sparsegpt(two), x)
    half = lambda s, start: best(s, s.size // 2)  # noqa: E731
    expected, _ = reference(W, x, half, 8)
    np.testing.assert_allclose(first.params["z"], expected, atol=1e-10)
    hidden = np.maximum(x @ expected, 0)
    np.testing.assert_allclose(first.params["a"], reference(W[:6, :4], hidden, half, 6)[0], atol=1e-10)
    further = rx.make_plan(params, 0.75, rx.uniform)
    second = rx.prune(further, first.params, sparsegpt(two), x, masks=first.masks)
    rx.check_masked(second.params, second.masks, further)
    assert not np.any(second.masks["z"] & ~first.masks["z"])


def test_sparsegpt_of_a_stack_and_of_a_convolution():
    x, w = RNG.normal(size=(20, 3, 4)), RNG.normal(size=(3, 2, 4))
    found = pruned(rx.unstructured(), w=w, x=x, apply=transposed)
    for k in range(3):
        expected, _ = reference(w[k].T, x[:, k], lambda s, start: best(s, 4), 4)
        np.testing.assert_allclose(found.params["w"][k].T, expected, atol=1e-10)
    image, kernel = RNG.normal(size=(9, 6, 4)), RNG.normal(size=(2, 4, 3))
    conv = lambda p, x: jax.lax.conv_general_dilated(x, p["w"], (1,), "VALID", dimension_numbers=("NWC", "WIO", "NWC"))  # noqa: E731
    found = pruned(rx.n_of_m(2, 4, axis=1), w=kernel, x=image, apply=conv)
    assert np.all(np.sum(found.masks["w"], 1) == 2)
    patches = np.stack([image[:, i : i + 2] for i in range(5)], 1).transpose(0, 1, 3, 2).reshape(45, 8)
    matrix = lambda a: np.asarray(a).transpose(1, 0, 2).reshape(8, 3)  # noqa: E731
    expected, _ = reference(matrix(kernel), patches, None, 1, mask=matrix(found.masks["w"]))
    np.testing.assert_allclose(matrix(found.params["w"]), expected, atol=1e-10)


def test_arguments_are_checked():
    for make, words in (
        (lambda: rx.criteria.wanda(None), "apply"),
        (lambda: rx.criteria.nnrelief(3), "apply"),
        (lambda: sparsegpt(3), "apply"),
        (lambda: sparsegpt(len, 0.0), "damping"),
        (lambda: sparsegpt(len, block=0), "block"),
    ):
        with refused(words):
            make()
    with refused("w"):
        pruned(rx.unstructured(), apply=lambda p, x: jnp.sum(p["w"]) * x, w=W)


def test_what_no_output_depends_on_is_dropped_and_outputs_stay():
    """A unit that nothing reads, an input that is always 0, a ReLU that is never active; layers below follow."""

    def apply(params, x):
        hidden = jax.nn.relu(x @ params["a"] + params["bias"][None])
        return jax.nn.relu(hidden @ params["b"]) @ params["c"]

    x = np.abs(X) * (np.arange(8) != 3)
    params = {"a": np.abs(W), "bias": np.full(6, 0.1), "b": np.abs(W[:6, :5]), "c": W[:5, :2]}
    params["a"][:, 2], params["bias"][2] = -1.0, -0.1  # never active
    masks = {"a": np.ones((8, 6), bool), "bias": None, "b": np.ones((6, 5), bool), "c": np.ones((5, 2), bool)}
    masks["c"][4] = False  # nothing reads unit 4 of b,
    masks["b"][1, :4] = False  # which alone reads unit 1 of a
    given = jax.tree.map(jnp.asarray, params)
    left = rx.criteria.clean_up(apply, given, masks, jnp.asarray(x))
    a, b = np.ones((8, 6), bool), masks["b"].copy()
    a[3], a[:, [1, 2]], b[:, 4], b[2] = False, False, False, False
    np.testing.assert_array_equal(left["a"], a)
    np.testing.assert_array_equal(left["b"], b)
    np.testing.assert_array_equal(left["c"], masks["c"])
    assert left["bias"] is None
    before, after = (apply(rx.apply_masks(given, m), x) for m in (masks, left))
    np.testing.assert_allclose(before, after, atol=1e-12)
    with refused("clean_up", "masks"):  # the reader of the silent unit is dense
        rx.criteria.clean_up(apply, given | {"bias": jnp.full(6, 0.1)}, masks | {"b": None}, jnp.asarray(x))
