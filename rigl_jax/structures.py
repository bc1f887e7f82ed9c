"""Structures: which weights live and die together, and which of them compete.

Unstructured sparsity is the special case of units of one weight in one group. Every algorithm speaks to a weight
through its structure alone, so a new structure is a function here and nothing else.
"""

from __future__ import annotations

from rigl_jax.base import Array, Shape, Structure


def unstructured() -> Structure:
    """Every weight is a unit; all weights of a leaf compete with each other.

    >>> unstructured().units((3, 4))
    (3, 4)
    """
    return Structure(
        name="unstructured",
        pool=lambda scores: scores,
        expand=_same,
        units=lambda shape: shape,
        axes=lambda units: tuple(range(len(units))),
    )


def _same(units: Array, shape: Shape) -> Array:
    del shape
    return units
