"""Leaves are known by name: distinct ones have distinct names, and masks find their weights in any container."""

import collections

import jax
import jax.numpy as jnp
import pytest

import rigl_jax as rx
from tests.errors import refused

W = jnp.ones((4, 4))
TWINS = {
    "slash": {"a/b": W, "a": {"b": W}},
    "number": collections.OrderedDict([(0, W), ("0", W)]),
    "deeper": {"x": {"a/b/c": W, "a": {"b/c": W}}},
}


@pytest.mark.parametrize("tree", TWINS)
@pytest.mark.parametrize(
    "function",
    [
        lambda p: rx.make_plan(p, 0.5),
        lambda p: rx.apply_masks(p, jax.tree.map(lambda _: None, p)),
        rx.trees.named_leaves,
    ],
)
def test_two_leaves_of_one_name_are_both_told(function, tree):
    with refused("[0] and ['0']" if tree == "number" else "a/b"):
        function(TWINS[tree])


@pytest.mark.parametrize("tree", [{"a.b": W, "a": {"b": W}}, {"a/b": W, "c": {"b": W}}, [{"0": W}, W]])
def test_names_that_only_look_alike_are_kept_apart(tree):
    plan = rx.make_plan(tree, 0.5)
    assert sum(leaf.n_active for leaf in plan.values()) == 16
    assert len(plan) == 2
