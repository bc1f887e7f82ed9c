"""Fields that a state got in a later version: where they are None, files are those of the earlier one."""

from __future__ import annotations

from typing import Any

from rigl_jax.base import PyTree


def written(state: PyTree) -> PyTree:
    """What is written of a state: a NamedTuple loses the fields that are None, if None is their default.

    >>> import collections
    >>> State = collections.namedtuple("State", "step explored examples", defaults=[None])
    >>> written(State(1, None)), written(State(1, None, 2))
    ({'step': 1, 'explored': None}, State(step=1, explored=None, examples=2))
    """
    defaults = getattr(state, "_field_defaults", {})
    absent = [name for name, default in defaults.items() if default is None and getattr(state, name) is None]
    return {name: value for name, value in state._asdict().items() if name not in absent} if absent else state


def read(like: PyTree, found: Any) -> PyTree:
    """The state, of the type of `like`, of what was written of it: the inverse of `written`."""
    return found if written(like) is like else type(like)(**found)
