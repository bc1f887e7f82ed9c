"""The roles of leaves, read off a trace: which of their axes the model's products sum over.

Every value that is made of a weight alone (cast, transposed, reshaped, sliced, masked by a constant) is followed, axis
by axis, to the products it is an operand of. What meets data any other way is no longer followed.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.extend.core as jex

from rigl_jax import trees
from rigl_jax.base import Axes, PyTree, Role
from rigl_jax.tracing import primitives
from rigl_jax.tracing.geometry import Part, broadcast, only, reshape, without

INPUT, OUTPUT, WINDOW, STACK = "inputs", "outputs", "window", "stack"

Parts = dict[str, tuple[Part, ...]]
"""`{leaf: a Part for each axis}`."""


class Data(NamedTuple):
    """A value that holds data: of the axes that products with weights have written, which of whose outputs they are."""

    trails: Parts


Owned = Parts | Data
"""A value that is made of weights alone, of none if it is constant; or data."""


class Use(NamedTuple):
    """One way in which a leaf meets data.

    Attributes:
      kind: "product", "depthwise" (a product), "lookup", "added" (element by element), or "unknown".
      parts: what its axes are there, `{axis of the leaf: INPUT, ...}`; axes that are missing were taken before.
    """

    kind: str
    parts: Mapping[int, str]


class _Seen(NamedTuple):
    uses: dict[str, list[Use]]
    shapes: dict[str, tuple[int, ...]]
    paired: set[str]  # leaves that were multiplied by another leaf
    apart: dict[str, set[int]]  # outputs that a later weight does not sum over but keeps apart: layers


def traced_roles(params: PyTree, apply: Callable[..., Any], inputs: Sequence[Any]) -> dict[str, Role]:
    """The roles of the leaves whose use is seen in `apply(params, *inputs)`; others are left out."""
    leaves, tree = jax.tree.flatten(params)
    arrays = {name: p for name, p in trees.named_leaves(params).items() if hasattr(p, "shape")}
    at = [i for i, p in enumerate(leaves) if hasattr(p, "shape")]

    def called(arrays: list[Any], *inputs: Any) -> Any:
        filled = list(leaves)
        for i, array in zip(at, arrays, strict=True):
            filled[i] = array
        return apply(jax.tree.unflatten(tree, filled), *inputs)

    shapes = {name: tuple(p.shape) for name, p in arrays.items()}
    seen = _Seen({name: [] for name in arrays}, shapes, set(), {name: set() for name in arrays})
    closed = jax.make_jaxpr(called)(list(arrays.values()), *inputs)
    owned: list[Owned] = [{name: tuple((axis,) for axis in range(len(shape)))} for name, shape in seen.shapes.items()]
    data: list[Owned] = [Data({})] * (len(closed.jaxpr.invars) - len(owned))
    _walk(closed.jaxpr, [*owned, *data], seen)
    found = {
        name: _role([_layered(use, seen.apart[name]) for use in uses], shapes[name]) for name, uses in seen.uses.items()
    }
    return {name: role for name, role in found.items() if role is not None}


def _role(uses: list[Use], shape: Sequence[int]) -> Role | None:
    """Of several uses: looked up at all is a table; else the first product tells, of layers in a stack if any does."""
    by_kind = {use.kind: use for use in reversed(uses)}
    if use := by_kind.get("lookup"):
        return Role(_axes(use.parts, shape), "embedding")
    if "product" in by_kind or "depthwise" in by_kind:
        products = [(use.kind, _axes(use.parts, shape)) for use in uses if use.kind in ("product", "depthwise")]
        kind, axes = next((found for found in products if found[1] and found[1].stack), products[0])
        return None if axes is None else Role(axes, None if kind == "product" else kind)
    return Role(None, "bias or scale") if uses and "unknown" not in by_kind else None


def _layered(use: Use, apart: set[int]) -> Use:
    """Outputs that are kept apart from then on are layers, if there are other outputs."""
    outputs = {axis for axis, kind in use.parts.items() if kind == OUTPUT}
    if use.kind != "product" or not outputs - apart:
        return use
    return use._replace(parts={**use.parts, **dict.fromkeys(outputs & apart, STACK)})


def _axes(parts: Mapping[int, str], shape: Sequence[int]) -> Axes | None:
    """What a use says, completed.

    An axis from which one index was taken is a stack; one that was summed over against another weight is what is
    missing, of inputs and outputs.
    """
    kinds = dict(parts)
    missing = [axis for axis in range(len(shape)) if axis not in kinds]
    for kind in (INPUT, OUTPUT):
        if missing and kind not in kinds.values() and STACK not in kinds.values():
            kinds |= dict.fromkeys(missing, kind)
            missing = []
    kinds |= dict.fromkeys(missing, STACK)
    if not {INPUT, OUTPUT} <= set(kinds.values()):
        return None
    found = {kind: tuple(axis for axis in range(len(shape)) if kinds[axis] == kind) for kind in Axes._fields}
    return Axes(**found)


def _walk(jaxpr: Any, ins: Sequence[Owned], seen: _Seen) -> list[Owned]:
    known: dict[Any, Owned] = dict(zip(jaxpr.invars, ins, strict=True))

    def read(atom: Any) -> Owned:
        return {} if isinstance(atom, jex.Literal) else known.get(atom, {})

    for eqn in jaxpr.eqns:
        operands = [read(atom) for atom in eqn.invars]
        outs = _equation(eqn, operands, seen)
        known.update(zip(eqn.outvars, outs, strict=True))
    return [read(atom) for atom in jaxpr.outvars]


def _equation(eqn: Any, ins: list[Owned], seen: _Seen) -> list[Owned]:
    name = eqn.primitive.name
    if (inner := primitives.called(eqn)) is not None:
        return _walk(inner.jaxpr, ins, seen)
    if rule := _RULES.get(name):
        return rule(eqn, ins, seen)
    if name.startswith(("random_", "threefry", "rng_")):  # no data: a weight that noise drops stays one
        return [{}] * len(eqn.outvars)
    if all(owned == {} for owned in ins):
        return [{}] * len(eqn.outvars)
    if name == "scan":
        return _scan(eqn, ins, seen)
    if name == "while":
        loop = primitives.while_loop(eqn)
        return _walk(loop.body.jaxpr, ins[loop.condition_consts :], seen)
    if name == "cond":
        outs = [_walk(branch.jaxpr, ins[1:], seen) for branch in primitives.branches(eqn)]
        return [own[0] if all(other == own[0] for other in own) else Data({}) for own in zip(*outs, strict=True)]
    inner_programs = primitives.held(eqn)
    if len(inner_programs) == 1 and len(inner_programs[0].jaxpr.invars) == len(ins):  # shard_map and its like
        outs = _walk(inner_programs[0].jaxpr, ins, seen)
        return outs if len(outs) == len(eqn.outvars) else [Data({})] * len(eqn.outvars)
    if inner_programs or len(eqn.outvars) != 1 or name in _OPAQUE:
        return _unknown(ins, seen, len(eqn.outvars))
    return [_elementwise(eqn, ins, seen)]


def _unknown(ins: Sequence[Owned], seen: _Seen, n: int) -> list[Owned]:
    _note(ins, seen, "unknown")
    return [Data({})] * n


def _note(ins: Sequence[Owned], seen: _Seen, kind: str) -> None:
    for owned in ins:
        for name in owned if isinstance(owned, dict) else ():
            seen.uses[name].append(Use(kind, {}))


def _elementwise(eqn: Any, ins: list[Owned], seen: _Seen) -> Owned:
    """Of one weight, or of several: what it is made of. With data: data. An axis of 1 that is repeated is nobody's."""
    shape = eqn.outvars[0].aval.shape
    aligned: list[Owned] = []
    for atom, owned in zip(eqn.invars, ins, strict=True):
        given = atom.aval.shape
        fits = len(given) == len(shape) and all(n in (1, m) for n, m in zip(given, shape, strict=True))
        if owned and given and not fits:
            return _unknown(ins, seen, 1)[0]
        own = [k for k, n in enumerate(given) if fits and n == shape[k]]
        aligned.append(_mapped(owned, functools.partial(only, own)))
    return _together(aligned, seen)


def _mapped(owned: Owned, move: Callable[[tuple[Part, ...]], Sequence[Part]]) -> Owned:
    parts = {name: tuple(move(parts)) for name, parts in _parts(owned).items()}
    return _data(parts) if isinstance(owned, Data) else parts


def _data(parts: Parts) -> Data:
    return Data({name: of_axes for name, of_axes in parts.items() if any(of_axes)})


def _parts(owned: Owned) -> Parts:
    return owned.trails if isinstance(owned, Data) else owned


def _together(ins: Sequence[Owned], seen: _Seen) -> Owned:
    data = [owned for owned in ins if isinstance(owned, Data)]
    if data:
        _note(ins, seen, "added")
    found: Parts = {}
    for name, parts in (item for owned in data or ins for item in _parts(owned).items()):
        found[name] = max(found.get(name, parts), parts, key=lambda parts: sum(map(bool, parts)))
    rank = max((len(parts) for parts in found.values()), default=0)
    found = {name: parts for name, parts in found.items() if len(parts) == rank}
    return _data(found) if data else found


def _scan(eqn: Any, ins: list[Owned], seen: _Seen) -> list[Owned]:
    scan = primitives.scan(eqn)
    first = scan.consts + scan.carry
    inside = [*ins[:first], *(_mapped(owned, lambda parts: parts[1:]) for owned in ins[first:])]
    outs = _walk(scan.body.jaxpr, inside, seen)
    return [*outs[: scan.carry], *[Data({})] * (len(outs) - scan.carry)]


# --- axes that move --------------------------------------------------------------------------------------------------


def _moved(move: Callable[[Any, tuple[Part, ...]], Sequence[Part]]) -> Callable[..., list[Owned]]:
    """The rule of an operation that rearranges its first operand."""

    def rule(eqn: Any, ins: list[Owned], seen: _Seen) -> list[Owned]:
        del seen
        return [_mapped(ins[0], functools.partial(move, eqn))] * len(eqn.outvars)

    return rule


def _gather(eqn: Any, ins: list[Owned], seen: _Seen) -> list[Owned]:
    """Rows that data choose are looked up; where whole matrices are chosen, as those of experts, each is a layer.

    Constant numbers of rows are data that were closed over, unless they are one row (a layer) or all (an order).
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
            seen.uses[name].append(Use("lookup", looked))
        return [Data({})]
    places = dict(zip(given.offset_dims, kept, strict=False))
    places = {k: axis for k, axis in places.items() if axis not in chosen}
    if ordered and isinstance(ins[1], dict):
        places |= dict(zip((k for k in range(len(wide)) if k not in given.offset_dims), chosen, strict=True))
    moved = {n: tuple(p[places[k]] if k in places else () for k in range(len(wide))) for n, p in ins[0].items()}
    return [moved]


def _sliced(eqn: Any, ins: list[Owned], seen: _Seen) -> list[Owned]:
    """A slice of a stack is one of its layers: the axis from which one index is taken is no longer the leaf's."""
    del seen
    before, after = eqn.invars[0].aval.shape, eqn.outvars[0].aval.shape
    own = [axis for axis in range(len(before)) if not after[axis] == 1 < before[axis]]
    return [_mapped(ins[0], functools.partial(only, own))]


# --- products --------------------------------------------------------------------------------------------------------


def _dot(eqn: Any, ins: list[Owned], seen: _Seen) -> list[Owned]:
    contract, batch = eqn.params["dimension_numbers"]
    weights = [isinstance(owned, dict) and bool(owned) for owned in ins]
    written: Parts = {}
    for side in (0, 1):
        rest = [axis for axis in range(len(eqn.invars[side].aval.shape)) if axis not in (*contract[side], *batch[side])]
        first = len(batch[0]) if side == 0 else len(eqn.outvars[0].aval.shape) - len(rest)
        places = {**dict(enumerate(batch[side])), **{first + k: axis for k, axis in enumerate(rest)}}
        for name, parts in _parts(ins[side]).items():
            row = tuple(parts[places[k]] if k in places else () for k in range(len(eqn.outvars[0].aval.shape)))
            written[name] = row if weights[side] or name not in written else written[name]
            if all(weights):  # what meets data is their product
                seen.paired.add(name)
            elif weights[side]:
                kinds = {INPUT: contract[side], OUTPUT: rest, STACK: batch[side]}
                seen.uses[name].append(_product(parts, kinds, name in seen.paired))
            elif weights[1 - side]:  # a layer for each index of what earlier layers wrote: these are stacked as well
                alone = [parts[axis] for axis in batch[side] if sum(parts[axis] == part for part in parts) == 1]
                seen.apart[name].update(part[0] for part in alone if len(part) == 1)
    constant = all(isinstance(owned, dict) for owned in ins) and sum(weights) != 1
    return [written if constant else _data(written)]


def _product(parts: tuple[Part, ...], kinds: Mapping[str, Sequence[int]], paired: bool = False) -> Use:
    """A leaf that meets data in a product. An axis of it that is two of the value's is what comes first in `kinds`."""
    known: dict[int, str] = {}
    for kind, axes in kinds.items():
        for axis in axes:
            for mine in parts[axis]:
                known.setdefault(mine, kind)
    summed = paired or any(parts[axis] for axis in (*kinds[INPUT], *kinds.get(WINDOW, ())))
    return Use("product" if summed else "added", known)


def _ragged(eqn: Any, ins: list[Owned], seen: _Seen) -> list[Owned]:
    """Rows in groups, each with a matrix of its own: experts."""
    given = eqn.params["ragged_dot_dimension_numbers"]
    contract, batch = given.dot_dimension_numbers
    own, stack = contract[1], (*batch[1], *given.rhs_group_dimensions)
    for name, parts in ins[1].items() if isinstance(ins[1], dict) else ():
        free = [axis for axis in range(len(parts)) if axis not in (*own, *stack)]
        seen.uses[name].append(_product(parts, {INPUT: own, OUTPUT: free, STACK: stack}))
    return _unknown(ins[:1], seen, 1)


def _conv(eqn: Any, ins: list[Owned], seen: _Seen) -> list[Owned]:
    out, channels, *window = eqn.params["dimension_numbers"].rhs_spec
    for name, parts in ins[1].items() if isinstance(ins[1], dict) else ():
        groups, stack, mine = eqn.params["feature_group_count"], [], list(parts[out])
        # Under vmap over kernels each of them is a group, and their axis comes before the outputs.
        while len(mine) > 1 and groups > 1 and groups % seen.shapes[name][mine[0]] == 0:
            stack.append(mine.pop(0))
            groups //= seen.shapes[name][stack[-1]]
        use = _product(parts, {INPUT: (channels,), OUTPUT: (out,), WINDOW: window})
        depthwise = groups > 1 and eqn.invars[1].aval.shape[channels] == 1
        kinds = {**use.parts, **dict.fromkeys(stack, STACK)}
        seen.uses[name].append(Use("depthwise" if depthwise else use.kind, kinds))
    return _unknown(ins[:1], seen, 1)


_OPAQUE = frozenset(("ffi_call", "pallas_call", "pure_callback", "io_callback", "custom_call", "fft", "sort"))

_RULES: dict[str, Callable[[Any, list[Owned], _Seen], list[Owned]]] = {
    "reshape": _moved(reshape),
    "transpose": _moved(lambda eqn, parts: [parts[axis] for axis in eqn.params["permutation"]]),
    "broadcast_in_dim": _moved(broadcast),
    "squeeze": _moved(lambda eqn, parts: without(eqn.params["dimensions"], parts)),
    **dict.fromkeys(
        ("reduce_sum", "reduce_max", "reduce_min", "reduce_prod", "argmax", "argmin"),
        _moved(lambda eqn, parts: without(eqn.params["axes"], parts)),
    ),
    **dict.fromkeys(("pad", "rev", "split"), _moved(lambda eqn, parts: parts)),
    "concatenate": lambda eqn, ins, seen: [_together(ins, seen)],
    "slice": _sliced,
    "dynamic_slice": _sliced,
    "gather": _gather,
    "dot_general": _dot,
    "ragged_dot_general": _ragged,
    "conv_general_dilated": _conv,
}
