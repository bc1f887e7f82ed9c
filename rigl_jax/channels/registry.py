"""The table of the criteria of channels: what studies, tables and tests know about a criterion by its name."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

from rigl_jax.base import Criterion, PyTree
from rigl_jax.channels import pooling
from rigl_jax.channels.first_order import singe, taylor_2016, taylor_2019
from rigl_jax.channels.gating import ChannelCriterion
from rigl_jax.channels.grouping import Group
from rigl_jax.channels.propagation import nisp
from rigl_jax.channels.reconstruction import i_spasp
from rigl_jax.channels.redundancy import effective_rank, mutual_information, random
from rigl_jax.channels.second_order import sosp_h, sosp_i
from rigl_jax.channels.stability import nrs


class Entry(NamedTuple):
    """A criterion of channels.

    Attributes:
      name: what studies and tests call it.
      label: what tables and figures call it.
      make: `(*, loss, apply, key) -> ((groups, params, batch) -> scores)`; it takes what it needs of
        `loss(params, batch) -> scalar`, `apply(params, inputs) -> outputs` and a PRNG key. Of a batch that is a tuple
        the inputs come first.
      random: whether scores are drawn, so that they do not depend on the weights.
    """

    name: str
    label: str
    make: Callable[..., ChannelCriterion]
    random: bool = False


def _pooled(criterion: Criterion | None = None, reduce: str = "mean") -> ChannelCriterion:
    given = {} if criterion is None else {"criterion": criterion}

    def pooled(groups: Sequence[Group], params: PyTree, batch: Any) -> Any:
        return pooling.scores(groups, params, **given, batch=batch, reduce=reduce)

    return pooled


CRITERIA = {
    entry.name: entry
    for entry in (
        Entry("magnitude", "L1 norm", lambda **_: _pooled()),
        Entry("magnitude_2", "L2 norm", lambda **_: _pooled(reduce="norm")),
        Entry("random", "Random", lambda key, **_: random(key), random=True),
        Entry("taylor_2016", "Taylor 2016", lambda loss, **_: taylor_2016(loss)),
        Entry("taylor_2019", "Taylor 2019 FO", lambda loss, **_: taylor_2019(loss)),
        Entry("taylor_2019_2", "Taylor 2019 SO", lambda loss, **_: taylor_2019(loss, second="diagonal")),
        Entry("singe", "SInGE", lambda loss, **_: singe(loss)),
        Entry("sosp_h", "SOSP-H", lambda loss, **_: sosp_h(loss)),
        Entry("sosp_i", "SOSP-I", lambda apply, loss, **_: sosp_i(apply, loss)),
        Entry("nisp", "NISP", lambda apply, **_: nisp(apply)),
        Entry("i_spasp", "i-SpaSP", lambda apply, **_: i_spasp(apply)),
        Entry("effective_rank", "Effective rank", lambda loss, **_: effective_rank(loss)),
        Entry("mutual_information", "Mutual information", lambda apply, key, **_: mutual_information(apply, key)),
        Entry("nrs", "NRS", lambda apply, **_: nrs(apply)),
    )
}
"""`{name: Entry}`, in the order of tables."""
