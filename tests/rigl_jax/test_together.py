"""Leaves ranked by one search, as accelerators do it, against each leaf ranked by itself."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import rigl_jax as rx
from rigl_jax import topology
from rigl_jax.topology import together

SHAPES = {"a": (5, 7), "b": (40,), "c": (3, 4, 8), "d": (65, 8), "e": (8, 6), "g": (9, 9), "h": (65, 2)}
STRUCTURES = {"c": rx.block(2, 4, rx.Axes((1,), (2,), window=(0,))), "e": rx.n_of_m(2, 4, 0)}
SHORT = ("g", "h")  # in bfloat16


def tree(seed):
    """Scores with many ties, infinities and NaN."""
    rng = np.random.default_rng(seed)
    found = {}
    for name, shape in SHAPES.items():
        x = np.round(rng.standard_normal(shape) * 2).astype(np.float32)
        x[rng.random(shape) < 0.1] = rng.choice([np.nan, np.inf, -np.inf, -0.0])
        found[name] = jnp.asarray(x, jnp.bfloat16 if name in SHORT else jnp.float32)
    return found


@pytest.fixture
def accelerator(monkeypatch):
    monkeypatch.setattr(together, "digit_bits", lambda: 4)
    monkeypatch.setattr(jax, "device_count", lambda: 1)
    monkeypatch.setattr(together, "ROW", 16)
    monkeypatch.setattr(together, "MOST", 400)  # less than "d" has


def test_masks_are_those_of_leaf_by_leaf(request, monkeypatch):
    rules = tuple((name, STRUCTURES.get(name, rx.unstructured())) for name in SHAPES)
    plan = rx.make_plan({n: jax.ShapeDtypeStruct(s, "float32") for n, s in SHAPES.items()}, 0.5, rules=rules)
    masks = topology.random_masks(plan, jax.random.key(0), tree(0))

    def leaf_by_leaf(masks, drop, grow):
        return {n: topology.rewire(leaf.structure, masks[n], drop[n], grow[n], 9) for n, leaf in plan.items()}

    expected = jax.jit(leaf_by_leaf)(masks, tree(1), tree(2))
    request.getfixturevalue("accelerator")
    searched, search = [], together._search
    monkeypatch.setattr(together, "_search", lambda *args: searched.append(int(args[3].max()) + 1) or search(*args))

    def at_once(masks, drop, grow):
        steps = lambda leaf, *x: topology.leaf.rewiring(leaf.structure, *x, 9, None, True)  # noqa: E731
        return together.map_selections(steps, plan, masks, drop, grow)

    got = jax.jit(at_once)(masks, tree(1), tree(2))
    jax.tree.map(np.testing.assert_array_equal, got, expected)
    assert searched == [4, 2, 3]  # leaves in a search of float32 when dropping, of bfloat16, of float32 when growing
