"""Channels of any traced model: which can be removed together, what they are worth, and the smaller model."""

from rigl_jax.channels.grouping import Group, Groups, Member, groups
from rigl_jax.channels.selection import scores, select
from rigl_jax.channels.shrinking import Compact, shrink

__all__ = ["Compact", "Group", "Groups", "Member", "groups", "scores", "select", "shrink"]
