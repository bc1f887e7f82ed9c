"""Channels of any traced model: which can be removed together, what they are worth, and the smaller model."""

from rigl_jax.channels.firing import Fired, Gated, ftwt, mass_targets
from rigl_jax.channels.first_order import ema, singe, taylor_2016, taylor_2019
from rigl_jax.channels.gating import ChannelCriterion
from rigl_jax.channels.grouping import Group, Groups, Member, groups
from rigl_jax.channels.iterating import Level, iterative_shrinking
from rigl_jax.channels.pooling import scores
from rigl_jax.channels.propagation import inf_fs, nisp
from rigl_jax.channels.reconstruction import i_spasp
from rigl_jax.channels.redundancy import effective_rank, mutual_information, random
from rigl_jax.channels.registry import CRITERIA
from rigl_jax.channels.second_order import sosp_h, sosp_i
from rigl_jax.channels.selection import select
from rigl_jax.channels.shrinking import Compact, latency, shrink
from rigl_jax.channels.slimming import only, slimming, soft_threshold
from rigl_jax.channels.stability import nrs

__all__ = [
    "CRITERIA",
    "ChannelCriterion",
    "Compact",
    "Fired",
    "Gated",
    "Group",
    "Groups",
    "Level",
    "Member",
    "effective_rank",
    "ema",
    "ftwt",
    "groups",
    "i_spasp",
    "inf_fs",
    "iterative_shrinking",
    "latency",
    "mass_targets",
    "mutual_information",
    "nisp",
    "nrs",
    "only",
    "random",
    "scores",
    "select",
    "shrink",
    "singe",
    "slimming",
    "soft_threshold",
    "sosp_h",
    "sosp_i",
    "taylor_2016",
    "taylor_2019",
]
