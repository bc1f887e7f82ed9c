"""A factor on every channel of a model, at all the products that read the channel.

A product reads a channel where it sums over it: the rows of the next kernels, the features of queries and keys. With
the factor 0 nothing reads the channel, which is what `shrink` makes of it (in groups that are `exact`). Criteria of
channels are derivatives by these factors. As every product is linear in what it reads, the derivative by the factor of
a channel is the sum of g w over the rows that read it.
"""

from __future__ import annotations

import functools
import itertools
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from rigl_jax.base import Array, PyTree
from rigl_jax.channels import loops, rules
from rigl_jax.channels.grouping import Group, arrays_of, checked_groups
from rigl_jax.tracing import geometry, primitives
from rigl_jax.tracing.channels import Reading
from rigl_jax.tracing.program import Program, evaluate, trace_model
from rigl_jax.tracing.walk import Walker

Scores = tuple[Array, ...]
"""float[size] for each group, higher is more worth keeping."""
ChannelCriterion = Callable[[Sequence[Group], PyTree, Any], Scores]
"""`(groups, params, batch) -> scores`. Pure: for jit over params and batch, with the groups closed over."""


class Read(NamedTuple):
    """What a product sums over.

    Attributes:
      eqn: the product.
      side: which operand is data; of two, or none, the first.
      axis: an axis of it that is summed over.
      other: that of the other operand.
      weight: whether the other operand does not depend on data.
      index: int64[size of the axis]: the number of the channel at each position, counted over all groups; the number of
        all channels where there is none.
    """

    eqn: Any
    side: int
    axis: int
    other: int
    weight: bool
    index: np.ndarray


Tap = Callable[[Read, list[Array]], list[Array]]
"""`(read, the two operands of the product) -> the operands to take instead`."""


def sizes(groups: Sequence[Group]) -> np.ndarray:
    """Where the channels of each group begin in a list of all, and how many there are."""
    return np.cumsum([0, *(group.size for group in groups)])


def parted(groups: Sequence[Group], flat: Array) -> Scores:
    """A list of all channels, group by group."""
    return tuple(flat[a:b] for a, b in itertools.pairwise(sizes(groups).tolist()))


def removable(groups: Sequence[Group]) -> np.ndarray:
    """bool[all channels]: which may be removed."""
    return np.repeat([not group.why for group in groups], [group.size for group in groups]).astype(bool)


class Tapped(NamedTuple):
    """A function whose products can be changed where they read channels.

    Attributes:
      size: the number of channels of all groups.
      run: `(tap, params, *inputs) -> outputs`; its derivatives are those of the function.
    """

    size: int
    run: Callable[..., Any]

    def gated(self, scale: Array, params: PyTree, *inputs: Any) -> Any:
        """The function with a factor, of float[size], on every channel."""
        return self.run(functools.partial(_scaled, jnp.append(scale, 1)), params, *inputs)

    def slope(self, params: PyTree, *inputs: Any) -> Callable[[Array], Array]:
        """`factors -> float[size]`: the derivative by every factor of a function that is a scalar, such as a loss."""
        return jax.grad(lambda scale: self.gated(scale, params, *inputs))

    def curved(self, along: Array, params: PyTree, *inputs: Any) -> tuple[Array, Array]:
        """(float[size], float[size]): the `slope` at factors of 1, and the Hessian there times `along`."""
        return jax.jvp(self.slope(params, *inputs), (jnp.ones(self.size),), (along,))

    def shifted(self, shift: Array, params: PyTree, *inputs: Any, scale: Array | None = None) -> Any:
        """The function with a number added to every channel at every position, after the factor."""
        scale = jnp.ones_like(shift) if scale is None else scale

        def tap(read: Read, operands: list[Array]) -> list[Array]:
            operands = _scaled(jnp.append(scale, 1), read, operands)
            return _with(read, operands, operands[read.side] + _along(jnp.append(shift, 0), read, operands))

        return self.run(tap, params, *inputs)

    def noted(self, note: Callable[[Read, list[Array]], Array], params: PyTree, *inputs: Any) -> Array:
        """float[size]: what `note(read, operands)`, a number for each position, is in all reads together."""

        def total(probe: Array) -> Array:
            tap = functools.partial(_probed, note, probe)
            outputs = jax.tree.leaves(self.run(tap, params, *inputs))
            return sum((jnp.sum(y.astype(jnp.float32)) for y in outputs), jnp.zeros(()))

        return jax.grad(total)(jnp.zeros(self.size + 1))[: self.size]


def inputs_of(batch: Any) -> Any:
    """The inputs of a batch: its first part where it is a tuple or list, `(inputs, labels)`, else the batch."""
    return batch[0] if isinstance(batch, tuple | list) else batch


def tapped(who: str, function: Callable[..., Any], groups: Sequence[Group], params: PyTree, *inputs: Any) -> Tapped:
    """Reads where the products of `function(params, *inputs)` read the channels of the groups.

    Args:
      who: what errors call it.
      function: the model, or a loss around it.
      groups: of the model.
      params: the weights.
      *inputs: trees of arrays; `run` takes others of the same shapes.

    Raises:
      ValueError: groups of other params; a function that makes several channels of them one.
    """
    checked_groups(who, groups)
    leaves = arrays_of(who, params)
    program = trace_model(who, function, params, *inputs)
    reading = rules.read(program, len(leaves))
    own = {name: reading.labels[v] for name, v in zip(leaves, program.inputs, strict=False)}
    number, data = numbered(who, reading, own, groups), set(program.inputs[len(leaves) :])
    reads = _reads(reading, program, number, data)

    def run(tap: Tap, params: PyTree, *inputs: Any) -> Any:
        return _evaluated(reading, reads, tap)(program, jax.tree.leaves((params, inputs)))

    return Tapped(int(sizes(groups)[-1]), run)


def numbered(who: str, reading: Reading, own: dict[str, Any], groups: Sequence[Group]) -> np.ndarray:
    """Of every position the number of its channel among those of all groups; how many there are for others."""
    channels, starts = reading.channels, sizes(groups)
    number = np.full(len(channels), starts[-1])
    places = []
    for start, group in zip(starts[:-1], groups, strict=True):
        for member in group.members:
            axes = own.get(member.leaf, ())
            label = axes[member.axis] if member.axis < len(axes) else None
            if label is None or member.positions.max() >= len(label):
                raise ValueError(f"{who}: groups must be those of these params, got {group.name!r} among them")
            places.append((group, channels.find(label[member.positions]), start + np.arange(group.size)[:, None]))
            number[places[-1][1]] = places[-1][2]
    for group, roots, numbers in places:
        if (number[roots] != numbers).any():
            raise ValueError(f"{who}: groups must be those of this function, which ties channels of {group.name!r}")
    return number


_Reads = dict[Any, list[Read]]
"""`{result of a product: what it sums over}`."""


def _reads(reading: Reading, program: Program, number: np.ndarray, data: set[Any]) -> _Reads:
    """The products of a program, and of the loops and branches in it, that read channels. Adds to `data`."""
    found: _Reads = {}
    for eqn in program.equations:
        given = [not hasattr(atom, "val") and atom in data for atom in eqn.invars]
        for inner in reading.notes.bodies.get(eqn.outvars[0], ()):
            found |= _reads(reading, inner, number, _inside(eqn, inner, given))
        if any(given):
            data.update(eqn.outvars)
        side = 1 if given[:2] == [False, True] else 0
        for pair in _summed(eqn):
            labels = reading.labels[eqn.invars[side]][pair[side]]
            if labels is None:
                continue
            index = number[reading.channels.find(labels)]
            if (index < number[0]).any():
                read = Read(eqn, side, pair[side], pair[1 - side], not given[1 - side], index)
                found.setdefault(eqn.outvars[0], []).append(read)
    return found


def _inside(eqn: Any, inner: Program, given: list[bool]) -> set[Any]:
    """The inputs of a loop or branch that are data: what a loop carries is, if anything is."""
    given = list(given)
    if eqn.primitive.name == "scan":
        loop = primitives.scan(eqn)
        given[loop.consts : loop.consts + loop.carry] = [any(given)] * loop.carry
    return {variable for variable, one in zip(inner.inputs[::-1], given[::-1], strict=False) if one}


def _summed(eqn: Any) -> list[tuple[int, int]]:
    """The pairs of axes that a product sums over and that may be channels."""
    if eqn.primitive.name == "dot_general":
        return list(zip(*geometry.dot(eqn).summed, strict=True))
    if eqn.primitive.name == "conv_general_dilated":
        conv = geometry.conv(eqn)
        return [(conv.data[1], conv.kernel[1])]
    return []


def _evaluated(reading: Reading, reads: _Reads, tap: Tap) -> Callable[[Program, Sequence[Any]], Any]:
    """Runs programs of a reading with changed products."""

    def run(program: Program, inputs: Sequence[Any]) -> Any:
        return evaluate(program, inputs, table, functools.partial(around, program))

    def product(walker: Walker, eqn: Any, xs: list[Any]) -> Sequence[Any]:
        for read in reads.get(eqn.outvars[0], ()):
            xs = tap(read, xs)
        return walker.unknown(walker, eqn, xs)

    def around(program: Program, call: Any, outs: Any, inside: Any, operands: Sequence[Any]) -> list[Any]:
        if any(outer is call and variable in reads for variable, outer in program.within.items()):
            return inside(*operands)
        results = dict(zip(call.outvars, primitives.bind(call, operands), strict=True))
        return [results[variable] for variable in outs]

    table = {"dot_general": product, "conv_general_dilated": product, **loops.resized(reading.notes.bodies, run)}
    return run


def _along(values: Array, read: Read, operands: Sequence[Array]) -> Array:
    """Numbers of channels along the axis that is read."""
    x = operands[read.side]
    return values[read.index].astype(x.dtype).reshape([-1 if k == read.axis else 1 for k in range(x.ndim)])


def _with(read: Read, operands: Sequence[Array], x: Array) -> list[Array]:
    return [x if side == read.side else operand for side, operand in enumerate(operands)]


def _scaled(scale: Array, read: Read, operands: list[Array]) -> list[Array]:
    return _with(read, operands, operands[read.side] * _along(scale, read, operands))


def _probed(note: Callable[[Read, list[Array]], Array], probe: Array, read: Read, operands: list[Array]) -> list[Array]:
    """Operands as they are; the derivative by the probe is what is noted. So it comes out of loops as well."""

    @jax.custom_vjp
    def see(x: Array, other: Array, probe: Array) -> Array:
        return x

    def forward(x: Array, other: Array, probe: Array) -> tuple[Array, tuple[Array, Array, Array]]:
        pair = [x, other] if read.side == 0 else [other, x]
        return x, (note(read, pair).astype(probe.dtype), other, probe)

    def backward(seen: tuple[Array, Array, Array], cotangent: Array) -> tuple[Array, Array, Array]:
        noted, other, probe = seen
        return jnp.zeros_like(cotangent), jnp.zeros_like(other), jnp.zeros_like(probe).at[read.index].add(noted)

    see.defvjp(forward, backward)
    return _with(read, operands, see(operands[read.side], operands[1 - read.side], probe))


def read_sums(function: Callable[[Array], Array], read: Read, operands: list[Array]) -> Array:
    """float[size of the axis]: the sums over all other axes of a function of what is read."""
    x = operands[read.side]
    return jnp.sum(function(x.astype(jnp.float32)), [k for k in range(x.ndim) if k != read.axis])
