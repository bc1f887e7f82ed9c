"""Layers stacked in one leaf, which a scan goes through: packed layer by layer."""

import chex
import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import Mesh

import rigl_jax as rx
from rigl_jax import topology
from rigl_jax.execution import explain, kernels, load_safetensors, masks_of, save_safetensors
from tests.errors import refused
from tests.execution.test_training import check_together

LAYERS, WIDTH = 3, 16
RNG = np.random.default_rng(0)
PARAMS = {"stack": np.float32(0.25 * RNG.standard_normal((LAYERS, WIDTH, WIDTH)))}
PLAN = rx.make_plan(PARAMS, 0.75, axes={"stack": rx.Axes((1,), (2,), stack=(0,))}, rules=[("stack", rx.unstructured())])
MASKS = {"stack": RNG.random((LAYERS, WIDTH, WIDTH)) < np.array([0.1, 0.3, 0.2]).reshape(3, 1, 1)}
X = np.float32(RNG.standard_normal((8, WIDTH)))


def in_slabs(name, mask):
    """Layers in slabs, of which the last is empty."""
    one = kernels.make_pattern(mask[0])
    return kernels.make_stacked(mask, kernels.make_slabs(mask[0], one, 4, "model"))


def loss(params, x):
    """Backwards through the layers, each of them recomputed for its gradient."""
    layer = jax.checkpoint(lambda h, w: (jnp.tanh(h @ w), None))
    return jnp.mean(jnp.square(jax.lax.scan(layer, x, params["stack"], reverse=True)[0] - x))


@pytest.mark.filterwarnings("error:run_packed")  # nothing becomes dense
@pytest.mark.parametrize(
    "algorithm", [rx.rigl(PLAN, period=2), rx.gmp(PLAN, start=0, stop=4, period=2, initial=0.7)], ids=["rigl", "gmp"]
)
def test_a_packed_run_of_stacked_layers_is_a_masked_run(algorithm):
    inputs = [X * (1 + 0.1 * i) for i in range(5)]
    check_together(loss, PARAMS, algorithm, optax.sgd(0.05, 0.9), inputs)


@pytest.mark.filterwarnings("error:run_packed")
@pytest.mark.skipif(jax.device_count() < 8, reason="needs eight devices")
def test_a_run_of_stacked_layers_in_slabs_is_a_masked_run():
    """Also where prunings change the counts of the slabs."""
    mesh = Mesh(np.array(jax.devices()[:8]).reshape(2, 4), ("data", "model"))
    algorithm = rx.gmp(PLAN, start=0, stop=4, period=2, initial=0.7)
    check_together(loss, PARAMS, algorithm, optax.sgd(0.05, 0.9), [X * (1 + 0.1 * i) for i in range(5)], mesh=mesh)


def test_each_layer_has_its_pattern():
    masks = {"stack": RNG.random((LAYERS, WIDTH, WIDTH)) < np.array([0.1, 0.2, 0.3]).reshape(3, 1, 1)}
    packed = rx.pack(PARAMS, masks, plan=PLAN)
    pattern = packed.patterns["stack"]
    assert isinstance(pattern, kernels.Stacked)
    assert pattern.nnz == LAYERS * masks["stack"][2].sum()
    chex.assert_trees_all_equal(masks_of(packed), masks)
    chex.assert_trees_all_equal(rx.unpack(packed), rx.apply_masks(PARAMS, masks))
    assert isinstance(rx.pack(PARAMS, masks).patterns["stack"], kernels.Folded)  # taken for one weight
    (row,) = explain(packed, batch=4, repeats=1).rows
    assert row.kernel.startswith("3 layers of single weights")


def test_layers_in_slabs():
    """What a device holds is in one piece: the first of four is the stack of the first quarter of the outputs."""
    masks = {"stack": MASKS["stack"] & (np.arange(WIDTH) < 12)}
    packed = rx.pack(PARAMS, masks, choose=in_slabs)
    pattern, values = packed.patterns["stack"], packed.values["stack"]
    chex.assert_trees_all_equal(masks_of(packed), masks)
    chex.assert_trees_all_equal(rx.unpack(packed), rx.apply_masks(PARAMS, masks))
    kernels.check("me", pattern, content=True)
    quarter = rx.pack({"stack": PARAMS["stack"][..., :4]}, {"stack": masks["stack"][..., :4]}, choose=small(pattern))
    chex.assert_trees_all_equal(values.reshape(4, -1)[0], quarter.values["stack"])
    assert not values.reshape(4, -1)[3].any()
    np.testing.assert_array_equal(
        kernels.clear_padding(jnp.ones(pattern.nnz), pattern), kernels.gather(np.float32(masks["stack"]), pattern)
    )
    moved = np.roll(masks["stack"], 1, axis=1)
    assert kernels.count(kernels.rebuild(pattern, moved)) == moved.sum() == kernels.count(pattern)
    assert kernels.rebuild(pattern, moved).nnz == pattern.nnz
    (row,) = explain(packed, batch=4, repeats=1).rows
    assert row.kernel.startswith("3 layers of 4 slabs of single weights")


def small(stack):
    """Chooses a stack with the kernel of the slabs of another."""
    part = kernels.kernel_of(stack).part
    return lambda name, mask: kernels.make_stacked(mask, part, capacity=part.nnz)


@pytest.mark.parametrize("choose", [None, in_slabs], ids=["whole", "in slabs"])
def test_a_file_holds_a_stack_whose_layers_are_padded(tmp_path, choose):
    packed = rx.pack(PARAMS, MASKS, **({"choose": choose} if choose else {"plan": PLAN}))
    save_safetensors(tmp_path / "stack.safetensors", packed)
    read = load_safetensors(tmp_path / "stack.safetensors", like=packed)
    chex.assert_trees_all_equal(read, packed)


def test_runs_folds_and_convolutions_are_stacked_too():
    runs = np.repeat(np.arange(32).reshape(2, 8, 2) % 5 < 1, 8, axis=2)
    folded, taps = RNG.random((2, 8, 4, 4)) < 0.3, RNG.random((2, 3, 3, 2, 4)) < 0.3
    plan = {
        name: rx.base.LayerPlan(name, mask.shape, rx.unstructured(), 1, rx.Axes((1,), (2,), stack=(0,)))
        for name, mask in {"runs": runs, "folded": folded, "taps": taps}.items()
    }
    masks = {"runs": runs, "folded": folded, "taps": taps}
    packed = rx.pack(jax.tree.map(np.float32, masks), masks, plan=plan)
    assert packed.patterns["runs"].layer.height == 8
    assert isinstance(packed.patterns["folded"].layers, kernels.Folded)
    chex.assert_trees_all_equal(masks_of(packed), masks)


def test_a_scanned_module_runs_packed():
    class Block(nn.Module):
        @nn.compact
        def __call__(self, x, _):
            return x + nn.tanh(nn.Dense(WIDTH)(x)), None

    model = nn.scan(Block, variable_axes={"params": 0}, split_rngs={"params": True}, length=LAYERS)()
    params = model.init(jax.random.key(0), X, None)["params"]
    plan = rx.make_plan(params, 0.75)
    masks = topology.random_masks(plan, jax.random.key(0), params)
    packed = rx.pack(params, masks, plan=plan)
    assert isinstance(packed.patterns["Dense_0"]["kernel"], kernels.Stacked)
    run = jax.jit(rx.run_packed(lambda params: model.apply({"params": params}, X, None)[0]))
    np.testing.assert_allclose(run(packed), _dense(model, packed), atol=1e-5)


def _dense(model, packed):
    return jax.jit(lambda params: model.apply({"params": params}, X, None)[0])(rx.unpack(packed))


@pytest.mark.filterwarnings("error:run_packed")
@pytest.mark.parametrize("choose", [rx.execution.packed.best_choice(PLAN), in_slabs], ids=["whole", "in slabs"])
@pytest.mark.parametrize(
    "product",
    [
        lambda w, x: jax.vmap(lambda w, x: x @ w)(w, jnp.stack([x, 2 * x, 3 * x])),
        lambda w, x: jax.vmap(lambda w, x: w @ x.T, (0, 1), 1)(w, jnp.stack([x, 2 * x, 3 * x], 1)),
        lambda w, x: jax.vmap(lambda w: x @ w)(w),
        lambda w, x: jax.vmap(lambda w: w @ x.T, out_axes=2)(w),
    ],
    ids=["each its own", "each its own, flipped", "all the same", "all the same, flipped"],
)
def test_vmap_over_layers_runs_packed(product, choose):
    """Experts, or layers of `eqx.filter_vmap`."""
    packed = rx.pack(PARAMS, MASKS, choose=choose)
    of = lambda params: jnp.sum(jnp.sin(product(params["stack"], X)))  # noqa: E731
    wanted, gradient = jax.jit(jax.value_and_grad(of))(rx.unpack(packed))
    run = lambda values: rx.run_packed(of)(packed._replace(values=values))  # noqa: E731
    found, values = jax.jit(jax.value_and_grad(run))(packed.values)
    np.testing.assert_allclose(found, wanted, atol=1e-4)
    np.testing.assert_allclose(
        rx.unpack(packed._replace(values=values))["stack"], gradient["stack"] * MASKS["stack"], atol=1e-5
    )


def test_what_is_no_stack_is_refused():
    mask = np.eye(4, dtype=bool)
    with refused("make_stacked", "mask"):
        kernels.make_stacked(mask, kernels.make_pattern(mask))
    with refused("make_stacked", "like"):
        kernels.make_stacked(np.stack([mask]), kernels.make_block_pattern(np.ones((4, 4), bool), (2, 2)))
    stack = kernels.make_stacked(np.stack([mask, mask]), kernels.make_pattern(mask))
    with refused("scatter", "Stacked"):
        kernels.scatter(jnp.ones(4 * 3), kernels.Stacked(stack.layers, (3, 4, 4)))
    with refused("matmul", "at"):
        kernels.matmul(jnp.ones((2, 4)), jnp.ones(8), stack)
