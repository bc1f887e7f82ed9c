"""The table of the criteria: everything that configs, tables and tests know about a criterion by its name."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

from rigl_jax.base import Criterion, Surgeon
from rigl_jax.criteria.activation import mean_activation, nnrelief, wanda
from rigl_jax.criteria.data_free import magnitude, random, synflow
from rigl_jax.criteria.first_order import singe, snip
from rigl_jax.criteria.m_fac import m_fac
from rigl_jax.criteria.obs import obs
from rigl_jax.criteria.second_order import fisher, grasp, obd, taylor
from rigl_jax.criteria.sparsegpt import sparsegpt


class Entry(NamedTuple):
    """A criterion or a surgeon.

    Attributes:
      name: what configs and the command line call it.
      label: what tables and figures call it.
      make: `(*, loss, apply, key) -> Criterion | Surgeon`; it takes what it needs of `loss(params, batch) -> scalar`,
        `apply(params, inputs) -> outputs` and a PRNG key.
      random: whether scores are drawn, so that they do not depend on the weights.
    """

    name: str
    label: str
    make: Callable[..., Criterion | Surgeon]
    random: bool = False


CRITERIA = {
    entry.name: entry
    for entry in (
        Entry("magnitude", "Magnitude", lambda **_: magnitude),
        Entry("random", "Random", lambda key, **_: random(key), random=True),
        Entry("snip", "SNIP", lambda loss, **_: snip(loss)),
        Entry("grasp", "GraSP", lambda loss, **_: grasp(loss)),
        Entry("synflow", "SynFlow", lambda apply, **_: synflow(apply)),
        Entry("taylor", "Taylor FO", lambda loss, **_: taylor(loss)),
        Entry("taylor_2", "Taylor SO", lambda loss, **_: taylor(loss, order=2)),
        Entry("singe", "SInGE", lambda loss, **_: singe(loss)),
        Entry("obd", "OBD", lambda loss, **_: obd(loss)),
        Entry("fisher", "Fisher", lambda loss, **_: fisher(loss)),
        Entry("wanda", "Wanda", lambda apply, **_: wanda(apply)),
        Entry("mean_activation", "Magnitude by activation", lambda apply, **_: mean_activation(apply)),
        Entry("nnrelief", "NNrelief", lambda apply, **_: nnrelief(apply)),
    )
}
"""`{name: Entry}`, in the order of tables."""

SURGEONS = {
    entry.name: entry
    for entry in (
        Entry("sparsegpt", "SparseGPT", lambda apply, **_: sparsegpt(apply)),
        Entry("m_fac", "M-FAC", lambda loss, **_: m_fac(loss, size=1)),
        Entry("obs", "OBS", lambda loss, **_: obs(loss)),
    )
}
"""The same of the surgeons."""
