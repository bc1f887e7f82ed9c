"""What an optimizer keeps for single weights, put back to its start."""

from __future__ import annotations

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from rigl_jax import trees
from rigl_jax.base import Array, Masks, PyTree


class _Pair(NamedTuple):
    now: Any
    start: Any


def restart(inner: optax.GradientTransformation, state: PyTree, keep: Masks, params: PyTree) -> PyTree:
    """The optimizer state, with everything it keeps for a weight back at its start wherever `keep` is False.

    Which parts belong to a weight is read off `inner.init` itself (`optax.tree.map_params`), never off a list of known
    state types. Parts whose shape is not the weight's, such as Adafactor's row and column sums, are left alone.
    """

    def one(pair: Any, mask: Array | None) -> Any:
        if not isinstance(pair, _Pair):
            return pair
        if mask is None or jnp.shape(pair.now) != mask.shape:
            return pair.now
        return jnp.where(mask, pair.now, pair.start.astype(pair.now.dtype))

    pairs = jax.tree.map(_Pair, state, inner.init(params))
    return optax.tree.map_params(
        inner.init,
        one,
        pairs,
        keep,
        is_leaf=lambda x: isinstance(x, (_Pair, optax.MaskedNode)),
        transform_non_params=lambda pair: pair.now if isinstance(pair, _Pair) else pair,
    )


def check_restartable(inner: optax.GradientTransformation, optimizer: PyTree, params: PyTree) -> None:
    """Refuses an optimizer whose state of a single weight cannot be found or reset."""
    larger: list[tuple[str, Any, Any]] = []

    def one(value: Any, name: str, p: Any) -> Any:
        if not isinstance(value, optax.MaskedNode) and jnp.ndim(value) > jnp.ndim(p) > 0:
            larger.append((name, jnp.shape(value), jnp.shape(p)))
        return value

    try:
        optax.tree.map_params(
            inner.init, one, optimizer, trees.names(params), params, is_leaf=lambda x: isinstance(x, optax.MaskedNode)
        )
    except Exception as error:  # whatever its init does with a placeholder for the params
        raise ValueError(
            "sparsify: what the inner optimizer keeps for a single weight cannot be told apart from the rest of its "
            "state (as in SM3 and line searches), so pruned weights cannot be reset in it: "
            f"{str(error).splitlines()[0]}"
        ) from error
    for name, kept, shape in larger:
        raise ValueError(
            f"sparsify: the inner optimizer keeps an array of shape {kept} for leaf {name!r} of shape {shape}, in "
            "which a single weight has no place of its own to start anew (as in L-BFGS and GaLore)"
        )
