"""Packed weights that are cut over devices: the same run, and each device holds its part."""

import functools
import math
import re

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import Mesh, NamedSharding, PartitionSpec

import rigl_jax as rx
from rigl_jax.execution import kernels, layout, packed_training
from tests.errors import refused

DEVICES = 8
RNG = np.random.default_rng(0)
SHAPES = {"in": (40, 64), "out": (64, 24)}
PARAMS = {name: np.float32(0.2 * RNG.standard_normal(shape)) for name, shape in SHAPES.items()}
PARAMS["bias"] = np.zeros(24, np.float32)
X = np.float32(RNG.standard_normal((16, 40)))
ALGORITHM = rx.rigl(rx.make_plan(PARAMS, 0.85, rules=[("bias", None), (".*", rx.unstructured())]), period=2)


def loss(params, x):
    return jnp.mean(jnp.square(jnp.tanh(x @ params["in"]) @ params["out"] + params["bias"][None]))


@functools.cache
def run(mesh=None, spec=("data",)):
    """(packed, state, training, step) after an ordinary step, a rewiring and another step."""
    cut, split, whole = (
        (None,) * 3 if mesh is None else (NamedSharding(mesh, PartitionSpec(*axes)) for axes in (spec, ["data"], []))
    )
    training = packed_training(optax.adam(0.01), ALGORITHM, key=jax.random.key(0), sharding=cut)
    packed, state = training.init(jax.device_put(PARAMS, whole))
    x = jax.device_put(X, split)

    @jax.jit
    def step(packed, state):
        inner = lambda values: rx.run_packed(loss, batch=split)(packed._replace(values=values), x)  # noqa: E731
        return training.update(jax.grad(inner)(packed.values), state, packed)

    packed, state = step(packed, state)
    dense = jax.jit(jax.grad(loss))(training.unpack(packed, state)[0], x)
    packed, state = training.rewire(dense, state, packed)
    packed, state = step(packed, state)
    return packed, state, training, step


def bytes_on_each(tree):
    held = dict.fromkeys(jax.devices()[:DEVICES], 0)
    for leaf in jax.tree.leaves(tree):
        for shard in leaf.addressable_shards:
            held[shard.device] += shard.data.nbytes
    return held.values()


@pytest.mark.skipif(jax.device_count() < DEVICES, reason="needs eight devices")
def test_a_run_that_is_cut_over_devices_is_that_of_one():
    mesh = Mesh(np.array(jax.devices()[:DEVICES]), ("data",))
    packed, state, training, _ = run(mesh)
    alone, alone_state, whole, _ = run()
    (params, masked), (wanted, _) = training.unpack(packed, state), whole.unpack(alone, alone_state)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-5), params, wanted)
    dense = params, masked.masks, masked.inner[0].mu, masked.inner[0].nu
    assert set(bytes_on_each(dense)) == {rx.execution.nbytes(dense) // DEVICES}
    program = training.rewire.args[0].masked_step.lower(params, masked, params).compile().as_text()
    sizes = [math.prod(map(int, found.split(","))) for found in re.findall(r"\b\w+\[([\d,]+)\]", program)]
    assert max(sizes) == 40 * 64 // DEVICES  # no device has a whole weight, score or mask while masks change
    moments = state.inner[0].mu, state.inner[0].nu
    starts = sum(p.starts.nbytes + p.starts_t.nbytes for p in packed.patterns.values() if p)
    whole = rx.execution.nbytes((packed, moments)) - starts
    assert set(bytes_on_each((packed, moments))) == {whole // DEVICES + starts}  # only starts lie whole on each
    assert all(kernels.count(p) == alone.patterns[name].nnz for name, p in packed.patterns.items() if p)


@pytest.mark.skipif(jax.device_count() < DEVICES, reason="needs eight devices")
def test_each_device_multiplies_its_own_outputs():
    mesh = Mesh(np.array(jax.devices()[:DEVICES]).reshape(2, 4), ("data", "model"))
    packed, state, training, step = run(mesh, (None, "model"))
    alone, alone_state, whole, _ = run()
    params, wanted = training.unpack(packed, state)[0], whole.unpack(alone, alone_state)[0]
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-5), params, wanted)
    patterns = [p for p in packed.patterns.values() if p]
    assert [type(p) for p in patterns] == [kernels.Slabs] * 2
    held = packed.values, patterns, state.inner[0].mu, state.inner[0].nu
    assert set(bytes_on_each(held)) == {rx.execution.nbytes(held) // 4}
    other = packed_training(
        optax.adam(0.01), ALGORITHM, key=jax.random.key(0), sharding=NamedSharding(mesh, PartitionSpec("data"))
    )
    again, _ = other.pack(*training.unpack(packed, state), like=packed)
    assert {type(p) for p in again.patterns.values() if p} == {kernels.Pattern}  # slabs of other devices do not stay
    program = step.lower(packed, state).compile().as_text()
    assert not any(f"[{pattern.nnz}]" in program for pattern in patterns)  # no device has all values of a leaf
    assert all(f"[{pattern.nnz // 4}]" in program for pattern in patterns)


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
