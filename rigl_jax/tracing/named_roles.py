"""The roles of leaves by names, modules and biases, for use without a trace of the model. In this order:

1. The module that contains the leaf, if the tree has modules and not only names (as in Equinox, which is not imported
   for this). A module with `in_features` (or `in_channels` and `kernel_size`) has a kernel (out, in, *window), one with
   `num_embeddings` has a table, and one with `eps` has a scale.
2. The last name of the leaf, and the bias next to it. `kernel`, `w` and unknown names are (*window, in, out), as in
   Flax and Haiku. `weight` is (out, in, *window), as in PyTorch, unless its bias only fits the other order. `bias`,
   `scale`, `offset` and similar names are not kernels; neither are embeddings, positions and tokens, or a weight with
   the shape of its bias. Attributes of unknown modules are kernels with unknown axes. A leaf directly in a module that
   is named as a normalisation (`norm`, `ln`, `rms`) is not a kernel. A leaf of two or three axes directly in a module
   that is named as an embedding (`embed`, `pos`; not `patch_embed`) is a table. In both, a leaf named `kernel`, or with
   a bias of fewer axes, is still a kernel.
3. A bias of several axes: (layers, out) with (layers, in, out) is a stack of layers; (heads, size) with
   (in, heads, size) are several output axes. If neither fits, scan and vmap may have put the layers at another index,
   the same in kernel and bias, counted from the front or the back: (out, layers) with (in, layers, out). If several of
   these fit, none is used. Layers along axes -1 and -2 have the shapes of heads, and the bias does not distinguish
   them; `axes=` or a trace does. Without a bias, three axes may be a stack, heads or a 1-D convolution, and remain
   unknown. `query`, `key`, `value` and the `out` next to them are attention.

A convolution with one input channel for each output is depthwise if there are several of them, or if its path contains
`depthwise` or `dw`. A single one is the first layer for grey images. If the path contains such a word, (out, 1, k, k)
has its outputs first, for every name of the leaf.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from typing import Any, NamedTuple

import jax

from rigl_jax import trees
from rigl_jax.base import Axes, PyTree, Role, Shape
from rigl_jax.structures import n_stacked

ADDED = re.compile(r"bias(es)?|bias_.*|.*_bias|scales?|offset|gamma|beta|mean|var")
TABLE = re.compile(
    r"(?!.*(patch|un)_emb)(.*_)?"
    r"((pos|tok|token|word)?(emb|embeds?|embeddings?)|pos|positions?|(pos|position|positional)_?enc(odings?)?"
    r"|wte|wpe|tokens?)(_?\d+)?"
)
NORM = re.compile(r".*norm(s|\dd|ali[sz]\w+)?(_.*|\d*)|(bn|ln|rms)(_.*|\d*)")
DEPTHWISE = re.compile(r".*depth_?wise.*|(.*_)?dw(_?conv)?_?\d*")

NOT_MULTIPLIED, LOOKED_UP, DEPTHWISE_REASON = "bias or scale", "embedding", "depthwise"


class _Leaf(NamedTuple):
    """What is known about a leaf without a trace."""

    path: tuple[str, ...]  # lower case
    shape: Shape
    module: Any  # that holds it, or None
    siblings: Mapping[str, Shape]  # leaves beside it, by their last name
    attention: bool  # whether its module is beside a query, a key and a value


def named_roles(params: PyTree) -> dict[str, Role]:
    """The roles of the leaves, as far as they are known without the model."""
    leaves = _leaves(params)
    by_module = {name: _of_module(leaf) for name, leaf in leaves.items()}
    found = {name: by_module[name] or _of_name(leaf) for name, leaf in leaves.items()}
    lone = {name for name, leaf in leaves.items() if by_module[name] is None and _one_channel(leaf, found[name])}
    several = sum(n_stacked(leaves[name].shape, found[name].axes) for name in lone) > 1
    for name in lone:
        if several or _depthwise(leaves[name]):
            found[name] = found[name]._replace(dense=DEPTHWISE_REASON)
    return found


def _leaves(params: PyTree) -> dict[str, _Leaf]:
    names = jax.tree.leaves(trees.names(params))
    flat = jax.tree_util.tree_leaves_with_path(params)
    given = [(name, path, x) for name, (path, x) in zip(names, flat, strict=True) if hasattr(x, "shape")]
    parts = {name: tuple(re.split(r"[/.]", name.lower())) for name in names}
    beside: dict[tuple[str, ...], dict[str, Shape]] = {}
    modules: dict[tuple[str, ...], set[str]] = {}
    for name, _, x in given:
        *rest, own = parts[name]
        beside.setdefault(tuple(rest), {})[own] = tuple(x.shape)
        if rest:
            modules.setdefault(tuple(rest[:-1]), set()).add(rest[-1])
    return {
        name: _Leaf(
            parts[name],
            tuple(x.shape),
            _holder(params, path),
            beside[parts[name][:-1]],
            {"query", "key", "value"} <= modules.get(parts[name][:-2], set()),
        )
        for name, path, x in given
    }


def _holder(tree: Any, path: Any) -> Any:
    """The module whose attribute the leaf is, if it is one."""
    if path and str(path[-1]) == ".value":  # NNX wraps each array in a variable
        path = path[:-1]
    if not path or not isinstance(path[-1], jax.tree_util.GetAttrKey):
        return None
    for key in path[:-1]:
        try:
            if isinstance(key, jax.tree_util.GetAttrKey):
                tree = getattr(tree, key.name)
            else:
                tree = tree[key.idx if isinstance(key, jax.tree_util.SequenceKey) else key.key]
        except (AttributeError, KeyError, IndexError, TypeError):
            return None
    return None if isinstance(tree, tuple) else tree


def _of_module(leaf: _Leaf) -> Role | None:
    module, own, n = leaf.module, leaf.path[-1], len(leaf.shape)
    has = lambda *names: all(hasattr(module, name) for name in names)  # noqa: E731
    if module is None or own not in ("weight", "weight_ih", "weight_hh"):
        return None
    if has("num_embeddings"):
        return Role(Axes((n - 2,), (n - 1,), stack=tuple(range(n - 2))), LOOKED_UP)
    if has("eps"):
        return Role(None, NOT_MULTIPLIED)
    window = 0
    if has("in_channels", "kernel_size"):
        window = len(module.kernel_size)
    elif not has("in_features") and own == "weight":
        return None
    axes = _trailing(n, "oi", window)
    if axes is None:
        return None
    groups = getattr(module, "groups", 1)
    depthwise = window and isinstance(groups, int) and groups > 1 and leaf.shape[axes.inputs[0]] == 1
    return Role(axes, DEPTHWISE_REASON if depthwise else None)


def _of_name(leaf: _Leaf) -> Role:
    *_, parent, own = ("", *leaf.path)
    n = len(leaf.shape)
    bias = next((leaf.siblings[b] for b in ("bias", "b") if b in leaf.siblings and b != own), None)
    if ADDED.fullmatch(own) or (own == "b" and n < len(leaf.siblings.get("w", ()))):
        return Role(None, NOT_MULTIPLIED)
    table = Axes((n - 2,), (n - 1,), stack=tuple(range(n - 2))) if n > 1 else None
    token = own == "cls" and math.prod(leaf.shape[:-1]) == 1  # else a classifier
    if TABLE.fullmatch(own) or token:
        return Role(table, LOOKED_UP)
    if any(leaf.siblings.get(added) == leaf.shape for added in ("bias", "offset", "beta")):
        return Role(None, NOT_MULTIPLIED)
    if own != "kernel" and (bias is None or len(bias) >= n):
        if NORM.fullmatch(parent):
            return Role(None, NOT_MULTIPLIED)
        if n in (2, 3) and bias is None and TABLE.fullmatch(parent):
            return Role(table, LOOKED_UP)
    return Role(_layout(leaf, own, parent, bias) if n > 1 else None)


def _layout(leaf: _Leaf, own: str, parent: str, bias: Shape | None) -> Axes | None:
    """The axes by name and bias, None if they are ambiguous."""
    n = len(leaf.shape)
    ask = leaf.module is not None and own != "kernel"  # an attribute of a module that is not known: either way round
    if own in ("kernel", "w") and (attention := _attention(leaf, parent)):
        return attention
    if _depthwise(leaf) and n > 3 and leaf.shape[1] == 1 < leaf.shape[2] and len(set(leaf.shape[2:])) == 1:
        return _trailing(n, "oi", n - 2)
    orders = ["io", "oi"] if ask else ["io"]
    if own == "weight" or own.startswith("weight_"):
        orders = ["oi", "io"]
    fitting = [found for order in orders if (found := _by_bias(leaf.shape, bias, order))]
    if not fitting and bias:
        fitting = [found for order in orders if (found := _by_inner_stack(leaf.shape, bias, order))]
    if fitting:
        return fitting[0][0] if len(fitting[0]) == 1 and not (ask and len(fitting) > 1) else None
    return None if n == 3 or ask else _trailing(n, orders[0], max(n - 2, 0))


def _attention(leaf: _Leaf, parent: str) -> Axes | None:
    n = len(leaf.shape)
    if n < 3 or not leaf.attention:
        return None
    stack = tuple(range(n - 3))
    if parent in ("query", "key", "value"):
        return Axes((n - 3,), (n - 2, n - 1), stack=stack)
    return Axes((n - 3, n - 2), (n - 1,), stack=stack) if parent == "out" else None


def _by_bias(shape: Shape, bias: Shape | None, order: str) -> list[Axes]:
    """The axes for which the bias has one number for each layer and output."""
    while bias and len(bias) > 1 and bias[-1] == 1:  # Equinox's convolutions: (out, 1, 1)
        bias = bias[:-1]
    if not bias:
        return []
    n, rank = len(shape), len(bias)
    found = []
    axes = _trailing(n, order, n - rank - 1)
    if axes is not None and bias == tuple(shape[i] for i in (*axes.stack, *axes.outputs)):
        found.append(axes)
    if order == "io" and 1 < rank < n and shape[n - rank :] == bias:
        found.append(Axes(tuple(range(n - rank)), tuple(range(n - rank, n))))
    return found


def _by_inner_stack(shape: Shape, bias: Shape, order: str) -> list[Axes]:
    """The axes for which kernel and bias have their layers at one index, from the front or from the back."""
    found = []
    for i, size in enumerate(bias):
        for at in {i, i + len(shape) - len(bias)}:
            if shape[at : at + 1] != (size,):
                continue
            inner = _by_bias(shape[:at] + shape[at + 1 :], bias[:i] + bias[i + 1 :], order)
            found += [_with_layers(axes, at) for axes in inner]
    return list(dict.fromkeys(found))


def _with_layers(axes: Axes, at: int) -> Axes:
    """The axes of a leaf where those of each layer are `axes` and the layers are along axis `at`."""
    moved = Axes(*(tuple(axis + (axis >= at) for axis in part) for part in axes))
    return moved._replace(stack=tuple(sorted((*moved.stack, at))))


def _depthwise(leaf: _Leaf) -> bool:
    return any(DEPTHWISE.fullmatch(part) for part in leaf.path)


def _trailing(n: int, order: str, window: int) -> Axes | None:
    """(stack..., window..., in, out) or (stack..., out, in, window...), None for too few axes."""
    stack = n - 2 - window
    if stack < 0 or window < 0:
        return None
    if order == "io":
        return Axes((n - 2,), (n - 1,), tuple(range(stack, n - 2)), tuple(range(stack)))
    return Axes((stack + 1,), (stack,), tuple(range(stack + 2, n)), tuple(range(stack)))


def _one_channel(leaf: _Leaf, role: Role) -> bool:
    if role.dense is not None:
        return False
    if role.axes is None:  # (window, in, out) or (out, in, window), or a stack of columns
        return len(leaf.shape) == 3 and leaf.shape[1] == 1 and leaf.module is None
    return bool(role.axes.window) and all(leaf.shape[i] == 1 for i in role.axes.inputs)
