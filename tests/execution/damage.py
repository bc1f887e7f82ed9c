"""Damages every field of every kind of pattern and says what each call did; run by test_damaged.py: it may crash."""

import dataclasses
import itertools
import json
import sys

import jax
import jax.numpy as jnp
import numpy as np

from rigl_jax import native
from rigl_jax.execution import kernels


def far(array):
    return np.full_like(array, np.iinfo(array.dtype).max)


def low(array):
    return np.full_like(array, np.iinfo(array.dtype).min)


def one_far(array):
    return np.where(np.arange(len(array)) == len(array) // 2, np.iinfo(array.dtype).max, array).astype(array.dtype)


def one_past(array):
    """The smallest damage: the largest index, one further."""
    return np.where(array == array.max(), array + 1, array).astype(array.dtype)


def longer(array):
    return np.concatenate([array, array[-1:]])


UNSIGNED = {"far": far, "one far": one_far, "one past": one_past}
SIGNED = {**UNSIGNED, "doubled": lambda a: a + a, "low": low, "falling": lambda a: np.r_[a[:1], a[1:-1][::-1], a[-1:]]}
LENGTH = {"shorter": lambda a: a[:-1], "longer": longer, "empty": lambda a: a[:0]}


HALVES = [level for level in ("avx2_wide", "avx512_bf16") if level in native.levels()]


def cases(level):
    """(name, pattern, x, dy, product)."""
    rng = np.random.default_rng(0)
    matrices = {"one row": (1, 1), "matrix": (1, 40), "one row of runs": (16, 1), "runs": (8, 40), "padded": (1, 40)}
    for name, (height, batch) in matrices.items():
        mask = np.repeat(rng.random((60, 96 // height)) < 0.3, height, axis=1)
        mask[[19, 39, 59]] = True  # the last row of each block
        capacity = int(mask.sum()) // height + 5 * (name == "padded")
        pattern = kernels.make_pattern(mask, height=height, block=20, capacity=capacity)
        x, dy = jnp.ones((batch, 60)), jnp.ones((batch, 96))
        yield name, pattern, x, dy, lambda x, v, p: kernels.matmul(x, v, p, level=level)
        if batch == 1:  # y reads values in bfloat16 as they are
            x, dy = x.astype(jnp.bfloat16), dy.astype(jnp.bfloat16)
            yield f"{name} in bfloat16", pattern, x, dy, lambda x, v, p: kernels.matmul(x, v, p, level=level)
    for wide, height in itertools.product(HALVES, (1, 4, 8, 16)):  # products in bfloat16, of one whole tile
        mask = np.repeat(rng.random((60, 96 // height)) < 0.3, height, axis=1)
        mask[[19, 39, 59]] = True
        x, dy = jnp.ones((64, 60), jnp.bfloat16), jnp.ones((64, 96), jnp.bfloat16)
        on = level if level == "jax" else wide
        pattern = kernels.make_pattern(mask, height=height, block=20, capacity=int(mask.sum()) // height + 5)
        name = f"halves {wide}, runs of {height}"
        yield name, pattern, x, dy, lambda x, v, p, on=on: kernels.matmul(x, v, p, level=on)
    convs = {"conv": (1, 1), "strided conv": (2, 1), "strided conv in groups": (2, 2)}
    ways = [(level, jnp.float32, 2, ""), (level, jnp.bfloat16, 2, "bfloat16 ")]
    ways += [(level if level == "jax" else wide, jnp.bfloat16, 32, f"halves {wide} ") for wide in HALVES]
    for (own, dtype, batch, way), (kind, (stride, groups)) in itertools.product(ways, convs.items()):
        name = way + kind
        mask = rng.random((3, 3, 6, 8)) < 0.4
        mask[-1, -1], mask[:, :, -1] = True, True
        pattern = kernels.make_pattern(mask, block=27)
        x, dy = jnp.ones((batch, 6, 6, 6 * groups), dtype), jnp.ones((batch, 6 // stride, 6 // stride, 8), dtype)
        options = {"strides": (stride, stride), "groups": groups, "level": own}
        yield name, pattern, x, dy, lambda x, v, p, options=options: kernels.conv(x, v, p, **options)


def outcome(call):
    try:
        result = jax.block_until_ready(call())
    except Exception as error:
        return type(error).__name__
    return "NaN" if jnp.isnan(result).any() else "no error"


def products(product, x, dy):
    """Each of the three alone, so that no other one's error hides what it does."""

    def given(x, v, p):
        return jnp.vdot(product(x, v.astype(x.dtype), p), dy)

    return {
        "forward": jax.jit(lambda v, p: product(x, v.astype(x.dtype), p)),
        "input gradient": jax.jit(lambda v, p: jax.grad(given)(x, v, p)),
        "values gradient": jax.jit(lambda v, p: jax.grad(given, 1)(x, v, p)),
    }


def static(pattern):
    """Other numbers in the static fields, all of them wrong."""
    for block in {0, 1, 9, 18, 30, 54, 1 << 20} - {pattern.block}:
        yield {"block": block}
    for block_t in {1, 18, 1 << 20} - {pattern.block_t} if pattern.height == 1 else ():
        yield {"block_t": block_t}
    for height in {0, 1, 3, 4, 16} - {pattern.height}:
        yield {"height": height}
    yield {"shape": (*pattern.shape[:-2], pattern.shape[-2] + 7, pattern.shape[-1])}


def contents(pattern):
    """(field, products that use it, what was done to it, the array then)."""
    straight, transposed = ["forward", "values gradient"], ["input gradient"]
    if pattern.height > 1:
        uses = dict.fromkeys(("indices", "starts"), straight + transposed)
    else:
        uses = {"indices": straight, "starts": straight} | dict.fromkeys(
            ("indices_t", "starts_t", "order_t"), transposed
        )
    for field, kinds in uses.items():
        array = np.asarray(getattr(pattern, field))
        for label, harm in (SIGNED if array.dtype == np.int32 else UNSIGNED).items():
            if (field, label) != ("order_t", "falling"):  # another order: wrong, and within the arrays
                yield field, kinds, label, harm(array)


def check_pattern(name, pattern, run):
    values, found = jnp.ones(pattern.nnz), {}
    doubled = jax.tree.map(jnp.add, pattern, pattern)
    for kind, call in run.items():
        found[f"{name}, {kind}, sound"] = outcome(lambda call=call: call(values, pattern))
        found[f"{name}, {kind}, tree.map"] = outcome(lambda call=call: call(values, doubled))
    for field, kinds, label, array in contents(pattern):
        damaged = dataclasses.replace(pattern, **{field: jnp.asarray(array)})
        for kind in kinds:
            found[f"{name}, {kind}, {field} {label}"] = outcome(lambda k=kind, p=damaged: run[k](values, p))
        for other, harm in LENGTH.items():
            damaged = dataclasses.replace(pattern, **{field: jnp.asarray(harm(np.asarray(getattr(pattern, field))))})
            found[f"{name}, {field} {other}"] = outcome(lambda p=damaged: run["forward"](values, p))
    for change in static(pattern):
        damaged = dataclasses.replace(pattern, **change)
        found[f"{name}, {change}"] = outcome(lambda p=damaged: run["forward"](values, p))
    return found


def handlers():
    """(target, shape of its result, operands, attributes, changes to these that the Python side would not send)."""
    indices, starts = jnp.array([0, 0, 0, 7], jnp.uint16), jnp.array([0, 2, 4], jnp.int32)
    order, huge = jnp.arange(4, dtype=jnp.int32), 1 << 62
    matrix, tiles, dy_tiles = {"block": 8, "level": -1}, jnp.ones(64 * 8), jnp.ones(64 * 2)
    runs = {"height": 1, **matrix}
    types = [{"dtype": jnp.float16}, {"dtype": jnp.bfloat16, "shape": (1, 2)}]  # of results; one row is float32
    changes = [{"operands": [jnp.ones(shape, dtype)]} for shape, dtype in (((9, 8), "float16"), ((1, 8), "bfloat16"))]
    yield "tile", (16 * 8,), [jnp.ones((9, 8))], {"level": -1}, changes
    changes = [{"rows": n} for n in (1000, huge, -1)] + [{"block": 0}, {"block": 3}, {"height": 2}, {"height": 1 << 40}]
    shorts = [jnp.ones(4, dtype) for dtype in (jnp.bfloat16, jnp.float16)]  # values: one row may have bfloat16
    more = [{"operands": [tiles, values, indices, starts]} for values in shorts]
    yield "gather", (4, 2), [tiles, jnp.ones(4), indices, starts], {"rows": 8, **runs}, changes + types + more
    more = [{"operands": [tiles, shorts[1], indices, starts]}, {"shape": (2, 2)}, {"rows": 1000}, {"block": 3}]
    yield "gather", (1, 2), [tiles, shorts[0], indices, starts], {"rows": 8, **runs}, more
    changes = [{"rows": 1000}, {"block": 1}]
    yield "gather_ordered", (4, 2), [tiles, jnp.ones(4), order, indices, starts], {"rows": 8, **matrix}, changes + types
    changes = [{"height": 8}, {"block": 1 << 12}, {"outputs": 4000}]
    changes += [{"height": 1, "outputs": 2, "operands": [tiles, jnp.ones(4), indices, starts]}]  # it is for runs
    yield (
        "scatter",
        (4, 8),
        [tiles, jnp.ones(16), indices, starts],
        {"outputs": 8, "height": 4, **matrix},
        changes + types,
    )
    changes = [{"batch": 1000}, {"batch": huge}, {"batch": 0}, {"outputs": 200}]
    attributes = {"batch": 4, "rows": 8, "outputs": 2, **runs}
    yield "dots", (4,), [tiles, dy_tiles, indices, starts], attributes, changes
    for level in (native.levels()[name] for name in HALVES):
        yield from halves(level, indices, starts, order, huge)
    sizes = {"rows": 8, "depth": 1, "taps": 1, "outputs": 2, "height": 1, "block": 8}
    changes = [
        {"rows": 9},
        {"rows": huge},
        {"taps": 3},
        {"taps": 0},
        {"depth": 0},
        {"depth": huge},
        {"outputs": 3},
        {"outputs": -1},
        {"height": 2},
    ]
    changes += [{"height": 17}, {"block": 0}, {"block": 4}, {"block": huge}, {"block": 7}, {"dtype": jnp.float16}]
    yield "fill", (8, 2), [jnp.ones(4), indices, starts], sizes, changes
    yield "take", (4,), [jnp.ones((8, 2)), indices, starts], sizes, changes
    image = (2, 4, 4, 3, 1, 1, 6, 6)
    changes = [
        {"sizes": (*image[:k], n, *image[k + 1 :])} for k in range(8) for n in (-1, 70, huge) if (k, n) not in FITS
    ]
    images = [jnp.ones((2, 4, 2, 3), jnp.bfloat16), jnp.ones(image[:4], jnp.float16)]
    attributes, more = {"sizes": image, "level": -1}, [{"operands": [x]} for x in images]
    yield "planes", (16 * 6 * 6 * 3,), [jnp.ones(image[:4])], attributes, changes + more
    yield from convolutions(indices, starts, order, huge)
    for level in (native.levels()[name] for name in HALVES):
        attributes |= {"level": level, "dtype": jnp.uint16}
        images = [jnp.ones((2, 4, 2, 3), jnp.bfloat16), jnp.ones(image[:4])]
        more = [{"operands": [x]} for x in images] + [{"level": native.levels()["portable"]}]
        yield "half_planes", (32 * 6 * 6 * 3,), [jnp.ones(image[:4], jnp.bfloat16)], attributes, changes + more
        yield from convolutions(indices, starts, order, huge, level)


def halves(level, indices, starts, order, huge):
    level, tiles, dy_tiles = {"level": level}, jnp.ones(64 * 8, jnp.uint16), jnp.ones(64 * 2, jnp.uint16)
    x, values = jnp.ones((9, 8), jnp.bfloat16), jnp.ones(4, jnp.bfloat16)
    none = {"level": native.levels()["portable"]}  # it has none of these
    yield "half_tile", (64 * 8,), [x], {"dtype": jnp.uint16, **level}, [{"operands": [jnp.ones((9, 8))]}, none]
    attributes = {"dtype": jnp.bfloat16, "rows": 8, "block": 8, **level}
    changes = [{"rows": n} for n in (1000, huge, -1)] + [{"block": 0}, {"block": 3}, {"dtype": jnp.float32}, none]
    changes += [{"shape": (65, 2)}]
    heights = [{"height": n} for n in (0, 2, 4, 1 << 40)]
    single = {"height": 1, **attributes}
    yield "half_gather", (4, 2), [tiles, values, indices, starts], single, changes + heights
    yield "half_gather_ordered", (4, 2), [tiles, values, order, indices, starts], attributes, changes
    runs, attributes = jnp.ones(16, jnp.bfloat16), {"dtype": jnp.bfloat16, "height": 4, "block": 8, **level}
    changes = [{"block": n} for n in (0, 3, 1 << 12)] + [{"height": n} for n in (0, 1, 2, 8)]
    changes += [{"dtype": jnp.float32}, none]
    more = [{"rows": n} for n in (1000, huge, -1)] + [{"shape": shape} for shape in ((65, 8), (4, 12))]
    yield "half_gather", (4, 8), [tiles, runs, indices, starts], {"rows": 8, **attributes}, changes + more
    more = [{"outputs": n} for n in (1000, huge, -8)] + [{"shape": shape} for shape in ((65, 8), (4, 12))]
    more += [{"height": 1, "outputs": 2, "operands": [tiles, values, indices, starts]}]  # it is for runs
    yield "half_scatter", (4, 8), [tiles, runs, indices, starts], {"outputs": 8, **attributes}, changes + more
    attributes = {"batch": 4, "rows": 8, "outputs": 2, "height": 1, "block": 8, **level}
    changes = [{"batch": n} for n in (65, huge, 0)] + [{"outputs": 200}, {"rows": 1000}, {"block": 3}, none]
    yield "half_dots", (4,), [tiles, dy_tiles, indices, starts], attributes, changes + heights
    attributes |= {"outputs": 8, "height": 4}
    changes += [{"height": n} for n in (0, 1, 2, 8)]
    yield "half_dots", (16,), [tiles, tiles, indices, starts], attributes, changes


FITS = {(4, 70), (5, 70)}  # margins may be as wide as they like
HALF_CONVOLUTIONS = "half_conv", 32, jnp.uint16, jnp.bfloat16  # name, images side by side, numbers of planes and values


def convolutions(indices, starts, order, huge, half=None):
    """Those of float32, or of bfloat16 at the level `half`."""
    name, images, stored, dtype = ("conv", 16, jnp.float32, jnp.float32) if half is None else HALF_CONVOLUTIONS
    sizes = (1, 3, 3, 2, 2, 1, 1, 2, 1, 1, 1, 1, 1)
    changes = [{"sizes": (*sizes[:k], n, *sizes[k + 1 :])} for k in range(13) for n in (0, 7, -1, huge)]
    # Two groups: half as many indices are in range; the transposed pattern would have half as many units.
    changes += [{"sizes": (*sizes[:12], 2)}]
    fit = [{"sizes": (*sizes[:k], 7, *sizes[k + 1 :])} for k in (4, 8, 9)]  # one block, and no second pixel to step to
    changes = [change for change in changes if change not in fit]
    changes += [{"rows": (0, 3)}, {"rows": (-1, 0)}, {"columns": (0, huge)}, {"rows": ()}, {"sizes": sizes[:-1]}]
    types = [{"dtype": jnp.float16}, {"dtype": jnp.bfloat16, "shape": (1, 1, 1, 1)}]  # of results
    changes += [] if half is None else [{"level": native.levels()["portable"]}]  # it has none of these
    attributes = {"sizes": sizes, "rows": (0, 1), "columns": (0, 2), "level": -1 if half is None else half}
    planes, values = jnp.ones(3 * 3 * 2 * images, stored), jnp.ones(4, dtype)
    yield f"{name}_forward", (1, 1, 1, 2), [planes, values, indices, starts], attributes, changes + types
    changes = [{"row_phases": (0, 1)}, {"column_phases": (0,)}, {"row_phases": (-1, 0)}]
    phased = {**attributes, "row_phases": (0, 0), "column_phases": (0, 0)}
    yield f"{name}_input_gradient", (1, 1, 1, 2), [planes, values, order, indices, starts], phased, changes + types
    dy = (1, 1, 1, 2, 0, 0, 1, 1)
    changes = [{"dy_sizes": (*dy[:k], 40, *dy[k + 1 :])} for k in range(8)]
    attributes["dy_sizes"] = dy
    dy_planes = jnp.ones(2 * images, stored)
    yield f"{name}_values_gradient", (4,), [planes, dy_planes, indices, starts], attributes, changes


def check_handler(target, shape, operands, attributes, changes):
    def call(operands=operands, shape=shape, **own):
        return outcome(lambda: native.call(handler, shape, *operands, **{**attributes, **own}))

    handler = f"rigl_{target}"
    target = f"{target} at level {attributes.get('level')}"
    found = {f"{target}, sound": call()}
    found |= {f"{target}, {change}": call(**change) for change in changes}
    for k, operand in enumerate(operands):
        changed = {"short": operand[:1]} if operand.ndim == 1 else {}
        index = operand.dtype == jnp.uint16 and operand.size == 4  # not tiles, whose content may be anything
        changed |= {"far": far(operand)} if index else {}
        changed |= {"doubled": operand + operand} if operand.dtype == jnp.int32 else {}
        for label, other in changed.items():
            found[f"{target}, operand {k} {label}"] = call([*operands[:k], other, *operands[k + 1 :]])
    found[f"{target}, result short"] = call(shape=(*shape[:-1], shape[-1] // 2))
    return found


def main():
    """Prints {case: what came of it} as JSON."""
    found = {}
    for name, pattern, x, dy, product in cases("auto"):
        found |= check_pattern(name, pattern, products(product, x, dy))
    for arguments in handlers():
        found |= check_handler(*arguments)
    json.dump(found, sys.stdout)


if __name__ == "__main__":
    main()
