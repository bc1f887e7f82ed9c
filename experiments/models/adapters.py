"""Networks of any kind as a pair of pure functions: linen modules, NNX modules, and functions."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
from flax import linen, nnx

from experiments.options import parameters
from rigl_jax.base import Array, PyTree

_OTHERS = "*"
"""The key of the collections of a linen module that are neither params nor batch_stats."""


class Model(NamedTuple):
    """A network.

    Attributes:
      init: `(key, x, train=False) -> {"params": tree, "batch_stats": tree}`, from a typed key and x `[1, ...]`. What is
        not trained by gradients, such as running statistics, is in `batch_stats`; {} where there is nothing.
      apply: `(variables, x, train=bool, mutable=(), rngs={"dropout": key}) -> logits [batch, classes]`; with any
        `mutable`, `(logits, {"batch_stats": tree})`.
    """

    init: Callable[..., dict[str, PyTree]]
    apply: Callable[..., Any]


def adapt(constructor: Callable[..., Any], num_classes: int) -> Model:
    """The network that `constructor(num_classes)` makes.

    Args:
      constructor: gives a linen module; or, where it takes `rngs`, an NNX module; or two functions,
        `init(key, x) -> params` and `apply(params, x) -> logits`, of which the second may also take `train=bool` and
        `key=`, for dropout; or a `Model`.
      num_classes: width of the last layer.

    Raises:
      ValueError: it returns something else, or the constructor refuses its arguments.
    """
    if "rngs" in {parameter.name for parameter in parameters(constructor)}:
        return from_nnx(lambda rngs: constructor(num_classes, rngs=rngs))
    made = constructor(num_classes)
    if isinstance(made, Model):
        return made
    if isinstance(made, linen.Module):
        return from_linen(made)
    if isinstance(made, tuple) and len(made) == 2 and all(map(callable, made)):
        return from_functions(*made)
    raise ValueError(
        "a model must be a linen module, two functions (init, apply), or an NNX module whose constructor takes rngs, "
        f"got {type(made).__name__}"
    )


def _accepted(function: Callable[..., Any], **arguments: Any) -> dict[str, Any]:
    """Those of the arguments that a function takes."""
    taken = inspect.signature(function).parameters.values()
    if any(parameter.kind is parameter.VAR_KEYWORD for parameter in taken):
        return arguments
    return {name: value for name, value in arguments.items() if name in {parameter.name for parameter in taken}}


def from_linen(module: linen.Module) -> Model:
    """A linen module. `train` is passed where its `__call__` takes it; collections of any name are kept."""

    def stats_of(collections: dict[str, PyTree]) -> PyTree:
        return collections.get("batch_stats", {}) if set(collections) <= {"batch_stats"} else {_OTHERS: collections}

    def init(key: Array, x: Any, *, train: bool = False) -> dict[str, PyTree]:
        collections = dict(module.init(key, x, **_accepted(module.__call__, train=train)))
        return {"params": collections.pop("params", {}), "batch_stats": stats_of(collections)}

    def apply(variables: dict[str, PyTree], x: Any, *, train: bool, mutable: Any = (), rngs: Any = None) -> Any:
        stats = variables.get("batch_stats", {})
        collections = {"batch_stats": stats} if stats else {}
        collections = stats.get(_OTHERS, collections)
        given = {"params": variables["params"], **collections}
        if rngs is not None:  # for a stream of another name than dropout
            rngs = {**rngs, "params": jax.random.fold_in(rngs["dropout"], 1)}
        options = _accepted(module.__call__, train=train)
        if not mutable:
            return module.apply(given, x, rngs=rngs, **options)
        logits, changed = module.apply(given, x, rngs=rngs, mutable=list(collections), **options)
        return logits, {"batch_stats": stats_of({**collections, **changed})}

    return Model(init, apply)


def from_nnx(constructor: Callable[[nnx.Rngs], nnx.Module]) -> Model:
    """An NNX module as plain dicts: `nnx.Param` are the params, all else but random keys is `batch_stats`."""
    parts = (nnx.Param, nnx.RngState, ...)
    graph, *abstract = nnx.split(nnx.eval_shape(lambda: constructor(nnx.Rngs(0))), *parts)

    def filled(state: nnx.State, values: PyTree) -> nnx.State:
        state = jax.tree.map(lambda leaf: leaf, state)
        nnx.replace_by_pure_dict(state, values)
        return state

    def init(key: Array, x: Any, *, train: bool = False) -> dict[str, PyTree]:
        del x, train
        _, params, _, rest = nnx.split(constructor(nnx.Rngs(key)), *parts)
        return {"params": _plain(nnx.to_pure_dict(params)), "batch_stats": _plain(nnx.to_pure_dict(rest))}

    def apply(variables: dict[str, PyTree], x: Any, *, train: bool, mutable: Any = (), rngs: Any = None) -> Any:
        key = jax.random.key(0) if rngs is None else rngs["dropout"]
        params = filled(abstract[0], variables["params"])
        keys, rest = _reseeded(abstract[1], key), filled(abstract[2], variables.get("batch_stats", {}))
        module: Any = nnx.merge(graph, params, keys, rest)
        module.set_attributes(deterministic=not train, use_running_average=not train, raise_if_not_found=False)
        logits = module(x, **_accepted(module.__call__, train=train))
        if not mutable:
            return logits
        changed: Any = nnx.split(module, *parts)[3]
        return logits, {"batch_stats": _plain(nnx.to_pure_dict(changed))}

    return Model(init, apply)


def _plain(tree: Any) -> Any:
    """With words for keys: NNX numbers the entries of a list, and checkpoints hold words."""
    return {str(name): _plain(value) for name, value in tree.items()} if isinstance(tree, dict) else tree


def _reseeded(state: nnx.State, key: Array) -> nnx.State:
    """The random state of a module with keys that all come from one, and counts of 0."""
    leaves, structure = jax.tree.flatten(state)
    fresh = [
        jax.random.split(jax.random.fold_in(key, i), leaf.shape)
        if jax.dtypes.issubdtype(leaf.dtype, jax.dtypes.prng_key)
        else jax.numpy.zeros(leaf.shape, leaf.dtype)
        for i, leaf in enumerate(leaves)
    ]
    return jax.tree.unflatten(structure, fresh)


def from_functions(init: Callable[..., PyTree], apply: Callable[..., Any]) -> Model:
    """Two plain functions: `init(key, x) -> params`, `apply(params, x) -> logits`."""

    def initialise(key: Array, x: Any, *, train: bool = False) -> dict[str, PyTree]:
        return {"params": init(key, x, **_accepted(init, train=train)), "batch_stats": {}}

    def applied(variables: dict[str, PyTree], x: Any, *, train: bool, mutable: Any = (), rngs: Any = None) -> Any:
        key = None if rngs is None else rngs["dropout"]
        logits = apply(variables["params"], x, **_accepted(apply, train=train, key=key))
        return (logits, {"batch_stats": {}}) if mutable else logits

    return Model(initialise, applied)
