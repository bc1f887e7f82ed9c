"""Integers in proportion to weights: who gets how many of what was dropped elsewhere."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from rigl_jax import arguments as rules
from rigl_jax import checks
from rigl_jax.arguments import arguments
from rigl_jax.base import Array

MOST = checks.LARGEST - 1


def count(n: Any) -> Array:
    """The integer or integers as int32, from 0 to 2**31 - 1; what is beyond counts as that."""
    if isinstance(n, jax.Array):
        n = jnp.maximum(n, jnp.zeros((), n.dtype))
        return (jnp.minimum(n, jnp.asarray(MOST, n.dtype)) if jnp.iinfo(n.dtype).max > MOST else n).astype(jnp.int32)
    return jnp.asarray(np.asarray(np.clip(np.asarray(n, object), 0, MOST), np.int32))


def geometric(first: int, last: int, rounds: int) -> np.ndarray:
    """int32[rounds], the units left in a group after each round; the last is exact."""
    steps = np.arange(1, rounds + 1) / rounds
    return np.rint(first * (last / first) ** steps).astype(np.int32)


def running(counts: Array) -> Array:
    """Running sums of int32 counts, at least 0 and fewer than 2**15, that stop at 2**31 - 1 where they would wrap.

    >>> running(jnp.full(4, 2**30, jnp.int32)).tolist() == [2**30, 2**31 - 1, 2**31 - 1, 2**31 - 1]
    True
    """
    return _capped(jnp.cumsum(counts >> 16, dtype=jnp.int32), jnp.cumsum(counts & 0xFFFF, dtype=jnp.int32))


def total(counts: Array) -> Array:
    """The sum, as in `running`."""
    return _capped(_sum(counts >> 16), _sum(counts & 0xFFFF))


def _capped(high: Array, low: Array) -> Array:
    high = high + (low >> 16)
    return jnp.where(high < 2**15, ((high & 0x7FFF) << 16) | (low & 0xFFFF), MOST)


@arguments(amount=rules.count, weights=rules.array(1), room=rules.array(1))
def redistribute(amount: Any, weights: Array, room: Array) -> Array:
    """Shares out `amount` places in proportion to `weights`, no more to each than it has room for.

    What a full receiver cannot take spills over to the others, in proportion again. Shares are rounded by largest
    remainder, ties to the lower index. A receiver of weight 0 gets nothing unless all others are full; such receivers
    then share by their room. There is no loop: where shares saturate follows in closed form, so a full network ends
    as surely as any other.

    Args:
      amount: how many in all, below 2**31; may be traced. Below 0 counts as 0, above the sum of room as that sum.
      weights: float[n], at least 0; NaN and below count as 0.
      room: int[n], the most that each can take; below 0 counts as 0. The sum may be above 2**31.

    Returns:
      int32[n] with the exact sum. Each is within 1 of its real share up to amounts of about 1e6, beyond that within
      float32's precision of it.

    >>> redistribute(10, jnp.array([3.0, 1.0, 0.0]), jnp.array([5, 9, 9])).tolist()
    [5, 5, 0]
    """
    if jnp.shape(weights) != jnp.shape(room) or jnp.ndim(room) != 1:
        raise ValueError(
            f"redistribute: weights and room must be of one shape [n], got {jnp.shape(weights)} and {jnp.shape(room)}"
        )
    if not isinstance(amount, jax.Array):
        checks.total("redistribute", "amount", int(amount))
    room = count(room)
    weights = jnp.nan_to_num(jnp.asarray(weights, jnp.float32), nan=0.0)
    amount = jnp.minimum(count(amount), total(room))
    shares = _share(amount, weights, room)
    left = room - shares
    return shares + _share(amount - _sum(shares), left.astype(jnp.float32), left)


def _sum(counts: Array) -> Array:
    # It may wrap. So does a difference from it, which is right again wherever int32 holds it.
    return jnp.sum(counts, dtype=jnp.int32)


def _share(amount: Array, weights: Array, room: Array) -> Array:
    """As much of the amount as receivers of positive weight can take."""
    takes = (weights > 0) & (room > 0)
    highest = jnp.max(jnp.where(takes, weights, 0.0), initial=0.0)
    # Relative, and no lower than what keeps room / weight finite.
    weights = jnp.where(takes, jnp.maximum(weights / jnp.where(highest > 0, highest, 1.0), 1e-28), 0.0)
    room = jnp.where(takes, room, 0)
    amount = jnp.minimum(amount, total(room))
    # A receiver is full at the scale room / weight; it is so in the end if all together take less at that scale.
    scale = jnp.where(takes, room.astype(jnp.float32) / jnp.where(takes, weights, 1.0), 0.0)
    taken = jnp.where(takes[None], jnp.minimum(scale[:, None] * weights[None], room.astype(jnp.float32)[None]), 0.0)
    full = takes & (jnp.sum(taken, axis=1) <= amount.astype(jnp.float32))
    rest, share = amount - _sum(jnp.where(full, room, 0)), jnp.sum(jnp.where(full, 0.0, weights))
    ideal = jnp.where(
        full,
        room.astype(jnp.float32),
        jnp.where(share > 0, rest.astype(jnp.float32) / jnp.where(share > 0, share, 1.0), 0.0) * weights,
    )
    ideal = jnp.clip(ideal, 0.0, room.astype(jnp.float32))
    shares = jnp.minimum(jnp.floor(ideal).astype(jnp.int32), room)
    remainder = jnp.where(shares < room, ideal - shares.astype(jnp.float32), -1.0)
    shares = shares + ((_rank(remainder) < amount - _sum(shares)) & (shares < room)).astype(jnp.int32)
    # Float rounding of large amounts may leave a few over or under.
    missing = amount - _sum(shares)
    shares = shares + _fill(missing, room - shares)
    return shares - _fill(-missing, shares)


def _rank(x: Array) -> Array:
    """How many entries come before each one: higher, or equal with a lower index."""
    index = jnp.arange(x.size)
    before = (x[None] > x[:, None]) | ((x[None] == x[:, None]) & (index[None] < index[:, None]))
    return jnp.sum(before, axis=1)


def _fill(amount: Array, room: Array) -> Array:
    """The amount put into the first places that have room."""
    before = running(jnp.concatenate([jnp.zeros(1, jnp.int32), room[:-1]]))
    return jnp.clip(jnp.maximum(amount, 0) - before, 0, room)
