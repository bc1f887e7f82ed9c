"""Packed weights that are cut over devices: the same run, and each device holds its part."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import Mesh, NamedSharding, PartitionSpec

import rigl_jax as rx
from rigl_jax.execution import kernels, packed_training
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


def run(mesh=None):
    """(packed, state, params) after an ordinary step, a rewiring and another step."""
    cut, whole = (
        (None, None) if mesh is None else (NamedSharding(mesh, PartitionSpec(*axes)) for axes in (["data"], []))
    )
    training = packed_training(optax.adam(0.01), ALGORITHM, key=jax.random.key(0), sharding=cut)
    packed, state = training.init(jax.device_put(PARAMS, whole))
    x = jax.device_put(X, cut)

    @jax.jit
    def step(packed, state):
        inner = lambda values: rx.run_packed(loss, batch=cut)(packed._replace(values=values), x)  # noqa: E731
        return training.update(jax.grad(inner)(packed.values), state, packed)

    packed, state = step(packed, state)
    dense = jax.jit(jax.grad(loss))(training.unpack(packed, state)[0], x)
    packed, state = training.rewire(dense, state, packed)
    packed, state = step(packed, state)
    return packed, state, training.unpack(packed, state)[0]


def bytes_on_each(tree):
    held = dict.fromkeys(jax.devices()[:DEVICES], 0)
    for leaf in jax.tree.leaves(tree):
        for shard in leaf.addressable_shards:
            held[shard.device] += shard.data.nbytes
    return held.values()


@pytest.mark.skipif(jax.device_count() < DEVICES, reason="needs eight devices")
def test_a_run_that_is_cut_over_devices_is_that_of_one():
    mesh = Mesh(np.array(jax.devices()[:DEVICES]), ("data",))
    packed, state, params = run(mesh)
    alone, _, wanted = run()
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-5), params, wanted)
    moments = state.inner[0].mu, state.inner[0].nu
    starts = sum(p.starts.nbytes + p.starts_t.nbytes for p in packed.patterns.values() if p)
    whole = rx.execution.nbytes((packed, moments)) - starts
    assert set(bytes_on_each((packed, moments))) == {whole // DEVICES + starts}  # only starts lie whole on each
    assert all(kernels.count(p) == alone.patterns[name].nnz for name, p in packed.patterns.items() if p)


@pytest.mark.skipif(jax.device_count() < DEVICES, reason="needs eight devices")
def test_no_device_holds_the_dense_weights_of_a_rewiring():
    params = {"w": np.float32(RNG.standard_normal((64, 96)))}
    algorithm = rx.rigl(rx.make_plan(params, 0.9), period=2)

    def needed(devices):
        """Bytes on a device: of weights, masks and moments, and what the masked step has beside them."""
        mesh = Mesh(np.array(jax.devices()[:devices]), ("data",))
        cut, whole = NamedSharding(mesh, PartitionSpec("data")), NamedSharding(mesh, PartitionSpec())
        training = packed_training(optax.sgd(0.1, momentum=0.9), algorithm, key=jax.random.key(0), sharding=cut)
        weights, masked = training.unpack(*training.init(jax.device_put(params, whole)))
        step = training.rewire.args[0].masked_step.lower(weights, masked, weights).compile()
        return max(bytes_on_each((weights, masked))), step.memory_analysis().temp_size_in_bytes

    held, beside = zip(needed(2), needed(8), strict=True)
    assert held[1] < held[0] / 3.9
    assert beside[1] < beside[0] / 3


@pytest.mark.skipif(jax.device_count() < DEVICES, reason="needs eight devices")
def test_other_shardings_are_refused():
    mesh = Mesh(np.array(jax.devices()), ("data",))
    for sharding in (NamedSharding(mesh, PartitionSpec(None, "data")), "data"):
        with refused("packed_training", "sharding"):
            packed_training(optax.sgd(0.1), ALGORITHM, key=jax.random.key(0), sharding=sharding)
