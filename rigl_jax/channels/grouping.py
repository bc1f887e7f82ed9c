"""Groups of channels that are removed together, read off the program of a model."""

from __future__ import annotations

import functools
import math
import re
from collections.abc import Callable, Iterable, Sequence
from typing import Any, NamedTuple

import numpy as np

from rigl_jax import checks, trees
from rigl_jax.base import PyTree
from rigl_jax.channels import rules
from rigl_jax.messages import listed, shown
from rigl_jax.tables import table
from rigl_jax.tracing.channels import Channels, Labels, Reading
from rigl_jax.tracing.program import trace_model


class Member(NamedTuple):
    """What a group is in one axis of a leaf.

    Attributes:
      leaf: its name.
      axis: the axis, from 0.
      positions: int64[size, per channel]: the positions of every channel of the group along the axis, ascending. A
        channel has more than one where an image was flattened, or heads of several features.
    """

    leaf: str
    axis: int
    positions: np.ndarray


class Group(NamedTuple):
    """Channels that occur in the same axes of the same leaves. Each of them can be removed on its own.

    Attributes:
      members: all the places where they occur; a channel is removed from all of them.
      size: how many channels there are.
      ties: the operations that make the members one, by JAX's names.
      why: why the channels cannot be removed; empty if they can be.
      unknown: True where that is only not known, as they meet an operation that has no rule.
      exact: whether the model computes the same function without a channel that is 0 wherever it occurs. False for
        channels over which there is a sum other than a product, a mean (normalisation over features), a maximum or a
        softmax: there the function may change.
    """

    members: tuple[Member, ...]
    size: int
    ties: tuple[str, ...]
    why: str
    unknown: bool
    exact: bool

    @property
    def name(self) -> str:
        """The first place, `"Dense_0/kernel[1]"`."""
        return f"{self.members[0].leaf}[{self.members[0].axis}]"


Extent = tuple[float, tuple[tuple[int, tuple[tuple[int, np.ndarray], ...]], ...]]
"""What is proportional to the sizes of some axes, and which groups lie in each of them; see `Groups`."""


def _left(extent: Extent, removed: Sequence[np.ndarray] | None) -> float:
    whole, axes = extent
    for size, parts in axes:
        gone = 0 if removed is None else sum(int(counts[removed[g]].sum()) for g, counts in parts)
        whole *= (size - gone) / size
    return whole


class Groups(tuple[Group, ...]):
    """Groups of one model: a tuple that prints as a table.

    Attributes:
      products: `(MACs, for each axis (its size; of every group that lies in it the number and the positions of every
        channel; those of no group are counted in the size only))`, see `macs`.
      leaves: `(entries, for each axis the same)` of every leaf of params, see `parameters`.
    """

    products: tuple[Extent, ...]
    leaves: tuple[Extent, ...]

    def __new__(cls, groups: Iterable[Group], products: Any = (), leaves: Any = ()) -> Groups:
        """A tuple with the products and leaves of the model."""
        made = super().__new__(cls, groups)
        made.products, made.leaves = tuple(products), tuple(leaves)
        return made

    def macs(self, removed: Sequence[np.ndarray] | None = None) -> float:
        """MACs of one call of the model without the channels that are `removed`: bool[size] for each group."""
        return sum((_left(extent, removed) for extent in self.products), 0.0)

    def parameters(self, removed: Sequence[np.ndarray] | None = None) -> int:
        """Entries of params (statistics included) without the channels that are `removed`."""
        return sum(round(_left(extent, removed)) for extent in self.leaves)

    def __str__(self) -> str:
        """A table: members, channels, what ties them, and what keeps them."""
        rows = [("members", "ties", "", "channels")]
        for group in self:
            stays = ("unknown: " if group.unknown else "stays: ") + group.why if group.why else _note(group)
            names = [f"{m.leaf}[{m.axis}]" for m in group.members]
            more = f" and {len(names) - 3} more" if len(names) > 4 else ""
            rows.append((", ".join(names[: 3 if more else 4]) + more, ", ".join(group.ties), stays, str(group.size)))
        return table(rows, words=3)


def _note(group: Group) -> str:
    return "" if group.exact else "may change the function even where 0"


def groups(apply: Callable[..., Any], params: PyTree, *inputs: Any, ignore: str | Sequence[str] = ()) -> Groups:
    """Which channels of a model can be removed, and what goes with each of them. Nothing is run.

    Every position of every axis of every weight is followed through the model's jaxpr. Positions that an operation
    needs to be the same are one channel: outputs of a layer and inputs of the next, biases, the scales and statistics
    of normalisations, both sides of a residual sum, whole heads of attention in queries, keys, values and outputs.
    Known are products, convolutions (grouped, transposed, dilated), pooling, sums over channels, elementwise
    operations, concatenations, slices, padding, reshapes, transposes, lookups, scans and branches.

    Choices, where a dense array leaves one:
      * an axis that is reshaped to several (heads and their features, groups of a GroupNorm) loses positions of the
        first of these: whole heads, whole groups;
      * a grouped convolution loses whole groups if there are at least as many as channels in each, otherwise the same
        channels of all groups; a depthwise one loses single channels;
      * stacked layers of a scan all lose the same channels.

    Args:
      apply: `(params, *inputs) -> outputs`, a pure function, for inference (no dropout). For Equinox: `eqx.combine`
        inside, and the arrays of `eqx.partition` as params; for NNX: `nnx.merge` inside, and the state.
      params: the weights, and all else that has channels, such as batch statistics.
      *inputs: arrays or `jax.ShapeDtypeStruct`, for their shapes.
      ignore: regular expressions. Groups with a leaf that one of them matches (`re.search`) stay.

    Returns:
      The groups in the order of their first members: a tuple that prints as a table. Inputs and outputs of the model
      are groups too; they stay, and so does what meets a primitive that has no rule here (`unknown`).

    Raises:
      ValueError: `ignore` is no regular expression or matches no leaf, params hold no arrays, apply cannot be traced on
        these inputs.

    Example:
      >>> import jax, jax.numpy as jnp
      >>> params = {"a": jnp.ones((4, 8)), "b": jnp.ones(8), "c": jnp.ones((8, 3))}
      >>> apply = lambda p, x: jax.nn.relu(x @ p["a"] + p["b"][None]) @ p["c"]
      >>> print(groups(apply, params, jnp.ones((1, 4))))
      members           ties                                             channels
      a[0]              dot_general       stays: an input of the model          4
      a[1], b[0], c[0]  add, dot_general                                        8
      c[1]                                stays: an output of the model         3
    """
    checks.functions("groups", apply=apply)
    patterns = _patterns(ignore)
    leaves = arrays_of("groups", params)
    if unused := [p.pattern for p in patterns if not any(map(p.search, leaves))]:
        raise ValueError(f"groups: ignore {unused[0]!r} matches no leaf; leaves are {listed(list(leaves))}")
    program = trace_model("groups", apply, params, *inputs)
    reading = rules.read(program, len(leaves))
    own = {name: reading.labels[v] for name, v in zip(leaves, program.inputs, strict=False)}
    found = [_named(group, patterns) for group in _found(reading, own)]
    made = [group for group, _ in found]
    count = functools.partial(_counted, reading.channels, _places(reading.channels, found))
    sizes = [
        (math.prod(map(int, leaf.shape)), tuple(count(axis) for axis in own[name] if axis is not None))
        for name, leaf in leaves.items()
    ]
    return Groups(made, [(macs, tuple(map(count, axes))) for macs, axes in reading.notes.products], sizes)


_Found = tuple[Group, np.ndarray]  # a group, and the representative of each of its channels


def _found(reading: Reading, own: dict[str, Labels]) -> list[_Found]:
    """The groups: channels of the same places and the same fate, in the order of the leaves."""
    channels = reading.channels
    places = [(name, axis) for name, axes in own.items() for axis, label in enumerate(axes) if label is not None]
    if not places:
        return []
    labels = [own[name][axis] for name, axis in places]
    of = np.repeat(np.arange(len(places)), [len(label) for label in labels])
    at = np.concatenate([np.arange(len(label)) for label in labels])
    roots = channels.find(np.concatenate(labels))
    order = np.lexsort((at, of, roots))
    starts = np.flatnonzero(np.diff(roots[order], prepend=-1))
    heads = roots[order][starts]
    mark = np.random.default_rng(0).integers(0, 1 << 63, len(places), np.uint64)
    where = np.add.reduceat(mark[of[order]], starts)  # the same sum: the same places, each as often
    reasons, fate = _fates(channels)
    uneven = np.zeros(len(fate), bool)
    for axes in reading.notes.uneven:
        uneven[channels.find(axes)] = True
    ties = _ties(channels)
    key = np.stack([where, fate[heads].astype(np.uint64), uneven[heads].astype(np.uint64)])
    alike = np.unique(key, axis=1, return_inverse=True)[1].reshape(-1)
    made = []
    for kind in np.unique(alike):
        rows = np.flatnonzero(alike == kind)
        length = (np.append(starts, len(order)) - np.append(0, starts))[rows[0] + 1]
        entries = order[starts[rows][:, None] + np.arange(length)]
        (why, known), changes = reasons[fate[heads[rows[0]]]], uneven[heads[rows[0]]]
        if not why and fate[heads[rows[0]]]:  # positions of a window are no channels
            continue
        in_place = of[entries[0]]
        members = tuple(Member(places[i][0], places[i][1], at[entries[:, in_place == i]]) for i in np.unique(in_place))
        tied = tuple(sorted(name for name, which in ties.items() if which[heads[rows]].any()))
        group = Group(members, len(rows), tied, why, not known, not changes)
        made.append((in_place.min(), heads[rows[0]], (group, heads[rows])))
    return [found for *_, found in sorted(made, key=lambda row: row[:2])]


def _named(found: _Found, patterns: Sequence[re.Pattern[str]]) -> _Found:
    """The same group; one that is to be ignored stays."""
    group, roots = found
    hit = next((p.pattern for p in patterns for m in group.members if p.search(m.leaf)), None)
    return (group if hit is None else group._replace(why=f"ignored by {hit!r}", unknown=False)), roots


def arrays_of(who: str, params: PyTree) -> dict[str, Any]:
    """The leaves by name, which must be arrays or `jax.ShapeDtypeStruct`, one at least."""
    leaves = trees.named_leaves(params)
    if not leaves or not all(hasattr(leaf, "shape") and hasattr(leaf, "dtype") for leaf in leaves.values()):
        raise ValueError(f"{who}: params must be a tree of arrays, got {shown(params)}")
    return leaves


def checked_groups(who: str, groups: Any, **parallel: Any) -> None:
    """Groups, and sequences of one element for each."""
    if not isinstance(groups, Sequence) or not all(isinstance(group, Group) for group in groups):
        raise ValueError(f"{who}: groups must be those of rx.channels.groups, got {shown(groups)}")
    for name, values in parallel.items():
        if not isinstance(values, Sequence) or isinstance(values, str) or len(values) != len(groups):
            raise ValueError(f"{who}: {name} must be {len(groups)} arrays, one a group, got {shown(values)}")


def _patterns(ignore: str | Sequence[str]) -> list[re.Pattern[str]]:
    try:
        return [re.compile(p) for p in ([ignore] if isinstance(ignore, str) else ignore)]
    except (re.error, TypeError) as error:
        raise ValueError(f"groups: ignore must be regular expressions, got {shown(ignore)}: {error}") from None


def _fates(channels: Channels) -> tuple[list[tuple[str, bool]], np.ndarray]:
    """The reasons, and which of them holds for each representative; the first of them stands for none.

    A reason comes before one that is only that something is not known, and that before none.
    """
    reasons = [("", True), *dict.fromkeys((why, known) for _, why, known in channels.reasons)]
    number = {reason: i for i, reason in reversed(list(enumerate(reasons))[1:])}
    fate = np.zeros(len(channels), np.int64)
    events = [event for event in channels.reasons if not event[1]]
    for known in (False, True):
        events += [event for event in channels.reasons[::-1] if event[1] and event[2] == known]
    for positions, why, known in events:
        fate[channels.find(positions)] = number[why, known]
    return reasons, fate


def _ties(channels: Channels) -> dict[str, np.ndarray]:
    """Of every operation which representatives it has joined others to."""
    found: dict[str, np.ndarray] = {}
    for positions, name in channels.ties:
        found.setdefault(name, np.zeros(len(channels), bool))[channels.find(positions)] = True
    return found


_Places = tuple[np.ndarray, np.ndarray, list[int]]
"""Of every representative the group (-1: none) and the number in it; the sizes of the groups."""


def _places(channels: Channels, found: Sequence[_Found]) -> _Places:
    group, number = np.full(len(channels), -1), np.zeros(len(channels), np.int64)
    for g, (_, roots) in enumerate(found):
        group[roots], number[roots] = g, np.arange(len(roots))
    return group, number, [len(roots) for _, roots in found]


def _counted(channels: Channels, places: _Places, axis: np.ndarray) -> Any:
    """How often every channel of every group occurs in an axis of a product."""
    roots = channels.find(axis)
    group, number = places[0][roots], places[1][roots]
    present = np.unique(group[group >= 0]).tolist()
    return len(axis), tuple((g, np.bincount(number[group == g], minlength=places[2][g])) for g in present)
