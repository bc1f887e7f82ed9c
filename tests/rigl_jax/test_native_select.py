"""The native selection takes what the selection in plain XLA takes, on every input."""

import functools

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import rigl_jax as rx
from rigl_jax import native, topology
from rigl_jax.scores import Draws, Magnitudes, made
from rigl_jax.topology import order, topk, tree

pytestmark = [pytest.mark.eight_devices, pytest.mark.skipif(native.library() is None, reason=native.reason())]


def oracle(scores, k, among):
    """By sorting: candidates first, then numbers before NaN, then high before low, then the lower index."""
    scores = np.asarray(scores, np.float32).ravel()
    order = np.lexsort((np.arange(scores.size), -np.nan_to_num(scores, nan=0.0, posinf=np.inf, neginf=-np.inf)))
    order = order[np.argsort(np.isnan(scores[order]), kind="stable")]
    order = order[among[order]]
    taken = np.zeros(scores.size, bool)
    taken[order[: max(k, 0)]] = True
    return taken


def random_scores(kind, n, rng):
    scores = rng.standard_normal(n).astype(np.float32)
    if kind == "ties":
        return np.round(scores)
    if kind == "special":
        return rng.choice(np.array([0.0, -0.0, np.nan, np.inf, -np.inf, 1e-45, 1.0], np.float32), n)
    if kind == "sorted":
        return np.sort(scores)
    return np.where(rng.random(n) < 0.9, 0, scores).astype(np.float32) if kind == "sparse" else scores


@settings(max_examples=60, deadline=None)
@given(
    n=st.sampled_from([1, 3, 256, 4096, 70_001, 300_007]),
    kind=st.sampled_from(["normal", "ties", "special", "sorted", "sparse"]),
    share=st.sampled_from([-0.1, 0.0, 1e-5, 0.03, 0.5, 0.97, 1.0, 1.2]),
    candidates=st.sampled_from([0.0, 0.1, 0.9, None]),
    seed=st.integers(0, 100),
)
def test_it_is_the_top_k_by_sorting(n, kind, share, candidates, seed):
    rng = np.random.default_rng(seed)
    scores, k = random_scores(kind, n, rng), int(share * n)
    among = None if candidates is None else rng.random(n) < candidates
    got = native.select(jnp.asarray(scores), jnp.int32(k), None if among is None else jnp.asarray(among))
    np.testing.assert_array_equal(got, oracle(scores, k, np.ones(n, bool) if among is None else among))


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16, jnp.float16])
def test_it_is_the_selection_in_xla(dtype):
    scores = jax.random.normal(jax.random.key(0), (96, 70), dtype)
    among = jax.random.uniform(jax.random.key(1), scores.shape) < 0.4
    for k in (0, 7, 900, 5000):
        np.testing.assert_array_equal(
            native.select(scores, jnp.int32(k), among), topology.select(scores, k, among=among)
        )


def in_plain_jax(mask, drop, grow, n_drop, regrow):
    """What a rewiring leaves of a mask, without the native call; the old mask where a score that is read is unsound."""
    drop, grow = made(drop, mask), made(grow, mask)
    new = topology.rewire(rx.unstructured(), mask, drop, grow, n_drop, regrow_dropped=regrow)
    if not bool((drop[mask] < jnp.inf).all() & (grow[~new.kept] < jnp.inf).all()):
        return mask, mask, np.zeros_like(mask)
    return new


@settings(max_examples=60, deadline=None)
@given(
    n=st.sampled_from([1, 3, 256, 4096, 70_001]),
    kinds=st.tuples(*[st.sampled_from(["normal", "ties", "special", "sorted", "sparse"])] * 2),
    active=st.sampled_from([0.0, 0.1, 0.9, 1.0]),
    share=st.sampled_from([-0.1, 0.0, 1e-3, 0.3, 1.0, 1.2]),
    magnitudes=st.tuples(st.booleans(), st.booleans()),
    regrow=st.booleans(),
    seed=st.integers(0, 100),
)
def test_a_rewiring_is_that_of_plain_jax(n, kinds, active, share, magnitudes, regrow, seed):
    rng = np.random.default_rng(seed)
    mask, given = rng.random(n) < active, [jnp.asarray(random_scores(kind, n, rng)) for kind in kinds]
    drop, grow = (Magnitudes(x) if of else x for x, of in zip(given, magnitudes, strict=True))
    n_drop = jnp.int32(share * mask.sum())
    got = native.rewire(jnp.asarray(mask), drop, grow, n_drop, regrow_dropped=regrow)
    for part, expected in zip(got, in_plain_jax(mask, drop, grow, n_drop, regrow), strict=True):
        np.testing.assert_array_equal(part, expected)


@settings(max_examples=60, deadline=None)
@given(
    n=st.sampled_from([1, 3, 256, 4097, 70_001, 300_007]),
    active=st.sampled_from([0.0, 0.1, 0.9, 1.0]),
    late=st.sampled_from([None, 0.0, 0.5, 0.95, 1.0]),
    share=st.sampled_from([0.0, 1e-3, 0.3, 1.0]),
    regrow=st.booleans(),
    seed=st.integers(0, 2**32 - 1),
)
def test_draws_are_those_of_jax(n, active, late, share, regrow, seed):
    rng = np.random.default_rng(seed)
    mask, drop = rng.random(n) < active, jnp.asarray(rng.standard_normal(n), jnp.float32)
    grow = Draws(jax.random.key(seed), None if late is None else jnp.asarray(rng.random(n) < late))
    n_drop = jnp.int32(share * mask.sum())
    got = native.rewire(jnp.asarray(mask), drop, grow, n_drop, regrow_dropped=regrow)
    for part, expected in zip(got, in_plain_jax(mask, drop, grow, n_drop, regrow), strict=True):
        np.testing.assert_array_equal(part, expected)


@pytest.mark.parametrize("generator", ["rbg", "unsafe_rbg", "threefry2x32"])
@pytest.mark.parametrize("partitionable", [True, False])
def test_draws_of_every_generator_give_the_masks_of_plain_jax(generator, partitionable, request):
    before = jax.config.jax_threefry_partitionable
    jax.config.update("jax_threefry_partitionable", partitionable)
    try:
        grow = Draws(jax.random.key(3, impl=generator), late={"w": MASK & (GROW > 0)})
        rewire = lambda: topology.drop_and_grow(PLAN, {"w": MASK}, {"w": DROP}, grow, 0.5)  # noqa: E731
        expected = rewire()
        request.getfixturevalue("on_one_cpu")
        (call,) = [line for line in jax.jit(rewire).lower().as_text().splitlines() if "@rigl_rewire" in line]
        assert ("tensor<2xui32>" in call) == native.draws(grow.key) == (partitionable and generator == "threefry2x32")
        chex.assert_trees_all_equal(rewire(), expected)
    finally:
        jax.config.update("jax_threefry_partitionable", before)


@pytest.mark.parametrize("where", ["active", "kept", "dropped", "inactive"])
@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("of", ["drop", "grow"])
def test_a_mask_stays_where_a_score_that_is_read_is_unsound(of, value, where):
    mask = np.arange(5000) % 3 == 0
    scores = {
        name: np.random.default_rng(seed).random(5000).astype(np.float32) for seed, name in enumerate(["drop", "grow"])
    }
    kept = np.asarray(in_plain_jax(mask, *map(jnp.asarray, scores.values()), 300, True)[1])
    places = {"active": mask, "kept": kept, "dropped": mask & ~kept, "inactive": ~mask}[where]
    scores[of][np.flatnonzero(places)[7]] = value
    for of in (lambda x: x, Magnitudes):
        drop, grow = (of(jnp.asarray(s)) for s in scores.values())
        for regrow in (True, False):
            got = native.rewire(jnp.asarray(mask), drop, grow, jnp.int32(300), regrow_dropped=regrow)
            for part, expected in zip(got, in_plain_jax(mask, drop, grow, 300, regrow), strict=True):
                np.testing.assert_array_equal(part, expected)


def test_under_vmap_each_member_is_rewired_for_itself():
    rng = np.random.default_rng(0)
    masks = jnp.asarray(rng.random((3, 8, 5)) < 0.5)
    drop, grow = (jnp.asarray(rng.standard_normal((3, 8, 5)), jnp.float32) for _ in range(2))

    def rewire(mask, drop, grow, n_drop):
        return native.rewire(mask, Magnitudes(drop), Magnitudes(grow), n_drop, regrow_dropped=True)

    together = jax.vmap(rewire)(masks, drop, grow, jnp.array([0, 3, 20], jnp.int32))
    shared = jax.vmap(rewire, in_axes=(0, None, 0, None))(masks, drop[0], grow, jnp.int32(4))
    for i, n in enumerate([0, 3, 20]):
        chex.assert_trees_all_equal(tuple(x[i] for x in together), rewire(masks[i], drop[i], grow[i], jnp.int32(n)))
        chex.assert_trees_all_equal(tuple(x[i] for x in shared), rewire(masks[i], drop[0], grow[i], jnp.int32(4)))


def test_under_vmap_each_member_draws_with_its_own_key():
    rng = np.random.default_rng(0)
    masks, late = (jnp.asarray(rng.random((3, 8, 5)) < 0.5) for _ in range(2))
    drop, keys = jnp.asarray(rng.standard_normal((3, 8, 5)), jnp.float32), jax.random.split(jax.random.key(0), 3)
    rewire = functools.partial(native.rewire, n_drop=jnp.int32(4), regrow_dropped=True)
    for draws in (Draws(keys), Draws(keys, late)):
        together = jax.vmap(rewire)(masks, drop, draws)
        for i in range(3):
            alone = rewire(masks[i], drop[i], jax.tree.map(lambda x, i=i: x[i], draws))
            chex.assert_trees_all_equal(tuple(x[i] for x in together), alone)


@pytest.mark.parametrize(
    ("what", "drop", "grow", "late"),
    [
        ("scores", (4,), ((5,), "float32"), (0,)),
        ("scores", (5,), ((4,), "float32"), (0,)),
        ("draws", (5,), ((1,), "uint32"), (0,)),
        ("draws", (5,), ((4,), "uint32"), (0,)),
        ("draws", (5,), ((2,), "uint32"), (4,)),
        ("draws", (5,), ((5,), "float32"), (5,)),
        ("a key", (5,), ((5,), "int32"), (0,)),
    ],
)
def test_a_native_rewiring_of_arrays_that_do_not_fit_is_an_error(what, drop, grow, late):
    """Nothing is read or written outside of the arrays, whatever the call is given."""
    results = [jax.ShapeDtypeStruct((5,), dtype) for dtype in (np.bool_, np.uint8)]
    attributes = {name: np.int64(0) for name in ("drop_magnitudes", "grow_magnitudes", "regrow_dropped")}
    with pytest.raises(jax.errors.JaxRuntimeError, match=what):
        jax.block_until_ready(
            jax.ffi.ffi_call("rigl_rewire", results)(
                jnp.ones(5, bool), jnp.ones(drop), jnp.ones(*grow), jnp.ones(late, bool), jnp.int32(1), **attributes
            )
        )


def test_a_mask_that_is_not_donated_is_not_changed():
    """The new mask takes the memory of the old one only where nobody reads that any more."""
    mask, (drop, grow) = jnp.arange(4096) % 2 == 0, jax.random.normal(jax.random.key(0), (2, 4096))
    before = np.asarray(mask).copy()

    @jax.jit
    def rewired(mask):
        new, *_ = native.rewire(mask, drop, grow, jnp.int32(500), regrow_dropped=True)
        return new, mask

    new, after = rewired(mask)
    np.testing.assert_array_equal(mask, before)
    np.testing.assert_array_equal(after, before)
    assert (np.asarray(new) != before).any()


@pytest.mark.parametrize(("method", "copies"), [("rigl", (1, 2)), ("set_", (5, 6)), ("itop", (5, 6))])
def test_a_rewiring_of_a_training_step_takes_few_copies_beyond_the_dense_step(method, copies, on_one_cpu):
    """As XLA plans it: the masks are changed in their own memory, and no scores exist.

    SET and ITOP train in a step that rewires, so the new weights of all four leaves exist beside the old ones.
    """
    params = {f"layer_{i}": jax.ShapeDtypeStruct((256, 256), jnp.float32) for i in range(4)}
    inner = optax.adam(1e-3)
    tx = rx.sparsify(inner, getattr(rx, method)(rx.make_plan(params, 0.9), period=100), key=jax.random.key(0))

    def loss(weights, x):
        for w in weights.values():
            x = jax.nn.relu(x @ w)
        return jnp.mean(x**2)

    def bytes_of(tx, **static):
        def step(weights, state, x):
            updates, state = tx.update(jax.grad(loss)(weights, x), state, weights, **static)
            return optax.apply_updates(weights, updates), state

        x = jax.ShapeDtypeStruct((32, 256), jnp.float32)
        compiled = jax.jit(step, donate_argnums=(0, 1)).lower(params, jax.eval_shape(tx.init, params), x).compile()
        return compiled.memory_analysis().temp_size_in_bytes

    dense, copy = bytes_of(inner), 4 * 256 * 256
    assert bytes_of(tx, rewire=True) < dense + copies[0] * copy
    assert bytes_of(tx) < dense + copies[1] * copy


def test_under_vmap_each_member_selects_for_itself():
    scores = jax.random.normal(jax.random.key(0), (3, 8, 5))
    counts = jnp.array([0, 7, 40], jnp.int32)
    among = scores > -1
    together = jax.vmap(native.select)(scores, counts, among)
    alone = jax.vmap(lambda s: native.select(s, jnp.int32(4), None))(scores)
    for i in range(3):
        np.testing.assert_array_equal(together[i], native.select(scores[i], counts[i], among[i]))
        np.testing.assert_array_equal(alone[i], native.select(scores[i], jnp.int32(4), None))


@pytest.fixture
def on_one_cpu(monkeypatch):
    """As where there is one device; these tests have eight."""
    for module in (topk, order):
        monkeypatch.setattr(module, "one_cpu", lambda: True)


def trained(method, structure=None):
    """Masks and weights after four steps with a rewiring on each."""
    params = {"w": jax.random.normal(jax.random.key(0), (16, 24)), "v": jax.random.normal(jax.random.key(1), (24, 8))}
    rules = None if structure is None else ((".*", structure),)
    tx = rx.sparsify(optax.adam(0.1), method(rx.make_plan(params, 0.5, rx.uniform, rules=rules)), key=jax.random.key(2))
    state = tx.init(params)
    params = rx.apply_masks(params, state.masks)

    def loss(params, masks):
        params = rx.straight_through(params, masks)
        return jnp.sum(jnp.sin(params["w"] @ params["v"]))

    @jax.jit
    def step(params, state):
        updates, state = tx.update(jax.grad(loss)(params, state.masks), state, params, rewire=True)
        return optax.apply_updates(params, updates), state

    for _ in range(4):
        params, state = step(params, state)
    return params, state.masks


@pytest.mark.parametrize("structure", [rx.unstructured(), rx.block(4, 2)], ids=lambda s: s.name)
def test_training_goes_through_the_same_masks(structure, request):
    """Of one method, over several steps; `test_sharding.py` compares the first masks and a step of every method."""
    method = functools.partial(rx.rigl, period=1, skip_step=False)
    expected = trained(method, structure)
    request.getfixturevalue("on_one_cpu")
    chex.assert_trees_all_equal(trained(method, structure), expected)


def test_short_floats_are_ranked_as_they_are_stored(on_one_cpu):
    """Not as XLA may hold them in the program that computes them, in float32. Many are tied in bfloat16."""
    mask = jnp.arange(4096).reshape(64, 64) % 2 == 0
    drawn = jax.random.normal(jax.random.key(0), (2, 64, 64))
    rewire = lambda mask, drop, grow: native.rewire(  # noqa: E731
        mask, Magnitudes(drop), Magnitudes(grow), jnp.int32(500), regrow_dropped=True
    )

    def computed(x):
        return (x * 1.001).astype(jnp.bfloat16) + x.astype(jnp.bfloat16)

    @jax.jit
    def at_once(mask, drop, grow):
        drop, grow = computed(drop), computed(grow)
        return drop, grow, rewire(mask, drop, grow), native.select(jnp.abs(drop), jnp.int32(700), None)

    drop, grow, rewired, selected = at_once(mask, *drawn)
    chex.assert_trees_all_equal(rewired, rewire(mask, drop, grow))
    np.testing.assert_array_equal(selected, native.select(jnp.abs(drop), jnp.int32(700), None))


def test_inside_shard_map_plain_jax_selects(on_one_cpu):
    """There the types of results say over which axes of the mesh they vary, and those of a native call do not."""
    mesh = jax.make_mesh((2,), ("data",), axis_types=(jax.sharding.AxisType.Auto,))
    params = {"w": jax.random.normal(jax.random.key(0), (16, 8))}
    tx = rx.sparsify(optax.adam(0.1), rx.rigl(rx.make_plan(params, 0.5), period=1), key=jax.random.key(1))

    def step(params, state, x):
        grads = jax.grad(lambda params: jnp.sum((x @ params["w"]) ** 2))(params)
        updates, state = tx.update(jax.lax.pmean(grads, "data"), state, params, rewire=True)
        return optax.apply_updates(params, updates), state.masks, topology.select(x[:, 0], 1)

    state, x = tx.init(params), jax.random.normal(jax.random.key(2), (4, 16))
    specs = (jax.P(), jax.P(), jax.P("data")), (jax.P(), jax.P(), jax.P("data"))
    *_, masks, first = jax.jit(jax.shard_map(step, mesh=mesh, in_specs=specs[0], out_specs=specs[1]))(params, state, x)
    assert int(masks["w"].sum()) == 64
    assert first.reshape(2, 2).sum(1).tolist() == [1, 1]


def test_a_mask_that_is_not_bool_is_refused_by_name():
    plan = rx.make_plan({"w": jnp.ones((8, 8))}, 0.5)
    scores = {"w": jnp.ones((8, 8))}
    with pytest.raises(ValueError, match=r"masks must be bool, got uint8\[8, 8\] for leaf 'w'"):
        topology.drop_and_grow(plan, {"w": jnp.ones((8, 8), jnp.uint8)}, scores, scores, 0.3)


def test_one_group_on_one_cpu_is_selected_natively(on_one_cpu):
    program = str(jax.make_jaxpr(lambda scores: topology.select(scores, 2))(jnp.ones(5)))
    assert "rigl_select" in program


def test_no_gradient_asks_for_that_of_the_selection(on_one_cpu):
    """A straight-through loss selects inside of what is differentiated."""

    def loss(w):
        return jnp.sum(jnp.where(rx.topology.select(jnp.abs(w), 2), w, 0) ** 2)

    np.testing.assert_array_equal(jax.grad(loss)(jnp.array([1.0, -3.0, 2.0])), [0.0, -6.0, 4.0])


PLAN = rx.make_plan({"w": jax.ShapeDtypeStruct((8, 9), jnp.float32)}, 0.7)
MASK = jnp.arange(72).reshape(8, 9) < PLAN["w"].n_active
DROP, GROW = jax.random.normal(jax.random.key(0), (2, 8, 9))


def rewired(plan=PLAN, drop=DROP, grow=GROW, of=lambda tree: tree):
    """What `drop_and_grow` makes of one leaf."""
    new = topology.drop_and_grow(plan, {"w": MASK}, of({"w": drop}), of({"w": grow}), 0.3)
    return topology.Rewiring(*(tree["w"] for tree in new))


def test_a_structure_that_changes_scores_is_asked(on_one_cpu):
    dear = rx.unstructured()._replace(pool=lambda scores: scores * jnp.arange(72.0).reshape(8, 9))
    new = rewired({"w": PLAN["w"]._replace(structure=dear)})
    chex.assert_trees_all_equal(new, topology.rewire(dear, MASK, DROP, GROW, int(0.3 * PLAN["w"].n_active)))
    assert (new.mask != rewired().mask).any()


def test_of_complex_numbers_the_magnitude_is_ranked(on_one_cpu):
    turns = 1j ** jnp.arange(72).reshape(8, 9)
    new = rewired(drop=DROP * turns, grow=GROW * turns, of=Magnitudes)
    chex.assert_trees_all_equal(new, rewired(of=Magnitudes))


def test_draws_with_what_is_no_key_are_refused():
    with pytest.raises(ValueError, match="drop_and_grow: key must be a PRNG key"):
        topology.drop_and_grow(PLAN, {"w": MASK}, {"w": DROP}, Draws(7), 0.3)
    with pytest.raises(ValueError, match=r"rewire_tree: grow must have an array of shape \(8, 9\) for leaf 'w'"):
        topology.rewire_tree(PLAN, {"w": MASK}, {"w": DROP}, Draws(jax.random.key(0), late={"w": MASK[:3]}), {"w": 2})
    with pytest.raises(ValueError, match=r"drop_and_grow: late must be bool, got int32\[8, 9\] for leaf 'w'"):
        topology.drop_and_grow(PLAN, {"w": MASK}, {"w": DROP}, Draws(jax.random.key(0), late={"w": MASK * 1}), 0.3)


def test_a_rewiring_outside_of_jit_is_compiled_once_for_each_shape(on_one_cpu):
    tree._rewired.clear_cache()
    for _ in range(2):
        rewired(rx.make_plan({"w": DROP}, 0.7))  # each plan makes structures of its own
    assert tree._rewired._cache_size() == 1
