"""The pruning study: its cells, what a cell trains, and the page of its records."""

import functools
import json

import jax
import numpy as np
import optax
import pytest

import rigl_jax as rx
from experiments.studies import pruning, pruning_page, pruning_tables, pruning_training
from experiments.studies.method_training import Data
from experiments.studies.pruning import SEEDS, Cell
from experiments.studies.pruning_cells import CRITERIA, SCHEDULES
from experiments.studies.pruning_training import MODELS
from tests.experiments.test_studies import images


@pytest.fixture(scope="module")
def bench():
    """Eight steps of an epoch of noise; the "dense network" is not trained."""
    made = pruning_training.make_bench("lenet_300_100", Data(images(1024), images(1000), images(1000)), epochs=1)
    init = jax.jit(made.init)(jax.random.key(0))
    made.dense[0] = pruning_training.Dense(init, init, init)
    return made


def test_training_is_the_plain_loop(bench):
    """From step 3 to 6: rates and batches of those steps, and masks that hold."""
    params = bench.dense[0].init
    plan = pruning_training.plan_of(params, 0.9)
    start = jax.jit(lambda params: rx.prune(plan, params))(params)
    batches = pruning_training.batches_of(bench, 0)
    schedule = lambda step: 0.01 * (step + 1)  # noqa: E731
    trained = pruning_training.train(bench, schedule, batches, *start, 6, start=3).params
    rx.check_masked(trained, start.masks, plan)
    inner = optax.sgd(lambda count: 0.01 * (count + 4), momentum=0.9, nesterov=True)
    kernels = functools.partial(jax.tree.map, lambda p: p.ndim > 1)
    tx = optax.chain(optax.add_decayed_weights(5e-4, mask=kernels), inner)

    @jax.jit
    def step(params, state, rows):
        grads = jax.grad(bench.loss)(params, (bench.data.train.x[rows], bench.data.train.y[rows]))
        updates, state = tx.update(grads, state, params)
        return rx.apply_masks(optax.apply_updates(params, updates), start.masks), state

    now, state = start.params, jax.jit(tx.init)(start.params)
    for rows in batches[3:6]:
        now, state = step(now, state, rows)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-6), trained, now)


def test_a_cell(bench):
    """Counts are exact in one ranking, and both splits are measured before and after."""
    cell = Cell("lenet_300_100", "criteria", "magnitude_global", 0.98, 0.5, 0)
    with pytest.raises(ValueError, match="chosen"):
        pruning.run(bench, {}.get, cell, None)
    found = pruning.run(bench, {}.get, cell, "llr")
    assert sum(found["weights"]) == 266_200 - sum(round(0.98 * n) for n in (235_200, 30_000, 1000))
    assert found["before"].keys() == found["after"].keys() == {"validation", "test"}
    assert found["before"]["test"] != found["after"]["test"]


def test_an_ensemble_is_measured_by_its_mean_probability(bench):
    params = bench.dense[0].init
    alone, twice = (pruning_training.measure(bench, members) for members in (params, [params, params]))
    np.testing.assert_allclose(alone["test"], twice["test"], rtol=1e-3)


def test_cells_are_distinct_and_found_in_their_records(tmp_path):
    cells, whole = list(pruning.cells()), list(pruning.cells(whole=True))
    assert len(set(whole)) == len(whole)
    assert set(cells) < set(whole)
    assert {cell.seed for cell in set(whole) - set(cells) if cell.study != "retraining"} == {3, 4}
    assert {cell.method for cell in cells if cell.study == "criteria"} == {*CRITERIA, "iterative"}
    (tmp_path / "lenet5.jsonl").write_text(json.dumps(cells[-1]._asdict()) + "\n")
    assert list(pruning.read(tmp_path)) == [cells[-1]]


def record(accuracy):
    return {"after": {"validation": [accuracy, 1.0, 0.1], "test": [accuracy, 1.0, 0.1]}}


def test_fine_tuning_is_chosen_by_validation():
    records = {
        Cell("lenet5", *pruning.CHOICE[:1], name, *pruning.CHOICE[1:], seed): record(0.5 + 0.1 * (name == "slr"))
        for name in SCHEDULES
        for seed in range(MODELS["lenet5"]["seeds"])
    }
    assert pruning.choose(records, "lenet5") == "slr"
    records.popitem()
    assert pruning.choose(records, "lenet5") is None


def test_claims_come_out_as_the_records_say():
    claim = pruning_page.Claim("a is better than b", "retraining", "a", "b")
    records = {}
    for seed in SEEDS:
        noise = 0.001 * seed
        for sparsity, a, b in ((0.8, 0.9, 0.8), (0.9, 0.8, 0.9), (0.95, 0.8, 0.8 + (-1) ** seed * 0.01)):
            records[Cell("lenet5", "retraining", "a", sparsity, 1.0, seed)] = record(a + noise)
            records[Cell("lenet5", "retraining", "b", sparsity, 1.0, seed)] = record(b - noise**2)
    told = pruning_page.outcome(pruning_tables.gather(records), "lenet5", claim)
    assert told == "yes at 80 % (1 epochs); not told apart at 95 % (1 epochs); the opposite at 90 % (1 epochs)"
    records = {cell: found for cell, found in records.items() if (cell.sparsity, cell.seed) != (0.95, 2)}
    assert "95 %" not in pruning_page.outcome(pruning_tables.gather(records), "lenet5", claim)


def test_the_page_is_what_the_records_give():
    records = pruning.read()
    assert pruning_page.PAGE.read_text() == pruning_page.page(records)
    runs = pruning_tables.gather(records)
    for model in pruning_training.MODELS:
        assert pruning_page.picture(model).exists() == pruning_page.has_picture(runs, model)
