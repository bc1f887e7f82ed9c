"""What sparse training asks of the optimizer: a clock for each weight, float32 masters, an average, surgery."""

from __future__ import annotations

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from rigl_jax import checks, trees
from rigl_jax.base import Array, Masks, PyTree
from rigl_jax.masking import apply_masks
from rigl_jax.messages import kind, listed, shown
from rigl_jax.restart import restart
from rigl_jax.transform import SparseState


class PerWeightAdamState(NamedTuple):
    """Adam's state with a clock in every weight.

    Attributes:
      count: int32 tree parallel to params, the updates each weight has had since it was grown.
      mu: first moments.
      nu: second moments.
    """

    count: PyTree
    mu: PyTree
    nu: PyTree


def per_weight_adam(
    learning_rate: optax.ScalarOrSchedule,
    b1: float = 0.9,
    b2: float = 0.999,
    eps: float = 1e-8,
    *,
    weight_decay: float = 0.0,
    warmup: int = 0,
) -> optax.GradientTransformationExtraArgs:
    """Adam in which a regrown weight starts as at step 1 (SMET, arXiv 2606.00888).

    `optax.adam` corrects the bias of its moments by one step count for all. A weight grown late has moments of 0 and a
    correction that is over, and its first update is up to (1 - b1) / sqrt(1 - b2) = 3.2 times the learning rate. Here
    it is the learning rate, as for any weight at the start. `sparsify` resets the clock with the moments, by itself.

    Weights that are never reset get the updates of `optax.adam`, or of `optax.adamw` with a weight decay. Schedules of
    the learning rate run on the common clock. Costs 4 bytes and two powers a weight more than Adam.

    Args:
      learning_rate: number or schedule.
      b1: decay of the first moment, in [0, 1).
      b2: decay of the second moment, in [0, 1).
      eps: added to the root of the second moment.
      weight_decay: decoupled, as in `optax.adamw`; of all leaves.
      warmup: a weight's first `warmup` updates are scaled by 1 / warmup, 2 / warmup, ..., 1. Also at the start of
        training, when all weights are new. 0: none.

    >>> tx = per_weight_adam(0.1)
    >>> params = {"w": jnp.zeros(2)}
    >>> updates, _ = tx.update({"w": jnp.array([3.0, -5.0])}, tx.init(params), params)
    >>> updates["w"].round(3).tolist() == [-jnp.float32(0.1), jnp.float32(0.1)]
    True
    """
    for name, value in (("learning_rate", learning_rate), ("weight_decay", weight_decay)):
        if not callable(value) and not isinstance(value, jax.Array):
            checks.number("per_weight_adam", name, value, "must be a number or a schedule", lambda found: True)
    decay = [] if _is_zero(weight_decay) else [optax.add_decayed_weights(weight_decay)]
    adam = scale_by_per_weight_adam(b1, b2, eps, warmup=warmup)
    return optax.with_extra_args_support(optax.chain(adam, *decay, optax.scale_by_learning_rate(learning_rate)))


def scale_by_per_weight_adam(
    b1: float = 0.9, b2: float = 0.999, eps: float = 1e-8, *, warmup: int = 0
) -> optax.GradientTransformation:
    """The part of `per_weight_adam` that goes into chains of one's own, where `optax.scale_by_adam` would.

    Raises:
      ValueError: b1 or b2 outside [0, 1), or a negative warmup.
    """
    for name, value in (("b1", b1), ("b2", b2)):
        if not isinstance(value, jax.Array):  # under inject_hyperparams
            checks.number("per_weight_adam", name, value, "is a decay rate, in [0, 1)", lambda found: 0 <= found < 1)
    if not isinstance(eps, jax.Array):
        checks.number("per_weight_adam", "eps", eps, "must be at least 0", lambda found: found >= 0)
    if not isinstance(warmup, jax.Array):
        whole = "must be a whole number of steps, 0 or more"
        checks.number("per_weight_adam", "warmup", warmup, whole, lambda found: found >= 0 and found == int(found))

    def init(params: PyTree) -> PerWeightAdamState:
        return PerWeightAdamState(
            count=optax.tree.zeros_like(params, dtype=jnp.int32),
            mu=optax.tree.zeros_like(params),
            nu=optax.tree.zeros_like(params),
        )

    def update(updates: PyTree, state: PerWeightAdamState, params: PyTree | None = None) -> Any:
        del params
        count = jax.tree.map(optax.safe_increment, state.count)
        mu = optax.tree.update_moment(updates, state.mu, b1, 1)
        nu = optax.tree.update_moment_per_elem_norm(updates, state.nu, b2, 2)

        def direction(m: Array, v: Array, t: Array) -> Array:
            # The correction in float32: in bfloat16 1 - b2 rounds to 0.
            t = t.astype(jnp.float32)
            m_hat, v_hat = m / (1 - b1**t).astype(m.dtype), v / (1 - b2**t).astype(v.dtype)
            u = m_hat / (jnp.sqrt(v_hat) + eps)
            return u if _is_zero(warmup) else u * jnp.minimum(t / jnp.maximum(warmup, 1), 1.0).astype(u.dtype)

        nu = optax.tree.cast_like(nu, state.nu)
        return jax.tree.map(direction, mu, nu, count), PerWeightAdamState(count, mu, nu)

    return optax.GradientTransformation(init, update)  # pyrefly: ignore[bad-argument-type]


def _is_zero(value: Any) -> bool:
    return isinstance(value, (int, float)) and value == 0  # under inject_hyperparams it is a tracer, and may change


class MasterState(NamedTuple):
    """The state of `with_masters`.

    Attributes:
      masters: the weights in the wider type.
      inner: the inner optimizer's state, made for the masters.
    """

    masters: PyTree
    inner: Any


def with_masters(
    inner: optax.GradientTransformation, dtype: Any = jnp.float32
) -> optax.GradientTransformationExtraArgs:
    """Trains short-float params through copies in a wider type, so that updates too small for them are not lost.

    After `apply_updates` a weight is its master rounded to the params' type. Inside `sparsify` both are exactly 0 where
    a weight is pruned: `sparsify(with_masters(optax.adam(1e-3)), algorithm, key=key)` with bfloat16 params. A weight
    that is not what its master rounds to was set by someone else, such as a rewiring or the user, and its master
    follows it. Gradients and moments are in the wider type.

    Args:
      inner: any optimizer; it sees the masters as its params.
      dtype: the masters' type. Weights that are as wide or wider have masters of their own type; leaves that are no
        floats have none, and get the inner optimizer's updates.

    >>> tx = with_masters(optax.sgd(1.0))
    >>> params = {"w": jnp.ones((), jnp.bfloat16)}
    >>> state = tx.init(params)
    >>> for _ in range(4):  # in bfloat16, 1 - 0.001 is 1
    ...     updates, state = tx.update({"w": jnp.bfloat16(0.001)}, state, params)
    ...     params = optax.apply_updates(params, updates)
    >>> float(params["w"]), round(float(state.masters["w"]), 4)
    (0.99609375, 0.996)
    """
    checks.optimizer("with_masters", inner)
    try:
        wide = dtype is not None and jnp.issubdtype(dtype, jnp.floating)  # NumPy reads None as float64
    except TypeError:
        wide = False
    if not wide:
        raise ValueError(f"with_masters: dtype must be a floating-point type, got {shown(dtype)}")
    inner = optax.with_extra_args_support(inner)

    def widen(x: Any) -> Array:
        if not jnp.issubdtype(x.dtype, jnp.floating):
            return x
        with jax.numpy_dtype_promotion("standard"):  # asked for, where the caller forbids what is not
            return x.astype(jnp.promote_types(x.dtype, dtype))

    def init(params: PyTree) -> MasterState:
        masters = jax.tree.map(lambda p: jnp.copy(widen(p)), params)  # a donated state shares no buffer with params
        return MasterState(masters, inner.init(masters))

    def update(updates: PyTree, state: MasterState, params: PyTree | None = None, **extra: Any) -> Any:
        if params is None:
            raise ValueError("with_masters: update needs the params: tx.update(grads, state, params)")
        masters = jax.tree.map(
            lambda p, m: jnp.where(m.astype(p.dtype) == p, m, p.astype(m.dtype)), params, state.masters
        )
        wide, optimizer = inner.update(jax.tree.map(widen, updates), state.inner, masters, **extra)
        masters = optax.apply_updates(masters, wide)

        # Not the narrow update: p + u is rounded once, in apply_updates, to the rounded master.
        def narrow(p: Array, m: Array, u: Array) -> Array:
            if not jnp.issubdtype(p.dtype, jnp.floating):
                return u
            return m.astype(p.dtype).astype(m.dtype) - p.astype(m.dtype)

        return jax.tree.map(narrow, params, masters, wide), MasterState(masters, optimizer)

    return optax.GradientTransformationExtraArgs(init, update)  # pyrefly: ignore[bad-argument-type]


def sparse_average(average: PyTree, params: PyTree, masks: Masks, decay: float = 0.999) -> PyTree:
    """A moving average of the weights, decay * average + (1 - decay) * params, that is as sparse as they are.

    A plain average keeps a share of every weight that ever was active and fills up as masks change. Here what is not
    active now is exactly 0, and a weight that comes back starts from 0, as it does in training. Call it after
    `apply_updates`, with the new masks.

    Args:
      average: the average so far; begin with the masked params.
      params: the weights now.
      masks: `state.masks`.
      decay: in [0, 1); the average reaches back about 1 / (1 - decay) steps.

    >>> masks = {"w": jnp.array([True, False])}
    >>> sparse_average({"w": jnp.array([1.0, 1.0])}, {"w": jnp.array([2.0, 0.0])}, masks, 0.5)["w"].tolist()
    [1.5, 0.0]
    """
    if not isinstance(decay, jax.Array):
        checks.number("sparse_average", "decay", decay, "must be in [0, 1)", lambda found: 0 <= found < 1)
    checks.masks("sparse_average", masks, params)
    so_far = trees.named_leaves(average)
    for name, p in trees.named_leaves(params).items():
        if name not in so_far or jnp.shape(so_far[name]) != jnp.shape(p):
            raise ValueError(f"sparse_average: the average must be parallel to params, got another leaf {name!r}")
    return apply_masks(optax.incremental_update(params, average, 1 - decay), masks)


def replace_masks(
    inner: optax.GradientTransformation, state: SparseState, params: PyTree, masks: Masks
) -> tuple[PyTree, SparseState]:
    """Surgery: goes on training with masks of the user's own, made by hand or taken from another run.

    Weights off the new masks become 0, with their optimizer moments. Weights that are new in them start from the values
    in `params` and from fresh moments; the moments of the others go on. Counts are the user's: `rigl` and its kin
    preserve them, methods that prune to the plan's counts return to those when they are next due. After surgery on the
    *weights* alone, such as loading trained ones, `apply_masks(params, state.masks)` is all there is to do.

    Args:
      inner: the optimizer that was given to `sparsify`.
      state: of `sparsify`.
      params: the weights.
      masks: parallel to params as `state.masks` is: bool[*shape], None for dense leaves.

    Returns:
      `(params, state)` to go on with.

    Raises:
      ValueError: other leaves, shapes or types than those of `state.masks`; the message names the leaf. Another inner
        optimizer than that of the state.

    >>> import rigl_jax as rx
    >>> params = {"w": jnp.ones((2, 2))}
    >>> inner = optax.adam(0.1)
    >>> tx = rx.sparsify(inner, rx.static(rx.make_plan(params, 0.5)), key=jax.random.key(0))
    >>> params, state = replace_masks(inner, tx.init(params), params, {"w": jnp.array([[True, False], [False, False]])})
    >>> params["w"].tolist()
    [[1.0, 0.0], [0.0, 0.0]]
    """
    checks.optimizer("replace_masks", inner)
    if not isinstance(state, SparseState):
        raise ValueError(f"replace_masks: the state must be that of sparsify, got {kind(state)}")
    for given in (state.masks, masks):
        checks.not_in_patterns("replace_masks", given)
    for name, leaf in trees.named_leaves(params).items():
        if not hasattr(leaf, "dtype"):
            raise ValueError(f"replace_masks: params must hold arrays, got {shown(leaf)} at leaf {name!r}")
    if jax.tree.structure(jax.eval_shape(inner.init, params)) != jax.tree.structure(state.inner):
        raise ValueError(
            "replace_masks: inner must be the optimizer that sparsify was given, and params those of the state, "
            "got a state of another"
        )
    expected, given = trees.named_leaves(state.masks), trees.named_leaves(masks)
    if expected.keys() != given.keys():
        raise ValueError(f"replace_masks: masks must be of {listed(expected)}, got those of {listed(given)}")
    for name, mask in given.items():
        checks.mask("replace_masks", name, mask, expected[name])
    masks = jax.tree.map(jnp.asarray, trees.aligned(masks, state.masks))
    both = jax.tree.map(jnp.logical_and, masks, state.masks)
    params = apply_masks(params, masks)
    optimizer = restart(inner, state.inner, both, params)
    return params, state._replace(algorithm=optax.tree.set(state.algorithm, masks=masks), inner=optimizer)
