"""The bridge to optax: any optimizer, with masks that change while it trains."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax import lax

from rigl_jax import checks, trees
from rigl_jax.base import Algorithm, Array, Masks, PyTree, Rewired, Signals
from rigl_jax.branches import either
from rigl_jax.masking import apply_masks
from rigl_jax.messages import kind, shown
from rigl_jax.restart import check_restartable, restart
from rigl_jax.tracing.invariants import cached_by_shapes, frozen, rests, shapes_of


class SparseState(NamedTuple):
    """The state of `sparsify`; every leaf is an array of numbers or bools, so it checkpoints, shards, pickles and
    serialises like any optimizer state.

    Attributes:
      step: int32 scalar, the number of updates so far, rewirings included.
      key: the data of a PRNG key, uint32 (`jax.random.key_data`), never advanced: each step folds its number in.
      algorithm: the algorithm's own state.
      inner: the inner optimizer's state.
    """

    step: Array
    key: Array
    algorithm: Any
    inner: Any

    @property
    def masks(self) -> Masks:
        """A pytree parallel to params: bool[*shape], or None for a dense leaf. A packed run's are its patterns."""
        return self.algorithm.masks


def sparsify(
    inner: optax.GradientTransformation, algorithm: Algorithm, *, key: Array
) -> optax.GradientTransformationExtraArgs:
    """Trains sparse: any optax optimizer with any algorithm of this library.

    The contract, after `params = optax.apply_updates(params, updates)`, whatever the inner optimizer:

    * a pruned weight is exactly 0: its update is emitted as minus its value, and p + (-p) is 0 in any float format
      (unless p is infinite or NaN: that stays, and `check_masked` finds it);
    * the optimizer state of a pruned weight (moments, accumulated gradients) is what `inner.init` gives a weight of 0,
      which for all but a few optimizers is 0. It starts from there when it is grown again;
    * a leaf that the inner optimizer never changes (`optax.set_to_zero`, `optax.freeze`) keeps its mask and its weights
      bit by bit; a method that would have to move its weights elsewhere is refused.

    Pass *dense* gradients, taken at masked weights: `jax.grad(loss)(params, batch)` as it is. They are masked here, and
    growth needs them whole. Under `jax.pmap` or `shard_map` average them over the devices first; otherwise masks differ
    between devices.

    `sparsify` is the outermost transformation. Weight decay, clipping, accumulation and averaging go inside `inner`;
    a transformation around it would scale the updates that set weights to 0. `check_masked` finds such a mistake.
    Around it only `optax.partition` and `optax.masked` are in place: it then sees its part of the params (which the
    plan must be of), and its masks, found in its state, serve for all of them.

    Under `jax.vmap(tx.init)` all members of an ensemble draw the same masks, for there is one key. Give each member its
    own: `jax.vmap(lambda key, params: sparsify(inner, algorithm, key=key).init(params))(keys, params)`; `update` takes
    the key from the state, so any of these transformations serves them all.

    A state brings its own masks. One from a run with another sparsity goes on at that sparsity, as masks put in by
    `replace_masks` do; `check_masked(params, state.masks, plan)` tells. For a new sparsity begin with `tx.init`.

    Args:
      inner: the optimizer. It sees the gradient and the weights of active positions only.
      algorithm: from `rigl`, `set_`, `static`, ...
      key: `jax.random.key(seed)`; a raw `PRNGKey` works too. All randomness of the masks comes from it. Use the same on
        every host and replica. It is copied, so a donated train state does not take the caller's key along.

    Returns:
      A transformation. `update(grads, state, params, rewire=None, **extra)` needs params; further keywords go to
      `inner`. `rewire=None` decides inside the compiled program (by `algorithm.due(state.step)`), and in
      Python where nothing is compiled: such a loop compiles its operations once and is right for small experiments. A
      Python bool decides outside, so that a training loop can compile two steps without a conditional and choose by
      `algorithm.due(step)`. Both give the same result. On CPUs the first is no conditional but two loops of at most
      one round (`rigl_jax.branches`), and costs little. Elsewhere a conditional becomes under `vmap` a select that
      rewires on every step: pass a bool there.

    Raises:
      ValueError: params missing, or not those of the plan; a state of another algorithm, optimizer or set of leaves;
        gradients not parallel to params; a `sparsify` inside; an optimizer that keeps state which cannot be reset for
        single weights (L-BFGS, SM3).

    >>> import rigl_jax as rx
    >>> params = {"w": jnp.ones((4, 4))}
    >>> plan = rx.make_plan(params, sparsity=0.5)
    >>> tx = rx.sparsify(optax.adam(0.1), rx.rigl(plan, period=10, stop=100), key=jax.random.key(0))
    >>> state = tx.init(params)
    >>> params = rx.apply_masks(params, state.masks)
    >>> updates, state = tx.update(jax.tree.map(jnp.ones_like, params), state, params)
    >>> params = optax.apply_updates(params, updates)
    >>> float(rx.sparsity(state.masks))
    0.5
    """
    checks.optimizer("sparsify", inner)
    checks.algorithm("sparsify", algorithm)
    inner, key = optax.with_extra_args_support(inner), checks.key("sparsify", key)
    # Made once: JAX remembers the shapes of one function, and the optimizer is asked once for each set of shapes.
    train = functools.partial(_train, inner, algorithm, cached_by_shapes(functools.partial(rests, inner)))
    bridge = _Bridge(inner, algorithm, key, train, cached_by_shapes(functools.partial(frozen, inner)))
    return optax.GradientTransformationExtraArgs(  # pyrefly: ignore[bad-argument-type]
        functools.partial(_init, bridge), functools.partial(_update, bridge)
    )


class _Bridge(NamedTuple):
    """What `sparsify` was given, how it trains, and which leaves the inner optimizer never changes."""

    inner: optax.GradientTransformationExtraArgs
    algorithm: Algorithm
    key: Array
    train: Callable[..., tuple[PyTree, PyTree]]
    frozen: Callable[..., frozenset[str]]


def _init(bridge: _Bridge, params: PyTree) -> SparseState:
    algorithm, inner = bridge.algorithm, bridge.inner
    first, later = jax.random.split(bridge.key)  # so that no step repeats the draws that made the first masks
    state = algorithm.init(first, params)
    checks.has_masks("sparsify", "init", state)
    if algorithm.stored(state) is not state.masks and not algorithm.latent:
        raise ValueError("sparsify: an algorithm that stores more than its masks must say latent=True")
    optimizer = inner.init(apply_masks(params, state.masks))
    if _contains_sparse_state(optimizer):
        raise ValueError("sparsify: the inner optimizer must not contain another sparsify; nest it the other way")
    check_restartable(inner, optimizer, params)
    return SparseState(jnp.zeros((), jnp.int32), trees.stored_key(later), state, optimizer)


def _update(
    bridge: _Bridge,
    updates: PyTree,
    state: SparseState,
    params: PyTree | None = None,
    *,
    rewire: bool | None = None,
    **extra: Any,
) -> tuple[PyTree, SparseState]:
    grads, algorithm = updates, bridge.algorithm  # `updates` is optax's name for what comes in
    _check_update(bridge, grads, state, params, rewire)
    if rewire is None and not isinstance(state.step, jax.core.Tracer):
        rewire = bool(algorithm.due(int(state.step)))  # outside of jit a conditional would compile at every call
    now = jax.random.fold_in(trees.typed_key(state.key, bridge.key), state.step)
    signals = Signals(params, grads, state.step, now, extra)
    seen = algorithm.observe(state.algorithm, signals)
    checks.has_masks("sparsify", "observe", seen)
    if rewire is None:
        after, updates, optimizer = _decide(bridge, signals, seen, state.inner)
    else:
        after, updates, optimizer = (_rewire if rewire else _ordinary)(bridge, signals, seen, state.inner)
    return updates, SparseState(state.step + 1, state.key, after, optimizer)


def _check_update(bridge: _Bridge, grads: PyTree, state: Any, params: PyTree, rewire: Any) -> None:
    if params is None:
        raise ValueError("sparsify: update needs the params: tx.update(grads, state, params)")
    if not isinstance(state, SparseState):
        raise ValueError(f"sparsify: the state must be what tx.init gives, got {kind(state)}")
    if not isinstance(rewire, (bool, np.bool_, type(None))):
        raise ValueError(f"sparsify: rewire must be True, False or None, known outside of jit, got {shown(rewire)}")
    checks.gradients("sparsify", grads, params)
    checks.algorithm_state("sparsify", bridge.algorithm, state.algorithm)
    checks.optimizer_state("sparsify", shapes_of(bridge.inner.init, params), state.inner)


def _decide(bridge: _Bridge, signals: Signals, state: Any, optimizer: PyTree) -> tuple[Any, PyTree, PyTree]:
    """`_rewire` or `_ordinary`, as the algorithm says at this step. The updates take the place of the gradients."""
    due, changed = bridge.algorithm.due(signals.step), (state, signals.grads, optimizer)

    def on(step: Callable[..., Any]) -> Callable[..., Any]:
        def changes(changed: Any, params: PyTree) -> Any:
            state, grads, optimizer = changed
            return step(bridge, signals._replace(params=params, grads=grads), state, optimizer)

        return changes

    trained = _shapes(bridge.train, signals.grads, state, optimizer, signals.params, **signals.extra)
    if trees.types(trained) == trees.types((signals.grads, optimizer)):
        return either(due, on(_rewire), on(_ordinary), changed, signals.params)
    return lax.cond(due, on(_rewire), on(_ordinary), changed, signals.params)


def _ordinary(bridge: _Bridge, signals: Signals, state: Any, optimizer: PyTree) -> tuple[Any, PyTree, PyTree]:
    """A step that does not rewire: the algorithm's state, updates and the optimizer's state."""
    return state, *bridge.train(signals.grads, state, optimizer, signals.params, **signals.extra)


def _rewire(bridge: _Bridge, signals: Signals, state: Any, optimizer: PyTree) -> tuple[Any, PyTree, PyTree]:
    """A step that rewires, after training or in its place."""
    train = functools.partial(_pause, bridge.train) if bridge.algorithm.skip_step else bridge.train
    params = signals.params
    updates, optimizer = train(signals.grads, state, optimizer, params, **signals.extra)
    trained = signals._replace(params=optax.apply_updates(params, updates))
    fixed = frozenset() if bridge.algorithm.latent else bridge.frozen(params, **signals.extra)
    return _change_masks(bridge, trained, state, params, updates, optimizer, fixed)


def _train(
    inner: optax.GradientTransformationExtraArgs,
    algorithm: Algorithm,
    rests_at_zero: Callable[..., bool],
    grads: PyTree,
    state: Any,
    optimizer: PyTree,
    params: PyTree,
    **extra: Any,
) -> tuple[PyTree, PyTree]:
    """Updates and the optimizer's state after a step under the masks of a state."""
    trained, stored = algorithm.trained(state), algorithm.stored(state)
    updates, after = inner.update(apply_masks(grads, trained), optimizer, params, **extra)
    updates = trees.map_masked(_where_trained, trained, updates, params, stored)
    if not rests_at_zero(params, **extra):
        after = restart(inner, after, trained, apply_masks(params, stored))
    return updates, after


def _shapes(train: Callable[..., Any], *given: Any, **extra: Any) -> Any:
    # `train` itself where it can be, so that JAX remembers the shapes.
    return shapes_of(functools.partial(train, **extra) if extra else train, *given)


def _pause(
    train: Callable[..., Any], grads: PyTree, state: Any, optimizer: PyTree, params: PyTree, **extra: Any
) -> tuple[PyTree, PyTree]:
    """In place of `train`: updates of 0 and the optimizer's state as it is, in the types that training gives.

    With gradients wider than the weights, moments become as wide on the first step, and the branches of a conditional
    must agree.
    """
    shapes, after = _shapes(train, grads, state, optimizer, params, **extra)
    unchanged = jax.tree.map(
        lambda now, then: now if jnp.result_type(now) == then.dtype else jnp.asarray(now, then.dtype), optimizer, after
    )
    return jax.tree.map(lambda u, p: jnp.zeros_like(p, u.dtype), shapes, params), unchanged


def _change_masks(
    bridge: _Bridge,
    signals: Signals,
    state: Any,
    params: PyTree,
    updates: PyTree,
    optimizer: PyTree,
    fixed: frozenset[str],
) -> tuple[Any, PyTree, PyTree]:
    """Applies what the algorithm decides: masks, the values of fresh weights, and their place in the optimizer.

    Leaves that are `fixed`, because the optimizer never changes them, keep masks and weights.
    """
    algorithm = bridge.algorithm
    result = algorithm.update(state, signals)
    if not isinstance(result, Rewired):
        raise ValueError(f"sparsify: update of the algorithm must return Rewired(state, ...), got {kind(result)}")
    checks.has_masks("sparsify", "update", result.state)
    if fixed:
        result = _without(fixed, algorithm, result, state)
    trained, stored = algorithm.trained(result.state), algorithm.stored(result.state)
    fresh = result.fresh
    if fresh is None:
        fresh = jax.tree.map(lambda new, old: new & ~old, trained, algorithm.trained(state))

    nothing = jax.tree.map(lambda _: None, params)
    values, delta = (nothing if tree is None else tree for tree in (result.values, result.delta))
    placed = jax.tree.map(_place, updates, params, stored, fresh, values, delta)
    settled = trees.map_masked(lambda new, keep: keep & ~new, fresh, trained)
    return result.state, placed, restart(bridge.inner, optimizer, settled, optax.apply_updates(params, placed))


def _place(
    u: Array, p: Array, keep: Array | None, new: Array | None, value: Array | None, change: Array | None
) -> Array:
    """The update of one leaf after a rewiring: a change of what is kept, a start for what is new, -p for the rest.

    `keep` is None where a leaf is dense or stored whole: there a weight that becomes active keeps its value.
    """
    if keep is None and change is None:
        return u
    dtype = jnp.promote_types(u.dtype, p.dtype)
    u, p = u.astype(dtype), p.astype(dtype)
    if change is not None:
        u = u + _finite(change, dtype)
    if keep is None:
        return u
    if new is not None:
        u = jnp.where(new, (0 if value is None else _finite(value, dtype)) - p, u)
    return jnp.where(keep, u, -p)


def _finite(x: Array, dtype: Any) -> Array:
    return jnp.where(jnp.isfinite(x), x.astype(dtype), 0)


def _without(fixed: frozenset[str], algorithm: Algorithm, result: Rewired, before: Any) -> Rewired:
    """The rewiring without what it did to these leaves."""
    masked = fixed & trees.named_leaves(before.masks).keys()
    if masked and not algorithm.keeps_counts:
        raise ValueError(
            f"sparsify: leaf {min(masked)!r} is in the plan, but the inner optimizer never changes it, and this method "
            f"would prune it or move its weights to other leaves; make it dense by the rule ({min(masked)!r}, None)"
        )
    fresh, delta = (
        None if tree is None else _keep(fixed, tree, jax.tree.map(jnp.zeros_like, tree))
        for tree in (result.fresh, result.delta)
    )
    state = _keep_state(masked, result.state, before) if masked else result.state
    return result._replace(state=state, fresh=fresh, delta=delta)


def _keep(fixed: frozenset[str], new: PyTree, old: PyTree) -> PyTree:
    """The old leaves of these names among the new ones."""
    return jax.tree.map(lambda name, n, o: o if name in fixed else n, trees.names(new), new, old)


def _keep_state(fixed: frozenset[str], new: Any, old: Any) -> Any:
    """The same for all that an algorithm's state keeps beside the masks, and for the state of one within another."""
    parallel, fields = trees.named_leaves(new.masks).keys(), {}
    for name, value in new._asdict().items():
        if hasattr(value, "masks"):
            fields[name] = _keep_state(fixed, value, getattr(old, name))
        elif trees.named_leaves(value).keys() == parallel:
            fields[name] = _keep(fixed, value, getattr(old, name))
    return new._replace(**fields)


def _where_trained(trained: Array, update: Array, p: Array, stored: Array | None) -> Array:
    # In the wider of the two types: rounding -p to a narrow update would leave a remainder.
    dtype = jnp.promote_types(update.dtype, p.dtype)
    still = jnp.zeros((), dtype) if stored is None else jnp.where(stored, jnp.zeros((), dtype), -p.astype(dtype))
    return jnp.where(trained, update.astype(dtype), still)


def _contains_sparse_state(state: PyTree) -> bool:
    is_sparse = lambda x: isinstance(x, SparseState)  # noqa: E731
    return any(is_sparse(x) for x in jax.tree.leaves(state, is_leaf=is_sparse))
