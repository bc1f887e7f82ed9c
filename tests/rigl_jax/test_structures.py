"""Each structure against its definition: units, groups, and what selection makes of them."""

import hypothesis
import hypothesis.strategies as st
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import rigl_jax as rx
from rigl_jax import topology
from rigl_jax.structures import block, channel, fan_in, n_of_m, unstructured
from tests import oracles

pytestmark = pytest.mark.eight_devices

CONV, DENSE = (3, 3, 8, 4), (16, 12)
# structure, shape, units, weights in a unit, groups
TABLE = [
    (unstructured(), CONV, CONV, 1, 1),
    (block(4, 2), CONV, (3, 3, 2, 2), 8, 1),
    (block(8, 3), DENSE, (2, 4), 24, 1),
    (block(4, 2, fan_in=True), CONV, (3, 3, 2, 2), 8, 2),
    (n_of_m(2, 4), CONV, (3, 3, 2, 4, 4), 1, 72),
    (n_of_m(1, 4, axis=-1), DENSE, (16, 3, 4), 1, 48),
    (n_of_m(2, 3, axis=0), CONV, (1, 3, 3, 8, 4), 1, 96),
    (fan_in(), CONV, CONV, 1, 4),
    (fan_in(), DENSE, DENSE, 1, 12),
    (channel(), CONV, (1, 1, 1, 4), 72, 1),
    (channel(axis=-2), DENSE, (16, 1), 12, 1),
]
IDS = [f"{row[0].name}-{len(row[1])}d" for row in TABLE]


def naive_unit_ids(structure, shape):
    """Which unit and which group each weight belongs to, from the words of the docs."""
    index = np.indices(shape)
    name, *sizes = structure.name.replace("axis=", "").replace(",", "").replace("(", " ").replace(")", "").split()
    sizes = [int(s) for s in sizes if s != "fan_in"]
    flat = np.arange(np.prod(shape)).reshape(shape)
    if name == "block":
        tiles = [*index[:-2], index[-2] // sizes[0], index[-1] // sizes[1]]
        return np.ravel_multi_index(tiles, shape), tiles[-1] * ("fan_in" in structure.name)
    if name == "n_of_m":
        axis = (sizes[2] if len(sizes) > 2 else -2) % len(shape)
        groups = [i // sizes[1] if k == axis else i for k, i in enumerate(index)]
        return flat, np.ravel_multi_index(groups, shape)
    if name == "fan_in":
        return flat, index[-1]
    if name == "channel":
        return index[sizes[0] if sizes else -1], np.zeros(shape, int)
    return flat, np.zeros(shape, int)


@pytest.mark.parametrize(("structure", "shape", "units", "size", "groups"), TABLE, ids=IDS)
def test_units_and_groups(structure, shape, units, size, groups):
    assert structure.units(shape) == units
    assert structure.pool(jnp.zeros(shape)).shape == units
    assert np.prod(shape) == np.prod(units) * size
    in_group = np.prod([units[axis] for axis in structure.axes(units)])
    assert np.prod(units) == groups * in_group


def test_columns_of_tiles_keep_the_same_number():
    mask = topology.prune(block(2, 4, fan_in=True), jnp.arange(8.0 * 12).reshape(8, 12), 3)
    np.testing.assert_array_equal(np.asarray(mask)[::2].sum(0), np.full(12, 3))


@pytest.mark.parametrize(("structure", "shape", "units", "size", "groups"), TABLE, ids=IDS)
def test_pool_is_the_mean_and_expand_its_inverse(structure, shape, units, size, groups):
    rng = np.random.default_rng(0)
    scores, chosen, dtypes = rng.normal(size=shape), rng.random(units) < 0.5, (jnp.float32, jnp.bfloat16, jnp.float16)
    unit, _ = naive_unit_ids(structure, shape)
    total = np.bincount(unit.ravel(), scores.ravel())
    means = (total / np.maximum(np.bincount(unit.ravel()), 1))[unit]

    @jax.jit
    def there_and_back(scores, chosen):
        spread = structure.expand(structure.pool(scores), shape)  # expand copies whatever it is given
        return spread, [structure.pool(structure.expand(chosen, shape).astype(dtype)) for dtype in dtypes]

    spread, backs = there_and_back(np.float32(scores), chosen)
    np.testing.assert_allclose(spread, means, atol=1e-6)
    for back, dtype in zip(backs, dtypes, strict=True):
        assert back.dtype == dtype
        np.testing.assert_array_equal(np.asarray(back, np.float32), chosen)


@pytest.mark.parametrize(("structure", "shape", "units", "size", "groups"), TABLE[1:], ids=IDS[1:])
def test_masks_random_pruned_and_rewired(structure, shape, units, size, groups):
    unit, group = naive_unit_ids(structure, shape)
    rules = [("w", structure)]
    sparsity = 0.5 if structure.sparsity is None else structure.sparsity
    plan = rx.make_plan({"w": jnp.zeros(shape)}, sparsity, rx.uniform, rules=rules)
    leaf = plan["w"]
    in_group = np.prod(units) // groups
    if structure.sparsity is None:
        assert leaf.n_active == max(1, in_group - in_group // 2)
    assert (leaf.groups, leaf.group_size) == (groups, in_group)

    @jax.jit
    def all_three(key, scores, grow, n_drop):
        random = topology.random_masks(plan, key, {"w": scores})["w"]
        pruned = topology.prune(structure, scores, leaf.n_active)
        return random, pruned, topology.rewire(structure, random, scores, grow, n_drop, regrow_dropped=False)

    scores, grow = jax.random.normal(jax.random.key(2), (2, *shape))
    n_drop = max(1, groups * leaf.n_active // 4)
    random, pruned, (new, kept, fresh) = all_three(jax.random.key(3), scores, grow, n_drop)
    for mask in (random, pruned, new):
        mask = np.asarray(mask)
        sizes = np.bincount(unit.ravel(), mask.ravel())[unit]
        np.testing.assert_array_equal(sizes, np.where(mask, size, 0))  # whole units
        per_group = np.bincount(group.ravel(), mask.ravel())[np.unique(group)]
        np.testing.assert_array_equal(per_group, leaf.n_active * size)
    np.testing.assert_array_equal(fresh, new & ~random)
    # Against the oracle, on one score a unit.
    mean = np.asarray(structure.pool(scores))
    axes = structure.axes(units)
    rest = [axis for axis in range(len(units)) if axis not in axes]
    groups_first = lambda x: np.transpose(x, [*rest, *axes]).reshape(groups, -1)  # noqa: E731
    best = np.stack([oracles.top(row, leaf.n_active) for row in groups_first(mean)])
    np.testing.assert_array_equal(groups_first(np.asarray(structure.pool(pruned.astype(float))) > 0), best)
    active = np.asarray(structure.pool(random.astype(float))) > 0
    survivors = oracles.top(mean, groups * leaf.n_active - n_drop, active)
    np.testing.assert_array_equal(np.asarray(structure.pool(kept.astype(float))) > 0, survivors)
    grown = np.asarray(new & ~random)
    assert grown.any(), "rewiring must move something"


def test_two_of_four_really_moves():
    """A share of each group would floor to nothing; dropping in the leaf as a whole moves the weakest third."""
    plan = rx.make_plan({"w": jnp.zeros((64, 8))}, 0.5, rules=[("w", n_of_m(2, 4))])
    params = {"w": jax.random.normal(jax.random.key(0), (64, 8))}
    masks = jax.jit(lambda key: topology.random_masks(plan, key, params))(jax.random.key(1))
    scores = {"w": jnp.abs(params["w"])}
    grow = {"w": jax.random.uniform(jax.random.key(2), (64, 8))}
    rewired = jax.jit(
        lambda regrow: topology.drop_and_grow(plan, masks, scores, grow, 0.3, regrow_dropped=regrow), static_argnums=0
    )
    new, kept, _ = rewired(True)
    assert int(kept["w"].sum()) == 256 - 76  # floor(0.3 * 256)
    assert (new["w"].reshape(16, 4, 8).sum(1) == 2).all()
    # A dropped weight competes with at least two others for its place, so at least half of the drops move on average.
    assert 30 <= int((new["w"] & ~masks["w"]).sum()) <= 76
    forbidden, *_ = rewired(False)
    assert int((forbidden["w"] & ~masks["w"]).sum()) == 76


@hypothesis.given(st.integers(0, 1000), st.integers(0, 64))
@hypothesis.settings(max_examples=25)
def test_rewired_groups_keep_their_count_whatever_is_dropped(seed, n_drop):
    rng = np.random.default_rng(seed)
    mask = np.stack([oracles.top(row, 2) for row in rng.random((32, 4))]).reshape(8, 4, 4).transpose(0, 2, 1)
    mask = mask.reshape(32, 4)
    drop, grow = rng.integers(0, 4, (2, 32, 4)).astype(np.float32)
    new, kept, _ = REWIRE(TWO_OF_FOUR, mask, drop, grow, n_drop)
    np.testing.assert_array_equal(np.asarray(new).reshape(8, 4, 4).sum(1), 2)
    assert int(kept.sum()) == 64 - n_drop


REWIRE, TWO_OF_FOUR = jax.jit(topology.rewire, static_argnums=0), n_of_m(2, 4)


def test_a_mixture_by_rules():
    params = {
        "conv": {"kernel": jnp.zeros((3, 3, 4, 8)), "bias": jnp.zeros(8)},
        "attention": {"kernel": jnp.zeros((16, 16))},
        "mlp": {"kernel": jnp.zeros((16, 32))},
        "head": {"kernel": jnp.zeros((32, 10))},
    }
    rules = [
        ("conv/kernel", block(2, 4)),
        ("attention/.*", n_of_m(2, 4)),
        ("mlp/.*", fan_in()),
        (".*/kernel", unstructured()),
        (".*", None),
    ]
    plan = rx.make_plan(params, 0.75, rx.uniform, rules=rules)
    masks = jax.jit(lambda key: topology.random_masks(plan, key, params))(jax.random.key(0))
    assert masks["conv"]["bias"] is None
    assert (masks["attention"]["kernel"].reshape(4, 4, 16).sum(1) == 2).all()
    # 2:4 stays at 0.5, and the others make up for it: 0.848 each, so that the total is 0.75 but for each group's floor.
    rest = (0.75 * (288 + 256 + 512 + 320) - 128) / (288 + 512 + 320)
    assert {name: leaf.n_active for name, leaf in plan.items()} == {
        "conv/kernel": 36 - int(rest * 36),
        "attention/kernel": 2,
        "mlp/kernel": 16 - int(rest * 16),
        "head/kernel": 320 - int(rest * 320),
    }
    assert len(set(np.asarray(masks["mlp"]["kernel"].sum(0)).tolist())) == 1


def test_sizes_may_come_from_numpy():
    assert block(np.int64(2), 2).units((4, 4)) == (2, 2)


@pytest.mark.parametrize("structure", [block(2, 2), n_of_m(2, 4), fan_in(), channel()], ids=lambda s: s.name)
def test_selection_of_a_sharded_weight_is_that_of_the_whole(structure):
    mesh = jax.make_mesh((4, 2), ("a", "b"), axis_types=(jax.sharding.AxisType.Auto,) * 2)
    scores = jnp.round(jax.random.normal(jax.random.key(1), (32, 16)), 1)
    sharded = jax.device_put(scores, jax.NamedSharding(mesh, jax.P("a", "b")))
    prune = jax.jit(topology.prune, static_argnums=(0, 2))
    np.testing.assert_array_equal(prune(structure, sharded, 2), prune(structure, scores, 2))
