"""Paths, rules and maps over pytrees in which some leaves are sparse and the others are None."""

from __future__ import annotations

import difflib
import re
import zlib
from collections.abc import Callable, Iterable, Sequence
from typing import Any, TypeVar

import jax
import jax.numpy as jnp
import optax

from rigl_jax.base import Array, Plan, PyTree
from rigl_jax.messages import listed, shown

T = TypeVar("T")


def names(tree: PyTree) -> PyTree:
    """A tree parallel to `tree` whose leaves are their own paths, `"Dense_0/kernel"`.

    NNX wraps each array in a variable; its trailing `value` is left out, so a name does not depend on which side
    of `nnx.split` a tree comes from.

    >>> names({"Dense_0": {"kernel": 1, "bias": 2}})
    {'Dense_0': {'bias': 'Dense_0/bias', 'kernel': 'Dense_0/kernel'}}
    """
    return jax.tree_util.tree_map_with_path(lambda path, _: _name(path), tree)


def _name(path: Sequence[Any]) -> str:
    if len(path) > 1 and str(path[-1]) == ".value":
        path = path[:-1]
    return jax.tree_util.keystr(tuple(path), simple=True, separator="/")


def named_leaves(tree: PyTree) -> dict[str, Any]:
    """`{"a/b/kernel": leaf}` in pytree order.

    Raises:
      ValueError: two leaves of one name, such as a key "a/b" beside a dict "a" with a key "b"; names both.
    """
    pairs = jax.tree_util.tree_leaves_with_path(tree)
    found = {_name(path): leaf for path, leaf in pairs}
    if len(found) < len(pairs):
        _refuse_twins([path for path, _ in pairs])
    return found


def _refuse_twins(paths: Iterable[Sequence[Any]]) -> None:
    seen: dict[str, Sequence[Any]] = {}
    for path in paths:
        if (name := _name(path)) in seen:
            both = " and ".join(jax.tree_util.keystr(tuple(twin)) for twin in (seen[name], path))
            raise ValueError(f"params: each leaf must have a name of its own, got {name!r} for both {both}; rename one")
        seen[name] = path


def named_shapes(tree: PyTree) -> dict[str, tuple[int, ...]]:
    """`{name: shape}` of any tree, such as an optimizer's state, where twins do no harm."""
    return {_name(path): jnp.shape(leaf) for path, leaf in jax.tree_util.tree_leaves_with_path(tree)}


def aligned(masks: PyTree, tree: PyTree) -> PyTree:
    """Masks found by name as a tree parallel to `tree`, None where there is none.

    So masks serve the same weights in another container, and those of a `sparsify` within `optax.partition`, which
    hold an `optax.MaskedNode` where it sees no weight.
    """
    found = named_leaves(masks)
    return jax.tree_util.tree_map_with_path(lambda path, _: found.get(_name(path)), tree)


def uncovered(masks: PyTree, tree: PyTree) -> list[str]:
    """Names of the leaves for which masks hold neither a mask nor, there or above, a None or `optax.MaskedNode`."""
    is_dense = lambda x: x is None or isinstance(x, optax.MaskedNode)  # noqa: E731
    known = {_name(path) for path, _ in jax.tree_util.tree_leaves_with_path(masks, is_leaf=is_dense) if path}
    paths = [path for path, _ in jax.tree_util.tree_leaves_with_path(tree)]
    return [_name(p) for p in paths if p and not any(_name(p[:i]) in known for i in range(len(p), 0, -1))]


def types(tree: PyTree) -> tuple[Any, list[Any]]:
    """Structure, shapes and types of a tree of arrays or `jax.ShapeDtypeStruct`, to be compared with another's.

    >>> types({"w": jnp.ones(3)}) == types({"w": jax.ShapeDtypeStruct((3,), "float32")})
    True
    """
    leaves, structure = jax.tree.flatten(tree)
    return structure, [(jnp.shape(leaf), jnp.result_type(leaf)) for leaf in leaves]


def map_sparse(f: Callable[..., Any], plan: Plan, tree: PyTree, *trees: PyTree) -> PyTree:
    """`f(leaf, x, *xs)` where the plan has a `LayerPlan`, None elsewhere. The trees are parallel to params."""

    def one(path: Sequence[Any], *arrays: Any) -> Any:
        leaf = plan.get(_name(path))
        return None if leaf is None else f(leaf, *arrays)

    return jax.tree_util.tree_map_with_path(one, tree, *trees, is_leaf=lambda x: x is None)


def map_masked(f: Callable[..., Any], masks: PyTree, tree: PyTree, *trees: PyTree) -> PyTree:
    """`f(mask, x, *xs)` where there is a mask; `x` itself where the mask is None (a dense leaf).

    The mapping follows `tree`, because a None inside `masks` would otherwise read as an empty subtree.
    """
    return jax.tree.map(lambda x, mask, *xs: x if mask is None else f(mask, x, *xs), tree, masks, *trees)


def leaf_key(key: Array, name: str) -> Array:
    """The leaf's own key: the CRC-32 of its path folded in, equal in every process (unlike `hash`)."""
    return jax.random.fold_in(key, zlib.crc32(name.encode()))


def stored_key(key: Array) -> Array:
    """A copy of a key's data, uint32, to keep in a state: files and serialisers know no typed keys."""
    return jnp.copy(jax.random.key_data(key))


def typed_key(stored: Array, like: Array) -> Array:
    """The key of `stored_key`, of the implementation of `like`. A typed one, as older states hold it, as it is."""
    if jnp.issubdtype(stored.dtype, jax.dtypes.prng_key):
        return stored
    return jax.random.wrap_key_data(jnp.asarray(stored), impl=jax.random.key_impl(like))


def explicit_sharding(x: Any) -> Any:
    """The sharding that new arrays beside `x` must be made with, or None where the compiler finds it by itself.

    On a mesh with explicit axes (the default of `jax.make_mesh`) a sharding is part of an array's type, and an array
    made from nothing, as random numbers are, would not fit a sharded weight. Pass it on as `out_sharding`.

    >>> import jax.numpy as jnp
    >>> explicit_sharding(jnp.ones(3)) is None
    True
    """
    sharding = getattr(jax.typeof(x), "sharding", None)
    explicit = sharding is not None and jax.sharding.AxisType.Explicit in sharding.mesh.axis_types
    return sharding if explicit else None


def match(patterns: Iterable[re.Pattern[str]], name: str) -> int | None:
    """Index of the first pattern that matches the whole name, or None."""
    return next((i for i, pattern in enumerate(patterns) if pattern.fullmatch(name)), None)


def first_match(who: str, rules: Sequence[tuple[str, T]], found: Sequence[str]) -> dict[str, T]:
    """`{name: value}` by the first rule whose regular expression matches the whole name.

    Names that no rule matches are left out; what that means is the caller's to say.

    Raises:
      ValueError: a rule that is the first match of no name (a typo, or shadowed by an earlier rule).
    """
    patterns = []  # compiled here: Python's own cache holds 512
    for pattern, _ in rules:
        if not isinstance(pattern, str):
            raise ValueError(f"{who}: {shown(pattern)} is not a regular expression but {type(pattern).__name__}")
        try:
            patterns.append(re.compile(pattern))
        except re.error as error:
            raise ValueError(f"{who}: {shown(pattern)} is not a regular expression: {error}") from None
    index = {name: match(patterns, name) for name in found}
    used = set(index.values())
    for i, (pattern, _) in enumerate(rules):
        if i not in used:
            shadow = [name for name in found if patterns[i].fullmatch(name)]
            why = f"earlier rules take all it matches ({listed(shadow)})" if shadow else "it matches no leaf"
            tip = hint(pattern, found)
            if not shadow and any(map(patterns[i].search, found)):
                why, tip = "it has to match the whole name of a leaf", f"; did you mean {shown(f'.*{pattern}.*')}?"
            raise ValueError(
                f"{who}: the rule {shown(pattern)} applies to nothing: {why}; leaves are {listed(found)}{tip}"
            )
    return {name: rules[i][1] for name, i in index.items() if i is not None}


def nearest(word: str, known: Iterable[str]) -> str | None:
    """The known word closest to a mistyped one, or None."""
    found = difflib.get_close_matches(word, list(known), n=1)
    return found[0] if found else None


def hint(word: str, known: Iterable[str]) -> str:
    """The end of an error about a word that is not among the known: the nearest that is, or nothing.

    >>> hint("kernl", ["kernel", "bias"])
    "; did you mean 'kernel'?"
    """
    near = nearest(word, known)
    return f"; did you mean {re.escape(near) if near == word else near!r}?" if near else ""


def floats(tree: PyTree) -> tuple[list[Any], Callable[[Sequence[Any]], PyTree]]:
    """The floating-point leaves of a tree, and the function that puts others in their place.

    >>> leaves, join = floats({"w": 1.5, "steps": 3})
    >>> join([2 * x for x in leaves])
    {'steps': 3, 'w': 3.0}
    """
    leaves, treedef = jax.tree.flatten(tree)
    places = [i for i, leaf in enumerate(leaves) if jnp.issubdtype(jnp.result_type(leaf), jnp.floating)]

    def join(given: Sequence[Any]) -> PyTree:
        joined = list(leaves)
        for i, leaf in zip(places, given, strict=True):
            joined[i] = leaf
        return treedef.unflatten(joined)

    return [leaves[i] for i in places], join
