"""Retraining schedules against the tables of the authors' code."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import rigl_jax as rx
from rigl_jax.recipes import retraining
from tests.errors import refused

LINEAR = optax.linear_schedule(1.0, 0.0, 100)
STEPWISE = optax.piecewise_constant_schedule(0.1, {50: 0.1, 75: 0.1})
SLR = [0, 5, 11, 16, 22, 27, 33, 38, 44, 50, 55, 61, 66, 72, 77, 83, 88, 94]


def rates(schedule, n):
    return np.asarray(jax.vmap(schedule)(jnp.arange(n)), np.float64)


def test_slr_reads_the_rates_that_the_authors_code_reads():
    found = rates(retraining.slr(lambda step: 100.0 + step, 100, 20), 20)
    np.testing.assert_allclose(found[2:], 100.0 + np.array(SLR))
    np.testing.assert_allclose(found[:2], [0, 50])  # half a cosine from 0 to the first
    warmed = retraining.slr(optax.warmup_cosine_decay_schedule(0.0, 1.0, 30, 100), 100, 20, warmup=30)
    np.testing.assert_allclose(rates(warmed, 20)[2:8], 1.0)  # indices below 30 lie in the dense run's warm-up


def test_rewinding_all_steps_is_the_original():
    np.testing.assert_array_equal(rates(retraining.rewind(LINEAR, 100, 100), 100), rates(LINEAR, 100))
    np.testing.assert_array_equal(rates(retraining.rewind(LINEAR, 100, 20), 20), rates(LINEAR, 100)[80:])
    with refused("rewind", "retrain_steps"):
        retraining.rewind(LINEAR, 100, 101)


def test_finetune_takes_the_smallest_rate_after_the_warmup():
    assert float(retraining.finetune(STEPWISE, 100, 20)(0)) == pytest.approx(0.001)
    warmed = optax.warmup_constant_schedule(0.0, 0.5, 10)
    assert float(retraining.finetune(warmed, 100, 20)(5)) == 0
    assert float(retraining.finetune(warmed, 100, 20, warmup=10)(5)) == 0.5


def test_clr_and_llr():
    cosine = rates(retraining.clr(STEPWISE, 100, 20), 21)
    np.testing.assert_allclose(cosine[[2, 11, 20]], [0.1, 0.0505, 0.001], rtol=1e-5)
    linear = rates(retraining.llr(STEPWISE, 100, 20), 30)
    np.testing.assert_allclose(linear[2:21], 0.1 * (1 - np.arange(19) / 18), rtol=1e-5, atol=1e-9)
    assert (linear[20:] == 0).all()
    assert float(retraining.llr(STEPWISE, 100, 5)(0)) == pytest.approx(0.1)  # a tenth of 5 is no step


@pytest.mark.parametrize("drop", [0.0, 0.1, 0.3, 0.5, 1.0])
def test_allr_stays_within_its_bounds(drop):
    high = rates(retraining.allr(STEPWISE, 100, 20, norm_drop=drop, fraction=0.25), 20)[2]
    assert high == pytest.approx(min(max(0.1 * drop / 0.5, 0.1 * 0.2), 0.1), rel=1e-6)
    found = rates(retraining.bimp(STEPWISE, 100, 65, 3, 2, norm_drop=drop, fraction=0.25), 30)
    expected = rates(retraining.allr(STEPWISE, 100, 21, norm_drop=drop, fraction=0.25), 30)
    np.testing.assert_array_equal(found, expected)


def test_the_budget_is_split():
    assert retraining.split(65, 3) == [21, 21, 23]
    assert sum(retraining.split(10, 7)) == 10
    with refused("split", "budget"):
        retraining.split(2, 3)
    with refused("bimp", "level"):
        retraining.bimp(LINEAR, 100, 10, 2, 3, norm_drop=0.1, fraction=0.1)


@pytest.mark.parametrize("sparsity", [0.2, 0.5, 0.9, 0.98])
def test_the_norm_that_magnitude_pruning_takes(sparsity):
    """Exactly that of the dropped weights, and at most sqrt(p) of the whole."""
    params = {"a": jax.random.normal(jax.random.key(0), (30, 20)), "b": jax.random.normal(jax.random.key(1), (20, 5))}
    plan = rx.make_plan(params, sparsity, rx.uniform)
    pruned = rx.apply_masks(params, rx.topology.prune_jointly(plan, jax.tree.map(jnp.abs, params)))
    found = retraining.norm_drop(params, pruned)
    square = lambda tree: sum(float((np.asarray(x, np.float64) ** 2).sum()) for x in jax.tree.leaves(tree))  # noqa: E731
    dropped = jax.tree.map(lambda p, q: p - q, params, pruned)
    assert found == pytest.approx(np.sqrt(square(dropped) / square(params)), rel=1e-6)
    fraction = 1 - sum(layer.active_weights for layer in plan.values()) / 700
    assert found / np.sqrt(fraction) <= 1


def test_silo():
    table = [0.030039, 0.032132, 0.05, 0.069961, 0.07]
    found = [retraining.silo_max_lr(x, eps=0.03, alpha=0.04) for x in (0.2, 0.36, 0.5, 0.8, 0.95)]
    np.testing.assert_allclose(found, table, atol=5e-7)
    assert [retraining.silo_max_lr(x, eps=0.03, alpha=0.04) for x in (0, 0.5, 1)] == [0.03, 0.05, 0.07]
    for x in (0.1, 0.3):
        both = [retraining.silo_max_lr(y, eps=0.03, alpha=0.04) for y in (x, 1 - x)]
        assert sum(both) == pytest.approx(0.1)  # antisymmetric about 1/2
    peaks = [float(retraining.silo(k, eps=0.03, alpha=0.04, warmup=5, drops=(50,))(10)) for k in range(20)]
    assert peaks[0] == peaks[1] == pytest.approx(0.03)
    assert peaks[2] == pytest.approx(retraining.silo_max_lr(0.2, eps=0.03, alpha=0.04))
    assert peaks == sorted(peaks)


def test_odd_arguments():
    for name in ("finetune", "slr", "clr"):
        make = getattr(retraining, name)
        for given, argument in (
            ((3, 100, 20), "original"),
            ((LINEAR, 0, 20), "steps"),
            ((LINEAR, 9, 0.5), "retrain_steps"),
        ):
            with refused(name, argument):
                make(*given)
        with refused(name, "warmup"):
            make(LINEAR, 100, 20, warmup=100)
    with refused("slr", "original"):
        retraining.slr(lambda step: jnp.nan, 100, 20)
    for given, argument in (
        ({"norm_drop": 2.0, "fraction": 0.1}, "norm_drop"),
        ({"norm_drop": 0.1, "fraction": 0}, "fraction"),
    ):
        with refused("allr", argument):
            retraining.allr(LINEAR, 100, 20, **given)
    with refused("silo_max_lr", "pruned"):
        retraining.silo_max_lr(1.5, eps=0.1, alpha=0.1)
    for changed, argument in (
        ({"level": -1}, "level"),
        ({"warmup": 0.5}, "warmup"),
        ({"drops": 3}, "drops"),
        ({"rate": 1}, "rate"),
    ):
        with refused("silo", argument):
            retraining.silo(**{"level": 1, "eps": 0.1, "alpha": 0.1, "warmup": 3, "drops": ()} | changed)
    for given, argument in (((-1, 1, 4), "low"), ((0, 1, 1), "period")):
        with refused("triangular", argument):
            retraining.triangular(*given)
    with refused("norm_drop", "before"):
        retraining.norm_drop({}, {})
