"""The table of the criteria: everything that configs, tables and tests know about a criterion by its name."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

from rigl_jax.base import Criterion
from rigl_jax.criteria.data_free import magnitude, random, synflow
from rigl_jax.criteria.first_order import snip
from rigl_jax.criteria.second_order import grasp


class Entry(NamedTuple):
    """A criterion.

    Attributes:
      name: what configs and the command line call it.
      label: what tables and figures call it.
      make: `(*, loss, apply, key) -> Criterion`; it takes what it needs of `loss(params, batch) -> scalar`,
        `apply(params, inputs) -> outputs` and a PRNG key.
      random: whether scores are drawn, so that they do not depend on the weights.
    """

    name: str
    label: str
    make: Callable[..., Criterion]
    random: bool = False


CRITERIA = {
    entry.name: entry
    for entry in (
        Entry("magnitude", "Magnitude", lambda **_: magnitude),
        Entry("random", "Random", lambda key, **_: random(key), random=True),
        Entry("snip", "SNIP", lambda loss, **_: snip(loss)),
        Entry("grasp", "GraSP", lambda loss, **_: grasp(loss)),
        Entry("synflow", "SynFlow", lambda apply, **_: synflow(apply)),
    )
}
"""`{name: Entry}`, in the order of tables."""
