"""What criteria that differentiate a loss share."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from rigl_jax import checks, trees
from rigl_jax.base import Array, Criterion, PyTree, Signals
from rigl_jax.messages import kind, line, shown

Loss = Callable[[PyTree, Any], Array]
"""`(params, batch) -> scalar`, a real number."""


def at(who: str, loss: Loss) -> Loss:
    """The loss, which refuses to return anything but one real number, and to go without a batch that it reads."""
    read = reading(who, "loss", loss)

    def value(params: PyTree, batch: Any) -> Array:
        out = read(params, batch)
        one = jax.tree.structure(out) == jax.tree.structure(0) and jnp.shape(out) == ()
        if not one or not jnp.issubdtype(jnp.result_type(out), jnp.floating):
            raise ValueError(f"{who}: loss must return one real number, got {kind(out)}")
        return out

    return value


def of_inputs(who: str, apply: Callable[[PyTree, Any], Any]) -> Callable[[PyTree, Any], Any]:
    """The model, whose batch are its inputs: an error for a tuple, which may hold labels too, says so."""
    read = reading(who, "apply", apply)

    def outputs(params: PyTree, batch: Any) -> Any:
        try:
            out = read(params, batch)
        except Exception as error:  # of any model: linen's own for a tuple are of many types
            if not isinstance(batch, (tuple, list)):
                raise
            raise ValueError(
                f"{who}: batch must be the inputs of apply, without labels, got a {type(batch).__name__} of "
                f"{len(batch)}, for which apply raised {_text(error)}"
            ) from error
        if jax.tree.structure(out) == jax.tree.structure(0) and jnp.shape(out) == ():
            raise ValueError(f"{who}: apply must give the outputs of the model, got one number, as of a loss")
        return out

    return outputs


def reading(who: str, name: str, function: Callable[[PyTree, Any], Any]) -> Callable[[PyTree, Any], Any]:
    """The function, whose error over a batch that was not given says that it reads one; a batch of no examples is one.

    Whether a function reads its batch is not known before: a loss may close over its data.
    """

    def call(params: PyTree, batch: Any) -> Any:
        for x in jax.tree.leaves(batch):
            if jnp.shape(x)[:1] == (0,):  # all scores would be alike, and weights would go by their index
                raise ValueError(f"{who}: batch must hold at least one example, got an array of shape {jnp.shape(x)}")
        try:
            return function(params, batch)
        except (AttributeError, IndexError, TypeError) as error:
            spoken = isinstance(error, IndexError) or "None" in str(error)  # the shape of None is ()
            if batch is not None or not spoken or isinstance(error, jax.errors.JAXTypeError):
                raise
            raise ValueError(
                f"{who}: batch must be what {name} reads, got None, for which {name} raised {_text(error)}"
            ) from error

    return call


def _text(error: Exception) -> str:
    return line(f"{type(error).__name__}: {error}")


def signals(params: PyTree, grads: PyTree) -> Signals:
    """What a score may read of a network and a gradient, outside of training: there is no step and no key."""
    return Signals(params, grads, 0, None)  # pyrefly: ignore[bad-argument-type]


def one_leaf(value: Loss, score: Callable[[Callable[[Array], Array], Array], Array]) -> Criterion:
    """The criterion that scores leaf by leaf: `score(loss as a function of the leaf, leaf)`; 0 for integers."""

    def criterion(params: PyTree, batch: Any) -> PyTree:
        weights, join = trees.floats(params)
        _, place = trees.floats(jax.tree.map(jnp.zeros_like, params))

        def scored(i: int) -> Array:
            return score(lambda w: value(join([*weights[:i], w, *weights[i + 1 :]]), batch), jnp.asarray(weights[i]))

        return place([scored(i) for i in range(len(weights))])

    return criterion


def parts(who: str, batch: Any, size: int) -> Any:
    """A batch in parts of `size` examples: each array `[n, ...]` as `[n / size, size, ...]`. None is one part.

    Raises:
      ValueError: an array without an axis of examples, arrays of several lengths, a length that size does not divide.
    """
    lengths = {jnp.shape(x)[:1] for x in jax.tree.leaves(batch)}
    if not lengths:
        return None
    (length, *others) = lengths
    if others or length == () or length[0] == 0 or length[0] % size:
        raise ValueError(
            f"{who}: batch must be arrays of one number of examples, a multiple of {size}, "
            f"got {sorted(n[0] if n else 'a number' for n in lengths)}"
        )
    return jax.tree.map(lambda x: jnp.reshape(x, (-1, size, *jnp.shape(x)[1:])), batch)


def part_size(who: str, size: Any) -> int:
    """The number of examples of a part, checked."""
    if not checks.is_whole(size, 1):
        raise ValueError(f"{who}: size must be a whole number, at least 1, got {shown(size)}")
    return int(size)
