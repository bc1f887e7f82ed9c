"""Packed training goes through the masks of a masked run, and streamed growth through those of RigL."""

import functools

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

import rigl_jax as rx
from rigl_jax.algorithms import registry
from rigl_jax.execution import gradient_factors, kernels, masks_of, packed_training, rewire_streamed
from tests.errors import refused
from tests.execution.models import problem

INNER = optax.chain(optax.clip_by_global_norm(1.0), optax.adamw(3e-3))


@functools.cache
def dense_gradient(loss):
    return jax.jit(jax.grad(loss))


def masked_step(tx, loss):
    def step(params, state, image, rewire=None):
        updates, state = tx.update(jax.grad(loss)(params, image), state, params, rewire=rewire)
        return optax.apply_updates(params, updates), state

    return jax.jit(step, static_argnames="rewire")


def packed_step(training, loss, traces=None, batch=None):
    """Writes down in `traces` each time that it is traced."""
    traces = [] if traces is None else traces

    @jax.jit
    def step(packed, state, image):
        traces.append(loss)
        run = rx.run_packed(loss, batch=batch)
        grads = jax.grad(lambda values: run(packed._replace(values=values), image))(packed.values)
        return training.update(grads, state, packed)

    return step


def check_together(loss, params, algorithm, inner, inputs, traces=None, mesh=None, choose=None):
    """Takes a masked and a packed run through the same steps: masks are equal, weights to float tolerance.

    A rewiring makes nothing compile anew where it keeps the number of values. With a mesh, batches are split over its
    axis "data" and weights cut by their outputs over "model".
    """
    cut, batch = (None if mesh is None else NamedSharding(mesh, axes) for axes in (P(None, "model"), P("data")))
    tx = rx.sparsify(inner, algorithm, key=jax.random.key(7))
    training = packed_training(inner, algorithm, key=jax.random.key(7), sharding=cut, choose=choose)
    packed, packed_state = training.init(params)
    state = tx.init(params)
    params = rx.apply_masks(params, state.masks)
    traces = [] if traces is None else traces
    masked, ordinary, dense = masked_step(tx, loss), packed_step(training, loss, traces, batch), dense_gradient(loss)
    chex.assert_trees_all_equal(masks_of(packed), state.masks)
    sizes = set()
    for i, seen in enumerate(inputs):
        due = bool(algorithm.due(i))
        params, state = masked(params, state, seen)
        if due:
            packed, packed_state = training.rewire(dense(rx.unpack(packed), seen), packed_state, packed)
        else:
            sizes.add(tuple(jax.tree.leaves(jax.tree.map(jnp.shape, packed.values))))
            packed, packed_state = ordinary(packed, packed_state, jax.device_put(seen, batch))
        unpacked, unpacked_state = training.unpack(packed, packed_state)
        chex.assert_trees_all_equal(unpacked_state.masks, state.masks)
        chex.assert_trees_all_close(unpacked, params, rtol=1e-4, atol=1e-5)
    assert len(traces) == len(sizes)
    return training.unpack(packed, packed_state), state


def test_a_packed_run_is_a_masked_run():
    """Convolutions, and an optimizer that looks at all leaves together; the methods are told apart below."""
    loss, params, plan, image = problem()
    inputs = [image * (1 + 0.05 * i) for i in range(5)]
    (unpacked, unpacked_state), state = check_together(loss, params, rx.rigl(plan, period=3), INNER, inputs)
    chex.assert_trees_all_equal(jax.tree.structure(unpacked_state), jax.tree.structure(state))
    chex.assert_trees_all_close(unpacked_state.inner, state.inner, rtol=1e-3, atol=1e-5)
    rx.check_masked(unpacked, unpacked_state.masks)


RNG = np.random.default_rng(0)
# Leaves of one shape share what is compiled; some weights are small enough for `dsr` to drop.
PRODUCTS = {name: np.float32(0.03) * RNG.standard_normal((16, 16), np.float32) for name in ("v", "w")}
INPUTS = RNG.standard_normal((6, 12, 16), np.float32)


def loss_of_products(params, x=INPUTS[0]):
    return jnp.mean(jnp.square(jnp.tanh(x @ params["v"]) @ params["w"] - x))


REFUSED = {"snfs", "ste", "dnw", "top_kast"}


@pytest.mark.parametrize("name", rx.ALGORITHMS)
def test_every_algorithm_goes_through_its_masked_masks_or_is_refused(name):
    """Six steps with rewirings, or the first masks of what never rewires; weights to float tolerance, masks exactly.

    Of one leaf beside a dense one, or of two where weights move between leaves. Not with Adam: its first step moves
    every regrown weight by the same amount, up to rounding, which then decides which of them is smallest.
    """
    options = {"period": 2, "stop": 6, "fraction": 0.5, "loss": loss_of_products}
    rules = [("w", rx.unstructured()), ("v", rx.unstructured() if name == "dsr" else None)]
    algorithm = registry.METHODS[name].example(rx.make_plan(PRODUCTS, 0.75, rules=rules), **options)
    if name in REFUSED:
        with refused("packed_training"):
            packed_training(optax.sgd(0.05, momentum=0.9), algorithm, key=jax.random.key(0))
        return
    first = algorithm.init(jax.random.split(jax.random.key(7))[0], PRODUCTS).masks
    inputs = INPUTS if any(map(algorithm.due, range(len(INPUTS)))) else ()
    _, state = check_together(loss_of_products, PRODUCTS, algorithm, optax.sgd(0.05, 0.9, nesterov=True), inputs)
    changed = any(not np.array_equal(a, b) for a, b in zip(first.values(), state.masks.values(), strict=True))
    assert changed == any(map(algorithm.due, range(len(INPUTS))))


@pytest.mark.filterwarnings("error:run_packed")
@pytest.mark.parametrize("devices", [(), (2, 4)], ids=["whole", "cut by outputs"])
def test_tiles_that_are_pruned_go_through_the_masks_of_a_masked_run(devices):
    """With room for more tiles, so that steps are compiled for few sizes; for exact counts there would be six."""
    if jax.device_count() < int(np.prod(devices)):
        pytest.skip("needs eight devices")
    mesh = Mesh(np.array(jax.devices()[:8]).reshape(devices), ("data", "model")) if devices else None
    plan = rx.make_plan(PRODUCTS, 0.9, rules=[(".*", rx.block(4, 2))])
    algorithm = rx.gmp(plan, start=0, stop=16, period=2, initial=0.5)
    inputs, traces = np.random.default_rng(1).standard_normal((18, 12, 16), np.float32), []
    tiles = lambda name, mask: kernels.make_block_pattern(mask, (4, 2))  # noqa: E731
    check_together(loss_of_products, PRODUCTS, algorithm, optax.sgd(0.05, 0.9), inputs, traces, mesh=mesh, choose=tiles)
    assert len(traces) <= 5


def test_conversion_is_exact_both_ways():
    loss, params, plan, image = problem()
    inner, algorithm = INNER, rx.rigl(plan, period=3)
    tx, training = (
        rx.sparsify(inner, algorithm, key=jax.random.key(0)),
        packed_training(inner, algorithm, key=jax.random.key(0)),
    )
    state = tx.init(params)
    params, state = masked_step(tx, loss)(rx.apply_masks(params, state.masks), state, image, False)
    back = training.unpack(*training.pack(params, state))
    chex.assert_trees_all_equal(jax.tree.leaves(back[0]), jax.tree.leaves(params))
    chex.assert_trees_all_equal(jax.tree.leaves(back[1].inner), jax.tree.leaves(state.inner))


def test_the_optimizer_keeps_active_values_only():
    _, params, plan, _ = problem()
    packed, state = packed_training(optax.adam(1e-3), rx.rigl(plan), key=jax.random.key(0)).init(params)
    chex.assert_trees_all_equal_shapes(state.inner[0].mu, packed.values)
    assert jax.tree.leaves(state.algorithm.masks) == []


def test_a_leaf_that_starts_dense_is_packed_once_it_is_sparse_enough():
    plan = rx.make_plan(PRODUCTS, 0.9)
    training = packed_training(optax.sgd(0.1), rx.gmp(plan, start=0, stop=2, period=1), key=jax.random.key(0))
    packed, state = training.init(PRODUCTS)
    assert not any(isinstance(pattern, kernels.Pattern) for pattern in packed.patterns.values())
    for _ in range(3):
        packed, state = training.rewire(PRODUCTS, state, packed)
    assert packed.values["w"].shape == (plan["w"].n_active,)


def test_runs_that_were_there_by_chance_may_break():
    params = {"w": jnp.arange(1.0, 257.0).reshape(8, 32)}
    algorithm = rx.set_(rx.make_plan(params, 0.75), period=1)
    training = packed_training(optax.sgd(0.1), algorithm, key=jax.random.key(0))
    packed, state = training.init(params)
    state = training.unpack(packed, state)[1]
    runs = {"w": jnp.arange(8)[:, None] < jnp.full((1, 32), 2)}
    packed, state = training.pack(params, state._replace(algorithm=state.algorithm._replace(masks=runs)))
    assert packed.patterns["w"].height == 16
    packed, state = training.rewire({"w": jnp.zeros((8, 32))}, state, packed)
    assert packed.patterns["w"].height == 1
    assert int(masks_of(packed)["w"].sum()) == 64


def test_gradients_of_another_form_are_refused():
    _, params, plan, _ = problem()
    training = packed_training(optax.sgd(0.1), rx.rigl(plan), key=jax.random.key(0))
    packed, state = training.init(params)
    with refused("Conv_0/kernel", "packed.values"):
        training.update(params, state, packed)
    with refused("Conv_0/kernel"):
        training.rewire(packed.values, state, packed)


@pytest.mark.parametrize("inner", [optax.adafactor(0.1), optax.contrib.muon(0.1)], ids=["adafactor", "muon"])
def test_optimizers_of_matrices_are_refused(inner):
    params = {"w": jnp.ones((16, 32)), "b": jnp.zeros(32)}
    training = packed_training(inner, rx.static(rx.make_plan(params, 0.8)), key=jax.random.key(0))
    with refused("packed_training", "optimizer"):
        training.init(params)


def test_packed_weights_are_not_packed_again():
    _, params, plan, _ = problem()
    training = packed_training(optax.sgd(0.1), rx.rigl(plan), key=jax.random.key(0))
    packed, _ = training.init(params)
    with refused("params"):
        training.init(packed)


def test_states_of_masked_and_packed_runs_are_told_apart():
    """A packed run's masks are its patterns. Its state in a masked run's place, or the other way, would train dense."""
    params = {"w": jnp.ones((4, 4)), "b": jnp.ones(4)}
    plan = rx.make_plan(params, 0.5)
    for inner in (optax.sgd(0.1), optax.adam(0.1)):
        training = packed_training(inner, rx.static(plan), key=jax.random.key(0))
        packed, state = training.init(params)
        dense, masked = training.unpack(packed, state)
        again, _ = training.pack(dense, masked)
        chex.assert_trees_all_equal(again, packed)
        grads = packed.values
        wrong = [
            ("pack state", lambda t=training, s=state, d=dense: t.pack(d, s)),
            ("pack params", lambda t=training, m=masked, p=packed: t.pack(p, m)),
            ("pack state", lambda t=training, d=dense: t.pack(d, None)),
            ("pack like", lambda t=training, m=masked, d=dense: t.pack(d, m, d)),
            ("unpack state", lambda t=training, m=masked, p=packed: t.unpack(p, m)),
            ("unpack packed", lambda t=training, s=state, d=dense: t.unpack(d, s)),
            ("update state", lambda t=training, m=masked, p=packed, g=grads: t.update(g, m, p)),
            ("update state", lambda t=training, p=packed, g=grads: t.update(g, g, p)),
            ("rewire state", lambda t=training, m=masked, p=packed, d=dense: t.rewire(d, m, p)),
        ]
        for named, call in wrong:
            with refused(*named.split()):
                call()
        with refused("state"):
            rewire_streamed(inner, {}, masked, packed, 0.3)


WEIGHTS = {"kernel": jnp.arange(1.0, 129.0).reshape(16, 8), "bias": jnp.ones(8)}
PLANNED = rx.make_plan(WEIGHTS, 0.75)
ADAM, MOMENTUM = optax.adam(0.1), optax.sgd(0.1, momentum=0.9)
OTHERS = {
    "optimizer": (MOMENTUM, rx.rigl(PLANNED), "0/trace/bias"),
    "algorithm": (ADAM, rx.dsr(PLANNED), "MaskState"),
    "leaves": (ADAM, rx.rigl(rx.make_plan(WEIGHTS, 0.5, rules=[(".*", rx.unstructured())])), "bias"),
}


def trained(inner=ADAM, algorithm=None):
    return packed_training(inner, rx.rigl(PLANNED) if algorithm is None else algorithm, key=jax.random.key(0))


@pytest.mark.parametrize("other", OTHERS)
def test_the_state_of_another_run_is_refused(other):
    packed, state = trained().init(WEIGHTS)
    masked = trained().unpack(packed, state)
    inner, algorithm, named = OTHERS[other]
    training = trained(inner, algorithm)
    calls = {
        "update": lambda: training.update(packed.values, state, packed),
        "rewire": lambda: training.rewire(WEIGHTS, state, packed),
        "unpack": lambda: training.unpack(packed, state),
        "pack": lambda: training.pack(*masked),
    }
    for who, call in calls.items():
        with refused(who, "state", named):
            call()


def test_a_state_that_does_not_fit_the_packed_weights_is_refused():
    packed, state = trained().init(WEIGHTS)
    training = trained(algorithm=rx.rigl(rx.make_plan(WEIGHTS, 0.8)))
    other, _ = training.init(WEIGHTS)
    for call in (
        lambda: training.update(other.values, state, other),
        lambda: training.rewire(WEIGHTS, state, other),
        lambda: training.unpack(other, state),
        lambda: rewire_streamed(ADAM, {}, state, other, 0.3),
    ):
        with refused("0/mu/kernel"):
            call()
    with refused("state"):
        rewire_streamed(MOMENTUM, {}, state, packed, 0.3)


def test_masks_of_other_counts_go_on_as_in_a_masked_run():
    tx = rx.sparsify(ADAM, rx.rigl(PLANNED), key=jax.random.key(0))
    masks = {"kernel": jnp.eye(16, 8, dtype=bool), "bias": None}
    params, state = rx.replace_masks(ADAM, tx.init(WEIGHTS), WEIGHTS, masks)
    packed, packed_state = trained().pack(params, state)
    packed, _ = trained().rewire(WEIGHTS, packed_state, packed)
    _, state = tx.update(WEIGHTS, state, params, rewire=True)
    assert int(state.masks["kernel"].sum()) == 8
    chex.assert_trees_all_equal(masks_of(packed), state.masks)
    with refused("kernel", "8"):
        rx.check_masked(rx.unpack(packed), masks_of(packed), PLANNED)


# --- growth by streamed gradients ---------------------------------------------------------------------------------


def test_streamed_rewiring_is_the_masked_one():
    loss, params, plan, image = problem()
    inner, algorithm = INNER, rx.rigl(plan, period=3, fraction=0.3)
    training = packed_training(
        inner, algorithm, key=jax.random.key(7), choose=lambda name, mask: kernels.make_pattern(mask)
    )
    packed, state = training.init(params)
    packed, state = packed_step(training, loss)(packed, state, image)
    expected, expected_state = training.rewire(dense_gradient(loss)(rx.unpack(packed), image), state, packed)
    factors = jax.jit(gradient_factors(loss))(packed, image)
    for block in (400, 1 << 24):  # many blocks, and one
        got, got_state = rewire_streamed(inner, factors, state, packed, 0.3, block=block)
        chex.assert_trees_all_equal(masks_of(got), masks_of(expected))
        chex.assert_trees_all_equal(rx.unpack(got), rx.unpack(expected))
        chex.assert_trees_all_equal(got_state.inner, expected_state.inner)
        assert int(got_state.step) == int(expected_state.step)


@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_streamed_rewiring_leaves_a_leaf_alone_whose_gradient_is_no_number(bad):
    params, x = PRODUCTS, INPUTS[0]
    loss = lambda params, x: jnp.sum(jnp.sin(x @ params["w"] @ params["v"]))  # noqa: E731
    inner = optax.adam(0.1)
    algorithm = rx.rigl(rx.make_plan(params, 0.5, rx.uniform), period=1)
    single = lambda name, mask: kernels.make_pattern(mask)  # noqa: E731
    packed, state = packed_training(inner, algorithm, key=jax.random.key(0), choose=single).init(params)
    with jax.checking_leaks():
        factors = jax.jit(gradient_factors(loss))(packed, x)
    factors["w"] = factors["w"]._replace(left=factors["w"].left.at[0, 0].set(bad))
    got, got_state = rewire_streamed(inner, factors, state, packed, 0.3)
    chex.assert_trees_all_equal(rx.unpack(got)["w"], rx.unpack(packed)["w"])
    chex.assert_trees_all_equal(got_state.inner[0].mu["w"], state.inner[0].mu["w"])
    assert not np.array_equal(masks_of(got)["v"], masks_of(packed)["v"])


OF_MORE_AXES = {
    "three": ((12, 3, 4), (5, 12), lambda x, w: jnp.einsum("bi,iho->bho", x, w)),
    "five": (
        (2, 3, 1, 2, 4),
        (3, 4, 5, 3, 2),
        lambda x, w: jax.lax.conv_general_dilated(
            x, w, (2, 1, 1), "SAME", rhs_dilation=(2, 1, 1), dimension_numbers=("NDHWC", "DHWIO", "NDHWC")
        ),
    ),
}


@pytest.mark.parametrize("axes", OF_MORE_AXES)
def test_a_kernel_of_more_axes_is_rewired_and_streamed_too(axes):
    shape, images, product = OF_MORE_AXES[axes]
    params, x = {"w": jax.random.normal(jax.random.key(0), shape)}, jax.random.normal(jax.random.key(1), images)
    loss = lambda params, x: jnp.sum(jnp.sin(product(x, params["w"])))  # noqa: E731
    inner, algorithm = optax.adam(0.1), rx.rigl(rx.make_plan(params, 0.7), period=1)
    training = packed_training(inner, algorithm, key=jax.random.key(0))
    packed, state = training.init(params)
    expected, expected_state = training.rewire(jax.jit(jax.grad(loss))(rx.unpack(packed), x), state, packed)
    got, got_state = rewire_streamed(inner, jax.jit(gradient_factors(loss))(packed, x), state, packed, 0.3)
    assert isinstance(got.patterns["w"], kernels.Folded if axes == "three" else kernels.Pattern)
    assert not np.array_equal(masks_of(got)["w"], masks_of(packed)["w"])
    chex.assert_trees_all_equal(masks_of(got), masks_of(expected))
    chex.assert_trees_all_equal((rx.unpack(got), got_state.inner), (rx.unpack(expected), expected_state.inner))


def test_factors_multiply_to_the_gradient():
    def loss(params, x):
        hidden = jnp.tanh(x @ params["w"])
        return jnp.sum(jnp.sin(hidden @ params["w"].T) + jnp.cos(params["w"] @ hidden.T).T)  # three uses, one flipped

    rng = np.random.default_rng(0)
    w, x = (jnp.asarray(rng.standard_normal((5, 5), dtype=np.float32)) for _ in range(2))
    mask = jnp.asarray(rng.random((5, 5)) < 0.35)
    packed = rx.pack({"w": w}, {"w": mask})
    factors = jax.jit(gradient_factors(loss))(packed, x)["w"]
    np.testing.assert_allclose(factors.left.T @ factors.right, jax.grad(loss)(rx.unpack(packed), x)["w"], atol=1e-4)


@pytest.mark.parametrize(
    ("k", "scores"), [(3, [0.0, 2, 2, 2, 1, 0]), (4, [np.nan, 1, 1, np.nan, 0, 1]), (0, [1.0] * 6)]
)
def test_ties_and_nan(k, scores):
    """Ties to the lower index, NaN last, what is excluded never."""
    pattern = kernels.make_pattern_at(np.array([0]), (6, 1))
    factors = rx.execution.Factors(jnp.asarray([scores], jnp.float32), jnp.ones((1, 1)))
    got = rx.execution.streaming.top_products(factors, k, exclude=np.array([0]), pattern=pattern, block=2)
    ranked = sorted(range(1, 6), key=lambda i: (np.isnan(scores[i]), -np.nan_to_num(scores[i]), i))
    assert got.tolist() == sorted(ranked[:k])


def test_a_weight_inside_a_loop_cannot_be_streamed():
    packed = rx.pack({"w": jnp.eye(4)}, {"w": jnp.eye(4, dtype=bool)})
    loss = lambda p, x: jax.lax.scan(lambda c, _: (c @ p["w"], None), x, None, length=2)[0].sum()  # noqa: E731
    with refused("w", "scan"):
        gradient_factors(loss)(packed, jnp.ones((2, 4)))


def test_streamed_errors_name_the_leaf():
    _, params, plan, _ = problem()
    inner = optax.sgd(0.1)
    training = packed_training(inner, rx.rigl(plan), key=jax.random.key(0))
    packed, state = training.init(params)
    with refused("Conv_0/kernel"):
        rewire_streamed(inner, {}, state, rx.pack(params, masks_of(packed), choose=lambda name, mask: None), 0.3)
    some = rx.pack({"w": jnp.eye(4)}, {"w": jnp.eye(4, dtype=bool)})
    with refused("w"):
        rewire_streamed(inner, {}, state._replace(inner=inner.init(some.values)), some, 0.3)


@pytest.mark.parametrize(
    ("left", "right"),
    [((2, 5), (2, 6)), ((2, 3), (2, 6)), ((2, 4), (2, 7)), ((2, 4), (2, 5)), ((2, 4), (3, 6)), ((4,), (6,)), ((), ())],
)
def test_factors_that_do_not_fit_the_weight_are_refused(left, right):
    rng = np.random.default_rng(0)
    packed = rx.pack({"w": jnp.ones((4, 6))}, {"w": jnp.asarray(rng.random((4, 6)) < 0.3)})
    inner = optax.sgd(0.1)
    training = packed_training(inner, rx.static(rx.make_plan({"w": jnp.ones((4, 6))}, 0.5)), key=jax.random.key(0))
    state = training.init({"w": jnp.ones((4, 6))})[1]._replace(inner=inner.init(packed.values))
    for factors in (rx.execution.Factors(jnp.ones(left), jnp.ones(right)), jnp.ones(left), None):
        with refused("gradients", "w"):
            rewire_streamed(inner, {"w": factors}, state, packed, 0.3)


def test_more_than_there_is_cannot_be_grown():
    factors, pattern = rx.execution.Factors(jnp.ones((1, 3)), jnp.ones((1, 2))), kernels.make_pattern(np.ones((3, 2)))
    with refused("k"):
        rx.execution.streaming.top_products(factors, 6, exclude=np.array([0]), pattern=pattern)
