"""Masks as numbers for a log. Masks are counted on the device, and one small array is fetched."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from rigl_jax import checks, trees
from rigl_jax.base import Array, Masks, Plan
from rigl_jax.messages import kind

COLUMNS = ("active", "dropped", "grown", "explored", "dead")


def metrics(
    state: Any, previous: Any = None, *, plan: Plan | None = None, explored: Masks | None = None
) -> dict[str, Any]:
    """What the masks are and how they changed, as plain Python numbers for any logger. Call it outside of jit.

    Args:
      state: of `sparsify` after a step, or a tree of masks (of a packed run: `rx.execution.masks_of(packed)`).
      previous: the same of an earlier step; its masks must not have been donated. None: no churn is reported.
      plan: says which axes of a leaf are outputs, for `dead_units`. None, or a leaf whose axes are not known: the last
        axis, as in Flax.
      explored: bool masks of the weights that were ever active. None: those in the state of `itop`; of other methods
        nothing is reported. `explored = jax.tree.map(jnp.logical_or, explored, state.masks)` keeps them.

    Returns:
      A dict with, in this order:

      * `step`: updates so far (where a state was given);
      * `sparsity`: share of the weights of all sparse leaves that are pruned;
      * `dropped_fraction`, `grown_fraction`: churn, shares of the weights that were active before (with `previous`);
      * `explored`: R_s of in-time over-parameterisation (Liu et al. 2021), weights ever active over all weights of the
        sparse leaves (where it is known);
      * `density`: {leaf: share of its weights that are active};
      * `dropped`: {leaf: share of the weights active before that are so no more} (with `previous`);
      * `dead_units`: {leaf: outputs without any active incoming weight; in a stack those of all its layers}.

    Raises:
      ValueError: no masks; `previous` or `explored` of other leaves or shapes.

    >>> import rigl_jax as rx
    >>> before = {"w": jnp.array([[True, True], [False, False]]), "b": None}
    >>> after = {"w": jnp.array([[True, False], [True, False]]), "b": None}
    >>> for name, value in rx.metrics(after, before).items():
    ...     print(name, value)
    sparsity 0.5
    dropped_fraction 0.5
    grown_fraction 0.5
    density {'w': 0.5}
    dropped {'w': 0.5}
    dead_units {'w': 1}
    """
    new = _masks(state, "state")
    if plan is not None:
        checks.plan("metrics", plan)
    if explored is None:
        explored = getattr(getattr(state, "algorithm", None), "explored", None)
    old, seen = (
        new if given is None else _like(new, given, name)
        for name, given in (("previous", previous), ("explored", explored))
    )
    outputs = tuple(_outputs(name, mask, plan) for name, mask in new.items())
    table = _COUNTS(*(list(masks.values()) for masks in (old, new, seen)), outputs=outputs)
    values = mask_values({name: mask.shape for name, mask in new.items()}, np.asarray(table))
    unknown = {"dropped_fraction", "grown_fraction", "dropped"} if previous is None else set()
    unknown |= {"explored"} if explored is None else set()
    step = {"step": int(state.step)} if hasattr(state, "masks") and hasattr(state, "step") else {}
    return step | {name: value for name, value in values.items() if name not in unknown}


def _masks(given: Any, argument: str) -> dict[str, Any]:
    """`{name: mask}` of a state or a tree of masks."""
    masks = given.masks if hasattr(given, "masks") else given
    checks.not_in_patterns("metrics", masks)
    found = trees.named_leaves(masks)
    if not found or any(getattr(mask, "dtype", None) != np.bool_ for mask in found.values()):
        raise ValueError(f"metrics: {argument} must have masks, bool arrays or None by leaf, got {kind(given)}")
    for name, mask in found.items():
        if isinstance(mask, jax.core.Tracer):
            raise ValueError(f"metrics: leaf {name!r} of {argument} is traced; call it outside of jit")
    return found


def _like(new: Mapping[str, Any], given: Any, argument: str) -> dict[str, Any]:
    found = _masks(given, argument)
    for name in [*new, *found]:
        shapes = [masks[name].shape if name in masks else None for masks in (new, found)]
        if shapes[0] != shapes[1]:
            raise ValueError(
                f"metrics: {argument} must have the leaves of state; leaf {name!r} must have shape {shapes[0]}, "
                f"got {shapes[1]}"
            )
    return found


def _outputs(name: str, mask: Any, plan: Plan | None) -> tuple[int, ...]:
    """The axes, from 0, along which a mask's output units lie, stacked layers included."""
    axes = plan[name].axes if plan is not None and name in plan else None
    if axes is None:
        return (mask.ndim - 1,)
    return tuple(axis % mask.ndim for axis in (*axes.outputs, *axes.stack))


def mask_counts(old: Masks, new: Masks, explored: Masks, *, outputs: Sequence[tuple[int, ...]] | None = None) -> Array:
    """`int32[leaves, 5]`, the columns of `COLUMNS` for each sparse leaf, in pytree order. Jit it.

    - active: weights that are on in `new`;
    - dropped, grown: on in `old` only, on in `new` only. A weight that a method drops and grows again in one
      rewiring counts as neither;
    - explored: on in `explored`;
    - dead: output units without any active incoming weight.

    Args:
      old: masks before.
      new: masks now.
      explored: the union of all masks so far.
      outputs: for each leaf the axes of its outputs. None: the last axis, which holds the outputs of a Flax kernel.
    """
    trios = list(zip(*map(jax.tree.leaves, (old, new, explored)), strict=True))
    axes = [(mask.ndim - 1,) for _, mask, _ in trios] if outputs is None else outputs
    rows = [
        jnp.stack([_count(b), _count(a & ~b), _count(b & ~a), _count(e), _dead(b, outs)])
        for (a, b, e), outs in zip(trios, axes, strict=True)
    ]
    return jnp.stack(rows)


def _count(mask: Array) -> Array:
    return jnp.sum(mask, dtype=jnp.int32)


def _dead(mask: Array, outputs: tuple[int, ...]) -> Array:
    return _count(~jnp.any(mask, axis=tuple(axis for axis in range(mask.ndim) if axis not in outputs)))


_COUNTS = jax.jit(mask_counts, static_argnames="outputs")


def mask_values(shapes: Mapping[str, tuple[int, ...]], table: np.ndarray) -> dict[str, Any]:
    """The values of `metrics`, from the counts of `mask_counts` and the sparse leaves' shapes in pytree order.

    >>> mask_values({"a": (2, 2)}, np.array([[2, 1, 1, 3, 0]]))["explored"]
    0.75
    """
    rows = {name: dict(zip(COLUMNS, map(int, row), strict=True)) for name, row in zip(shapes, table, strict=True)}
    sizes = {name: int(np.prod(shape)) for name, shape in shapes.items()}
    before = {name: row["active"] + row["dropped"] - row["grown"] for name, row in rows.items()}

    def total(column: str) -> int:
        return sum(row[column] for row in rows.values())

    size, was = sum(sizes.values()), max(sum(before.values()), 1)
    return {
        "sparsity": 1 - total("active") / max(size, 1),
        "dropped_fraction": total("dropped") / was,
        "grown_fraction": total("grown") / was,
        "explored": total("explored") / max(size, 1),
        "density": {name: row["active"] / max(sizes[name], 1) for name, row in rows.items()},
        "dropped": {name: row["dropped"] / max(before[name], 1) for name, row in rows.items()},
        "dead_units": {name: row["dead"] for name, row in rows.items()},
    }
