"""Groups of channels that are removed together, read off the program of a model."""

from __future__ import annotations

import functools
import re
from collections.abc import Callable, Iterable, Sequence
from typing import Any, NamedTuple

import numpy as np

from rigl_jax import checks, trees
from rigl_jax.base import PyTree
from rigl_jax.channels import rules
from rigl_jax.messages import shown
from rigl_jax.tables import table
from rigl_jax.tracing.channels import Channels, Labels, Reading
from rigl_jax.tracing.program import trace


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
      exact: whether the model computes the same function without a channel that is 0 at every input. Not so for
        channels over which there is a mean (normalisation over features), a maximum or a softmax.
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


class Groups(tuple[Group, ...]):
    """Groups of one model: a tuple that prints as a table.

    Attributes:
      products: `(MACs, for each axis (its size; of every group that lies in it the number and the positions of every
        channel; those of no group are counted in the size only))`, see `macs`.
    """

    products: tuple[tuple[float, tuple[tuple[int, tuple[tuple[int, np.ndarray], ...]], ...]], ...]

    def __new__(cls, groups: Iterable[Group], products: Any = ()) -> Groups:
        """A tuple with the products of the model."""
        made = super().__new__(cls, groups)
        made.products = tuple(products)
        return made

    def macs(self, removed: Sequence[np.ndarray] | None = None) -> float:
        """MACs of one call of the model without the channels that are `removed`: bool[size] for each group."""
        total = 0.0
        for cost, axes in self.products:
            for size, parts in axes:
                gone = 0 if removed is None else sum(int(counts[removed[g]].sum()) for g, counts in parts)
                cost *= (size - gone) / size
            total += cost
        return total

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
    return "" if group.exact else "changes the function even where 0"


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
      ValueError: `ignore` is no regular expression.

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
    leaves = trees.named_leaves(params)
    program = trace(apply, params, *inputs)
    reading = rules.read(program, len(leaves))
    own = {name: reading.labels[v] for name, v in zip(leaves, program.inputs, strict=False)}
    found = [_named(group, patterns) for group in _found(reading, own)]
    number = {root: (g, i) for g, (_, roots) in enumerate(found) for i, root in enumerate(roots)}
    made = [group for group, _ in found]
    count = functools.partial(_counted, reading.channels, number, [group.size for group in made])
    return Groups(made, [(macs, tuple(map(count, axes))) for macs, axes in reading.notes.products])


_Found = tuple[Group, list[int]]  # a group, and the representative of each of its channels


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
    reasons, ties = _reasons(channels), _ties(channels)
    uneven = {int(root) for axes in reading.notes.uneven for root in channels.find(axes)}
    order = np.lexsort((at, of, roots))
    alike: dict[Any, list[np.ndarray]] = {}
    for run in np.split(order, np.flatnonzero(np.diff(roots[order])) + 1):
        root = int(roots[run[0]])
        why = reasons.get(root)
        if why is None or why[0]:  # positions of a window are no channels
            alike.setdefault((of[run].tobytes(), why, root in uneven), []).append(run)
    made = []
    for (_, why, changes), runs in alike.items():
        where, own_roots = of[runs[0]], [int(roots[run[0]]) for run in runs]
        members = tuple(Member(*places[i], np.stack([at[run][where == i] for run in runs])) for i in np.unique(where))
        tied = sorted(set().union(*(ties.get(root, ()) for root in own_roots)))
        text, known = why or ("", True)
        made.append((where.min(), (Group(members, len(runs), tuple(tied), text, not known, not changes), own_roots)))
    return [found for _, found in sorted(made, key=lambda pair: pair[0])]


def _named(found: _Found, patterns: Sequence[re.Pattern[str]]) -> _Found:
    """The same group; one that is to be ignored stays."""
    group, roots = found
    hit = next((p.pattern for p in patterns for m in group.members if p.search(m.leaf)), None)
    return (group if hit is None else group._replace(why=f"ignored by {hit!r}", unknown=False)), roots


def _patterns(ignore: str | Sequence[str]) -> list[re.Pattern[str]]:
    try:
        return [re.compile(p) for p in ([ignore] if isinstance(ignore, str) else ignore)]
    except (re.error, TypeError) as error:
        raise ValueError(f"groups: ignore must be regular expressions, got {shown(ignore)}: {error}") from None


def _reasons(channels: Channels) -> dict[int, tuple[str, bool]]:
    """`{representative: (why it is fixed, whether that is known)}`. What is known comes first, then what came first."""
    found: dict[int, tuple[str, bool]] = {}
    for positions, why, known in channels.reasons:
        for root in np.unique(channels.find(positions)).tolist():
            before = found.get(root)
            if before is None or (not before[0] and why) or (known > before[1] and why):
                found[root] = (why, known)
    return found


def _ties(channels: Channels) -> dict[int, set[str]]:
    found: dict[int, set[str]] = {}
    for positions, name in channels.ties:
        for root in np.unique(channels.find(positions)).tolist():
            found.setdefault(root, set()).add(name)
    return found


def _counted(channels: Channels, number: dict[int, tuple[int, int]], sizes: Sequence[int], axis: np.ndarray) -> Any:
    """How often every channel of every group occurs in an axis of a product."""
    counts: dict[int, np.ndarray] = {}
    for root, times in zip(*np.unique(channels.find(axis), return_counts=True), strict=True):
        if (place := number.get(int(root))) is not None:
            counts.setdefault(place[0], np.zeros(sizes[place[0]], np.int64))[place[1]] = times
    return len(axis), tuple(counts.items())
