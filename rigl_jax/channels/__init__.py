"""Channels of any traced model: which can be removed together, what they are worth, and the smaller model."""

from rigl_jax.channels.grouping import Group, Groups, Member, groups
from rigl_jax.channels.selection import scores, select
from rigl_jax.channels.shrinking import Compact, shrink
from rigl_jax.channels.slimming import only, slimming, soft_threshold

__all__ = [
    "Compact",
    "Group",
    "Groups",
    "Member",
    "groups",
    "only",
    "scores",
    "select",
    "shrink",
    "slimming",
    "soft_threshold",
]
