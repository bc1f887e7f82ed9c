"""Rules of the interpreter for channels that may be removed although the function changes.

They add to those of `tracing.channels`, which `compact` uses and which keep everything whose removal could change the
function: concatenations, slices, sums over channels, splits into heads, groups of convolutions, lookups, loops.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np

from rigl_jax.channels import loops, parts, splits
from rigl_jax.channels.notes import Notes, Sum, unknown
from rigl_jax.channels.numbers import read_numbers
from rigl_jax.tracing import channels as base
from rigl_jax.tracing import geometry
from rigl_jax.tracing.channels import Channels, Labels, Reading, Split
from rigl_jax.tracing.program import Program
from rigl_jax.tracing.walk import Rule, Walker


def read(program: Program, weights: int) -> Reading:
    """The channels of a program whose first `weights` inputs are weights."""
    reading = Reading(Channels(), {}, Notes(read_numbers(program), {}, {}, {}, {}, [], [], _weights(program, weights)))
    channels, labels = reading.channels, reading.labels
    for k, variable in enumerate(program.inputs):
        labels[variable] = channels.new(variable.aval.shape)
        if k >= weights:
            channels.fix(labels[variable], "an input of the model")
    labels.update((variable, channels.new(variable.aval.shape)) for variable in program.constants)
    base.walk(program, reading, RULES, unknown)
    uses = program.uses
    for variable in program.inputs[:weights]:
        if not uses[variable]:
            channels.fix(labels[variable], "not read by the model")
    for variable, axes in labels.items():
        labels[variable] = splits.settle(channels, axes, finest=True)
    return reading


def _weights(program: Program, weights: int) -> int:
    """The first position that is no weight's, as these are numbered first."""
    sizes = [n for v in program.inputs[:weights] for n in v.aval.shape if n > 1]
    return 1 + sum(sizes)


def _settled(rule: Rule) -> Rule:
    """The rule of an operation that treats the axes of splits apart."""
    return lambda walker, eqn, ins: rule(walker, eqn, [splits.settle(walker.context.channels, axes) for axes in ins])


# --- element by element ----------------------------------------------------------------------------------------------


def _elementwise(walker: Walker, eqn: Any, ins: list[Labels]) -> list[Labels]:
    channels, (given, out) = walker.context.channels, geometry.shapes(eqn)
    full = [(axes, shape) for axes, shape in zip(ins, given, strict=True) if len(shape) == len(out)]
    pairs = _aligned(channels, full)
    joined: list[Any] = []
    for k, n in enumerate(out):
        same = [axes[k] for axes, shape in pairs if shape[k] == n]
        split = next((axis for axis in same if isinstance(axis, Split)), None)
        if split is None:
            joined.append(channels.join(*same) if same else None)
            continue
        channels.join(*(axis.grid.reshape(-1) for axis in same))
        joined.append(split)
    _note_mean(walker.context, eqn)
    if eqn.primitive.name in _COMPARISONS:
        for axes, atom in zip(ins, eqn.invars, strict=True):
            if np.issubdtype(atom.aval.dtype, np.integer):
                channels.fix(axes, "numbers of positions are compared")
    return [tuple(joined)]


_COMPARISONS = frozenset(("eq", "ne", "lt", "le", "gt", "ge"))


def _aligned(channels: Channels, pairs: list[tuple[Labels, Any]]) -> list[tuple[Labels, Any]]:
    """Operands whose splits lie on the same axes; all settled where one of them has other labels there."""
    pairs = [(splits.simple(channels, axes), shape) for axes, shape in pairs]
    for block in {block for axes, _ in pairs for block in splits.blocks(axes)}:
        for axes, shape in pairs:
            if block not in splits.blocks(axes) and any(shape[k] != 1 for k in block):
                return [(splits.settle(channels, axes), shape) for axes, shape in pairs]
    return pairs


def _note_mean(reading: Reading, eqn: Any) -> None:
    """Sees a division by the number of terms: a mean over channels."""
    notes = reading.notes
    if eqn.primitive.name not in ("div", "mul"):
        return
    for which in (1, 0) if eqn.primitive.name == "mul" else (1,):
        total, number = notes.sums.get(eqn.invars[1 - which]), notes.numbers.get(eqn.invars[which])
        if total is None or number is None or number.size != 1 or not number.any():
            continue
        terms = float(number.reshape(())) if eqn.primitive.name == "div" else 1 / float(number.reshape(()))
        if abs(terms - total.count) <= 1 + 1e-5 * total.count:  # or one less, in a variance without bias
            notes.means[eqn.outvars[0]] = total, which
        return


# --- axes that move, sums --------------------------------------------------------------------------------------------


def _moved(walker: Walker, eqn: Any, ins: list[Labels]) -> list[Labels]:
    _same_sum(walker.context, eqn)
    return list(base.RULES["transpose"](walker, eqn, ins))


def _same_sum(reading: Reading, eqn: Any) -> None:
    if (total := reading.notes.sums.get(eqn.invars[0])) is not None:
        reading.notes.sums[eqn.outvars[0]] = total


def _convert(walker: Walker, eqn: Any, ins: list[Labels]) -> list[Labels]:
    _same_sum(walker.context, eqn)
    return [ins[0]]


def _reshape(walker: Walker, eqn: Any, ins: list[Labels]) -> list[Labels]:
    if eqn.params.get("dimensions") is not None:
        return unknown(walker, eqn, ins)
    _same_sum(walker.context, eqn)
    (before, *_), after = geometry.shapes(eqn)
    return [splits.reshaped(walker.context.channels, ins[0], before, after, walker.context.notes.weights)]


def _reduce(walker: Walker, eqn: Any, ins: list[Labels]) -> list[Labels]:
    """A sum, maximum or product over channels: what is left is summed over."""
    gone, shape = eqn.params["axes"], eqn.invars[0].aval.shape
    axes = splits.settle(walker.context.channels, ins[0], gone, gone)
    over = tuple(axes[k] for k in gone if axes[k] is not None)
    walker.context.notes.over[eqn.outvars[0]] = over
    walker.context.notes.uneven.extend(over)
    if eqn.primitive.name == "reduce_sum":
        walker.context.notes.sums[eqn.outvars[0]] = Sum(math.prod(shape[k] for k in gone), over)
    elif eqn.primitive.name in ("argmax", "argmin"):
        walker.context.channels.fix(over, f"the number of a channel is returned, in {eqn.primitive.name}")
    return [tuple(axes[k] for k in range(len(shape)) if k not in gone)]


def _cumulative(walker: Walker, eqn: Any, ins: list[Labels]) -> list[Labels]:
    axis = eqn.params.get("axis", eqn.params.get("dimension"))
    why = f"the order of channels matters, in {eqn.primitive.name}"
    walker.context.channels.fix([axes[axis] for axes in ins], why)
    return _elementwise(walker, eqn, ins) * len(eqn.outvars)


# --- products --------------------------------------------------------------------------------------------------------


def _dot(walker: Walker, eqn: Any, ins: list[Labels]) -> list[Labels]:
    channels, dot = walker.context.channels, geometry.dot(eqn)
    sides = [splits.settle(channels, ins[s], (*dot.summed[s], *dot.batch[s]), dot.summed[s]) for s in (0, 1)]
    (out,) = base.RULES["dot_general"](walker, eqn, sides)
    terms = math.prod(eqn.invars[0].aval.shape[k] for k in dot.summed[0])
    _charge(walker.context, eqn, terms, (*out, *(sides[0][k] for k in dot.summed[0])))
    return [out]


def _charge(reading: Reading, eqn: Any, terms: float, axes: Sequence[Any]) -> None:
    macs = math.prod(eqn.outvars[0].aval.shape) * terms * reading.notes.trips
    grids = {id(getattr(a, "grid", a)): np.ravel(getattr(a, "grid", a)) for a in axes if a is not None}
    reading.notes.products.append((macs, tuple(grids.values())))


def _conv(walker: Walker, eqn: Any, ins: list[Labels]) -> list[Labels]:
    channels, conv = walker.context.channels, geometry.conv(eqn)
    x, kernel = splits.settle(channels, ins[0], None, conv.data[2:]), splits.settle(channels, ins[1])
    if eqn.params["batch_group_count"] != 1:
        return unknown(walker, eqn, [x, kernel])
    (outputs, inputs, *window), (batch, data, *space) = conv.kernel, conv.data
    if conv.groups == 1:
        channels.join(x[data], kernel[inputs])
    else:
        _grouped(channels, conv.groups, x[data], kernel[inputs], kernel[outputs])
    channels.fix([kernel[k] for k in window])
    channels.fix([x[k] for k in space], "positions of a convolution")
    out: list[Any] = [None] * len(conv.out)
    out[conv.out[0]], out[conv.out[1]] = x[batch], kernel[outputs]
    shape = eqn.invars[1].aval.shape
    terms = math.prod(shape[k] for k in (inputs, *window)) / math.prod(eqn.params["lhs_dilation"])
    _charge(walker.context, eqn, terms, (*out, kernel[inputs]))
    return [tuple(out)]


def _window(walker: Walker, eqn: Any, ins: list[Labels]) -> list[Labels]:
    axes = splits.settle(walker.context.channels, ins[0], None, geometry.window_axes(eqn))
    return list(base.RULES["reduce_window_sum"](walker, eqn, [axes]))


def _grouped(channels: Channels, groups: int, x: Any, inputs: Any, outputs: Any) -> None:
    """Whole groups go, or the same channels of all groups, whatever there are more of."""
    if x is None or outputs is None:
        return channels.fix([x, inputs, outputs], "meets an axis that keeps its size, in a grouped convolution")
    x, outputs = x.reshape(groups, -1), outputs.reshape(groups, -1)
    if groups >= x.shape[1]:
        channels.fix([inputs], "whole groups of a convolution are removed instead")
        for side in (x, outputs):
            channels.join(np.broadcast_to(x[:, :1], side.shape).reshape(-1), side.reshape(-1))
    else:
        channels.join(np.broadcast_to(inputs, x.shape).reshape(-1), x.reshape(-1))
        channels.join(np.broadcast_to(outputs[:1], outputs.shape).reshape(-1), outputs.reshape(-1))
    return None


_SCATTERS = [f"scatter{kind}" for kind in ("", "-add", "-mul", "-min", "-max", "_add", "_mul", "_min", "_max")]
RULES: dict[str, Rule] = {
    **dict.fromkeys(geometry.ELEMENTWISE, _elementwise),
    **dict.fromkeys(("convert_element_type", "copy", "stop_gradient"), _convert),
    **dict.fromkeys(("transpose", "squeeze", "broadcast_in_dim"), _moved),
    **dict.fromkeys(geometry.REDUCTIONS, _reduce),
    **dict.fromkeys(("cumsum", "cumprod", "cummax", "cummin", "cumlogsumexp", "sort"), _settled(_cumulative)),
    **dict.fromkeys(geometry.WINDOWED, _window),
    "rev": _settled(base.RULES["rev"]),
    "reshape": _reshape,
    "iota": lambda walker, eqn, ins: [walker.context.channels.new(eqn.outvars[0].aval.shape)],
    "concatenate": _settled(parts.concatenate),
    "slice": parts.slice,
    "split": parts.split,
    "pad": _settled(parts.pad),
    "gather": _settled(parts.gather),
    **dict.fromkeys(_SCATTERS, _settled(parts.scatter)),
    "dynamic_slice": _settled(parts.dynamic_slice),
    "dynamic_update_slice": _settled(parts.dynamic_update),
    "dot_general": _dot,
    "conv_general_dilated": _conv,
    "scan": loops.scan,
    "cond": loops.cond,
}
"""The channels of the results of a primitive, after it has joined those of its operands."""
