"""What can be done with a smaller model: rounds of training, saving, other tools, packed weights."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import orbax.checkpoint as ocp
import pytest

import rigl_jax as rx
from tests.channels.models import Draw, conv
from tests.errors import refused

KEY = jax.random.key(0)


def apply(p, x):
    return jax.nn.relu(jax.nn.relu(x @ p["a"] + p["bias"][None]) @ p["b"]) @ p["c"]


D = Draw()
PARAMS = {"a": D(4, 16), "bias": D(16), "b": D(16, 12), "c": D(12, 2)}
X = Draw(1).drawn(32, 4)
Y = np.stack([X[:, 0] * X[:, 1], X[:, 2]], 1)
SHAPES = jax.tree.map(lambda p: jax.ShapeDtypeStruct(p.shape, p.dtype), PARAMS)


def prune(apply, params, level):
    groups = rx.channels.groups(apply, params, X)
    return rx.channels.select(groups, rx.channels.scores(groups, params), remove=0.5, scope="layer")


def make_train(apply):
    tx = optax.sgd(0.1)

    @jax.jit
    def trained(params):
        def step(carry, _):
            params, state = carry
            loss, grads = jax.value_and_grad(lambda p: jnp.mean((apply(p, X) - Y) ** 2))(params)
            updates, state = tx.update(grads, state)
            return (optax.apply_updates(params, updates), state), loss

        (params, _), losses = jax.lax.scan(step, (params, tx.init(params)), length=20)
        return params, losses

    return lambda params, masks, start, stop, key: rx.base.Trained(*trained(params))


def run(**options):
    return rx.channels.iterative_shrinking(
        make_train, apply, PARAMS, prune, X, **{"levels": 2, "steps": 20, "key": KEY, **options}
    )


def test_levels_halve_train_and_resume_to_the_same_bits():
    models = list(run())
    assert [(m.level, m.params["b"].shape, m.macs / 32) for m in models] == [
        (0, (16, 12), 64 + 192 + 24),
        (1, (8, 6), 32 + 48 + 12),
        (2, (4, 3), 16 + 12 + 6),
    ]
    assert [m.weights for m in models] == [sum(p.size for p in jax.tree.leaves(m.params)) for m in models]
    assert all(m.aux[-1] < m.aux[0] for m in models[1:])
    again = rx.channels.iterative_shrinking(
        make_train, apply, SHAPES, prune, X, levels=2, steps=20, key=KEY, resume=models[1]._replace(apply=None)
    )
    (last,) = again
    jax.tree.map(np.testing.assert_array_equal, last.params, models[2].params)
    for leaf, axes in models[2].kept.items():
        for axis, at in axes.items():
            np.testing.assert_array_equal(last.kept[leaf][axis], at)
    kept = models[2].kept["b"]
    assert set(kept[0]) <= set(models[1].kept["b"][0])


def test_training_that_returns_something_else():
    with refused("train"):
        list(
            rx.channels.iterative_shrinking(
                lambda a: lambda *_: None, apply, PARAMS, prune, X, levels=1, steps=1, key=KEY
            )
        )
    with refused("resume"):
        run(resume=3)


def test_a_smaller_model_is_saved_and_read_again_by_the_positions_that_it_kept(tmp_path):
    small = rx.channels.shrink(apply, PARAMS, prune(apply, PARAMS, 1), X)
    kept = {leaf: {str(axis): at for axis, at in axes.items()} for leaf, axes in small.kept.items()}
    with ocp.StandardCheckpointer() as saver:
        saver.save(tmp_path / "kept", kept)
        saver.save(tmp_path / "params", small.params)
    with ocp.StandardCheckpointer() as saver:
        read = saver.restore(tmp_path / "kept", jax.tree.map(np.zeros_like, kept))
        keep = {leaf: {int(axis): np.asarray(at) for axis, at in axes.items()} for leaf, axes in read.items()}
        again = rx.channels.shrink(apply, SHAPES, keep, X)
        params = saver.restore(tmp_path / "params", again.params)
    assert again.shapes == small.shapes
    np.testing.assert_array_equal(jax.jit(again.apply)(params, X), jax.jit(small.apply)(small.params, X))


def test_a_smaller_model_is_exported_for_any_batch():
    def net(p, x):  # sizes that are written down beside that of the batch
        first = jnp.pad(apply(p, x[1:]), ((0, 0), (0, 1)))[:, :2]
        return first * jnp.broadcast_to(jax.nn.relu(x[1:] @ p["a"])[:, ::2].sum(1, keepdims=True), first.shape)

    small = rx.channels.shrink(net, PARAMS, {"a": {1: np.arange(0, 16, 2)}, "b": {1: [0, 1, 5]}}, X)
    (batch,) = jax.export.symbolic_shape("batch")
    shape = jax.ShapeDtypeStruct((batch, 4), jnp.float32)
    again = jax.export.export(jax.jit(small.apply))(small.params, shape)  # serialized with the package flatbuffers
    for x in (X, X[:3]):
        np.testing.assert_allclose(again.call(small.params, x), jax.jit(small.apply)(small.params, x), rtol=1e-5)


def test_a_smaller_model_runs_in_onnx_runtime(tmp_path):
    pytest.importorskip("jax2onnx")
    runtime = pytest.importorskip("onnxruntime")
    draw, x = Draw(2), Draw(3)(2, 8, 8, 3)
    params = {"a": draw.conv(3, 3, n=3, m=8), "b": draw.conv(3, 3, n=8, m=8), "c": draw(8, 4)}

    def net(p, x):
        x = jax.nn.relu(conv(p["a"], x))
        return (x + jax.nn.relu(conv(p["b"], x))).mean((1, 2)) @ p["c"]

    with jax.numpy_rank_promotion("allow"):
        groups = rx.channels.groups(net, params, x)
        keep = rx.channels.select(groups, rx.channels.scores(groups, params), remove=0.5, scope="layer")
        small = rx.channels.shrink(net, params, keep, x)
        assert small.shapes["b/kernel"] == ((3, 3, 8, 8), (3, 3, 4, 4))
        rx.execution.export_onnx(tmp_path / "small.onnx", small.apply, small.params, x)
        session = runtime.InferenceSession(tmp_path / "small.onnx")
        for batch in (1, 5):
            images = np.array(Draw(batch)(batch, 8, 8, 3))
            (y,) = session.run(None, {"input_0": images})
            np.testing.assert_allclose(y, jax.jit(small.apply)(small.params, images), rtol=1e-4, atol=1e-5)


def test_a_smaller_model_runs_on_packed_weights():
    small = rx.channels.shrink(apply, PARAMS, prune(apply, PARAMS, 1), X)
    plan = rx.make_plan(small.params, 0.5, rules=[("bias", None), (".*", rx.unstructured())])
    pruned = jax.jit(lambda p: rx.prune(plan, p, rx.criteria.magnitude))(small.params)
    packed = rx.pack(pruned.params, pruned.masks)
    got, want = jax.jit(lambda q, p: (rx.run_packed(small.apply)(q, X), small.apply(p, X)))(packed, pruned.params)
    np.testing.assert_allclose(got, want, rtol=1e-5, atol=1e-6)
