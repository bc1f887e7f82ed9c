"""The studies: exact figures of the paper's arithmetic, and a table of methods on data of the right shape."""

import functools
import json

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import rigl_jax as rx
from experiments.models import MODELS
from experiments.studies import (
    channels,
    channels_page,
    channels_training,
    method_networks,
    method_page,
    method_table,
    method_training,
    mnist1d,
    mnist1d_data,
    mnist1d_page,
    paper_tables,
    tuning,
    tuning_page,
)
from experiments.studies.paper_tables import ER, ERK, ERK_1, ERK_D, UNIFORM, UNIFORM_1, UNIFORM_D


@pytest.mark.parametrize(
    ("name", "variant", "sparsity", "test_flops", "megabytes"),
    [
        ("resnet50", UNIFORM_1, 0.0, 1.0, 102.122),
        ("resnet50", UNIFORM_1, 0.8, 0.2254, 23.729),
        ("resnet50", UNIFORM_1, 0.9, 0.1285, 13.532),
        ("resnet50", UNIFORM_1, 0.95, 0.0801, 8.433),
        ("resnet50", UNIFORM_1, 0.965, 0.0656, 6.904),
        ("resnet50", UNIFORM, 0.8, 0.2011, None),
        ("resnet50", UNIFORM, 0.9, 0.1012, None),
        ("resnet50", UNIFORM, 0.95, 0.0513, None),
        ("resnet50", ERK, 0.8, 0.4153, 23.684),
        ("resnet50", ERK, 0.95, 0.1230, 8.399),
        ("resnet50", ERK_1, 0.99, 0.0548, 4.354),
        ("resnet50", ER, 0.8, 0.4546, 23.685),
        ("mobilenet", UNIFORM_1, 0.75, 0.2675, None),
        ("mobilenet", UNIFORM_D, 0.9, 0.148, None),
        ("mobilenet", ERK_1, 0.9, 0.2748, None),
        ("mobilenet", ERK_D, 0.75, 0.525, None),
        ("wide_resnet", ERK, 0.8, 0.3530, None),
    ],
)
def test_flops_and_sizes(name, variant, sparsity, test_flops, megabytes):
    net = paper_tables.network(name)
    density = paper_tables.densities(net, variant, sparsity)
    assert paper_tables.test_flops(net, density) == pytest.approx(test_flops, abs=6e-4 if variant.dense else 6e-5)
    if megabytes is not None:
        assert paper_tables.megabytes(net, density) == pytest.approx(megabytes, abs=6e-4)


def test_training_flops():
    net = paper_tables.network("resnet50")
    assert net.dense == 8_202_340_776  # 8.20234e9
    for method, variant, sparsity, relative in (
        ("RigL", ERK, 0.9, 0.2456),
        ("RigL", UNIFORM_1, 0.8, 0.2279),
        ("SNFS", ERK, 0.8, 0.610),
        ("SNFS", ERK, 0.95, 0.415),
        ("static, SNIP, SET", ERK, 0.8, 0.4153),
    ):
        assert paper_tables.training(net, method, variant, sparsity) == pytest.approx(relative, abs=5e-4)
    for width, relative in ((0.465, 0.2218), (0.34, 0.1209), (0.26, 0.0723), (0.231, 0.0575)):
        assert paper_tables.small_dense(net, width) == pytest.approx(relative, abs=6e-5)


def test_published_figures_come_out_to_the_digits_printed():
    """Those of the tables that the page does not explain away."""
    for (name, variant, sparsity), published in paper_tables.PUBLISHED.items():
        net = paper_tables.network(name)
        layout = next(v for v in (UNIFORM_1, UNIFORM, ERK, ERK_1) if v.name == variant)
        forward = paper_tables.test_flops(net, paper_tables.densities(net, layout, sparsity))
        ours = (forward, paper_tables.rigl_training(forward), 5 * paper_tables.rigl_training(forward))
        for value, text in zip(ours, published[:3], strict=True):
            assert not text or abs(value - float(text)) < 0.0051, (name, variant, sparsity)


def test_the_page_of_the_papers_arithmetic_is_up_to_date():
    assert paper_tables.PAGE.read_text() == paper_tables.page()


def test_the_page_of_results_is_up_to_date():
    assert method_page.PAGE.read_text() == method_page.page(method_table.read())
    assert all(method_page.picture(cell.model).exists() for cell in method_table.read())


def test_the_page_of_channels_is_up_to_date():
    records = channels.read()
    assert records.keys() <= set(channels.cells())
    assert channels_page.PAGE.read_text() == channels_page.page(records)
    assert all(channels_page.picture(model).exists() for model in channels_page.drawn(records))


def test_paired_differences():
    ours, theirs = np.array([3.0, 4.0, 5.0]), np.array([2.0, 3.0, 3.0])
    difference, p = method_page.paired(ours, theirs)
    assert (difference, round(p, 4)) == (pytest.approx(4 / 3), 0.0572)
    assert method_page.paired(ours, None) is None
    assert method_page.verdict((0.5, 0.2)) == "+0.50, p 0.200"
    assert method_page.verdict((-1.0, 0.0002)) == "**-1.00, p < 0.001**"


def images(n):
    rng = np.random.default_rng(n)
    x = rng.standard_normal((n, 28, 28, 1), np.float32)
    return method_training.Images(jnp.asarray(x), jnp.asarray(rng.integers(10, size=n), jnp.int32))


def test_a_cell_of_the_method_table():
    """Trained on noise: the facts of a record are consistent, and the same seed gives the same record."""
    data = method_training.Data(images(640), images(2000), images(1000))
    run, _ = method_table.prepare(method_table.Cell("lenet_300_100", "rigl", 0.98), 10)
    assert run.steps == 10
    found = method_training.measure(run, data, 1)
    assert found == method_training.measure(run, data, 1)
    assert found["weights"] == sum(found["active"].values()) == 266_200 - 231_579 - 28_663 - 632
    assert 1 - 0.98 < found["explored"] < 0.03
    assert found["forward"] == found["weights"]  # a fully connected network does one product a weight
    assert found["training"] == pytest.approx((29 * found["forward"] + 266_200) / 10)  # one step of ten is dense


def test_a_run_in_loops_is_the_plain_loop():
    """Steps compiled as loops give what `tx.update` gives one by one, where it decides itself when to rewire."""
    data, module = images(256), MODELS["mlp"](10, features=(20, 12))
    algorithm = rx.rigl(rx.make_plan(method_table._shapes(module), 0.9, rx.erk), period=3, stop=4)
    run = method_training.compile_run(module, algorithm, 6, 0.1)
    batches, looped = method_training.order(0, 6, 256), run.init(0)
    for rewire, first, last in method_training.segments(algorithm, 6):
        looped = run.train(looped, data, batches, first, last, rewire=rewire)
    rate = optax.cosine_decay_schedule(0.1, 6)
    decay = optax.add_decayed_weights(5e-4, mask=lambda params: jax.tree.map(lambda p: p.ndim > 1, params))
    inner = optax.chain(decay, optax.sgd(rate, momentum=0.9, nesterov=True))
    tx, plain = rx.sparsify(inner, algorithm, key=jax.random.key(7)), run.init(0)
    params, state = plain.params, plain.opt_state

    @jax.jit
    def step(params, state, x, y):
        def loss(params):
            logits = run.module.apply({"params": params}, x)
            return optax.softmax_cross_entropy_with_integer_labels(logits, y).mean()

        updates, state = tx.update(jax.grad(loss)(params), state, params)
        return optax.apply_updates(params, updates), state

    for rows in batches:
        params, state = step(params, state, data.x[rows], data.y[rows])
    jax.tree.map(np.testing.assert_array_equal, state.masks, looped.opt_state.masks)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-6), params, looped.params)


@pytest.mark.parametrize("model", channels.MODELS)
def test_networks_of_the_study_of_channels_train_as_they_are_pruned(model):
    """Convolutions as products are convolutions, and training reads the widths of the smaller params."""
    network = channels_training.NETWORKS[model]()
    params, data = jax.jit(network.init)(jax.random.key(0)), images(128)
    groups = rx.channels.groups(network.plain, params, data.x)
    keep = rx.channels.select(groups, rx.channels.scores(groups, params), macs=0.2, scope="layer")
    small = rx.channels.shrink(network.plain, params, keep, data.x)
    want, (got, _) = jax.jit(lambda p: (small.apply(p, data.x), network.fast(p, data.x, False)))(small.params)
    np.testing.assert_allclose(got, want, rtol=1e-4, atol=1e-5)
    trained = channels_training.trainer(network)(small.params, data, np.arange(128)[None], 0.1, 1)
    moved = {name: not np.array_equal(a, b) for (name, a), b in
             zip(rx.trees.named_leaves(trained).items(), jax.tree.leaves(small.params), strict=True)}  # fmt: skip
    assert all(moved.values()), moved


def test_steps_one_by_one_are_the_loop_and_averages_have_no_gradient():
    """What a network of convolutions takes instead of loops, on a network that both can run."""
    data, module = images(2000), MODELS["mlp"](10, features=(20, 12))
    run = method_training.compile_run(module, None, 4, 0.1)
    schedule = optax.cosine_decay_schedule(0.1, 4)
    step = functools.partial(
        method_training._step,
        method_networks.fitting(module),
        lambda key: optax.with_extra_args_support(method_training.optimizer(schedule)),
    )
    batches = method_training.order(0, 4, 2000)
    looped = run.train(run.init(0), data, batches, 0, 4, rewire=False)
    single = jax.jit(step, static_argnames="rewire")
    got = method_training._one_by_one(single, run.init(0), data, batches, 0, 4, rewire=False)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-6), got.params, looped.params)
    right = functools.partial(method_training._right, method_networks.forward(module))
    parts = method_training._mean_of_parts(right, looped.params, data)
    assert parts == pytest.approx(float(run.accuracy(looped.params, data)))

    wide = MODELS["wide_resnet"](10, depth=10, width=1, dropout=0.0)
    params = method_table._shapes(wide)
    _, averages = jax.eval_shape(method_networks.fitting(wide), params, data.x[:2])
    assert jax.tree.structure(averages) == jax.tree.structure(params["batch_stats"])


def test_small_dense_networks_hold_no_more_weights_than_sparse_ones():
    for model, weights in (("lenet_300_100", 26_621), ("lenet5", 4_558), ("lenet5", 594)):
        features = method_table.small_features(model, weights)
        module = method_table.NETWORKS[method_table.MODELS[model]["network"]](10, features=features)
        assert 0.6 * weights < method_table._n_weights(method_table._shapes(module)) <= weights


def test_cells_and_records_name_each_other(tmp_path):
    planned, cells = list(method_table.cells()), list(method_table.cells(whole=True))
    assert len(set(cells)) == len(cells) == 2 * (1 + 11 * 5) + 1 + 10 * 5
    assert {cell.sparsity for cell in cells[:31]} == {0.0, 0.9, 0.95, 0.98}
    assert set(planned) < set(cells)
    assert {cell.sparsity for cell in planned if cell.model == "lenet5"} == {0.0, 0.95, 0.98}
    (tmp_path / "lenet5.jsonl").write_text(json.dumps({**cells[-1]._asdict(), "runs": []}) + "\n")
    assert list(method_table.read(tmp_path)) == [cells[-1]]


def test_batches_are_whole_epochs_of_their_own_permutation():
    batches = method_training.order(3, 9, 4 * method_training.BATCH + 5)
    assert batches.shape == (9, method_training.BATCH)
    for epoch in (batches[:4], batches[4:8]):
        assert len(np.unique(epoch)) == epoch.size
    assert not np.array_equal(batches[:4], batches[4:8])


def test_lenet5_as_products_is_lenet5():
    module = MODELS["lenet5"](10, features=(2, 3, 7, 5))
    x = images(4).x

    @jax.jit
    def both(key):
        variables = module.init(key, x)
        return method_networks.forward(module)(variables["params"], x), module.apply(variables, x)

    np.testing.assert_allclose(*both(jax.random.key(0)), rtol=1e-4, atol=1e-5)


def test_tuning_has_one_budget_and_keeps_the_best_of_it():
    records = tuning.read()
    assert {len(tuning.choices(model, method)) for model in tuning.MODELS for method in tuning.METHODS} == {6}
    assert tuning_page.PAGE.read_text() == tuning_page.page(records)
    assert records.keys() <= set(tuning.cells())
    for record in records.values():
        best = max(record["tried"], key=lambda entry: entry["validation"])
        assert best == record["chosen"] | {"validation": best["validation"]}
        assert record["chosen"].items() <= record["settings"].items()


def test_mnist1d_is_that_of_the_package():
    """Numbers of mnist1d 0.0.2.post1, `make_dataset()`."""
    train, test = mnist1d_data.generate()
    assert (train.x.shape, test.x.shape) == ((4000, 40), (1000, 40))
    np.testing.assert_allclose(train.x[0, :3], [-0.33200567, -0.47191037, -0.77869708], rtol=1e-6)
    assert train.y[:10].tolist() == [2, 6, 4, 5, 6, 6, 6, 0, 3, 1]
    assert np.bincount(np.concatenate([train.y, test.y])).tolist() == [500] * 10


def test_the_page_of_mnist1d_is_up_to_date():
    records = mnist1d.read()
    assert mnist1d_page.PAGE.read_text() == mnist1d_page.page(records)
    assert records.keys() <= set(mnist1d.cells())


def test_all_methods_have_one_budget_and_records_name_the_best_of_it():
    assert {len(mnist1d.choices(method)) for method in mnist1d.METHODS} == {4}
    for cell, record in mnist1d.read().items():
        if cell.part == "table":
            best = max(record["tried"], key=lambda entry: entry["validation"])
            chosen = {name: record["settings"][name] for name in best.keys() - {"validation"}}
            assert chosen.items() <= best.items()


def test_small_dense_networks_of_mnist1d_hold_no_more_weights_than_sparse_ones():
    for weights in (300, 752, 15_000):
        width = mnist1d.small_width(weights)
        assert width * (width + 50) <= weights < (width + 1) * (width + 51)


def test_a_ticket_has_the_largest_weights_of_the_dense_network_and_starts_where_it_started():
    parts = [method_training.Images(jnp.ones((n, 40)), jnp.arange(n) % 10) for n in (256, 1000, 1000)]
    data, plan = method_training.Data(*parts), mnist1d.plan_of(0.9)
    dense, run = (mnist1d.compiled(name, 0.9, 2, {"rate": 0.1}) for name in ("dense", "static"))
    state = mnist1d.ticket_of(dense, data, plan, 0.1, 3, run.init(3))
    start, end = dense.init(3).params["Dense_1"]["kernel"], method_training.trained(dense, data, 3)["Dense_1"]["kernel"]
    mask, size = np.asarray(state.opt_state.masks["Dense_1"]["kernel"]), np.abs(end)
    assert mask.sum() == plan["Dense_1/kernel"].n_active
    np.testing.assert_array_equal(state.params["Dense_1"]["kernel"], np.where(mask, start, 0))
    assert size[mask].min() >= size[~mask].max()
