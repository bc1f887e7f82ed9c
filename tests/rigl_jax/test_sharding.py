"""Weights spread over devices: nothing of a weight's size is ever put together, and the masks are those of one device.

The programs are read after XLA has split them. An array in them is what one device holds, so gathering a weight, by
whatever operation, shows as an array of its whole size.
"""

import functools
import math
import re
from typing import NamedTuple

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import AxisType, NamedSharding, PartitionSpec

import rigl_jax as rx
from rigl_jax import native, structures
from rigl_jax.algorithms import METHODS
from rigl_jax.topology import topk

pytestmark = pytest.mark.eight_devices

SIZE = 1024  # of every kernel, so that one number tells a whole weight from a part of it
SHAPES = {"dense": (32, 32), "conv": (2, 2, 16, 16)}
MESHES = [(2, 2), (8, 1), (1, 8)]  # and (2, 4), on which every algorithm runs


def tree(seed):
    """Like params. Multiples of 1/64, so that ties abound and sums are exact in any order."""
    random = np.random.default_rng(seed)
    kernels = {name: {"kernel": random.integers(-256, 257, shape) / 64} for name, shape in SHAPES.items()}
    return jax.tree.map(np.float32, {**kernels, "bias": random.integers(-256, 257, 8) / 64})


PARAMS, GRADS = tree(0), [tree(1), tree(2)]


def loss(params):
    return sum(jnp.sum(p**2) for p in jax.tree.leaves(params)) / 2


class Case(NamedTuple):
    method: rx.Algorithm
    tx: optax.GradientTransformationExtraArgs
    params: dict
    grads: list


def build(algorithm, rules=None, leaves=("dense", "conv", "bias")):
    params, *grads = ({name: tree[name] for name in leaves} for tree in (PARAMS, *GRADS))
    plan = rx.make_plan(params, 0.5, rx.uniform, rules=rules)
    method = METHODS[algorithm].example(plan, period=2, fraction=0.5, stop=6, loss=loss)
    tx = rx.sparsify(optax.sgd(0.125, momentum=0.5), method, key=jax.random.key(0))
    return Case(method, tx, params, grads)


def make_mesh(shape, kind=AxisType.Auto):
    devices = jax.devices()[: math.prod(shape)]
    return jax.make_mesh(shape, ("data", "model"), axis_types=(kind, kind), devices=devices)


def sharding(mesh, x):
    """The last two axes over both axes of the mesh; what is smaller whole on every device."""
    spec = PartitionSpec(*[None] * (x.ndim - 2), "data", "model") if x.ndim >= 2 else PartitionSpec()
    return NamedSharding(mesh, spec)


def spread(mesh, arrays):
    return jax.tree.map(lambda x: jax.device_put(x, sharding(mesh, x)), arrays)


def largest(compiled):
    """Elements of the largest array in a program."""
    shapes = re.findall(r"\b(?:pred|[a-z]+\d+)\[([\d,]+)\]", compiled.as_text())
    assert shapes
    return max(math.prod(map(int, shape.split(","))) for shape in shapes)


def train(tx, params, grads):
    """Initialisation, an ordinary step and one that rewires: the masks after each, the last weights and the state."""
    state = tx.init(params)
    found = [state.masks]
    for rewire, g in zip((False, True), grads, strict=True):
        updates, state = tx.update(g, state, params, rewire=rewire)
        params = optax.apply_updates(params, updates)
        found.append(state.masks)
    return found, params, state


def expected_of(case):
    """On one device, and selected as there."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(topk, "one_cpu", lambda: True)
        traced = jax.jit(functools.partial(train, case.tx)).trace(case.params, case.grads)
    assert native.library() is None or "rigl_select" in str(traced.jaxpr), "the native selection was not asked"
    return jax.device_get(traced.lower().compile()(case.params, case.grads)[:2])


@functools.cache
def on_one_device(algorithm):
    """What is trained, and the result. Where leaves keep their counts they have nothing to do with each other: one will
    do, but for RigL, which stands for these.
    """
    case = build(algorithm)
    if case.method.keeps_counts and algorithm != "rigl":
        case = build(algorithm, leaves=("dense", "bias"))
    return case, expected_of(case)


def check_spread(mesh, case, expected):
    """One program for all, so that it is compiled once: what is nowhere in it is in none of its steps."""
    run, arrays = functools.partial(train, case.tx), (case.params, case.grads)
    place = functools.partial(jax.tree.map, functools.partial(sharding, mesh))
    shapes = jax.eval_shape(run, *arrays)
    compiled = jax.jit(run, out_shardings=place(shapes)).lower(*spread(mesh, arrays)).compile()
    assert largest(compiled) < SIZE
    masks, params = jax.device_get(compiled(*spread(mesh, arrays))[:2])
    chex.assert_trees_all_equal(masks, expected[0])
    chex.assert_trees_all_close(params, expected[1], atol=1e-5)


def test_gathering_would_be_seen():
    """The measure that the other tests rest on."""
    x = spread(make_mesh((2, 4)), {"w": PARAMS["dense"]["kernel"]})["w"]
    assert largest(jax.jit(jnp.sum).lower(x).compile()) < SIZE
    assert largest(jax.jit(jnp.sort).lower(x).compile()) < SIZE  # along one axis: in turn, on parts
    assert largest(jax.jit(lambda x: jnp.sort(x.reshape(-1))).lower(x).compile()) >= SIZE
    assert largest(jax.jit(lambda x: jax.lax.top_k(x.reshape(-1), 3)[0]).lower(x).compile()) >= SIZE


@pytest.mark.parametrize("algorithm", rx.ALGORITHMS)
def test_every_algorithm_on_a_mixed_mesh_as_on_one_device(algorithm):
    check_spread(make_mesh((2, 4)), *on_one_device(algorithm))


@pytest.mark.parametrize("shape", MESHES, ids=str)
def test_every_shape_of_mesh_gives_the_masks_of_one_device(shape):
    check_spread(make_mesh(shape), *on_one_device("rigl"))


@pytest.mark.parametrize(
    ("dense", "conv"), [(structures.block(2, 2), structures.n_of_m(2, 4)), (structures.fan_in(), structures.channel())]
)
def test_structures_are_not_gathered_either(dense, conv):
    """Shards here hold whole units; the float sums over units that lie on several devices are exact by choice."""
    case = build("rigl", [("dense/kernel", dense), ("conv/kernel", conv), ("bias", None)])
    check_spread(make_mesh((2, 4)), case, expected_of(case))


@pytest.mark.parametrize("algorithm", ["top_kast", "deep_r"])
def test_a_mesh_with_explicit_axes(algorithm):
    """Shardings are then part of types; `jax.make_mesh` makes such a mesh where nothing else is said."""
    mesh = make_mesh((2, 4), AxisType.Explicit)
    with jax.set_mesh(mesh):
        check_spread(mesh, *on_one_device(algorithm))


def test_the_branch_in_the_graph_does_not_gather():
    tx, mesh = build("rigl").tx, make_mesh((2, 4))
    params, state = spread(mesh, PARAMS), spread(mesh, rewired_at_once()[1])
    step = jax.jit(lambda g, s, p: tx.update(g, s, p)[0])
    assert largest(step.lower(spread(mesh, GRADS[0]), state, params).compile()) < SIZE


# --- shard_map and pmap: each device has a part of the batch, and gradients are averaged by the axis name -------------


def per_device(count):
    """One gradient for each device, whose mean is GRADS[1] exactly: adds what sums to zero."""
    offsets = np.float32(np.arange(count) - (count - 1) / 2)
    return jax.tree.map(lambda g: g[None] + offsets.reshape(-1, *[1] * g.ndim), GRADS[1])


@functools.cache
def rewired_at_once():
    tx = build("set").tx
    state = jax.jit(tx.init)(PARAMS)
    _, after = jax.jit(functools.partial(tx.update, rewire=True))(GRADS[1], state, PARAMS)
    return tx, jax.device_get(state), jax.device_get(after.masks)


def mean_then_rewire(grads, state, params):
    tx, _, _ = rewired_at_once()
    updates, state = tx.update(jax.lax.pmean(grads, "data"), state, params, rewire=True)
    return optax.apply_updates(params, updates), state.masks


def test_shard_map_with_its_checks_on():
    _, state, expected = rewired_at_once()
    mesh = make_mesh((8, 1))
    step = jax.shard_map(
        lambda grads, state, params: mean_then_rewire(jax.tree.map(lambda g: g[0], grads), state, params),
        mesh=mesh,
        in_specs=(PartitionSpec("data"), PartitionSpec(), PartitionSpec()),
        out_specs=PartitionSpec(),  # which shard_map refuses unless it can prove that devices agree
    )
    _, masks = jax.jit(step)(per_device(8), state, PARAMS)
    chex.assert_trees_all_equal(masks, expected)


def test_shard_map_over_the_data_with_weights_split_over_the_rest():
    """Only the axis of the mean is manual: counts over the model axis are still added up by the compiler."""
    _, state, expected = rewired_at_once()
    mesh = make_mesh((2, 4))
    model = lambda x: NamedSharding(mesh, PartitionSpec(*[None] * (x.ndim - 1), "model") if x.ndim > 1 else jax.P())  # noqa: E731
    params, state = (jax.tree.map(lambda x: jax.device_put(x, model(x)), t) for t in (PARAMS, state))
    step = jax.shard_map(
        lambda grads, state, params: mean_then_rewire(jax.tree.map(lambda g: g[0], grads), state, params),
        mesh=mesh,
        in_specs=(PartitionSpec("data"), PartitionSpec(), PartitionSpec()),
        out_specs=PartitionSpec(),
        axis_names={"data"},
    )
    _, masks = jax.jit(step)(per_device(2), state, params)
    chex.assert_trees_all_equal(masks, expected)


def test_pmap():
    _, state, expected = rewired_at_once()
    step = jax.pmap(mean_then_rewire, axis_name="data", in_axes=(0, None, None))
    _, masks = step(per_device(8), state, PARAMS)
    for device in range(8):
        chex.assert_trees_all_equal(jax.tree.map(lambda m, d=device: np.asarray(m[d]), masks), expected)
