"""Groups, scores, selection and smaller models by hand; models of frameworks; published counts."""

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn
from flax import nnx

import rigl_jax as rx
from tests.channels.models import Draw
from tests.errors import refused


def two_layers(p, x):
    return jax.nn.relu(x @ p["a"] + p["b"][None]) @ p["c"]


PARAMS = {"a": jnp.array([[3.0, -1.0, 0.5, -2.0]]), "b": jnp.zeros(4), "c": jnp.array([[1.0], [2.0], [0.5], [4.0]])}
X = jnp.ones((2, 1))
GROUPS = rx.channels.groups(two_layers, PARAMS, X)


@pytest.fixture(autouse=True)
def any_ranks():
    """Frameworks and the models of the tests broadcast."""
    with jax.numpy_rank_promotion("allow"):
        yield


def as_lists(keep):
    return {leaf: {axis: at.tolist() for axis, at in axes.items()} for leaf, axes in keep.items()}


# ---- groups


def test_members_are_leaves_axes_and_positions():
    (group,) = GROUPS
    assert [(m.leaf, m.axis, m.positions.tolist()) for m in group.members] == [
        ("a", 1, [[0], [1], [2], [3]]),
        ("b", 0, [[0], [1], [2], [3]]),
        ("c", 0, [[0], [1], [2], [3]]),
    ]
    assert (group.name, group.ties, group.why, group.exact) == ("a[1]", ("add", "dot_general"), "", True)


@pytest.mark.parametrize(
    ("between", "why", "unknown"),
    [
        (lambda h: jnp.linalg.qr(h)[0] @ jnp.ones((2, 4)), "qr", True),
        (lambda h: jnp.sort(h, -1), "sort", False),
        (lambda h: jnp.cumsum(h, -1), "cumsum", False),
        (lambda h: h[:, 1:2] + jnp.ones((1, 4)), "slice", False),
        (lambda h: h + jax.nn.one_hot(jnp.argmax(h, -1), 4), "argmax", False),
    ],
)
def test_what_stays_says_why_and_whether_it_is_only_not_known(between, why, unknown):
    groups = rx.channels.groups(lambda p, x: between(x @ p["a"] + p["b"][None]) @ p["c"], PARAMS, X)
    stays = [group for group in groups if why in group.why]
    assert stays
    assert all(group.unknown == unknown for group in stays)


def test_ignored_leaves_keep_their_group():
    (group,) = rx.channels.groups(two_layers, PARAMS, X, ignore="^c$")
    assert "c" in group.why
    assert rx.channels.select([group], [np.ones(4)], remove=0.5) == {}
    with refused("ignore"):
        rx.channels.groups(two_layers, PARAMS, X, ignore="(")


# ---- scores


@pytest.mark.parametrize(
    ("reduce", "want"),
    [("mean", [2, 1.5, 0.5, 3]), ("sum", [4, 3, 1, 6]), ("norm", np.sqrt([10, 5, 0.5, 20])), ("max", [3, 2, 0.5, 4])],
)
def test_scores_are_reduced_over_the_kernels_of_a_channel(reduce, want):
    np.testing.assert_allclose(rx.channels.scores(GROUPS, PARAMS, reduce=reduce)[0], want)


def test_scores_of_single_leaves():
    """A criterion that is NaN elsewhere: Network Slimming ranks scales alone."""
    scales = lambda params, batch: {n: p if n == "b" else jnp.full(p.shape, jnp.nan) for n, p in params.items()}  # noqa: E731
    (got,) = rx.channels.scores(GROUPS, PARAMS | {"b": jnp.arange(4.0)}, scales)
    assert got.tolist() == [0, 1, 2, 3]
    with refused("reduce"):
        rx.channels.scores(GROUPS, PARAMS, reduce="median")
    with refused("criterion"):
        rx.channels.scores(GROUPS, PARAMS, lambda params, batch: {"a": params["a"]})


def test_a_broken_weight_is_no_score():
    with refused("scores", "NaN", "'a'"):
        rx.channels.scores(GROUPS, PARAMS | {"a": jnp.asarray(PARAMS["a"]).at[0, 1].set(jnp.nan)})


def test_params_may_hold_keys_and_counts():
    """As the state of an NNX model with dropout does."""
    params = PARAMS | {"rngs": {"key": jax.random.key(0), "count": jnp.zeros((), jnp.uint32)}}
    (got,) = rx.channels.scores(GROUPS, params)
    np.testing.assert_array_equal(got, rx.channels.scores(GROUPS, PARAMS)[0])


def test_what_groups_cannot_read_is_said_in_one_line():
    apply = lambda p, x: x @ p["a"] @ p["b"]  # noqa: E731
    params = {"a": jnp.ones((2, 6)), "b": jnp.ones((6, 10))}
    with refused("groups", "ignore", "zzz"):
        rx.channels.groups(apply, params, jnp.ones((1, 2)), ignore="zzz")
    for inputs in ((), (None,), (jnp.ones((1, 3)),)):
        with refused("groups", "apply", "traced"):
            rx.channels.groups(apply, params, *inputs)


def test_a_leaf_that_the_model_does_not_read_is_noted():
    apply = lambda p, x: x @ p["a"] @ p["b"]  # noqa: E731
    params = {"a": jnp.ones((2, 6)), "b": jnp.ones((6, 10)), "mean": jnp.ones(6)}
    small = rx.channels.shrink(apply, params, {"a": {1: [0, 2]}}, jnp.ones((1, 2)))
    assert [note.split()[0] for note in small.notes] == ["mean"]


# ---- selection


def wide():
    params = {"a": jnp.ones((2, 6)), "b": jnp.ones((6, 10)), "c": jnp.ones((10, 3))}
    apply = lambda p, x: x @ p["a"] @ p["b"] @ p["c"]  # noqa: E731
    return params, apply, [g for g in rx.channels.groups(apply, params, jnp.ones((1, 2))) if not g.why]


@pytest.mark.parametrize(("remove", "left"), [(0.0, 16), (0.1, 14), (0.5, 8), (0.7, 5), (0.99, 2)])
def test_a_share_of_all_channels_is_exact_and_leaves_one_of_every_group(remove, left):
    _, _, groups = wide()
    keep = rx.channels.select(groups, [np.zeros(6), np.arange(10.0)], remove=remove)
    widths = [len(keep.get("b", {}).get(axis, range(n))) for axis, n in ((0, 6), (1, 10))]
    assert sum(widths) == left
    assert min(widths) >= 1


def test_ties_leave_the_earlier_channels():
    _, _, groups = wide()
    keep = rx.channels.select(groups, [np.zeros(6), np.zeros(10)], remove=0.5)
    assert as_lists(keep)["b"] == {1: [0, 1]}
    scores = [np.zeros(6), np.array([0, 1, 1, 0, 0, 1, np.nan, 1, 1, 1])]
    keep = rx.channels.select(groups, scores, remove=0.5, scope="layer")
    assert as_lists(keep)["b"] == {0: [0, 1, 2], 1: [1, 2, 5, 7, 8]}


def test_rounding_keeps_more():
    _, _, groups = wide()
    keep = rx.channels.select(groups, [np.zeros(6), np.zeros(10)], remove=0.5, scope="layer", round_to=4)
    assert as_lists(keep)["b"] == {0: [0, 1, 2, 3], 1: [0, 1, 2, 3, 4, 5, 6, 7]}


def test_macs_take_the_fewest_channels_that_do():
    params, apply, _ = wide()
    groups = rx.channels.groups(apply, params, jnp.ones((1, 2)))
    scores = [np.arange(float(group.size)) for group in groups]
    assert groups.macs() == 12 + 60 + 30
    for share in (1.0, 0.8, 0.3, 0.1):
        small = rx.channels.shrink(apply, params, rx.channels.select(groups, scores, macs=share), jnp.ones((1, 2)))
        assert small.macs[1] <= share * 102
    with refused("macs"):
        rx.channels.select(groups, scores, macs=0.01)
    with refused("groups"):
        rx.channels.select(list(groups), scores, macs=0.5)


def test_parameters_and_what_is_measured_are_costs_as_well():
    params, apply, _ = wide()
    groups = rx.channels.groups(apply, params, jnp.ones((1, 2)))
    scores = [np.arange(float(group.size)) for group in groups]
    assert groups.parameters() == 12 + 60 + 30
    shrunk = lambda keep: rx.channels.shrink(apply, params, keep, jnp.ones((1, 2)))  # noqa: E731
    calls = []

    def measure(keep):
        calls.append(keep)
        return float(shrunk(keep).weights[1])

    for share in (0.8, 0.3):
        small = shrunk(rx.channels.select(groups, scores, parameters=share))
        assert 0.6 * share < small.weights[1] / 102 <= share
        measured = rx.channels.select(groups, scores, latency=share, measure=measure)
        assert as_lists(measured) == as_lists(rx.channels.select(groups, scores, parameters=share))
    assert calls[0] == {}
    assert len(calls) <= 2 * 6
    with refused("parameters"):
        rx.channels.select(groups, scores, parameters=0.01)
    with refused("measure"):
        rx.channels.select(groups, scores, latency=0.5)


@pytest.mark.parametrize("normalize", ["none", "sum", "mean", "max", "norm", "lamp"])
def test_scores_in_a_common_unit(normalize):
    """6 channels of worth 1 to 6, and 10 of 100 to 1000, of which 8 go."""
    _, _, groups = wide()
    scores = [np.arange(1, 7.0), 100 * np.arange(1, 11.0)]
    keep = rx.channels.select(groups, scores, remove=0.5, normalize=normalize)
    widths = tuple(len(keep.get("b", {}).get(axis, range(n))) for axis, n in ((0, 6), (1, 10)))
    assert sum(widths) == 8
    normal = {
        "none": lambda x: x,
        "sum": lambda x: x / x.sum(),
        "mean": lambda x: x / x.mean(),
        "max": lambda x: x / x.max(),
        "norm": lambda x: x / np.sqrt((x**2).sum()),
        "lamp": lambda x: x / np.cumsum(x[::-1])[::-1],
    }[normalize]
    ordered = sorted((v, -g) for g, x in enumerate(scores) for v in normal(x)[:-1])[:8]
    assert widths == tuple(n - sum(-g == k for _, g in ordered) for k, n in enumerate((6, 10)))


def test_isomorphic_groups_are_ranked_together_and_each_class_loses_its_share():
    params = {f"up_{i}": jnp.ones((4, 6)) for i in range(2)} | {f"down_{i}": jnp.ones((6, 4)) for i in range(2)}
    params |= {"in": jnp.ones((2, 4)), "out": jnp.ones((4, 1))}

    def apply(p, x):
        x = x @ p["in"]
        for i in range(2):
            x = x + jax.nn.relu(x @ p[f"up_{i}"]) @ p[f"down_{i}"]
        return x @ p["out"]

    groups = [group for group in rx.channels.groups(apply, params, X.repeat(2, 1)) if not group.why]
    scores = [np.full(4, 9.0) if group.size == 4 else np.arange(6.0) + 10 * ("up_1" in str(group)) for group in groups]
    keep = rx.channels.select(groups, scores, remove=0.5, scope="isomorphic")
    assert {name: len(axes[1]) for name, axes in as_lists(keep).items() if 1 in axes and "up" in name} == {
        "up_0": 1,
        "up_1": 5,
    }
    assert len(keep["in"][1]) == 2
    layer = rx.channels.select(groups, scores, remove=0.5, scope="layer")
    assert [len(layer[f"up_{i}"][1]) for i in range(2)] == [3, 3]


@pytest.mark.parametrize(
    ("options", "named"),
    [
        ({}, ("remove", "macs")),
        ({"remove": 0.5, "macs": 0.5}, ("remove", "macs")),
        ({"remove": 0.5, "normalize": "most"}, ("normalize",)),
        ({"remove": 1.0}, ("remove",)),
        ({"remove": 0.5, "scope": "all"}, ("scope",)),
        ({"remove": 0.5, "round_to": 0}, ("round_to",)),
    ],
)
def test_bad_options_of_a_selection(options, named):
    with refused(*named):
        rx.channels.select(GROUPS, [np.ones(4)], **options)
    with refused("scores", "a"):
        rx.channels.select(GROUPS, [np.ones(3)], remove=0.5)


# ---- smaller models


def test_members_follow_one_axis_and_whole_channels_go():
    small = rx.channels.shrink(two_layers, PARAMS, {"c": {0: [3, 0]}}, X)
    assert as_lists(small.kept) == {"a": {1: [0, 3]}, "b": {0: [0, 3]}, "c": {0: [0, 3]}}
    assert small.apply(small.params, X).tolist() == [[3.0], [3.0]]
    assert small.weights == (12, 6)


def test_a_batch_of_another_size():
    small = rx.channels.shrink(two_layers, PARAMS, {"c": {0: [0, 1]}}, X)
    assert small.apply(small.params, jnp.ones((7, 1))).tolist() == [[3.0]] * 7


@pytest.mark.parametrize(
    ("keep", "named"),
    [
        ({"d": {0: [0]}}, "d"),
        ({"a": {2: [0]}}, "a"),
        ({"a": {1: []}}, "a"),
        ({"a": {1: [4]}}, "a"),
        ({"a": [0]}, "a"),
        ([0], "keep"),
        ({"a": {1: [0, 1]}, "c": {0: [0, 2]}}, "a"),
    ],
)
def test_a_keep_that_does_not_fit(keep, named):
    with refused("keep" if named == "keep" else named):
        rx.channels.shrink(two_layers, PARAMS, keep, X)


def test_what_has_to_stay_is_not_removed():
    params, apply, _ = wide()
    with refused("keep", "a"):
        rx.channels.shrink(apply, params, {"a": {0: [0]}}, jnp.ones((1, 2)))


def test_derivatives_of_a_function_s_own_are_kept():
    """ReLU has derivative 0 at 0, which its operations alone do not give."""
    small = rx.channels.shrink(two_layers, PARAMS, {"c": {0: [0, 1]}}, X)
    grad = jax.jit(jax.grad(lambda p: small.apply(p, 0 * X).sum()))(small.params)
    assert grad["b"].tolist() == [0, 0]


@pytest.mark.parametrize("act", [jax.nn.relu, jax.nn.softplus])
def test_derivatives_of_elementwise_functions_are_those_of_the_smaller_model_at_its_shapes(act):
    def apply(p, x):
        return act(x @ p["a"]) @ p["b"]

    params, x = {"a": Draw()(3, 7), "b": Draw()(7, 2)}, Draw(1).drawn(5, 3)
    small = rx.channels.shrink(apply, params, {"a": {1: [1, 2, 4]}, "b": {0: [1, 2, 4]}}, x)

    def twice(apply):
        def bend(p):
            slope = jax.grad(lambda p: jnp.square(apply(p, x)).sum())(p)
            return sum(jnp.square(g).sum() for g in jax.tree.leaves(slope))

        return jax.jit(jax.grad(bend))

    found, wanted = twice(small.apply).lower(small.params), twice(apply)(small.params)
    assert "5x7" not in found.as_text()
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5), found.compile()(small.params), wanted)


# ---- frameworks


class Attention(nn.Module):
    @nn.compact
    def __call__(self, x):
        x = nn.Dense(16)(x)
        x = x + nn.MultiHeadDotProductAttention(num_heads=4)(nn.LayerNorm()(x))
        x = nn.GroupNorm(num_groups=4)(nn.Conv(24, (3,))(x))
        return nn.Dense(3)(nn.RNN(nn.OptimizedLSTMCell(8))(x))


def linen():
    module, x = Attention(), jnp.ones((2, 5, 6))
    return jax.eval_shape(module.init, jax.random.key(0), x), module.apply, x, [16, 8, 4, 4, 4, 4]


def equinox():
    keys = jax.random.split(jax.random.key(0), 2)
    first = [eqx.nn.Conv2d(3, 8, 3, key=keys[0]), eqx.nn.GroupNorm(4, 8), eqx.nn.Lambda(jax.nn.relu)]
    last = [eqx.nn.AvgPool2d(2, 2), eqx.nn.Lambda(jnp.ravel), eqx.nn.MLP(72, 3, 10, 1, key=keys[1])]
    model = eqx.nn.Sequential([*first, *last])
    arrays, rest = eqx.partition(model, eqx.is_array)
    return arrays, lambda p, x: jax.vmap(eqx.combine(p, rest))(x), jnp.ones((2, 3, 8, 8)), [4, 10]


def flax_nnx():
    class Net(nnx.Module):
        def __init__(self, rngs):
            self.a, self.n = nnx.Conv(3, 8, (3, 3), rngs=rngs), nnx.LayerNorm(8, rngs=rngs)
            self.b = nnx.Linear(8, 3, rngs=rngs)

        def __call__(self, x):
            return self.b(jax.nn.silu(self.n(self.a(x))).mean((1, 2)))

    graph, state = nnx.split(Net(nnx.Rngs(0)))
    return state, lambda state, x: nnx.merge(graph, state)(x), jnp.ones((2, 6, 6, 3)), [8]


@pytest.mark.parametrize("framework", [linen, equinox, flax_nnx])
def test_models_of_frameworks_are_halved_and_trained(framework):
    params, apply, x, sizes = framework()
    groups = rx.channels.groups(apply, params, x)
    assert sorted(group.size for group in groups if not group.why) == sorted(sizes), str(groups)
    keep = rx.channels.select(groups, [np.arange(group.size) for group in groups], remove=0.5, scope="layer")
    small = rx.channels.shrink(apply, params, keep, x, fold=False)
    trained = jax.value_and_grad(lambda p: (small.apply(p, x) ** 2).mean())
    if framework is linen:  # its operations are those of other tests, and slow to compile
        _, grads = jax.eval_shape(trained, small.params)
    else:
        loss, grads = jax.jit(trained)(small.params)
        assert np.isfinite(loss)
    assert jax.tree.structure(small.params) == jax.tree.structure(params) == jax.tree.structure(grads)
    again = rx.channels.groups(small.apply, small.params, x)
    assert sorted(group.size for group in again if not group.why) == sorted(n // 2 for n in sizes)


# ---- published counts


class Basic(nn.Module):
    features: int
    stride: int

    @nn.compact
    def __call__(self, x):
        conv = lambda name, size, stride: nn.Conv(  # noqa: E731
            self.features, (size, size), stride, padding=size // 2, use_bias=False, name=name
        )
        norm = lambda name: nn.BatchNorm(use_running_average=True, name=name)  # noqa: E731
        y = nn.relu(norm("bn1")(conv("conv1", 3, self.stride)(x)))
        y = norm("bn2")(conv("conv2", 3, 1)(y))
        if x.shape != y.shape:
            x = norm("bn3")(conv("short", 1, self.stride)(x))
        return nn.relu(x + y)


class ResNet18(nn.Module):
    @nn.compact
    def __call__(self, x):
        x = nn.Conv(64, (7, 7), 2, padding=3, use_bias=False)(x)
        x = nn.relu(nn.BatchNorm(use_running_average=True)(x))
        x = nn.max_pool(x, (3, 3), (2, 2), ((1, 1), (1, 1)))
        for stage in range(4):
            for block in range(2):
                x = Basic(64 * 2**stage, 2 if stage and not block else 1)(x)
        return nn.Dense(1000)(x.mean((1, 2)))


def test_a_halved_resnet_18_has_the_published_counts():
    """3,055,880 weights and 487,202,536 MACs, as the README of Torch-Pruning gives them.

    Its counter adds to the products two operations an element for batch normalisation, one for ReLU, one for each
    element that is pooled and one for each bias.
    """
    x = jax.ShapeDtypeStruct((1, 224, 224, 3), jnp.float32)
    params = jax.eval_shape(ResNet18().init, jax.random.key(0), x)
    groups = rx.channels.groups(ResNet18().apply, params, x)
    assert groups.macs() == 1_814_073_344
    scores = [np.zeros(group.size) for group in groups]
    keep = rx.channels.select(groups, scores, remove=0.5, scope="layer")
    small = rx.channels.shrink(ResNet18().apply, params, keep, x)
    assert sum(leaf.size for leaf in jax.tree.leaves(small.params["params"])) == 3_055_880
    stem, stages = 32 * 112**2, [32 * 56**2, 64 * 28**2, 128 * 14**2, 256 * 7**2]
    normed = stem + 4 * stages[0] + 5 * sum(stages[1:])
    rectified = stem + 4 * sum(stages)
    assert small.macs[1] + 2 * normed + rectified + stem + stages[-1] + 1000 == 487_202_536
