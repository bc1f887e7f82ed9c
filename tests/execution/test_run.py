"""Models on packed weights: same values, same gradients, nothing of the model changed."""

import functools
import math
import re
import warnings

import chex
import equinox as eqx
import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

import rigl_jax as rx
from rigl_jax.execution import kernels
from tests.errors import refused
from tests.execution.models import drawn, problem

RNG = np.random.default_rng(0)
W = jnp.asarray(RNG.standard_normal((12, 12), dtype=np.float32))
MASK = jnp.asarray(RNG.random((12, 12)) < 0.3)
X = jnp.asarray(RNG.standard_normal((4, 12), dtype=np.float32))
PACKED = rx.pack({"w": W}, {"w": MASK})


@jax.custom_vjp
def doubled(x):
    return 2 * x


doubled.defvjp(lambda x: (2 * x, None), lambda _, g: (2 * g,))

FUNCTIONS = {
    "right": lambda w, x: x @ w,
    "left": lambda w, x: w @ x.T,
    "transposed": lambda w, x: x @ w.T,
    "einsum": lambda w, x: jnp.einsum("bi,oi->ob", x, w),
    "twice": lambda w, x: jnp.tanh(x @ w) @ w,
    "custom_vjp": lambda w, x: doubled(x @ w),
    "custom_jvp": lambda w, x: jax.nn.relu(x @ w),
    "jit": lambda w, x: jax.jit(lambda w, x: x @ w)(w, x),
    "checkpoint": lambda w, x: jax.checkpoint(lambda w, x: jnp.tanh(x @ w))(w, x),
    "scan": lambda w, x: jax.lax.scan(lambda c, _: (jnp.tanh(c @ w), c.sum()), x, None, length=3),
    "cond": lambda w, x: jax.lax.cond(x[0, 0] > 9, lambda: x, lambda: x @ w),
    "vmap": lambda w, x: jax.vmap(lambda row: w @ row)(x),
    "bfloat16": lambda w, x: x.astype(jnp.bfloat16) @ w.astype(jnp.bfloat16),
    "three axes": lambda w, x: x.reshape(2, 2, 12) @ w,
    "not used": lambda w, x: x,
}


@pytest.mark.parametrize("name", FUNCTIONS)
def test_values_and_gradients_are_those_of_the_dense_weight(name):
    f = FUNCTIONS[name]

    def total(w, x):
        return sum(jnp.sum(jnp.sin(y.astype(jnp.float32))) for y in jax.tree.leaves(f(w, x)))

    def packed_total(values, x):
        return rx.run_packed(lambda p, x: total(p["w"], x))(PACKED._replace(values=values), x)

    value, (dw, dx) = jax.jit(jax.value_and_grad(total, argnums=(0, 1)))(jnp.where(MASK, W, 0), X)
    got, (dvalues, dx_packed) = jax.jit(jax.value_and_grad(packed_total, argnums=(0, 1)))(PACKED.values, X)
    tolerance = 0.05 if name == "bfloat16" else 1e-4
    np.testing.assert_allclose(got, value, rtol=tolerance, atol=tolerance)
    np.testing.assert_allclose(dx_packed, dx, rtol=tolerance, atol=tolerance)
    np.testing.assert_allclose(dvalues["w"], kernels.gather(dw, PACKED.patterns["w"]), rtol=tolerance, atol=tolerance)


def test_while_loop():
    run = rx.run_packed(lambda p, x: jax.lax.fori_loop(0, 3, lambda i, c: jnp.tanh(c @ p["w"]), x))
    expected = X
    for _ in range(3):
        expected = jnp.tanh(expected @ jnp.where(MASK, W, 0))
    np.testing.assert_allclose(jax.jit(run)(PACKED, X), expected, atol=1e-5)


def test_vmap_over_the_batch_from_outside():
    rows = jax.vmap(lambda x: rx.run_packed(lambda p, x: x @ p["w"])(PACKED, x))(X)
    np.testing.assert_allclose(rows, X @ jnp.where(MASK, W, 0), atol=1e-5)


def test_data_parallel_in_shard_map():
    mesh = jax.make_mesh((4,), ("data",), axis_types=(AxisType.Auto,))

    def loss(params, x):
        return jnp.mean(jnp.sin(x @ params["w"]))

    def grads(packed, x):
        mine = jax.grad(lambda values: rx.run_packed(loss)(packed._replace(values=values), x))(packed.values)
        return jax.lax.pmean(mine, "data")

    across = jax.shard_map(grads, mesh=mesh, in_specs=(P(), P("data")), out_specs=P(), check_vma=False)
    expected = jax.grad(lambda values: rx.run_packed(loss)(PACKED._replace(values=values), X))(PACKED.values)
    chex.assert_trees_all_close(jax.jit(across)(PACKED, X), expected, atol=1e-6)


def test_data_parallel_under_jit():
    """Each device multiplies its part of the batch, and nothing of the size of an input is put together.

    Of convolutions, a matrix and one of tiles.
    """
    loss, params, _, image = problem()
    params = {**params, "tiles": W[:, :4]}
    masks = jax.tree.map(lambda p: None if p.ndim < 2 else np.abs(p) > np.quantile(np.abs(p), 0.8), params)
    masks["tiles"] = np.kron(np.array([[1], [0], [1]], bool), np.ones((4, 4), bool))

    def choose(name, mask):
        return kernels.make_block_pattern(mask, (4, 4)) if name == "tiles" else kernels.make_pattern(mask)

    def both(params, image):
        rest = {name: leaf for name, leaf in params.items() if name != "tiles"}
        return loss(rest, image) + jnp.mean(jnp.sin(image.reshape(len(image), -1)[:, :12] @ params["tiles"]))

    packed = rx.pack(params, masks, choose=choose)
    mesh = jax.make_mesh((4,), ("data",), axis_types=(AxisType.Auto,))
    split, whole = NamedSharding(mesh, P("data")), NamedSharding(mesh, P())

    def grads(run, packed, image):
        return jax.value_and_grad(lambda values: run(packed._replace(values=values), image))(packed.values)

    expected = jax.jit(functools.partial(grads, rx.run_packed(both)))(packed, image)
    over = jax.jit(functools.partial(grads, rx.run_packed(both, batch=split)), out_shardings=whole)
    packed, image = jax.device_put(packed, whole), jax.device_put(image, split)
    compiled = over.lower(packed, image).compile()
    chex.assert_trees_all_close(compiled(packed, image), expected, rtol=1e-4, atol=1e-6)
    sent = [
        math.prod(map(int, re.findall(r"\d+", shape)))
        for shape in re.findall(r"\w+\[([\d,]+)\][^=]* all-gather", compiled.as_text())
    ]
    assert max(sent, default=0) <= 8 * 4  # logits at most
    odd = rx.run_packed(lambda p, x: x @ p["w"], batch=split)  # 6 rows: each device does the whole
    rows = jnp.concatenate([X, X[:2]])
    np.testing.assert_allclose(jax.jit(odd)(PACKED, rows), rows @ jnp.where(MASK, W, 0), atol=1e-5)


@pytest.mark.parametrize("placed", [False, True])
def test_data_parallel_on_a_mesh_with_explicit_axes(placed):
    """`jax.make_mesh` makes such a mesh where nothing else is said; shardings are then part of types."""
    keys = jax.random.split(jax.random.key(0), 3)
    params = {"conv": jax.random.normal(keys[0], (3, 3, 4, 8)), "dense": jax.random.normal(keys[1], (6 * 6 * 8, 16))}
    image = jax.random.normal(keys[2], (8, 8, 8, 4))
    masks = jax.tree.map(lambda p: p > 0.8, params)
    packed, split = rx.pack(params, masks), NamedSharding(jax.make_mesh((4,), ("data",)), P("data"))

    def loss(params, image):
        y = jax.lax.conv_general_dilated(
            image, params["conv"], (1, 1), "VALID", dimension_numbers=("NHWC", "HWIO", "NHWC")
        )
        return jnp.mean(jnp.sin(jnp.tanh(y).reshape(len(y), -1) @ params["dense"]))

    def grads(run, values, image):
        return jax.grad(lambda values: run(packed._replace(values=values), image))(values)

    expected = jax.jit(functools.partial(grads, rx.run_packed(loss)))(packed.values, image)
    image = jax.device_put(image, split) if placed else image
    across = jax.jit(functools.partial(grads, rx.run_packed(loss, batch=split)))(packed.values, image)
    chex.assert_trees_all_close(jax.device_get(across), expected, rtol=1e-4, atol=1e-6)


def test_an_operation_without_a_rule_is_dense_and_says_so():
    run = rx.run_packed(lambda p, x: x @ jnp.abs(p["w"]))
    with pytest.warns(UserWarning, match="leaf 'w' meets abs"):
        y = run(PACKED, X)
    np.testing.assert_allclose(y, X @ jnp.abs(jnp.where(MASK, W, 0)), atol=1e-5)


def test_the_dense_weight_is_never_formed():
    """With 2^36 weights, 256 GB, it could not be."""
    n = 2**18
    pattern = kernels.make_pattern_at(np.array([5, n + 7]), (n, n))
    huge = rx.Packed({"w": jnp.array([2.0, 3.0])}, {"w": pattern})
    y = jax.jit(rx.run_packed(lambda p, x: x @ p["w"]))(huge, jnp.ones((1, n)))
    assert (y[0, 5], y[0, 7], y.sum()) == (2, 3, 5)


def test_linen_convolutions():
    loss, params, plan, image = problem()
    masks = rx.topology.random_masks(plan, jax.random.key(3), params)
    packed = rx.pack(params, masks)
    assert sum(isinstance(p, kernels.Pattern) for p in packed.patterns["Conv_1"].values()) == 1
    params = rx.apply_masks(params, masks)
    value, grads = jax.jit(jax.value_and_grad(loss))(params, image)
    run = rx.run_packed(loss)
    of_values = jax.value_and_grad(lambda values: run(packed._replace(values=values), image))
    got, dvalues = jax.jit(of_values)(packed.values)
    np.testing.assert_allclose(got, value, rtol=1e-5)
    chex.assert_trees_all_close(dvalues, rx.pack(grads, masks).values, rtol=1e-3, atol=1e-5)


FOLDED = {
    "attention": (nn.MultiHeadDotProductAttention(num_heads=3, qkv_features=12), (2, 5, 12)),
    "conv": (nn.Conv(6, (3,)), (2, 9, 8)),
    "strided": (nn.Conv(6, (3,), strides=2, padding="VALID"), (2, 9, 8)),
    "dilated": (nn.Conv(6, (3,), kernel_dilation=2), (2, 9, 8)),
    "causal": (nn.Conv(6, (3,), padding="CAUSAL"), (2, 9, 8)),
}


@pytest.mark.parametrize("name", FOLDED)
@pytest.mark.filterwarnings("error")
def test_kernels_of_three_axes(name):
    layer, shape = FOLDED[name]
    rng = np.random.default_rng(0)
    x = rng.standard_normal(shape, np.float32)
    params = drawn(layer, x, rng)
    plan = rx.make_plan(params, 0.8)
    masks = rx.topology.random_masks(plan, jax.random.key(2), params)
    packed = rx.pack(params, masks)
    patterns = jax.tree.leaves(packed.patterns, is_leaf=lambda p: isinstance(p, kernels.Folded))
    folded = [p for p in patterns if isinstance(p, kernels.Folded)]
    assert sorted(p.shape for p in folded) == sorted(leaf.shape for leaf in plan.values())
    params = rx.apply_masks(params, masks)
    chex.assert_trees_all_equal(rx.unpack(packed), params)
    loss = lambda params, x: jnp.sum(jnp.sin(layer.apply({"params": params}, x)))  # noqa: E731
    run = rx.run_packed(loss)
    value, (grads, dx) = jax.jit(jax.value_and_grad(loss, argnums=(0, 1)))(params, x)
    of_values = lambda values, x: run(packed._replace(values=values), x)  # noqa: E731
    got, (dvalues, dx_packed) = jax.jit(jax.value_and_grad(of_values, argnums=(0, 1)))(packed.values, x)
    np.testing.assert_allclose(got, value, rtol=1e-5)
    np.testing.assert_allclose(dx_packed, dx, atol=1e-5)
    chex.assert_trees_all_close(dvalues, rx.pack(grads, masks).values, atol=1e-5)


@pytest.mark.parametrize("equation", ["bi,iho->bho", "iho,bi->ohb", "bho,iho->bi", "iho,bho->ib", "boh,iho->ib"])
@pytest.mark.filterwarnings("error")
def test_products_over_several_axes(equation):
    w, mask = W.reshape(12, 3, 4), MASK.reshape(12, 3, 4)
    packed = rx.pack({"w": w}, {"w": mask})
    sizes = {"b": 2, "i": 12, "h": 3, "o": 4}
    left, right = equation.split("->")[0].split(",")
    shape = [sizes[c] for c in (left if right == "iho" else right)]
    x = jax.random.normal(jax.random.key(0), shape)

    def f(params, x):
        return jnp.einsum(equation, *((x, params["w"]) if right == "iho" else (params["w"], x)))

    y = rx.run_packed(f)(packed, x)
    np.testing.assert_allclose(y, f({"w": jnp.where(mask, w, 0)}, x), atol=1e-5)
    moved = rx.run_packed(lambda p, x: jnp.einsum("bho,hoi->bi", x, p["w"].transpose(1, 2, 0)))
    x = jax.random.normal(jax.random.key(0), (2, 3, 4))
    np.testing.assert_allclose(moved(packed, x), jnp.einsum("bho,iho->bi", x, jnp.where(mask, w, 0)), atol=1e-5)


def test_nothing_in_nothing_out():
    y = rx.run_packed(lambda p, x: x @ p["w"])(PACKED, jnp.ones((0, 12)))
    assert y.shape == (0, 12)
    layer = nn.Conv(6, (3,), kernel_dilation=3, padding="VALID")
    params = drawn(layer, np.ones((2, 9, 8), np.float32), RNG)
    masks = {"kernel": RNG.random((3, 8, 6)) < 0.3, "bias": None}
    run = rx.run_packed(lambda p, x: layer.apply({"params": p}, x))
    assert run(rx.pack(params, masks), jnp.ones((2, 4, 8))).shape == (2, 0, 6)  # a window longer than the input


OTHER_USES = {
    "left of a convolution": lambda w, x: jax.lax.conv_general_dilated(
        w, x.reshape(3, 3, 8, 4), (1, 1), "SAME", dimension_numbers=("NHWC", "HWIO", "NHWC")
    ),
    "all axes contracted": lambda w, x: jnp.tensordot(x.reshape(2, 3, 3, 2, 8), w.reshape(3, 3, 2, 8), 4),
    "no axis contracted": lambda w, x: jnp.tensordot(x[:2], w, 0),
}


@pytest.mark.parametrize("name", OTHER_USES)
@pytest.mark.filterwarnings("ignore:run_packed")
def test_other_uses_of_a_convolutions_kernel_are_dense_and_right(name):
    f, shape = OTHER_USES[name], (3, 3, 2, 8)
    w, x = RNG.standard_normal(shape, np.float32), RNG.standard_normal(288, np.float32)
    mask = RNG.random(shape) < 0.3
    y = rx.run_packed(lambda p, x: f(p["w"], x))(rx.pack({"w": w}, {"w": mask}), x)
    np.testing.assert_allclose(y, f(jnp.where(mask, w, 0), x), atol=1e-5)


def test_axes_contracted_otherwise_are_dense_and_right():
    w, mask = W.reshape(12, 3, 4), MASK.reshape(12, 3, 4)
    x = jax.random.normal(jax.random.key(0), (2, 12, 3))
    run = rx.run_packed(lambda p, x: jnp.einsum("bih,iho->bo", x, p["w"]))
    with pytest.warns(UserWarning, match="leaf 'w' meets dot_general"):
        y = run(rx.pack({"w": w}, {"w": mask}), x)
    np.testing.assert_allclose(y, jnp.einsum("bih,iho->bo", x, jnp.where(mask, w, 0)), atol=1e-5)


CONVOLUTIONS = {
    "2-D": (nn.Conv(8, (3, 3), strides=2, feature_group_count=2), (4, 5, 6, 4)),
    "1-D": (nn.Conv(8, (3,), strides=2, kernel_dilation=2, feature_group_count=2), (4, 9, 4)),
    "3-D": (nn.Conv(4, (2, 3, 3), strides=(1, 2, 1)), (4, 3, 4, 5, 2)),
    "transposed": (nn.ConvTranspose(3, (3, 2), strides=(2, 3)), (4, 3, 4, 5)),
    "1-D, depthwise": (nn.Conv(6, (4,), feature_group_count=6), (4, 5, 6)),
}


@pytest.mark.filterwarnings("error")
def test_convolutions_in_groups_with_depth_and_transposed():
    rng = np.random.default_rng(0)
    inputs = {name: rng.standard_normal(shape, np.float32) for name, (_, shape) in CONVOLUTIONS.items()}
    params = {name: drawn(layer, inputs[name], rng) for name, (layer, _) in CONVOLUTIONS.items()}
    masks = jax.tree.map(
        lambda p: (rng.permutation(p.size) < p.size // 3).reshape(p.shape) if p.ndim > 1 else None, params
    )
    packed = rx.pack(params, masks)
    assert jax.tree.map(jnp.ndim, packed.values) == jax.tree.map(lambda p: 1, params)

    def total(params, inputs):
        return sum(
            jnp.sum(jnp.sin(CONVOLUTIONS[name][0].apply({"params": params[name]}, inputs[name]))) for name in inputs
        )

    mesh = jax.make_mesh((2,), ("data",), axis_types=(AxisType.Auto,))

    @jax.jit
    def both(packed, inputs):
        run = rx.run_packed(total, batch=NamedSharding(mesh, P("data", None)))  # the other axes are whole
        sparse = jax.value_and_grad(lambda v, x: run(packed._replace(values=v), x), (0, 1))(packed.values, inputs)
        return sparse, jax.value_and_grad(total, (0, 1))(rx.execution.unpack(packed), inputs)

    (y, (dvalues, dx)), (want, (dparams, want_dx)) = both(packed, inputs)
    got = rx.execution.unpack(packed._replace(values=dvalues))
    chex.assert_trees_all_close((y, got, dx), (want, rx.apply_masks(dparams, masks), want_dx), atol=1e-4)
    with refused("streamed growth", "1-D/kernel"):
        jax.eval_shape(rx.execution.gradient_factors(total), packed, inputs)


def test_convolutions_in_groups_of_examples_are_dense_and_right():
    def apply(params, x):
        numbers = ("NHWC", "HWIO", "NHWC")
        return jax.lax.conv_general_dilated(
            x, params["kernel"], (1, 1), "SAME", batch_group_count=2, dimension_numbers=numbers
        )

    params, x = {"kernel": RNG.standard_normal((3, 3, 4, 6), np.float32)}, np.ones((2, 5, 5, 4), np.float32)
    masks = {"kernel": RNG.random((3, 3, 4, 6)) < 0.1}
    with pytest.warns(UserWarning, match="leaf 'kernel' meets conv_general_dilated"):
        y = jax.jit(rx.run_packed(apply))(rx.pack(params, masks), x)
    np.testing.assert_allclose(y, jax.jit(apply)(rx.apply_masks(params, masks), x), atol=1e-5)


@pytest.mark.filterwarnings("error")
def test_taps_may_lie_apart():
    layer, x = nn.Conv(4, (3, 3), kernel_dilation=2), RNG.standard_normal((2, 8, 8, 4), np.float32)
    params = drawn(layer, x, RNG)
    masks = {"kernel": RNG.random(params["kernel"].shape) < 0.1, "bias": None}
    apply = jax.jit(lambda p, x: layer.apply({"params": p}, x))
    y = jax.jit(rx.run_packed(apply))(rx.pack(params, masks), x)
    np.testing.assert_allclose(y, apply(rx.apply_masks(params, masks), x), atol=1e-5)


def test_nnx_at_the_edge():
    graph, state = nnx.split(nnx.Linear(12, 12, rngs=nnx.Rngs(0)))
    masks = jax.tree.map(lambda p: MASK if p.ndim == 2 else None, state)
    run = rx.run_packed(lambda state, x: nnx.merge(graph, state)(x))
    expected = nnx.merge(graph, rx.apply_masks(state, masks))(X)
    np.testing.assert_allclose(run(rx.pack(state, masks), X), expected, atol=1e-5)


def test_equinox():
    model = eqx.nn.MLP(12, 12, 12, 2, key=jax.random.key(0))
    arrays, static = eqx.partition(model, eqx.is_array)
    masks = jax.tree.map(lambda p: MASK if p.ndim == 2 else None, arrays)
    run = rx.run_packed(lambda arrays, x: jax.vmap(eqx.combine(arrays, static))(x))
    expected = jax.vmap(eqx.combine(rx.apply_masks(arrays, masks), static))(X)
    np.testing.assert_allclose(jax.jit(run)(rx.pack(arrays, masks), X), expected, atol=1e-5)


@pytest.mark.filterwarnings("error")
def test_convolutions_of_equinox():
    """Channels before the window, outputs first: as the plan says."""
    keys, rng = jax.random.split(jax.random.key(0), 4), np.random.default_rng(0)
    model = {
        "conv": eqx.nn.Conv2d(4, 6, (3, 2), stride=2, padding=1, key=keys[0]),
        "groups": eqx.nn.Conv2d(4, 6, 3, groups=2, key=keys[1]),
        "line": eqx.nn.Conv1d(4, 6, 3, stride=2, key=keys[3]),
        "deep": eqx.nn.Conv3d(4, 3, (2, 1, 3), key=keys[2]),
    }
    params, static = eqx.partition(model, eqx.is_array)
    images, volumes = (rng.standard_normal(shape, np.float32) for shape in ((3, 4, 5, 6), (3, 4, 3, 4, 5)))

    def total(params, images, volumes):
        layers = eqx.combine(params, static)
        seen = [jax.vmap(layers[name])(images) for name in ("conv", "groups")] + [jax.vmap(layers["deep"])(volumes)]
        seen.append(jax.vmap(layers["line"])(images[..., 0]))
        return sum(jnp.sum(jnp.sin(y)) for y in seen)

    plan = rx.make_plan(params, 0.7, rx.uniform, apply=total, inputs=(images, volumes))
    masks = jax.tree.map(lambda p: rng.random(p.shape) < 0.3 if p.size > 6 else None, params)
    packed = rx.pack(params, masks, plan=plan)
    moved = [x for x in jax.tree.leaves(packed.patterns, is_leaf=is_moved) if is_moved(x)]
    assert sorted(pattern.axes for pattern in moved) == [(2, 1, 0), (2, 3, 1, 0), (2, 3, 1, 0), (2, 3, 4, 1, 0)]

    @jax.jit
    def both(packed, dense):
        run = rx.run_packed(total)
        sparse = jax.value_and_grad(lambda v: run(packed._replace(values=v), images, volumes))(packed.values)
        return sparse, jax.value_and_grad(total)(dense, images, volumes)

    (y, dvalues), (want, dparams) = both(packed, rx.unpack(packed))
    rebuilt = [kernels.rebuild(at, mask) for at, mask in zip(moved, jax.tree.leaves(masks), strict=True)]
    chex.assert_trees_all_equal(rebuilt, moved)
    got = rx.unpack(packed._replace(values=dvalues))
    chex.assert_trees_all_close((y, got), (want, rx.apply_masks(dparams, masks)), atol=1e-4)


def is_moved(x):
    return isinstance(x, kernels.Moved)


def test_static_arguments_stay_static():
    def apply(params, x, *, train, power):
        assert train is True
        return (x @ params["w"]) ** power

    y = rx.run_packed(apply)(PACKED, X, train=True, power=2)
    np.testing.assert_allclose(y, (X @ jnp.where(MASK, W, 0)) ** 2, atol=1e-4)


def test_a_leaf_stored_dense_is_masked_in_value_and_gradient():
    whole = rx.pack({"w": W}, {"w": MASK}, choose=lambda name, mask: None)
    run = rx.run_packed(lambda p, x: jnp.sum((x @ p["w"]) ** 2))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        grads = jax.grad(lambda values: run(whole._replace(values=values), X))(whole.values)["w"]
    assert not np.asarray(grads)[~np.asarray(MASK)].any()
    assert np.asarray(grads)[np.asarray(MASK)].all()
