"""Numbers of the criteria of channels: identities, bounds and what brute force finds."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np

import rigl_jax as rx
from rigl_jax.channels import gating, second_order
from tests.channels.models import Draw, pool
from tests.errors import refused

C = rx.channels


def mlp(p, x):
    return jax.nn.relu(x @ p["a"]) @ p["b"]


def made(n_in=4, hidden=6, n_out=3, seed=0):
    d = Draw(seed)
    return {"a": d(n_in, hidden), "b": d(hidden, n_out)}


def hidden_group(params, x, apply=mlp):
    """The group of the hidden channels alone: scores are a tuple of one array."""
    return C.Groups(group for group in C.groups(apply, params, x) if not group.why)


def scored(criterion, groups, params, batch):
    """Compiled at once; for a tuple of criteria, what each gives."""
    several = isinstance(criterion, tuple)

    def scores(params, batch):
        return tuple(one(groups, params, batch) for one in criterion) if several else criterion(groups, params, batch)

    return jax.jit(scores)(params, batch)


def squared(p, x):
    return jnp.mean(jnp.square(mlp(p, x)))


PARAMS, X = made(), Draw(1)(5, 4)
GROUP = hidden_group(PARAMS, X)


def without(params, *channels):
    b = np.array(params["b"])
    b[list(channels)] = 0
    return {"a": params["a"], "b": jnp.asarray(b)}


def rises(loss, params, x):
    loss = jax.jit(loss)
    n = params["b"].shape[0]
    return np.array([loss(without(params, k), x) - loss(params, x) for k in range(n)])


# ---- derivatives by factors


def test_the_derivative_by_a_factor_is_the_sum_over_the_rows_that_read_the_channel():
    model = gating.tapped("test", squared, GROUP, PARAMS, X)
    got, grads = jax.jit(lambda p: (model.slope(p, X)(jnp.ones(6)), jax.grad(squared)(p, X)))(PARAMS)
    np.testing.assert_allclose(got, (grads["b"] * PARAMS["b"]).sum(1), rtol=1e-5)
    np.testing.assert_allclose(scored(C.taylor_2019(squared), GROUP, PARAMS, X)[0], np.square(got), rtol=1e-5)
    model = gating.tapped("test", mlp, GROUP, PARAMS, X)
    hidden = jax.nn.relu(X @ PARAMS["a"])
    noted = jax.jit(lambda p: model.noted(lambda read, xs: gating.read_sums(jnp.abs, read, xs), p, X))(PARAMS)
    np.testing.assert_allclose(noted, hidden.sum(0), rtol=1e-5)


def test_squares_are_averaged_after_the_parts_of_a_batch():
    x = Draw(1)(4, 4)
    whole = jax.jit(lambda part: C.taylor_2019(squared)(GROUP, PARAMS, part)[0])
    parts = [np.asarray(whole(part)) for part in np.split(np.asarray(x), 2)]
    np.testing.assert_allclose(
        scored(C.taylor_2019(squared, size=2), GROUP, PARAMS, x)[0], np.mean(parts, 0), rtol=1e-5
    )
    with refused("batch"):
        scored(C.taylor_2019(squared, size=3), GROUP, PARAMS, x)


def test_taylor_2016_takes_absolute_values_example_by_example():
    a, b = (np.asarray(PARAMS[name], np.float64) for name in "ab")
    read = np.maximum(np.asarray(X) @ a, 0)
    slopes = 2 * (read @ b) @ b.T / b.shape[1]  # of the mean square of one example by what is read
    want = np.abs(slopes * read).mean(0)
    both = C.taylor_2016(squared, normalize=False), C.taylor_2016(squared)
    (plain,), (normal,) = scored(both, GROUP, PARAMS, X)
    np.testing.assert_allclose(plain, want, rtol=1e-4)
    np.testing.assert_allclose(normal, want / np.linalg.norm(want), rtol=1e-4)


def test_second_order_is_exact_for_a_quadratic_loss_and_rows_of_the_hessian_are_known():
    want = rises(squared, PARAMS, X)
    criteria = (C.taylor_2019(squared, second="diagonal"), C.taylor_2019(squared, second="rows"), C.sosp_h(squared))
    (diagonal,), (rows,), (sosp,) = scored(criteria, GROUP, PARAMS, X)
    np.testing.assert_allclose(diagonal, want**2, rtol=1e-3)
    flat = lambda b: squared({"a": PARAMS["a"], "b": b.reshape(6, 3)}, X)  # noqa: E731
    b = np.asarray(PARAMS["b"]).reshape(-1)
    hessian, grad = map(np.asarray, jax.jit(lambda b: (jax.hessian(flat)(b), jax.grad(flat)(b)))(b))
    own = np.kron(np.eye(6), np.ones(3)) * np.asarray(b)[None]  # theta_s of every channel
    pairs = own @ np.asarray(hessian) @ own.T
    np.testing.assert_allclose(rows, (own @ grad - pairs.sum(1) / 2) ** 2, rtol=1e-3)
    np.testing.assert_allclose(pairs.sum(), b @ hessian @ b, rtol=1e-4)
    np.testing.assert_allclose(sosp, np.abs(own @ grad) + np.abs(pairs.sum(1)) / 2, rtol=1e-3)
    loss = jax.jit(squared)
    for gone in itertools.chain.from_iterable(itertools.combinations(range(6), n) for n in (2, 3)):
        at = list(gone)
        rise = loss(without(PARAMS, *gone), X) - loss(PARAMS, X)
        np.testing.assert_allclose(-(own @ grad)[at].sum() + pairs[np.ix_(at, at)].sum() / 2, rise, atol=1e-5)


def cross_entropy(p, batch):
    x, y = batch
    return -jnp.mean(jnp.take_along_axis(jax.nn.log_softmax(mlp(p, x)), y[:, None], -1))


def test_interactions_are_the_hessian_where_the_logits_are_linear_in_the_factors():
    batch = X, jnp.arange(5) % 3
    got = jax.jit(lambda p, x: second_order.interactions("test", mlp, GROUP, p, x))(PARAMS, X)
    model = gating.tapped("test", cross_entropy, GROUP, PARAMS, batch)
    want = jax.jit(jax.hessian(lambda c: model.gated(c, PARAMS, batch)))(jnp.ones(6)) / 2
    np.testing.assert_allclose(got, want, atol=1e-6)
    assert np.linalg.eigvalsh(got).min() > -1e-6


def test_pairs_that_cancel_are_seen_by_sosp_i_alone():
    """Channels 0 and 1 cancel: either alone costs, both together nothing. Channel 2 costs a little."""
    params = {"a": jnp.ones((1, 3)), "b": jnp.array([[1.0, 0.0], [-1.0, 0.0], [0.1, 0.0]])}
    x = jnp.ones((1, 1))
    group = hidden_group(params, x)
    pairs = jax.jit(lambda p, x: second_order.interactions("test", mlp, group, p, x))(params, x)
    np.testing.assert_allclose(pairs[:2].sum(1), pairs[:2, 2], atol=1e-7)
    order = np.argsort(scored(C.sosp_i(mlp), group, params, x)[0]).tolist()
    costs = [float(np.asarray(pairs)[np.ix_(order[:n], order[:n])].sum()) for n in (1, 2, 3)]
    assert costs[0] <= min(np.diag(pairs)) + 1e-7
    assert order[0] == 2


def test_the_signed_path_is_the_loss_that_the_group_and_each_channel_are_worth():
    steps, curved = 100, jax.jit(lambda p, x: jnp.mean(jnp.tanh(mlp(p, x)) ** 2))
    paths = tuple(C.singe(curved, steps, None, signed=True, each=each) for each in (False, True))
    (together,), (alone,) = scored(paths, GROUP, PARAMS, X)
    whole = curved(without(PARAMS, *range(6)), X) - curved(PARAMS, X)
    error = 0.2 / steps**2 + 1e-6
    np.testing.assert_allclose(np.asarray(together).sum(), whole, atol=error)
    np.testing.assert_allclose(alone, rises(curved, PARAMS, X), atol=error)


def test_the_path_of_no_steps_is_half_way_and_geometric_grids_are_exact_for_quadratics():
    rise = rises(squared, PARAMS, X)
    got = scored(C.singe(squared, 20, 0.5, signed=True, each=True), GROUP, PARAMS, X)[0]
    np.testing.assert_allclose(got, rise, rtol=1e-3, atol=1e-6)


def spearman(a, b):
    rank = lambda v: np.argsort(np.argsort(np.asarray(v)))  # noqa: E731
    return np.corrcoef(rank(a), rank(b))[0, 1]


def test_taylor_ranks_channels_as_brute_force_does_in_a_trained_network():
    rng = np.random.default_rng(0)
    x = jnp.asarray(rng.normal(size=(256, 8)), jnp.float32)
    y = jnp.asarray(np.argmax(np.tanh(x @ rng.normal(size=(8, 12))) @ rng.normal(size=(12, 4)), 1))
    params = made(8, 32, 4)

    @jax.jit
    def train(params):
        step = lambda p, _: (jax.tree.map(lambda w, g: w - 0.3 * g, p, jax.grad(cross_entropy)(p, (x, y))), None)  # noqa: E731
        return jax.lax.scan(step, params, length=300)[0]

    params = train(params)
    group = hidden_group(params, x)
    factors = np.concatenate([1 - np.eye(32, dtype=np.float32), np.ones((1, 32), np.float32)])[..., None]
    *ablated, whole = jax.jit(jax.vmap(lambda c: cross_entropy({**params, "b": c * params["b"]}, (x, y))))(factors)
    truth = np.abs(np.array(ablated) - whole)
    singe = C.singe(cross_entropy, 5, None, signed=True, each=True)
    criteria = C.taylor_2016(cross_entropy), C.taylor_2019(cross_entropy, size=1), singe, C.random(jax.random.key(0))
    *found, drawn = (spearman(scores, truth) for (scores,) in scored(criteria, group, params, (x, y)))
    assert found[2] > 0.99
    assert min(found) > 0.8 > drawn


# ---- bounds and recovery


def test_nisp_bounds_what_removal_changes():
    d = Draw(3)
    params = {"a": d(3, 3, 2, 6), "b": d(3, 3, 6, 4), "scale": d(4), "c": d(16, 3)}

    def apply(p, x):
        conv = lambda x, w: jax.lax.conv_general_dilated(  # noqa: E731
            x, w, (1, 1), "SAME", dimension_numbers=("NHWC", "HWIO", "NHWC")
        )
        x = pool(jax.nn.relu(conv(x, p["a"])))
        x = jax.nn.relu(conv(x, p["b"]) * p["scale"][None, None, None] + 0.3)
        x = jax.lax.reduce_window(x, 0.0, jax.lax.add, (1, 2, 2, 1), (1, 1, 1, 1), "SAME") / 4
        return jnp.tanh(x.reshape(x.shape[0], -1) @ p["c"])

    x, s = Draw(4)(20, 4, 4, 2), np.array([1.0, 0.5, 2.0])
    groups = C.groups(apply, params, x)
    free = [g for g, group in enumerate(groups) if not group.why]
    scores = scored(C.nisp(apply, s), groups, params, x)
    assert all((np.asarray(one) >= 0).all() for one in scores)
    model = gating.tapped("test", apply, groups, params, x)
    factors = np.concatenate([1 - np.eye(model.size, dtype=np.float32), np.ones((1, model.size), np.float32)])
    *without_one, whole = np.asarray(jax.jit(lambda c: jax.lax.map(lambda c: model.gated(c, params, x), c))(factors))
    largest, ratios, starts = read_largest(apply, groups, params, x), [], gating.sizes(groups)
    for g in free:
        for k, score in enumerate(np.asarray(scores[g]), start=starts[g]):
            ratios.append(float((np.abs(without_one[k] - whole) @ s).max() / (score * largest[k])))
    assert 0.01 < max(ratios) <= 1 + 1e-5


def read_largest(apply, groups, params, x):
    """The largest absolute value of what is read of every channel."""
    model = gating.tapped("test", apply, groups, params, x)

    def largest(read, xs):
        x = jnp.abs(xs[read.side])
        return jnp.max(x, [k for k in range(x.ndim) if k != read.axis])

    return np.asarray(jax.jit(lambda p: model.noted(largest, p, x))(params))


def test_nisp_refuses_what_has_no_bound():
    with refused("apply", "mul"):
        scored(C.nisp(lambda p, x: jax.nn.silu(x @ p["a"]) @ p["b"]), GROUP, PARAMS, X)


def test_nrs_is_the_stability_that_the_diagnostics_measure():
    d = Draw(5)
    params = {"a": d(3, 5), "mean": d(5), "scale": d(5), "bias": d(5), "m": d(5, 5), "b": d(5, 2)}
    empty = {name: params[name] if name == "b" else params[name].at[..., 1].set(0) for name in params}

    def apply(p, x):
        x = x @ p["a"] - p["mean"][None]
        x = jax.nn.relu(x * (p["scale"] / jnp.sqrt(2.0))[None] + p["bias"][None])
        return jax.nn.relu(x @ p["m"] + x) @ p["b"]

    x = Draw(6)(7, 3)
    group = hidden_group(params, x, apply)

    @jax.jit
    def both(p):
        relus = rx.diagnostics.interval_bounds(apply, p, x - 0.1, x + 0.1).relus
        return C.nrs(apply, 0.1)(group, p, x)[0], rx.diagnostics.nrs_scores(relus, [p["scale"], None])

    got, want = both(params)
    np.testing.assert_allclose(got, (want[0] + want[1]) / 2, rtol=1e-5)  # a mean over both ReLUs
    assert both(empty)[0][1] == -2 == both(empty)[0].min()
    with refused("eps"):
        C.nrs(apply, 0.0)
    with refused("scales"):
        C.nrs(apply, scales="(")


def test_i_spasp_recovers_the_rows_that_are_there_and_its_error_falls():
    rng = np.random.default_rng(0)
    d, n = 40, 64
    decay = np.arange(1, d + 1) ** -1.5
    order = rng.permutation(d)
    rows = np.abs(rng.normal(size=(n, d))) * decay[order]
    params = {
        "b": jnp.asarray(rng.normal(size=(d, 12)) / np.sqrt(d), jnp.float32),
        "a": jnp.asarray(np.eye(d, dtype="f")),
    }
    group = hidden_group(params, jnp.ones((1, d)))
    group = C.Groups(g for g in group if g.size == d)
    sparse = rows * np.isin(np.arange(d), np.argsort(decay[order])[-5:])
    few, some, every = (jax.jit(lambda x, s=s: C.i_spasp(mlp, s / d)(group, params, x)[0]) for s in (5, 20, 40))

    def error(criterion, s, rows):
        gone = np.asarray(criterion(jnp.asarray(rows, jnp.float32))) < 1
        assert gone.sum() == d - s
        b = np.asarray(params["b"])
        return np.linalg.norm(rows[:, gone] @ b[gone]) / np.linalg.norm(rows @ b)

    assert error(few, 5, sparse) == 0
    errors = [error(few, 5, rows), error(some, 20, rows), error(every, 40, rows)]
    assert errors[0] / 2 > errors[1] > errors[2] == 0


def test_a_channel_that_is_there_twice_lowers_the_effective_rank_by_one():
    params = made(6, 5, 3)
    x = Draw(1)(16, 6)
    group = hidden_group(params, x)
    score = jax.jit(lambda p, x: C.effective_rank(squared, 1.0)(group, p, x)[0])
    assert int((np.asarray(score(params, x)) >= 1).sum()) == 5
    twice = {"a": params["a"].at[:, 1].set(params["a"][:, 0]), "b": params["b"].at[1].set(params["b"][0])}
    found = np.asarray(score(twice, x))
    assert int((found >= 1).sum()) == 4
    assert found[:2].min() < 1e-5
    np.testing.assert_allclose(score(twice, x[::-1]), found, atol=1e-4)


def test_mutual_information_of_noiseless_and_of_empty_channels():
    params = {"a": jnp.ones((1, 3)), "b": jnp.array([[1.0, 0.0], [0.0, 1.0], [0.0, 0.3]])}
    x = jnp.ones((1, 1))
    criterion = C.mutual_information(mlp, jax.random.key(0), 4096, 16)
    alone, most, less = scored(criterion, hidden_group(params, x), params, x)[0]
    np.testing.assert_allclose(alone, np.log(16) + 15**2 / 2 / 4096, atol=0.03)  # one output knows it, one does not
    assert alone > most > 3 * less


def test_scores_smoothed_over_prunings():
    first = C.ema(None, [jnp.array([1.0, 2.0])])
    np.testing.assert_allclose(C.ema(first, [jnp.array([2.0, 0.0])])[0], [1.1, 1.8])
    with refused("scores"):
        C.ema(first, [jnp.ones(3)])


def test_groups_of_another_model():
    with refused("groups"):
        C.taylor_2019(lambda p, x: jnp.sum(x @ p["a"]))(GROUP, {"a": PARAMS["a"]}, X)
