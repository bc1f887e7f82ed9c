"""Packed weights that are cut over devices: the same run, and each device holds its part."""

import functools
import math
import re
from collections.abc import Callable
from typing import Any, NamedTuple

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import Mesh, NamedSharding, PartitionSpec

import rigl_jax as rx
from rigl_jax.execution import kernels, layout, masks_of, packed_training
from tests.errors import refused

DEVICES = 8
RNG = np.random.default_rng(0)
SHAPES = {"in": (40, 64), "out": (64, 24)}
PARAMS = {name: np.float32(0.2 * RNG.standard_normal(shape)) for name, shape in SHAPES.items()}
PARAMS["bias"] = np.zeros(24, np.float32)
ROWS = 61  # of a batch on each of eight devices: a prime, so that activations can be told from weights by their sizes
X = np.float32(RNG.standard_normal((DEVICES * ROWS, 40)))
ALGORITHM = rx.rigl(rx.make_plan(PARAMS, 0.85, rules=[("bias", None), (".*", rx.unstructured())]), period=2)


def loss(params, x):
    return jnp.mean(jnp.square(jnp.tanh(x @ params["in"]) @ params["out"] + params["bias"][None]))


class Problem(NamedTuple):
    """Params, and what trains them; `choose` as in `pack`."""

    params: Any
    algorithm: rx.Algorithm
    loss: Callable[..., Any]
    x: np.ndarray
    choose: Any = None


@functools.cache
def run(name="single weights", mesh=None, spec=("data",)):
    """(packed, state, training, step) after an ordinary step, a rewiring and another step."""
    params, algorithm, loss, x, choose = {**PROBLEMS, "undivided": UNDIVIDED}[name]
    cut, split, whole = (
        (None,) * 3 if mesh is None else (NamedSharding(mesh, PartitionSpec(*axes)) for axes in (spec, ["data"], []))
    )
    training = packed_training(optax.adam(0.01), algorithm, key=jax.random.key(0), choose=choose, sharding=cut)
    packed, state = training.init(jax.device_put(params, whole))
    x = jax.device_put(x, split)

    @jax.jit
    def step(packed, state):
        inner = lambda values: rx.run_packed(loss, batch=split)(packed._replace(values=values), x)  # noqa: E731
        return training.update(jax.grad(inner)(packed.values), state, packed)

    packed, state = step(packed, state)
    dense = jax.jit(jax.grad(loss))(training.unpack(packed, state)[0], x)
    packed, state = training.rewire(dense, state, packed)
    packed, state = step(packed, state)
    return packed, state, training, step


def layers(*outputs):
    """Stacks of layers: one that a scan goes through, and one of experts under vmap."""
    shapes = {"scanned": (3, 40, *outputs), "experts": (3, 40, 24)}
    params = {name: np.float32(0.2 * RNG.standard_normal(shape)) for name, shape in shapes.items()}
    axes = {name: rx.Axes((1,), tuple(range(2, len(shape))), stack=(0,)) for name, shape in shapes.items()}
    plan = rx.make_plan(params, 0.8, axes=axes, rules=[(".*", rx.unstructured())])

    def loss(params, x):
        def layer(h, w):
            return jnp.tanh(jnp.tensordot(h, w, 1)).reshape(h.shape), None

        h, _ = jax.lax.scan(jax.checkpoint(layer), x, params["scanned"])
        return jnp.mean(jnp.square(jax.vmap(lambda w: h @ w)(params["experts"])))

    return Problem(params, rx.rigl(plan, period=2), loss, X)


def structured(structure, make):
    """Two matrices of a structure, `make` chooses their kernel."""
    plan = rx.make_plan(PARAMS, 0.5, rules=[("bias", None), (".*", structure)])
    return Problem(PARAMS, rx.rigl(plan, period=2), loss, X, lambda name, mask: make(mask))


def undivided():
    """Runs of which four devices have no equal number, and a stack whose outputs they do not divide."""
    params = {"runs": PARAMS["out"][:40], "stack": np.float32(0.2 * RNG.standard_normal((2, 24, 10)))}
    axes, rules = {"stack": rx.Axes((1,), (2,), stack=(0,))}, [("runs", rx.block(1, 8)), (".*", rx.unstructured())]
    plan = rx.make_plan(params, 0.8, axes=axes, rules=rules)
    return Problem(
        params,
        rx.rigl(plan, period=2),
        lambda params, x: jnp.mean(jnp.square(jax.vmap(lambda w: jnp.tanh(x @ params["runs"]) @ w)(params["stack"]))),
        X,
    )


def convolutions():
    """In groups, along one axis and along two: each device has whole groups of outputs, and of inputs."""
    shapes = {"one": (3, 2, 16), "two": (2, 2, 4, 16)}
    params = {name: np.float32(0.4 * RNG.standard_normal(shape)) for name, shape in shapes.items()}
    axes, rules = {"one": rx.Axes((1,), (2,), (0,))}, [(".*", rx.unstructured())]
    plan = rx.make_plan(params, 0.7, axes=axes, distribution=rx.uniform, rules=rules)

    def loss(params, x):
        layout = {"one": ("NWC", "WIO", "NWC"), "two": ("NHWC", "HWIO", "NHWC")}
        conv = lambda x, name, groups: jax.lax.conv_general_dilated(  # noqa: E731
            *(x, params[name], (1,) * (x.ndim - 2), "SAME"),
            dimension_numbers=layout[name],
            feature_group_count=groups,
        )
        y = jnp.tanh(conv(x.reshape(-1, 5, 8), "one", 4))
        return jnp.mean(jnp.square(conv(y[:, None], "two", 4)))

    return Problem(params, rx.rigl(plan, period=2), loss, X)


UNDIVIDED = undivided()
PROBLEMS = {
    "single weights": Problem(PARAMS, ALGORITHM, loss, X),
    "layers": layers(40),
    "layers with heads": layers(8, 5),
    "tiles": structured(rx.block(8, 2), lambda mask: kernels.make_block_pattern(mask, (8, 2))),
    "convolutions in groups": convolutions(),
    "n:m": structured(rx.n_of_m(2, 4), lambda mask: kernels.make_nm_pattern(mask, 2, 4)),
}


def bytes_on_each(tree):
    held = dict.fromkeys(jax.devices()[:DEVICES], 0)
    for leaf in jax.tree.leaves(tree):
        for shard in leaf.addressable_shards:
            held[shard.device] += shard.data.nbytes
    return held.values()


@pytest.mark.skipif(jax.device_count() < DEVICES, reason="needs eight devices")
def test_a_run_that_is_cut_over_devices_is_that_of_one():
    mesh = Mesh(np.array(jax.devices()[:DEVICES]), ("data",))
    packed, state, training, _ = run(mesh=mesh)
    alone, alone_state, whole, _ = run()
    (params, masked), (wanted, _) = training.unpack(packed, state), whole.unpack(alone, alone_state)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-5), params, wanted)
    dense = params, masked.masks, masked.inner[0].mu, masked.inner[0].nu
    assert set(bytes_on_each(dense)) == {rx.execution.nbytes(dense) // DEVICES}
    program = training.rewire.args[0].masked_step.lower(params, state, packed).compile().as_text()
    sizes = [math.prod(map(int, found.split(","))) for found in re.findall(r"\b\w+\[([\d,]+)\]", program)]
    # While masks change no device has a whole weight, score or mask, only row and output of each active weight.
    assert max(sizes) == 2 * max(p.nnz for p in packed.patterns.values() if p) < 40 * 64
    moments = state.inner[0].mu, state.inner[0].nu
    starts = sum(p.starts.nbytes + p.starts_t.nbytes for p in packed.patterns.values() if p)
    whole = rx.execution.nbytes((packed, moments)) - starts
    assert set(bytes_on_each((packed, moments))) == {whole // DEVICES + starts}  # only starts lie whole on each
    assert all(kernels.count(p) == alone.patterns[name].nnz for name, p in packed.patterns.items() if p)


def sent(program):
    """`(operation, dtype, size)` of every array that a compiled program sends to other devices."""
    found = re.findall(r"= (\(?[^=]*?) ([\w-]*all-[\w-]+?|collective-[\w-]+?|reduce-scatter)(?:-start)?\(", program)
    arrays = [(name, *array) for result, name in found for array in re.findall(r"(\w+)\[([\d,]*)\]", result)]
    return [(name, dtype, math.prod(map(int, filter(None, size.split(","))))) for name, dtype, size in arrays]


@pytest.mark.filterwarnings("error:run_packed")  # nothing becomes dense
@pytest.mark.skipif(jax.device_count() < DEVICES, reason="needs eight devices")
@pytest.mark.parametrize("name", PROBLEMS)
def test_each_device_multiplies_its_own_outputs(name):
    mesh = Mesh(np.array(jax.devices()[:DEVICES]).reshape(2, 4), ("data", "model"))
    packed, state, training, step = run(name, mesh, (None, "model"))
    alone, alone_state, whole, _ = run(name)
    params, wanted = training.unpack(packed, state)[0], whole.unpack(alone, alone_state)[0]
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-5), params, wanted)
    chex.assert_trees_all_equal(masks_of(packed), masks_of(alone))
    patterns = {name: p for name, p in packed.patterns.items() if p}
    assert {type(kernels.kernel_of(p)) for p in patterns.values()} == {kernels.Slabs}
    held = packed.values, patterns, state.inner[0].mu, state.inner[0].nu
    assert set(bytes_on_each(held)) == {rx.execution.nbytes(held) // 4}
    moved = sent(step.lower(packed, state).compile().as_text())
    assert moved
    gradients = {kernels.kernel_of(p).part.nnz for p in patterns.values()}  # of each layer for itself
    gradients |= {v.size // 4 for name, v in packed.values.items() if name not in patterns}
    assert all(size % ROWS for size in gradients)
    for operation, dtype, size in moved:  # activations, or gradients that are summed over the batch
        assert dtype == "f32", (operation, dtype, size)
        assert size % ROWS == 0 or (operation == "all-reduce" and size in gradients), (operation, dtype, size)


@pytest.mark.filterwarnings("error:run_packed")
@pytest.mark.skipif(jax.device_count() < DEVICES, reason="needs eight devices")
def test_what_the_devices_do_not_divide_is_gathered():
    mesh = Mesh(np.array(jax.devices()[:DEVICES]).reshape(2, 4), ("data", "model"))
    packed, state, training, _ = run("undivided", mesh, (None, "model"))
    alone, alone_state, whole, _ = run("undivided")
    kinds = {name: type(kernels.kernel_of(p)) for name, p in packed.patterns.items()}
    assert kinds == dict.fromkeys(packed.patterns, kernels.Pattern)
    assert packed.patterns["runs"].height == 8
    params, wanted = training.unpack(packed, state)[0], whole.unpack(alone, alone_state)[0]
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-5), params, wanted)


@pytest.mark.skipif(jax.device_count() < DEVICES, reason="needs eight devices")
@pytest.mark.parametrize("name", [name for name in PROBLEMS if "heads" not in name])  # slabs cut the last axis
def test_nothing_is_sent_to_pack_and_unpack(name):
    mesh = Mesh(np.array(jax.devices()[:DEVICES]).reshape(2, 4), ("data", "model"))
    packed, state, training, _ = run(name, mesh, (None, "model"))
    params, masked = training.unpack(packed, state)
    masked = masked._replace(algorithm=masked.algorithm._replace(masks=state.algorithm.masks))
    compiled = training.unpack.args[0]
    for program in (compiled.scatter.lower(packed, state), compiled.gather.lower(params, masked, packed.patterns)):
        assert sent(program.compile().as_text()) == []


@pytest.mark.skipif(jax.device_count() < DEVICES, reason="needs eight devices")
@pytest.mark.parametrize("name", PROBLEMS)
def test_a_run_goes_on_with_its_weights_cut_in_another_way(name):
    devices = np.array(jax.devices()[:DEVICES])
    mesh = Mesh(devices.reshape(2, 4), ("data", "model"))
    packed, state, training, _ = run(name, mesh, (None, "model"))
    before, masks = training.unpack(packed, state)[0], masks_of(packed)
    for shape, spec in (((2, 4), ("data",)), ((4, 2), (None, "model")), ((2, 4), (None, "model"))):
        cut = NamedSharding(Mesh(devices.reshape(shape), ("data", "model")), PartitionSpec(*spec))
        other = packed_training(
            optax.adam(0.01),
            PROBLEMS[name].algorithm,
            key=jax.random.key(0),
            choose=PROBLEMS[name].choose,
            sharding=cut,
        )
        again, other_state = other.pack(*training.unpack(packed, state), like=packed)
        found = [kernels.kernel_of(p) for p in again.patterns.values() if p]
        slabs = {p.number if isinstance(p, kernels.Slabs) else 1 for p in found}
        assert slabs == {1 if spec == ("data",) else shape[1]}  # slabs of other devices do not stay
        chex.assert_trees_all_equal(other.unpack(again, other_state)[0], before)
        chex.assert_trees_all_equal(masks_of(again), masks)
        training, packed, state = other, again, other_state


@pytest.mark.skipif(jax.device_count() < DEVICES, reason="needs eight devices")
def test_other_shardings_are_refused():
    mesh = Mesh(np.array(jax.devices()), ("data",))
    for sharding in (NamedSharding(mesh, PartitionSpec(None, None, "data")), "data"):
        with refused("packed_training", "sharding"):
            packed_training(optax.sgd(0.1), ALGORITHM, key=jax.random.key(0), sharding=sharding)


def test_a_mesh_axis_of_one_device_cuts_nothing():
    sharding = NamedSharding(
        Mesh(np.array(jax.devices()).reshape(-1, 1), ("data", "model")), PartitionSpec(None, "model")
    )
    placed = layout.placed(sharding, {"index": jnp.arange(5), "weight": jnp.ones((4, 6))})
    assert all(array.sharding.is_fully_replicated for array in placed.values())
