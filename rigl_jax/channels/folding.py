"""Constants of removed channels, added to the biases of the products that read them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from rigl_jax.tracing.channels import Labels
from rigl_jax.tracing.constants import Contraction, read_contractions
from rigl_jax.tracing.program import Program

Bias = tuple[int, int]
"""A leaf, and the sign with which it is added."""


def fold(
    program: Program, names: Sequence[str], weights: list[np.ndarray], labels: dict[Any, Labels], gone: np.ndarray
) -> tuple[list[np.ndarray], tuple[str, ...]]:
    """The weights with the constants of channels that are gone in the biases, and what could not be folded.

    Args:
      program: of the model.
      names: of its weights.
      weights: their values.
      labels: the channels of its variables.
      gone: bool[positions], the channels that are removed.
    """
    products, _ = read_contractions(program, weights, labels)
    takers = biases(program, labels, products, [True] * len(weights))
    notes = []
    for product, bias in zip(products, takers, strict=True):
        dead = gone[product.rows]
        own = dead & product.constant & (product.value != 0)
        for rows, why in (
            (dead & product.padded, "is padded, so that they are missing at its borders"),
            (own if bias is None else own & False, "has no bias of its own to take them"),
        ):
            if rows.any():
                name = _reader(program, names, product)
                notes.append(f"{int(rows.sum())} removed channels are constants that are not folded: {name} {why}")
    return folded(weights, products, takers, gone), tuple(notes)


def _reader(program: Program, names: Sequence[str], product: Contraction) -> str:
    """The name of the weight of a product."""
    made = {variable: eqn for eqn in program.equations for variable in eqn.outvars}
    leaf = dict(zip(program.inputs, names, strict=False))
    for atom in made[product.out].invars:
        while atom in made and len(made[atom].invars) == 1:
            (atom,) = made[atom].invars
        if atom in leaf:
            return repr(leaf[atom])
    return "a product"


def biases(
    program: Program, labels: dict[Any, Labels], products: list[Contraction], dense: list[bool]
) -> list[Bias | None]:
    """For every product the bias that can take the constant contribution of its rows, or None."""
    uses, made_by = program.uses, {eqn.outvars[0]: eqn for eqn in program.equations}
    weights = {variable: leaf for leaf, variable in enumerate(program.inputs[: len(dense)]) if dense[leaf]}
    readers = {variable: eqn for eqn in program.equations for variable in eqn.invars}

    def source(variable: Any) -> int | None:
        """The weight of a variable, through changes of rank and type."""
        while uses[variable] == 1 and variable in made_by and made_by[variable].primitive.name in _VIEWS:
            variable = made_by[variable].invars[0]
        return weights.get(variable) if uses[variable] == 1 else None

    def reader(variable: Any) -> tuple[Any, str]:
        """The only operation that reads a variable, and its primitive."""
        eqn = readers.get(variable) if uses[variable] == 1 else None
        return eqn, "" if eqn is None else eqn.primitive.name

    def bias(product: Contraction) -> Bias | None:
        value, axis = product.out, product.axis
        eqn, name = reader(value)
        while name in ("convert_element_type", "transpose"):
            value = eqn.outvars[0]
            axis = eqn.params["permutation"].index(axis) if name == "transpose" else axis
            eqn, name = reader(value)
        if name not in ("add", "sub") or (name == "sub" and eqn.invars[0] is not value):
            return None
        other = eqn.invars[1] if eqn.invars[0] is value else eqn.invars[0]
        leaf, n = source(other), len(product.columns)
        if leaf is None or program.inputs[leaf].aval.shape != (n,):
            return None
        whole, shape = value.aval.shape, other.aval.shape
        if len(shape) != len(whole) or shape[axis] != n or eqn.outvars[0].aval.shape != whole:
            return None
        own, there = labels[program.inputs[leaf]][0], labels[other][axis]
        same = n == 1 or (own is not None and there is not None and np.array_equal(own, there))
        return (leaf, 1 if name == "add" else -1) if same else None

    return [bias(product) for product in products]


_VIEWS = ("reshape", "broadcast_in_dim", "convert_element_type", "squeeze")


def folded(
    weights: list[np.ndarray], products: list[Contraction], biases: list[Bias | None], gone: np.ndarray
) -> list[np.ndarray]:
    """The weights, with the contributions of dead channels added to the biases."""
    weights = list(weights)
    for product, bias in zip(products, biases, strict=True):
        dead = gone[product.rows]
        if bias is not None and product.value[dead].any():
            leaf, sign = bias
            weight = weights[leaf]
            weights[leaf] = (weight.astype(np.float64) + sign * product.carried(dead)).astype(weight.dtype)
    return weights
