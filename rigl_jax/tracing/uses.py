"""The roles of leaves, read from a trace: which of their axes the products of the model sum over.

Every value that is computed from one weight only (cast, transposed, reshaped, sliced, masked by a constant) is
followed, axis by axis, to the products of which it is an operand. A value that meets data in another way is not
followed further.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import jax

from rigl_jax import trees
from rigl_jax.base import PyTree, Shape
from rigl_jax.tracing import geometry, primitives
from rigl_jax.tracing.walk import Rule, Walker, branches

Part = tuple[int, ...]
"""The axes of a leaf that an axis of a value runs over, major ones first; empty for an axis that is not the leaf's."""

INPUT, OUTPUT, WINDOW, STACK = "inputs", "outputs", "window", "stack"

Parts = dict[str, tuple[Part, ...]]
"""`{leaf: a Part for each axis}`."""


class Data(NamedTuple):
    """A value that contains data, with the output axis of the weight for each axis that a product has written."""

    trails: Parts


Owned = Parts | Data
"""A value that is computed from weights only (from none if it is constant), or data."""


class Use(NamedTuple):
    """One use of a leaf with data.

    Attributes:
      kind: "product", "depthwise" (a product), "lookup", "added" (element by element), or "unknown".
      parts: the roles of its axes, `{axis of the leaf: INPUT, ...}`; missing axes were indexed before.
    """

    kind: str
    parts: Mapping[int, str]


class Seen(NamedTuple):
    """The results of a walk, and the context of its rules."""

    uses: dict[str, list[Use]]
    shapes: dict[str, Shape]
    paired: set[str]  # leaves that were multiplied by another leaf
    apart: dict[str, set[int]]  # outputs that a later weight does not sum over but keeps apart: layers


def weights(shapes: Mapping[str, Sequence[int]]) -> tuple[Walker, list[Owned]]:
    """A walker over the uses of leaves of these shapes, and the values of the leaves. Other inputs are `Data({})`."""
    seen = Seen({n: [] for n in shapes}, {n: tuple(s) for n, s in shapes.items()}, set(), {n: set() for n in shapes})
    owned: list[Owned] = [{name: tuple((axis,) for axis in range(len(shape)))} for name, shape in shapes.items()]
    return Walker(RULES, _other, lambda *_: {}, seen, _made_of_constants), owned


def traced(params: PyTree, apply: Callable[..., Any], inputs: Sequence[Any]) -> tuple[dict[str, Shape], Any, PyTree]:
    """Of `apply(params, *inputs)`: shapes of the leaves that are arrays, the program, and shapes of its outputs.

    The program's first inputs are these leaves.
    """
    leaves, tree = jax.tree.flatten(params)
    arrays = {name: p for name, p in trees.named_leaves(params).items() if hasattr(p, "shape")}
    at = [i for i, p in enumerate(leaves) if hasattr(p, "shape")]

    def called(arrays: list[Any], *inputs: Any) -> Any:
        filled = list(leaves)
        for i, array in zip(at, arrays, strict=True):
            filled[i] = array
        return apply(jax.tree.unflatten(tree, filled), *inputs)

    program, out = jax.make_jaxpr(called, return_shape=True)(list(arrays.values()), *inputs)
    return {name: tuple(p.shape) for name, p in arrays.items()}, program, out


# --- values computed from weights ------------------------------------------------------------------------------------


def _made_of_constants(eqn: Any, ins: list[Owned]) -> list[Owned] | None:
    return None if any(owned != {} for owned in ins) else [{}] * len(eqn.outvars)


def _other(walker: Walker, eqn: Any, ins: list[Owned]) -> list[Owned]:
    """A primitive without a rule: treated as elementwise if the shapes allow it, else as unknown."""
    # Random numbers are not data: a weight with dropped entries is still a weight.
    if eqn.primitive.name.startswith(("random_", "threefry", "rng_")):
        return [{}] * len(eqn.outvars)
    if (inner := primitives.wrapped(eqn)) is not None:
        return walker(inner, ins)
    if primitives.held(eqn) or len(eqn.outvars) != 1:
        return _unknown(walker, eqn, ins)
    return _elementwise(walker, eqn, ins)


def _unknown(walker: Walker, eqn: Any, ins: Sequence[Owned]) -> list[Owned]:
    _note(ins, walker.context, "unknown")
    return [Data({})] * len(eqn.outvars)


def _note(ins: Sequence[Owned], seen: Seen, kind: str) -> None:
    for owned in ins:
        for name in owned if isinstance(owned, dict) else ():
            seen.uses[name].append(Use(kind, {}))


def _elementwise(walker: Walker, eqn: Any, ins: list[Owned]) -> list[Owned]:
    """The parts of all weights among the operands, or data if one is. A repeated axis of 1 belongs to no weight."""
    given, shape = geometry.shapes(eqn)
    aligned: list[Owned] = []
    for before, owned in zip(given, ins, strict=True):
        fits = len(before) == len(shape) and all(n in (1, m) for n, m in zip(before, shape, strict=True))
        if owned and before and not fits:
            return _unknown(walker, eqn, ins)
        own = [k for k, n in enumerate(before) if fits and n == shape[k]]
        aligned.append(_mapped(owned, functools.partial(_only, own)))
    return [_together(aligned, walker.context)]


def _only(axes: Sequence[int], parts: tuple[Part, ...]) -> tuple[Part, ...]:
    """The parts of these axes; the others belong to no weight."""
    return tuple(part if axis in axes else () for axis, part in enumerate(parts))


def _mapped(owned: Owned, move: Callable[[tuple[Part, ...]], Sequence[Part]]) -> Owned:
    parts = {name: tuple(move(parts)) for name, parts in _parts(owned).items()}
    return _data(parts) if isinstance(owned, Data) else parts


def _data(parts: Parts) -> Data:
    return Data({name: of_axes for name, of_axes in parts.items() if any(of_axes)})


def _parts(owned: Owned) -> Parts:
    return owned.trails if isinstance(owned, Data) else owned


def _together(ins: Sequence[Owned], seen: Seen) -> Owned:
    data = [owned for owned in ins if isinstance(owned, Data)]
    if data:
        _note(ins, seen, "added")
    found: Parts = {}
    for name, parts in (item for owned in data or ins for item in _parts(owned).items()):
        found[name] = max(found.get(name, parts), parts, key=lambda parts: sum(map(bool, parts)))
    rank = max((len(parts) for parts in found.values()), default=0)
    found = {name: parts for name, parts in found.items() if len(parts) == rank}
    return _data(found) if data else found


def _scan(walker: Walker, eqn: Any, ins: list[Owned]) -> list[Owned]:
    scan = primitives.scan(eqn)
    first = scan.consts + scan.carry
    inside = [*ins[:first], *(_mapped(owned, lambda parts: parts[1:]) for owned in ins[first:])]
    outs = walker(scan.body, inside)
    return [*outs[: scan.carry], *[Data({})] * (len(outs) - scan.carry)]


def _while(walker: Walker, eqn: Any, ins: list[Owned]) -> list[Owned]:
    loop = primitives.while_loop(eqn)
    return walker(loop.body, ins[loop.condition_consts :])


def _either(found: Sequence[Owned]) -> Owned:
    return found[0] if all(other == found[0] for other in found) else Data({})


# --- axes that move --------------------------------------------------------------------------------------------------


def _moved(move: Callable[[Any, tuple[Part, ...]], Sequence[Part]]) -> Rule:
    """The rule of an operation that rearranges its first operand."""
    return lambda walker, eqn, ins: [_mapped(ins[0], functools.partial(move, eqn))] * len(eqn.outvars)


def _move(eqn: Any, parts: tuple[Part, ...]) -> list[Part]:
    return [() if axis is None else parts[axis] for axis in geometry.moved(eqn)]


def _reshape(eqn: Any, parts: tuple[Part, ...]) -> list[Part]:
    """The rule of a reshape: merged axes have the parts of all, split axes the part that they had."""
    (before, *_), after = geometry.shapes(eqn)
    out: list[Part] = [()] * len(after)
    for axes, into in geometry.reshaped(before, after):
        kept = len(axes) == len(into) == 1
        run = tuple(part for k in axes if kept or before[k] > 1 for part in parts[k])
        for k in into:
            out[k] = run if kept or after[k] > 1 else ()
    return out


def _gather(walker: Walker, eqn: Any, ins: list[Owned]) -> list[Owned]:
    """The rule of a gather. Rows that data select are a lookup; whole matrices, as in experts, are layers.

    Constant row numbers count as data that were closed over, unless they select one row (a layer) or permute all.
    """
    given, shape, wide = eqn.params["dimension_numbers"], eqn.invars[0].aval.shape, eqn.outvars[0].aval.shape
    if isinstance(ins[0], Data) or not ins[0]:
        return [Data({}) if any(isinstance(owned, Data) for owned in ins) else {}]
    sizes = eqn.params["slice_sizes"]
    chosen = [axis for axis in range(len(shape)) if sizes[axis] < shape[axis]]
    kept = [axis for axis in range(len(shape)) if axis not in given.collapsed_slice_dims]
    matrices = sum(sizes[axis] > 1 for axis in kept) > 1
    rows = [wide[k] for k in range(len(wide)) if k not in given.offset_dims]
    ordered = [shape[axis] for axis in chosen] == rows
    if not matrices and (isinstance(ins[1], Data) or (rows and not ordered)):
        for name, parts in ins[0].items():
            looked = {axis: INPUT for k in chosen for axis in parts[k]}
            looked |= {axis: OUTPUT for k in kept if k not in chosen for axis in parts[k]}
            walker.context.uses[name].append(Use("lookup", looked))
        return [Data({})]
    places = dict(zip(given.offset_dims, kept, strict=False))
    places = {k: axis for k, axis in places.items() if axis not in chosen}
    if ordered and isinstance(ins[1], dict):
        places |= dict(zip((k for k in range(len(wide)) if k not in given.offset_dims), chosen, strict=True))
    moved = {n: tuple(p[places[k]] if k in places else () for k in range(len(wide))) for n, p in ins[0].items()}
    return [moved]


def _sliced(eqn: Any, parts: tuple[Part, ...]) -> tuple[Part, ...]:
    """A slice of a stack is one of its layers: the axis from which one index is taken is no longer the leaf's."""
    (before, *_), after = geometry.shapes(eqn)
    return _only([axis for axis in range(len(before)) if not after[axis] == 1 < before[axis]], parts)


# --- products --------------------------------------------------------------------------------------------------------


def _dot(walker: Walker, eqn: Any, ins: list[Owned]) -> list[Owned]:
    dot, seen, rank = geometry.dot(eqn), walker.context, len(eqn.outvars[0].aval.shape)
    weights = [isinstance(owned, dict) and bool(owned) for owned in ins]
    written: Parts = {}
    for side in (0, 1):
        places, batch = dot.written[side], dot.batch[side]
        for name, parts in _parts(ins[side]).items():
            row = tuple(parts[places[k]] if k in places else () for k in range(rank))
            written[name] = row if weights[side] or name not in written else written[name]
            if all(weights):  # the data are multiplied by the product of both
                seen.paired.add(name)
            elif weights[side]:
                kinds = {INPUT: dot.summed[side], OUTPUT: dot.free[side], STACK: batch}
                seen.uses[name].append(_product(parts, kinds, name in seen.paired))
            elif weights[1 - side]:  # a layer for each index of what earlier layers wrote: these are stacked as well
                alone = [parts[axis] for axis in batch if sum(parts[axis] == part for part in parts) == 1]
                seen.apart[name].update(part[0] for part in alone if len(part) == 1)
    constant = all(isinstance(owned, dict) for owned in ins) and sum(weights) != 1
    return [written if constant else _data(written)]


def _product(parts: tuple[Part, ...], kinds: Mapping[str, Sequence[int]], paired: bool = False) -> Use:
    """Records a product of a leaf with data. An axis that became two axes gets the first role in `kinds`."""
    known: dict[int, str] = {}
    for kind, axes in kinds.items():
        for axis in axes:
            for mine in parts[axis]:
                known.setdefault(mine, kind)
    summed = paired or any(parts[axis] for axis in (*kinds[INPUT], *kinds.get(WINDOW, ())))
    return Use("product" if summed else "added", known)


def _ragged(walker: Walker, eqn: Any, ins: list[Owned]) -> list[Owned]:
    """Rows in groups, each with its own matrix: experts."""
    given = eqn.params["ragged_dot_dimension_numbers"]
    contract, batch = given.dot_dimension_numbers
    own, stack = contract[1], (*batch[1], *given.rhs_group_dimensions)
    for name, parts in ins[1].items() if isinstance(ins[1], dict) else ():
        free = [axis for axis in range(len(parts)) if axis not in (*own, *stack)]
        walker.context.uses[name].append(_product(parts, {INPUT: own, OUTPUT: free, STACK: stack}))
    return _unknown(walker, eqn, ins[:1])


def _conv(walker: Walker, eqn: Any, ins: list[Owned]) -> list[Owned]:
    conv, seen = geometry.conv(eqn), walker.context
    out, channels, *window = conv.kernel
    for name, parts in ins[1].items() if isinstance(ins[1], dict) else ():
        groups, stack, mine = conv.groups, [], list(parts[out])
        # Under vmap over kernels each of them is a group, and their axis comes before the outputs.
        while len(mine) > 1 and groups > 1 and groups % seen.shapes[name][mine[0]] == 0:
            stack.append(mine.pop(0))
            groups //= seen.shapes[name][stack[-1]]
        use = _product(parts, {INPUT: (channels,), OUTPUT: (out,), WINDOW: window})
        depthwise = groups > 1 and eqn.invars[1].aval.shape[channels] == 1
        kinds = {**use.parts, **dict.fromkeys(stack, STACK)}
        seen.uses[name].append(Use("depthwise" if depthwise else use.kind, kinds))
    return _unknown(walker, eqn, ins[:1])


RULES: dict[str, Rule] = {
    **dict.fromkeys(geometry.MOVES, _moved(_move)),
    "reshape": _moved(_reshape),
    **dict.fromkeys(("pad", "rev", "split"), _moved(lambda eqn, parts: parts)),
    **dict.fromkeys(("slice", "dynamic_slice"), _moved(_sliced)),
    "concatenate": lambda walker, eqn, ins: [_together(ins, walker.context)],
    "gather": _gather,
    "dot_general": _dot,
    "ragged_dot_general": _ragged,
    "conv_general_dilated": _conv,
    "scan": _scan,
    "while": _while,
    "cond": branches(_either),
    **dict.fromkeys(
        ("ffi_call", "pallas_call", "pure_callback", "io_callback", "custom_call", "fft", "sort"), _unknown
    ),
}
"""The values of the results of a primitive; the rules also record uses (`Seen.uses`)."""
