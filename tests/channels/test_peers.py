"""The kinds of models that Torch-Pruning lists: each is halved, and can be run forward and backward."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import rigl_jax as rx
from tests.channels import models
from tests.channels.peers import NEW, make
from tests.channels.peers_table import PAGE, PEERS, rows_of

SIZES = {
    "vgg_bn": [8, 12, 16], "squeezenet": [6, 6, 4], "bottleneck": [4, 8, 4, 16, 4, 4], "preact_resnet": [6, 8],
    "mobilenet_v2": [4, 12], "mobilenet_v3": [4, 12, 6], "efficientnet": [4, 12, 6], "efficientnet_v2": [4, 12],
    "regnet": [4, 8, 4], "inception_v3": [4, 4, 6, 4], "xception": [8, 12], "shufflenet_v2": [4, 4, 4, 10],
    "swin": [2, 8, 12, 10], "bert": [8, 2, 12, 8], "llama": [12, 8, 2], "segment_anything": [8, 2, 4, 6, 2, 6],
    "diffusion": [4, 4, 2, 4, 8, 2], "retinanet": [6, 6, 8, 12, 6], "mask_rcnn": [10, 8, 12, 6, 6, 6, 6, 4],
    "ssd": [8, 10], "deeplab": [4, 8, 8, 4, 4], "lraspp": [6, 8, 8], "yolo": [8, 4, 4, 8, 8, 10, 4, 10],
    "raft": [8, 6, 4], "dgcnn": [8, 10], "graph_attention": [2, 6], "cascaded_concat": [4, 8, 12],
    "concat_split": [6, 6, 6], "shared_split": [4, 8], "other_axis": [6, 8], "reshaped": [6, 4],
    "customized": [8, 8], "fc_residual": [8], "several_outputs": [10], "wide_and_deep": [8, 6, 4],
    "prelu_instance": [8],
}  # fmt: skip
"""How many channels each group has that can be removed, in the order of the leaves."""
RUN = ("shufflenet_v2", "graph_attention", "reshaped")
"""Kinds whose rules no other test runs."""


@pytest.fixture(autouse=True)
def any_ranks():
    """The models broadcast."""
    with jax.numpy_rank_promotion("allow"):
        yield


def trained(apply):
    """`(params, x) -> outputs, gradients`."""

    def total(params, x):
        out = apply(params, x)
        return sum(jnp.sum(part**2) for part in jax.tree.leaves(out)), out

    def run(params, x):
        (_, out), grads = jax.value_and_grad(total, has_aux=True)(params, x)
        return out, grads

    return run


@pytest.mark.parametrize("kind", NEW)
def test_each_kind_is_halved(kind):
    params, apply, x = make(kind)
    if kind not in RUN:  # shapes say all
        params = jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype), params)
    groups = rx.channels.groups(apply, params, x)
    assert [group.size for group in groups if not group.why] == SIZES[kind], str(groups)
    assert not any(group.unknown for group in groups)
    scores = [np.random.default_rng(i).random(group.size) for i, group in enumerate(groups)]
    keep = rx.channels.select(groups, scores, remove=0.5, scope="layer")
    small = rx.channels.shrink(apply, params, keep, x, fold=False)
    out, grads = jax.eval_shape(trained(small.apply), small.params, x)
    assert jax.tree.map(jnp.shape, out) == jax.tree.map(jnp.shape, jax.eval_shape(apply, params, x))
    assert jax.tree.map(jnp.shape, grads) == jax.tree.map(jnp.shape, small.params)
    assert rows_of(kind, small)
    assert all(row in PAGE.read_text() for row in rows_of(kind, small))
    if kind in RUN:
        _runs(apply, params, keep, small, x)


def test_every_kind_of_theirs_is_one_of_ours():
    assert set(PEERS.values()) == set(NEW) | (set(PEERS.values()) & set(models.KINDS))


def _runs(apply, params, keep, small, x):
    """The same function as the large model of the same weights, others being 0; gradients are numbers."""
    dead = {name: np.zeros(leaf.shape, np.float32) for name, leaf in rx.trees.named_leaves(params).items()}
    for name, leaf in rx.trees.named_leaves(small.params).items():
        dead[name][np.ix_(*(keep.get(name, {}).get(k, range(n)) for k, n in enumerate(dead[name].shape)))] = leaf
    dead = jax.tree.unflatten(jax.tree.structure(params), dead.values())
    (got, grads), want = jax.jit(lambda p, q: (trained(small.apply)(p, x), apply(q, x)))(small.params, dead)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5), got, want)
    assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(grads))
