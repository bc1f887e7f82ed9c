"""Apportionment: integers in proportion to weights, to divide dropped weights among leaves."""

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
    """The integer or integers as int32, clipped to 0 to 2**31 - 1."""
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
    """Divides `amount` among receivers in proportion to `weights`, at most `room` to each.

    What a full receiver cannot take goes to the others, again in proportion. Shares are rounded by largest remainder,
    ties to the lower index. A receiver of weight 0 gets nothing unless all others are full; such receivers then get
    shares in proportion to their room. Which receivers are full is computed in closed form, without a loop.

    Args:
      amount: how many in all, below 2**31; may be traced. Clipped to 0 and the sum of room.
      weights: float[n], at least 0; NaN and negative numbers count as 0.
      room: int[n], the most that each can take; negative numbers count as 0. The sum may be above 2**31.

    Returns:
      int32[n] with the exact sum. Each is within 1 of its real share for amounts up to about 1e6, for larger ones
      within the precision of float32.

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
    # The sum may wrap. A difference from it then wraps too, so it is right if int32 can hold it.
    return jnp.sum(counts, dtype=jnp.int32)


def _share(amount: Array, weights: Array, room: Array) -> Array:
    """As much of the amount as receivers of positive weight can take."""
    takes = (weights > 0) & (room > 0)
    highest = jnp.max(jnp.where(takes, weights, 0.0), initial=0.0)
    # Relative to the highest, and large enough that room / weight is finite.
    weights = jnp.where(takes, jnp.maximum(weights / jnp.where(highest > 0, highest, 1.0), 1e-28), 0.0)
    room = jnp.where(takes, room, 0)
    amount = jnp.minimum(amount, total(room))
    # A receiver is full at the scale room / weight. In the result it is full if all take at most the amount there.
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
    # For large amounts float rounding may give a few too many or too few.
    missing = amount - _sum(shares)
    shares = shares + _fill(missing, room - shares)
    return shares - _fill(-missing, shares)


def _rank(x: Array) -> Array:
    """How many entries come before each one: higher, or equal with a lower index."""
    index = jnp.arange(x.size)
    before = (x[None] > x[:, None]) | ((x[None] == x[:, None]) & (index[None] < index[:, None]))
    return jnp.sum(before, axis=1)


def _fill(amount: Array, room: Array) -> Array:
    """Gives the amount to the first receivers that have room."""
    before = running(jnp.concatenate([jnp.zeros(1, jnp.int32), room[:-1]]))
    return jnp.clip(jnp.maximum(amount, 0) - before, 0, room)
