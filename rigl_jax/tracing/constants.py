"""What a model computes whatever its input: values of units that no input reaches, and the products they enter.

values, products = read_products(program, weights, labels)
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from rigl_jax.tracing.channels import ELEMENTWISE, Labels, common_ends, window_axes
from rigl_jax.tracing.program import Program, Step


class Known(NamedTuple):
    """What is known of an array before it is computed. Both have its rank, an axis along which they vary has its size,
    any other may have 1.

    Attributes:
      value: the entries; arbitrary where they are not known.
      sure: bool, where they are known.
    """

    value: np.ndarray
    sure: np.ndarray


class Product(NamedTuple):
    """A matrix product or convolution of data with a weight: where units are summed.

    Attributes:
      rows: int64[in], the position of the unit that each row of the weight reads.
      columns: int64[out], that of the unit which each column computes; 0 for the fixed unit.
      nonzero: bool[in, out], whether the weight has anything there (at any tap, for a convolution).
      constant: bool[in], the row reads a known number, and adds the same to an output wherever that is computed. (Not
        so for a number other than 0 beside padding, or beside the zeros that a transposed convolution puts in between:
        both leave out some of a convolution's taps.)
      value: float64[in], that number; 0 in other rows.
      total: float[in, out], the weight, summed over taps.
      out: the value that it computes.
      axis: that value's axis of columns.
    """

    rows: np.ndarray
    columns: np.ndarray
    nonzero: np.ndarray
    constant: np.ndarray
    value: np.ndarray
    total: np.ndarray
    out: int
    axis: int

    def carried(self, rows: np.ndarray) -> np.ndarray:
        """float64[out]: what the rows of a bool[in] add to the outputs, of those whose number is known."""
        return self.value[rows] @ self.total[rows].astype(np.float64)


def read_products(
    program: Program, weights: Sequence[np.ndarray], labels: dict[int, Labels]
) -> tuple[list[Product], list[np.ndarray | None]]:
    """All products of a program with weights of these values, and the summed axes of products that are beyond it."""
    known = {i: _whole(value) for i, value in zip(program.inputs, weights, strict=False)}
    for i, constant in program.constants.items():
        if not jax.dtypes.issubdtype(
            dtype := program.avals[i].dtype, jax.dtypes.extended
        ):  # random keys are no numbers
            known[i] = _whole(np.asarray(constant).astype(dtype))
    products: list[Product] = []
    beyond: list[np.ndarray | None] = []
    for step in program.steps:
        ins = [known.get(i) for i in step.ins]
        shapes = [program.avals[i].shape for i in (*step.ins, *step.outs)]
        axes = [labels.get(i, (None,) * len(shape)) for i, shape in zip(step.ins, shapes, strict=False)]
        if step.name in ("dot_general", "conv_general_dilated"):
            product = (_dot if step.name == "dot_general" else _conv)(step, ins, axes, shapes)
            if product is None:
                beyond += _summed(step, axes)
                continue
            products.append(product)
            out = _outcome(product, len(shapes[-1]))
        else:
            out = _follow(step, ins, shapes)
        if out is not None and out.sure.any():
            dtype = program.avals[step.outs[0]].dtype
            known[step.outs[0]] = out._replace(value=np.asarray(out.value).astype(dtype))
    return products, beyond


def _whole(value: np.ndarray) -> Known:
    return Known(value, np.ones((1,) * value.ndim, bool))


def _complete(known: Known | None) -> bool:
    return known is not None and bool(known.sure.all())


def _summed(step: Step, axes: list[Labels]) -> list[np.ndarray | None]:
    if step.name == "dot_general":
        return [axes[side][k] for side in (0, 1) for k in step.params["dimension_numbers"][0][side]]
    numbers = step.params["dimension_numbers"]
    return [axes[0][numbers.lhs_spec[1]], axes[1][numbers.rhs_spec[1]]]


_Shapes = list[Sequence[Any]]  # of the operands, and last of the result


def _dot(step: Step, ins: list[Known | None], axes: list[Labels], shapes: _Shapes) -> Product | None:
    contract, batch = step.params["dimension_numbers"]
    side = next((s for s in (1, 0) if _complete(ins[s]) and len(axes[s]) == 2), None)
    if side is None or batch[0] or len(contract[0]) != 1:
        return None
    (own,), (other,) = contract[side], contract[1 - side]
    matrix = np.moveaxis(np.broadcast_to(_value(ins[side]), shapes[side]), own, 0)
    rows, columns = _positions(axes[side][own], matrix.shape[0]), _positions(axes[side][1 - own], matrix.shape[1])
    constant, value = _along(ins[1 - side], other, len(rows))
    out_axis = len(shapes[-1]) - 1 if side == 1 else 0  # free axes of the left operand come first
    return Product(rows, columns, matrix != 0, constant, value, matrix, step.outs[0], out_axis)


def _conv(step: Step, ins: list[Known | None], axes: list[Labels], shapes: _Shapes) -> Product | None:
    given, numbers = step.params, step.params["dimension_numbers"]
    if not given["feature_group_count"] == given["batch_group_count"] == 1 or not _complete(ins[1]):
        return None
    out_first, in_first, *_ = numbers.rhs_spec
    kernel = np.moveaxis(np.broadcast_to(_value(ins[1]), shapes[1]), (in_first, out_first), (-2, -1))
    taps = kernel.reshape(-1, *kernel.shape[-2:])
    rows, columns = (_positions(axes[1][k], shapes[1][k]) for k in (in_first, out_first))
    constant, value = _along(ins[0], numbers.lhs_spec[1], len(rows))
    if any(edge > 0 for pair in given["padding"] for edge in pair) or set(given["lhs_dilation"]) != {1}:
        constant = constant & (value == 0)
    total = taps.astype(np.float64).sum(axis=0)
    nonzero = (taps != 0).any(axis=0)
    return Product(rows, columns, nonzero, constant, value * constant, total, step.outs[0], numbers.out_spec[1])


def _value(known: Known | None) -> np.ndarray:
    assert known is not None
    return known.value


def _positions(axis: np.ndarray | None, size: int) -> np.ndarray:
    return np.zeros(size, np.int64) if axis is None else axis


def _along(x: Known | None, axis: int, size: int) -> tuple[np.ndarray, np.ndarray]:
    """Which entries of a product's data are known numbers, and these; float64[size], 0 where not known."""
    if x is None or any(n != 1 for k, n in enumerate(x.value.shape) if k != axis):
        return np.zeros(size, bool), np.zeros(size)
    value = np.broadcast_to(x.value.reshape(-1).astype(np.float64), (size,))
    sure = np.broadcast_to(x.sure.reshape(-1), (size,)) & np.isfinite(value)
    return sure, np.where(sure, value, 0)


def _outcome(product: Product, rank: int) -> Known:
    """What is known of a product's result: the outputs that only constant rows reach."""
    sure = np.logical_not(product.nonzero[~product.constant].any(axis=0, keepdims=True))
    shape = [-1 if k == product.axis else 1 for k in range(rank)]
    return Known(product.carried(product.constant).reshape(shape), sure.reshape(shape))


def _follow(step: Step, ins: list[Known | None], shapes: _Shapes) -> Known | None:
    """What is known after any other operation."""
    found = [known for known in ins if known is not None]
    if len(found) < len(ins) or not found:
        return None
    if step.name in ELEMENTWISE:
        return _elementwise(step, found)
    (x, *_), given = found, step.params
    if step.name == "transpose":
        return Known(*(part.transpose(given["permutation"]) for part in x))
    if step.name == "rev":
        return Known(*(np.flip(part, given["dimensions"]) for part in x))
    if step.name == "squeeze":
        return Known(*(part.squeeze(given["dimensions"]) for part in x))
    if step.name == "broadcast_in_dim":
        return Known(*(_placed(part, given["broadcast_dimensions"], len(shapes[-1])) for part in x))
    if step.name == "reshape" and given.get("dimensions") is None:
        return Known(*(_reshaped(part, shapes[0], shapes[-1]) for part in x))
    if step.name in ("reduce_sum", "reduce_max", "reduce_min"):
        return _pooled(step, x, given["axes"], shapes[0])
    if step.name.startswith("reduce_window_"):
        return _pooled(step, x, window_axes(step), shapes[0])
    return None


def _elementwise(step: Step, found: list[Known]) -> Known:
    shape = np.broadcast_shapes(*(known.value.shape for known in found))
    values = [jnp.asarray(k.value if k.value.ndim == 0 else np.broadcast_to(k.value, shape)) for k in found]
    sure = np.ones((1,) * len(shape), bool)
    for known in found:
        sure = sure & known.sure
    return Known(np.asarray(step.primitive.bind(*values, **step.params)), sure)


def _placed(part: np.ndarray, into: Sequence[int], rank: int) -> np.ndarray:
    shape = [1] * rank
    for k, axis in enumerate(into):
        shape[axis] = part.shape[k]
    return part.reshape(shape)


def _reshaped(part: np.ndarray, before: Sequence[int], after: Sequence[int]) -> np.ndarray:
    start, stop = common_ends(before, after)
    end, out_end = len(before) - stop, len(after) - stop
    head, tail = part.shape[:start], part.shape[end:]
    if all(n == 1 for n in part.shape[start:end]):
        return part.reshape(*head, *[1] * (out_end - start), *tail)
    return np.broadcast_to(part, (*head, *before[start:end], *tail)).reshape(*head, *after[start:out_end], *tail)


def _pooled(step: Step, x: Known, touched: Sequence[int], shape: Sequence[int]) -> Known | None:
    """A sum or an extreme along axes: computed in full, and kept where it is the same everywhere."""
    full = [shape[k] if k in touched else n for k, n in enumerate(x.value.shape)]
    if any(x.sure.shape[k] != 1 for k in touched) or not full:
        return None
    value = np.asarray(step.primitive.bind(jnp.asarray(np.broadcast_to(x.value, full)), **step.params))
    if not step.name.startswith("reduce_window_"):
        return Known(value, x.sure.squeeze(tuple(touched)))
    first = value[tuple(slice(0, 1) if k in touched else slice(None) for k in range(len(full)))]
    return Known(first, x.sure & (value == first).all(axis=tuple(touched), keepdims=True))
