"""Packed weights: the active values of every sparse leaf, and beside them the pattern of where they are.

    packed = pack(params, masks)       # host
    packed.values                      # what an optimizer sees: [nnz] for a packed leaf, the array itself elsewhere
    params = unpack(packed)            # exactly apply_masks(params, masks)

Patterns are built on the host, so weights are packed and unpacked only when masks change; the steps in between use the
packed form alone (`run_packed`).
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from rigl_jax import arguments as rules
from rigl_jax import checks, trees
from rigl_jax.arguments import arguments
from rigl_jax.base import Array, Axes, Masks, Plan, PyTree
from rigl_jax.execution import kernels
from rigl_jax.messages import kind, shown


class Packed(NamedTuple):
    """Weights in packed form. A pytree to jit, donate and save; differentiate, optimise and average `values` only.

    The arrays of patterns are indices, so arithmetic on them gives no valid pattern: the result of
    `jax.tree.map(jnp.add, a, b)` over two Packed is a ValueError in `unpack`, `rewire` and others, an error of XLA in
    native products, and NaN in plain JAX inside of jit, where no error can be raised. Map over values instead:
    `a._replace(values=jax.tree.map(jnp.add, a.values, b.values))`, if both have the same masks.

    Attributes:
      values: parallel to params. float[nnz] for a packed leaf, the dense array for any other. The last values of a
        leaf whose count changes during training may be padding: 0, see `packed_training`.
      patterns: parallel to params. A pattern of `execution.kernels` for a packed leaf, `Whole` for a masked leaf that
        is stored dense, None for a leaf without a mask.
    """

    values: PyTree
    patterns: PyTree


@functools.partial(jax.tree_util.register_dataclass, data_fields=["mask"], meta_fields=[])
@dataclasses.dataclass(frozen=True)
class Whole:
    """The pattern of a masked leaf that is stored dense, because a sparse product would be slower.

    Attributes:
      mask: bool[*shape].
    """

    mask: Array


Choose = Callable[[str, np.ndarray], Any]
"""`(leaf name, mask) -> pattern, or None to store the leaf dense`: chooses the kernel of a leaf."""


def pack(params: PyTree, masks: Masks, *, choose: Choose | None = None, plan: Plan | None = None) -> Packed:
    """Packs every masked leaf, on the host.

    Args:
      params: the weights. Weights off the masks are dropped.
      masks: parallel to params, bool[*shape] or None, as `state.masks`.
      choose: the pattern of each leaf; default `best_pattern`. Pass `lambda name, mask: None` to store all dense, or
        your own choice of kernels. It replaces the plan: `rx.execution.fastest(plan=plan)` is given both.
      plan: tells which axes of a leaf are what. Without it a weight of three axes is taken for a matrix, split where
        that is closest to a square, and a convolution's kernel for one of Flax (HWIO); if the model uses it otherwise
        (OIHW in Equinox and PyTorch), it is made dense there. It also tells which leaves are stacks of layers that
        `lax.scan` or `nn.scan` uses, layers first: `best_pattern` then chooses for their layers.

    Returns:
      The packed weights. `unpack` gives `apply_masks(params, masks)` back, bit for bit.

    Raises:
      ValueError: a mask that is traced, is not bool, or does not have its weight's shape; names the leaf. Both `choose`
        and `plan`.

    >>> packed = pack({"w": jnp.array([[1.0, 2.0], [3.0, 4.0]])}, {"w": jnp.array([[False, True], [False, False]])})
    >>> packed.values["w"].tolist()
    [2.0]
    >>> unpack(packed)["w"].tolist()
    [[0.0, 2.0], [0.0, 0.0]]
    """
    checks.optional_functions("pack", choose=choose)
    if plan is not None:
        checks.plan("pack", plan)
        if choose is not None:
            raise ValueError(
                "pack: plan must be given to what chooses, say choose=rx.execution.fastest(plan=plan), "
                "got both choose and plan"
            )
    patterns = make_patterns(params, masks, choose or best_choice(plan))
    packed = Packed(jax.tree.map(gather_leaf, params, patterns), patterns)
    if choose is not None:
        _check_choice(masks, masks_of(packed))
    return packed


def _check_choice(masks: Masks, got: Masks) -> None:
    given = trees.named_leaves(masks)
    for name, mask in trees.named_leaves(got).items():
        if not np.array_equal(mask, given[name]):
            raise ValueError(f"pack: choose must give a pattern of the mask of leaf {name!r}, got that of another mask")


def make_patterns(params: PyTree, masks: Masks, choose: Choose) -> PyTree:
    """The patterns of a tree of masks, on the host; of the params only shapes are read."""
    masks = checks.masks("pack", masks, params)

    def one(name: str, mask: Array | None) -> Any:
        return None if mask is None else _checked_pattern(choose, name, mask)

    return jax.tree.map(one, trees.names(params), masks)


def unpack(packed: Packed) -> PyTree:
    """The params, dense, with exact zeros off the masks. Works under jit.

    >>> import jax.numpy as jnp
    >>> import rigl_jax as rx
    >>> packed = rx.pack({"w": jnp.ones((4, 4))}, {"w": jnp.eye(4, dtype=bool)})
    >>> float(unpack(packed)["w"].sum())
    4.0
    """
    return jax.tree.map(scatter_leaf, *checked("unpack", packed))


def masks_of(packed: Packed) -> Masks:
    """The masks, bool[*shape] for a masked leaf and None for any other. Works under jit.

    >>> import jax.numpy as jnp
    >>> import rigl_jax as rx
    >>> packed = rx.pack({"w": jnp.ones((4, 4))}, {"w": jnp.eye(4, dtype=bool)})
    >>> masks_of(packed)["w"].astype(int).tolist()
    [[1, 0, 0, 0], [0, 1, 0, 0], [0, 0, 1, 0], [0, 0, 0, 1]]
    """

    def one(values: Array, pattern: Any) -> Array | None:
        if pattern is None or isinstance(pattern, Whole):
            return None if pattern is None else pattern.mask
        return kernels.scatter(jnp.ones(values.shape, bool), pattern)

    return jax.tree.map(one, *checked("masks_of", packed))


def checked(who: str, packed: Any) -> Packed:
    """The argument, if `pack` made it, else a ValueError. Of traced patterns only types and sizes are checked."""
    if not isinstance(packed, Packed):
        raise ValueError(f"{who}: expected packed weights, from rx.pack, got {kind(packed)}")
    try:
        patterns = leaf_patterns(packed)
    except (ValueError, TypeError) as error:
        raise ValueError(f"{who}: patterns must be parallel to values: {str(error).splitlines()[0]}") from None
    for (name, values), pattern in zip(trees.named_leaves(packed.values).items(), patterns, strict=True):
        _check_leaf(f"{who}: leaf {name!r}", values, pattern)
    return packed


def _check_leaf(who: str, values: Array, pattern: Any) -> None:
    if pattern is None:
        return
    if isinstance(pattern, Whole):
        if jnp.result_type(pattern.mask) != jnp.bool_:
            raise ValueError(f"{who}: the mask must be bool, got {jnp.result_type(pattern.mask)}")
        wanted = np.shape(pattern.mask)
    else:
        kernels.check(who, pattern, content=True)
        wanted = (pattern.nnz,)
    if np.shape(values) != wanted:
        raise ValueError(f"{who}: values must have shape {wanted}, got {np.shape(values)}")


def nbytes(tree: PyTree) -> int:
    """Bytes of all arrays of a tree: of packed weights, a train state, or dense params.

    >>> import jax.numpy as jnp
    >>> nbytes({"w": jnp.ones((4, 4)), "b": jnp.ones(4, jnp.bfloat16)})
    72
    """
    leaves = trees.named_leaves(tree)
    for name, leaf in leaves.items():
        if not hasattr(leaf, "nbytes"):
            raise ValueError(f"nbytes: tree must hold arrays, got {shown(leaf)} at leaf {name!r}")
    return sum(leaf.nbytes for leaf in leaves.values())


@arguments(mask=rules.array())
def best_pattern(name: str, mask: np.ndarray) -> Any:
    """The best pattern for a mask on this machine, None if dense storage is best.

    It uses runs of 16, 8 or 4 outputs if the mask consists of such runs, and whole 32 x 32 tiles if the native CPU
    kernels are missing. A leaf of three axes (attention's projections, 1-D convolutions) becomes a matrix at
    `kernels.squarest_split`; if the model contracts other axes, the leaf is made dense there, with a warning. A leaf
    of four or five axes is treated as the kernel of a 2-D or 3-D convolution (HWIO, DHWIO). `pack` knows better from a
    plan. Leaves of other ranks stay dense, and so do those with a density above `DENSE_ABOVE`, or
    `CONV_DENSE_ABOVE` for convolutions.

    >>> best_pattern("w", np.ones((64, 64), bool)) is None  # dense
    True
    """
    if mask.ndim == 3:
        split = kernels.squarest_split(mask.shape)
        matrix = best_pattern(name, mask.reshape(kernels.as_matrix(mask.shape, split)))
        return None if matrix is None else kernels.Folded(matrix, mask.shape, split)
    native = kernels.native_in_use()
    highest = CONV_DENSE_ABOVE if mask.ndim > 2 and native else DENSE_ABOVE
    if not kernels.sorting.fits(mask.shape) or not mask.any() or mask.mean() > highest:
        return None
    if mask.ndim == 2 and not native and _in_tiles(mask, 32):
        return kernels.make_block_pattern(mask, (32, 32))
    heights = [h for h in (16, 8, 4) if mask.ndim == 2 and mask.shape[1] % h == 0 and _in_runs(mask, h)]
    return kernels.make_pattern(mask, height=(*heights, 1)[0])


def best_choice(plan: Plan | None) -> Choose:
    """`best_pattern` of the matrix, kernel or stack that each leaf is by the axes of its plan."""
    known = {name: leaf.axes for name, leaf in (plan or {}).items() if leaf.axes is not None}

    def choose(name: str, mask: np.ndarray) -> Any:
        axes = known.get(name)
        if axes is None:
            return best_pattern(name, mask)
        if axes.stack:
            return _best_stack(name, mask) if {axis % mask.ndim for axis in axes.stack} == {0} else None
        return _best_by_axes(name, mask, axes)

    return choose


def _best_by_axes(name: str, mask: np.ndarray, axes: Axes) -> Any:
    inputs, outputs, window = (tuple(axis % mask.ndim for axis in part) for part in axes[:3])
    order, plain = (*window, *inputs, *outputs), tuple(range(mask.ndim))
    turned = not window and (*outputs, *inputs) == plain  # a matrix, outputs first
    kernel = len(window) in (1, 2, 3) and len(inputs) == len(outputs) == 1
    matrix = not window and inputs and outputs and (turned or order == plain)
    if mask.ndim < 3 or not (kernel or matrix) or (len(window) > 1 and order == plain):
        return best_pattern(name, mask)
    if turned or order == plain:
        split = len(outputs) if turned else mask.ndim - len(outputs)
        found = best_pattern(name, mask.reshape(kernels.as_matrix(mask.shape, split)))
        return None if found is None else kernels.Folded(found, mask.shape, split)
    moved = mask.transpose(order)
    found = best_pattern(name, moved if len(window) > 1 else moved.reshape(kernels.as_matrix(moved.shape, 2)))
    return None if found is None else kernels.Moved(found, mask.shape, order)


def _best_stack(name: str, mask: np.ndarray) -> Any:
    if not len(mask):
        return None
    fullest = mask[np.argmax(mask.sum(axis=tuple(range(1, mask.ndim))))]
    like = best_pattern(name, fullest)
    if like is None:
        return None
    matrix = kernels.matrix_of(like)
    runs = getattr(matrix, "height", 1)
    if runs > 1 and not _in_runs(mask.reshape(-1, mask.shape[-1]), runs):
        runs = 1
    single = kernels.make_pattern(fullest.reshape(matrix.shape), height=runs)
    return kernels.make_stacked(mask, single if matrix is like else dataclasses.replace(like, matrix=single))


DENSE_ABOVE = 0.4
"""Share of active weights above which a leaf is stored dense. Native kernels are still a little faster at one half
(docs/why_not_faster.md), but a pattern takes 8 bytes an active weight, so such a leaf saves almost no memory."""

CONV_DENSE_ABOVE = 0.8
"""The same for convolutions on the native kernels. Those of XLA on the CPU are slower at every density, but a nearly
full leaf takes more memory packed than dense, because a pattern takes 8 bytes an active weight."""


def _in_runs(mask: np.ndarray, height: int) -> bool:
    runs = mask.reshape(mask.shape[0], -1, height)
    return bool((runs == runs[..., :1]).all())


def _in_tiles(mask: np.ndarray, size: int) -> bool:
    if mask.shape[0] % size or mask.shape[1] % size:
        return False
    tiles = mask.reshape(mask.shape[0] // size, size, mask.shape[1] // size, size)
    return bool((tiles == tiles[:, :1, :, :1]).all())


def _checked_pattern(choose: Choose, name: str, mask: Array) -> Any:
    if isinstance(mask, jax.core.Tracer):
        raise ValueError(f"pack: the mask of leaf {name!r} is traced; patterns are built on the host, outside of jit")
    host = np.asarray(mask)
    pattern = choose(name, host)
    if pattern is None:
        return Whole(jnp.asarray(mask))
    known = isinstance(pattern, kernels.AnyPattern) and tuple(pattern.shape) == host.shape
    if not known or kernels.count(pattern) != host.sum():
        raise ValueError(f"pack: choose must give a pattern of the mask of leaf {name!r}, got {kind(pattern)}")
    return pattern


def leaf_patterns(packed: Packed) -> list[Any]:
    """The pattern of every leaf, in the order of the leaves of params."""
    return jax.tree.structure(packed.values).flatten_up_to(packed.patterns)


def gather_leaf(p: Array, pattern: Any) -> Array:
    """The stored form of one leaf, or of a part of the optimizer state that belongs to it."""
    if pattern is None:
        return p
    if isinstance(pattern, Whole):
        return jnp.where(pattern.mask, p, jnp.zeros((), p.dtype))
    return kernels.gather(p, pattern)


def scatter_leaf(values: Array, pattern: Any) -> Array:
    """The dense form of one leaf, zeros off its mask."""
    if pattern is None or isinstance(pattern, Whole):
        return gather_leaf(values, pattern)
    return kernels.scatter(values, pattern)
