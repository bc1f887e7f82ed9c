"""Layers that are stacked in one leaf: each has its own count and its own ranking, under every method."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import rigl_jax as rx
from rigl_jax import topology
from rigl_jax.algorithms import reallocation
from tests.errors import refused

KEY, SHAPE = jax.random.key(0), (3, 8, 6)
AXES = {"stack": rx.Axes((1,), (2,), stack=(0,))}
RNG = np.random.default_rng(0)
SCALE = np.array([1e-3, 1.0, 1e3]).reshape(3, 1, 1)  # a quiet layer, an ordinary one and a loud one
PARAMS = {"lone": RNG.normal(size=(8, 6)), "stack": RNG.normal(size=SHAPE) * SCALE}
GRADS = {"lone": np.ones((8, 6)), "stack": RNG.normal(size=SHAPE) * SCALE}
PARAMS, GRADS = jax.tree.map(jax.device_put, jax.tree.map(np.float32, (PARAMS, GRADS)))


def planned(structure=None, sparsity=0.75, distribution=rx.uniform):
    rules = [("stack", structure or rx.unstructured()), ("lone", rx.unstructured())]
    return rx.make_plan(PARAMS, sparsity, distribution, rules=rules, axes=AXES)


FRACTION = {"fraction": optax.constant_schedule(0.3)}
METHODS = {
    "rigl": lambda plan: rx.rigl(plan, **FRACTION),
    "two_sided": lambda plan: rx.set_(plan, two_sided=True, **FRACTION),
    "itop": lambda plan: rx.itop(plan, **FRACTION),
    "snfs": lambda plan: rx.snfs(plan, **FRACTION),
    "dsr": lambda plan: rx.dsr(plan, threshold=0.05),
    "deep_r": rx.deep_r,
    "granet": lambda plan: rx.granet(plan, stop=4, **FRACTION),
    "srigl": lambda plan: rx.srigl(plan, min_salient=0.0, **FRACTION),
    "snip": rx.snip,
    "gmp": lambda plan: rx.gmp(plan, stop=1),
}
BY_VALUE = ("dsr", "deep_r")  # what they drop is below a threshold or has changed its sign: nothing in some layers


@pytest.mark.parametrize("name", METHODS)
def test_a_quiet_layer_keeps_its_weights(name):
    plan = planned()
    algorithm = METHODS[name](plan)
    step = 4

    def once(state, key):
        signals = rx.Signals(rx.apply_masks(PARAMS, state.masks), GRADS, step, key)
        return algorithm.update(algorithm.observe(state, signals), signals).state, None

    @jax.jit
    def twice():
        first = algorithm.init(KEY, PARAMS)
        return first.masks, jax.lax.scan(once, first, jax.random.split(KEY, 2))[0].masks

    before, after = jax.device_get(twice())
    np.testing.assert_array_equal(after["stack"].sum((1, 2)), plan["stack"].n_active)
    moved = (after["stack"] != before["stack"]).sum((1, 2))
    assert moved.min() > 0 or name in BY_VALUE


def test_layers_along_another_axis_are_told_by_their_bias():
    quiet = jnp.array([1.0, 1e-3, 1.0, 1e3]).reshape(1, 4, 1)
    params = {"kernel": jax.random.normal(KEY, (16, 4, 16)) * quiet, "bias": jnp.zeros((16, 4))}
    leaf = rx.make_plan({"Scan": {"Dense_0": params}}, 0.75)["Scan/Dense_0/kernel"]
    assert leaf.axes == rx.Axes((0,), (2,), stack=(1,))
    kept = topology.prune(leaf.structure, jnp.abs(params["kernel"]), leaf.n_active)
    np.testing.assert_array_equal(kept.sum((0, 2)), [64] * 4)


def test_srigl_gives_up_neurons_of_a_layer_for_others_of_that_layer():
    plan = planned(rx.fan_in())
    algorithm = rx.srigl(plan, min_salient=1.0, **FRACTION)
    signals = rx.Signals(PARAMS, GRADS, jnp.int32(0), KEY)
    masks = jax.jit(lambda: algorithm.update(algorithm.init(KEY, PARAMS), signals).state.masks)()
    counts = np.asarray(masks["stack"].sum(1))
    assert (counts == 0).any()
    total = 6 * plan["stack"].n_active
    for layer in counts:
        alive = (layer > 0).sum()
        assert set(layer[layer > 0].tolist()) == {total // alive}


def test_erk_counts_each_layer_of_a_stack():
    plan = planned(distribution=rx.erk)
    apart = {f"layer{i}": (8, 6) for i in range(4)}
    shared = rx.erk(apart, 0.75)
    assert {leaf.n_active for leaf in plan.values()} == {48 - int(shared["layer0"] * 48)}
    asked = []

    def ask(shapes, sparsity):
        asked.append(shapes)
        return rx.uniform(shapes, sparsity)

    planned(distribution=ask)
    assert asked == [{"lone": (8, 6), **{f"stack[{i}]": (8, 6) for i in range(3)}}]


def test_layers_of_a_stack_have_one_sparsity():
    uneven = lambda shapes, sparsity: {name: 0.1 * i for i, name in enumerate(shapes)}  # noqa: E731
    with refused("stack"):
        planned(distribution=uneven)


def test_the_least_that_stays_is_a_unit_of_each_layer():
    with refused("sparsity", "0.979167"):  # 4 of 192 stay
        planned(sparsity=0.996)


def test_one_ranking_over_all_leaves_leaves_some_of_each_layer():
    plan = planned()
    prune = jax.jit(lambda scores: topology.prune_jointly(plan, scores, min_active=2))
    masks = jax.device_get(prune(jax.tree.map(np.abs, PARAMS)))
    assert sum(int(mask.sum()) for mask in jax.tree.leaves(masks)) == 4 * plan["stack"].n_active
    assert masks["stack"].sum((1, 2)).tolist()[0] == 2
    algorithm = rx.snip(plan, loss=lambda p: sum(jnp.sum(w) for w in jax.tree.leaves(p)), jointly=True, min_active=2)
    assert int(np.asarray(jax.jit(algorithm.init)(KEY, PARAMS).masks["stack"])[0].sum()) == 2


def test_counts_of_a_stack_do_not_move_to_other_leaves():
    plan = planned()
    assert [[leaf.name for leaf in pool] for pool in reallocation.pools(plan)] == [["lone"], ["stack"]]
    counts = reallocation.n_active(plan, topology.random_masks(plan, KEY, PARAMS))
    assert counts["lone"].shape == ()
    np.testing.assert_array_equal(counts["stack"], np.full((3, 1, 1), plan["stack"].n_active))


def test_a_stack_of_one_layer_is_that_layer():
    params = {"w": PARAMS["stack"][1:2]}
    plan = rx.make_plan(params, 0.5, axes={"w": rx.Axes((1,), (2,), stack=(0,))})
    assert (plan["w"].groups, plan["w"].group_size) == (1, 48)
    algorithm = rx.dsr(plan, threshold=0.05)

    @jax.jit
    def rewired():
        state = algorithm.init(KEY, params)
        return state.masks, algorithm.update(state, rx.Signals(params, params, 0, KEY)).state.masks

    masks, after = rewired()
    assert int(after["w"].sum()) == int(masks["w"].sum()) == 24


def test_what_a_plan_does_to_the_whole_model_is_shown():
    params = {**PARAMS, "bias": jnp.zeros(6), "embedding": jnp.zeros((11, 8)), "head": jnp.zeros((8, 2))}
    rules = [("head", None), ("stack", rx.fan_in()), ("lone", rx.unstructured()), (".*", None)]
    plan = rx.make_plan(params, 0.75, rx.uniform, rules=rules, axes=AXES)
    lines = str(rx.describe(plan, params)).splitlines()
    words = {line.split()[0]: " ".join(line.split()[1:]) for line in lines}
    assert words["bias"] == "6 ? dense: bias or scale 6 0.0000"
    assert words["embedding"] == "11x8 io dense: embedding 88 0.0000"
    assert words["head"] == "8x2 io dense: by a rule 16 0.0000"
    assert words["stack"] == "3x8x6 sio fan_in, in each of 3 layers 36 0.7500"
    assert words["total"] == "48 0.7500"
    assert words["whole"] == f"model {48 + 110} {1 - 158 / 302:.4f}"
    assert len(str(rx.describe(plan)).splitlines()) == 4
    with refused("lone"):
        rx.describe(plan, {**params, "lone": jnp.zeros((2, 2))})
