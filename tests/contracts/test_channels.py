"""What must hold of channels for every kind of model: a new kind is a row of `tests.channels.models`, no line here."""

import functools

import jax
import numpy as np
import pytest

import rigl_jax as rx
from tests.channels.models import KINDS, Draw, make
from tests.channels.peers_table import PAGE, rows_of

SIZES = {
    "mlp": [12, 10], "lenet": [8, 12, 16], "resnet": [16, 8, 16], "padded_shortcut": [8, 8], "densenet": [4, 8, 4],
    "inception": [4, 6, 8, 4], "mobilenet": [8], "resnext": [8], "shufflenet": [8, 8], "squeeze_excite": [8, 4],
    "unet": [8, 12, 6], "convnext": [8, 32], "group_normed": [8], "temporal": [8], "volume": [6],
    "vit": [16, 20, 4, 6, 6], "gpt": [20, 16, 4], "grouped_query": [4], "lstm": [8], "gru": [8],
    "stacked": [16, 20, 4, 6, 6], "experts": [4, 10], "branch": [8],
}  # fmt: skip
"""How many channels each group has that can be removed, in the order of the leaves."""
OTHER_WIDTHS = {"padded_shortcut"}  # its function of smaller params is another one: it pads both sides alike
each = pytest.mark.parametrize("kind", KINDS)


@pytest.fixture(autouse=True)
def any_ranks():
    """The models broadcast."""
    with jax.numpy_rank_promotion("allow"):
        yield


@functools.cache
def grouped(kind):
    params, apply, x = make(kind)
    return params, apply, x, rx.channels.groups(apply, params, x)


def shapes(params):
    """Params of which only shapes are needed: nothing is computed."""
    return jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype), params)


def drawn_scores(groups):
    return [np.random.default_rng(i).random(group.size) for i, group in enumerate(groups)]


@each
def test_groups_are_those_of_the_architecture_and_hold_every_place_once(kind):
    _, _, _, groups = grouped(kind)
    assert [group.size for group in groups if not group.why] == SIZES[kind]
    assert not any(group.unknown for group in groups)
    places = [(m.leaf, m.axis, p) for group in groups for m in group.members for p in m.positions.reshape(-1).tolist()]
    assert len(places) == len(set(places))
    for group in groups:
        assert all(len(member.positions) == group.size for member in group.members)
    assert str(groups).count("\n") == len(groups)


@each
def test_a_halved_model_is_the_same_function_of_smaller_params_and_trains(kind):
    params, apply, x, groups = grouped(kind)
    keep = rx.channels.select(groups, drawn_scores(groups), remove=0.5, scope="layer")
    small = rx.channels.shrink(apply, params, keep, x, fold=False)
    assert jax.tree.structure(small.params) == jax.tree.structure(params)
    assert all(row in PAGE.read_text() for row in rows_of(kind, small))
    assert small.weights[1] == sum(leaf.size for leaf in jax.tree.leaves(small.params)) < small.weights[0]
    assert small.macs == (rx.flops(apply, params, x).total, rx.flops(small.apply, small.params, x).total)
    draw = Draw(9)
    along = jax.tree.map(lambda leaf: draw.drawn(*leaf.shape), small.params)

    def total(apply):
        return lambda p: (lambda out: ((out**2).mean(), out))(apply(p, x))

    @jax.jit
    def both(p, along):
        """The derivatives of one backwards, those of the other forwards, along a random direction."""
        plain = () if kind in OTHER_WIDTHS else jax.jvp(total(apply), (p,), (along,), has_aux=True)
        return jax.value_and_grad(total(small.apply), has_aux=True)(p), plain

    ((value, out), grads), plain = both(small.params, along)
    if plain:
        np.testing.assert_allclose(out, plain[2], rtol=1e-5, atol=1e-5)
        np.testing.assert_allclose(value, plain[0], rtol=1e-5)
        pairs = zip(jax.tree.leaves(grads), jax.tree.leaves(along), strict=True)
        rise = [np.asarray(a, np.float64) * b for a, b in pairs]
        size = np.sqrt(sum(np.square(part).sum() for part in rise))
        np.testing.assert_allclose(sum(part.sum() for part in rise), plain[1], rtol=1e-4, atol=1e-4 * size)
    assert out.shape == jax.eval_shape(apply, params, x).shape
    for leaf, grad in rx.trees.named_leaves(grads).items():
        assert np.isfinite(grad).all()
        unread = any("not read" in group.why for group in groups for m in group.members if m.leaf == leaf)
        assert unread or kind == "branch" or np.abs(grad).max() > 0, leaf
    again = rx.channels.groups(small.apply, small.params, x)
    assert [group.size for group in again if not group.why] == [-(-size // 2) for size in SIZES[kind]]


@each
def test_channels_that_are_0_are_removed_without_a_change(kind):
    params, apply, x, groups = grouped(kind)
    exact = [group if group.exact else group._replace(why="changes the function") for group in groups]
    keep = rx.channels.select(exact, drawn_scores(exact), remove=0.4)
    assert bool(keep) == any(not group.why for group in exact)
    if not keep:
        return
    dead = {name: np.array(leaf) for name, leaf in rx.trees.named_leaves(params).items()}
    for leaf, axes in keep.items():
        for axis, positions in axes.items():
            np.moveaxis(dead[leaf], axis, 0)[np.delete(np.arange(dead[leaf].shape[axis]), positions)] = 0
    dead = jax.tree.unflatten(jax.tree.structure(params), jax.device_put([*dead.values()]))
    small = rx.channels.shrink(apply, dead, keep, x)
    got, want = jax.jit(lambda p, q: (small.apply(p, x), apply(q, x)))(small.params, dead)
    np.testing.assert_allclose(got, want, rtol=1e-5, atol=1e-5)


@each
def test_selected_macs_are_kept_to(kind):
    params, apply, x, groups = grouped(kind)
    for scope in ("global", "layer"):
        keep = rx.channels.select(groups, drawn_scores(groups), macs=0.7, scope=scope)
        small = rx.channels.shrink(apply, shapes(params), keep, x)
        assert 0.2 * small.macs[0] < small.macs[1] <= 0.7 * small.macs[0]
