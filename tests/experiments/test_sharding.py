"""Rules say where weights lie, and what belongs to a weight lies with it."""

import functools
import types

import jax
import numpy as np
import pytest
from flax import linen as nn
from jax.sharding import PartitionSpec

from experiments import execution, sharding
from experiments.io import digests
from tests.errors import refused
from tests.experiments.runs import configured, prepare

SHAPES = {
    "conv": {"kernel": jax.ShapeDtypeStruct((3, 3, 8, 16), "float32")},
    "dense": {"kernel": jax.ShapeDtypeStruct((16, 6), "float32"), "bias": jax.ShapeDtypeStruct((6,), "float32")},
}
ALL = functools.cache(jax.devices)
P = PartitionSpec


def grid(**axes):
    return sharding.mesh(axes, ALL())


def test_a_mesh_takes_the_devices_that_are_left():
    assert dict(sharding.mesh({}, ALL()).shape) == {"data": 8}
    assert dict(grid(data=-1, model=4).shape) == {"data": 2, "model": 4}
    assert grid(data=2, model=4).devices[0].tolist() == ALL()[:4]


@pytest.mark.parametrize(
    "axes", [{"data": 3}, {"model": 8}, {"data": -1, "model": -1}, {"data": 0}, {"data": -1, "m": 3}]
)
def test_a_mesh_that_does_not_fit(axes):
    with refused("config.mesh"):
        sharding.mesh(axes, ALL())


def test_a_part_of_the_batch_belongs_to_one_process():
    devices = [types.SimpleNamespace(process_index=i // 2) for i in range(4)]
    with refused("processes"):
        sharding.mesh({"data": 1, "model": 4}, devices)


def test_grouped_convolutions_take_a_mesh_of_one_axis():
    def init(groups):
        return nn.Conv(8, (3, 3), feature_group_count=groups).init(jax.random.key(0), np.ones((1, 4, 4, 8)))

    both = grid(data=2, model=4)
    for groups in (4, 8):
        with refused("config.mesh", "grouped convolutions", "'model': 4"):
            sharding.check_convolutions(functools.partial(init, groups), both)
    sharding.check_convolutions(functools.partial(init, 1), both)
    sharding.check_convolutions(functools.partial(init, 8), grid(data=8, model=1))


def test_rules_count_axes_from_the_last():
    rules = ((".*/kernel", (None, "model")), ("dense/bias", ("model",)))
    assert sharding.specs(rules, SHAPES, grid(data=4, model=2)) == {
        "conv/kernel": P(None, None, None, "model"),
        "dense/kernel": P(None, "model"),
        "dense/bias": P("model"),
    }
    assert sharding.specs(((".*", "fsdp"),), SHAPES, grid(data=4, model=2)) == {
        "conv/kernel": P(None, None, None, "data"),
        "dense/kernel": P("data"),
        "dense/bias": P(),  # nothing to divide
    }
    assert sharding.specs(sharding.ALL_OUTPUTS, SHAPES, grid(data=2, model=4)) == {
        "conv/kernel": P(None, None, None, "model"),
        "dense/kernel": P("model"),  # 4 does not divide its outputs
        "dense/bias": P(),
    }
    both = sharding.specs((("conv/kernel", (["data", "model"],)),), SHAPES, grid(data=4, model=2))
    assert both["conv/kernel"] == P(None, None, None, ("data", "model"))


def test_where_packed_weights_lie():
    """That such runs are those of one device: tests/execution/test_layout.py, test_train.py, test_multihost.py."""
    data, both = grid(data=8), grid(data=2, model=4)
    found = [execution._packed_sharding(mesh, rules) for mesh, rules in ((data, ()), (data, [[".*", "fsdp"]]))]
    assert [at.spec for at in found] == [P(), P("data")]
    assert execution._packed_sharding(both, [[".*", "outputs"]]).spec == P(None, "model")
    assert execution._packed_sharding(sharding.mesh({}, ALL()[:1]), sharding.ALL_FSDP) is None


@pytest.mark.parametrize(
    ("rule", "named"),
    [
        (("dense/kernl", "fsdp"), "dense/kernl dense/kernel"),
        (("dense/bias", (None, "model")), "dense/bias"),
        (("dense/kernel", ("modle",)), "modle dense/kernel data model"),
        (("dense/kernel", ("model",)), "dense/kernel model"),
        (("dense/kernel", "model"), "config.sharding[0]"),
        ((".*", "outputs"), "model data"),
        (("dense/kernel",), "config.sharding[0]"),
    ],
)
def test_a_wrong_rule(rule, named):
    mesh = grid(data=8) if rule[-1] == "outputs" else grid(data=2, model=4)
    with refused(*named.split()):
        sharding.specs((rule,), SHAPES, mesh)


def test_drift_is_told_with_who_holds_what():
    sharding.compare(np.full((2, 4), 7, np.uint32), 100)
    with refused("100", "00000008"):
        sharding.compare(np.array([[7, 7], [7, 8]], np.uint32), 100)


def test_agreement_on_one_process():
    sharding.check_agreement(digests.digest({"a": np.ones((2, 2), bool)}), 1)


def test_what_belongs_to_a_weight_lies_with_it():
    """That such a run is the run on one device: tests/experiments/test_multihost.py."""
    config = configured()
    config.unlock()
    config.update(mesh={"data": 4, "model": 2}, sharding=(("Dense_[01]/kernel", (None, "model")), (".*", "fsdp")))
    state = prepare(config, ALL()).execution.abstract()
    kernels = [*jax.tree.leaves((state.opt_state.inner, state.opt_state.masks, state.explored, state.params))]
    spread = [x for x in kernels if x.ndim == 2 and x.shape[1] % 2 == 0]
    assert len(spread) == 4 * 2
    assert all(x.sharding.spec[-1] == "model" for x in spread)
