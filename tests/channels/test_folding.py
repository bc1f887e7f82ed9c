"""Constants of removed channels in the biases of the next layers; what is measured; a model that is read again."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import rigl_jax as rx
from tests.channels.models import Draw, batch_norm, conv, dense

GONE = [1, 4]


@pytest.fixture(autouse=True)
def any_ranks():
    """The models broadcast."""
    with jax.numpy_rank_promotion("allow"):
        yield


def made(padding, size=3, bias=True):
    """A convolution whose normalisation has two scales of 0, and the one after it."""
    d = Draw()
    params = {"a": d.conv(3, 3, n=2, m=6), "n": d.batch_norm(6), "b": d.conv(size, size, n=6, m=4), "h": d.dense(4, 3)}
    for leaf, values in (("scale", 0), ("bias", [0.7, -0.4])):
        changed = np.array(params["n"][leaf])
        changed[GONE] = values
        params["n"][leaf] = jax.device_put(changed)

    def apply(p, x):
        x = jax.nn.relu(batch_norm(p["n"], conv(p["a"], x, padding="VALID")))
        b = p["b"] if bias else {**p["b"], "bias": 0.0}
        return dense(p["h"], jnp.tanh(conv(b, x, padding=padding)).mean((1, 2)))

    return params, apply, Draw(1)(2, 7, 7, 2)


def shrunk(params, apply, x, **options):
    keep = {"n/scale": {0: np.delete(np.arange(6), GONE)}}
    return rx.channels.shrink(apply, params, keep, x, **options)


@pytest.mark.parametrize(("padding", "size"), [("VALID", 3), ("SAME", 1)])
def test_a_constant_channel_goes_into_the_next_bias(padding, size):
    params, apply, x = made(padding, size)
    small, without = shrunk(params, apply, x), shrunk(params, apply, x, fold=False)
    run = jax.jit(lambda p, folded, plain: (apply(p, x), small.apply(folded, x), without.apply(plain, x)))
    want, folded, plain = map(np.asarray, run(params, small.params, without.params))
    np.testing.assert_allclose(folded, want, atol=1e-6)
    assert np.abs(plain - want).max() > 1e-3
    carried = np.asarray(params["b"]["kernel"])[:, :, GONE[0]].sum((0, 1)) * 0.7  # the other is 0 after the ReLU
    np.testing.assert_allclose(small.params["b"]["bias"], params["b"]["bias"] + carried, rtol=1e-5)
    assert small.notes == ()
    np.testing.assert_array_equal(without.params["b"]["bias"], params["b"]["bias"])


@pytest.mark.parametrize(("padding", "bias", "why"), [("SAME", True, "padded"), ("VALID", False, "bias")])
def test_what_cannot_be_folded_is_said(padding, bias, why):
    params, apply, x = made(padding, bias=bias)
    small = shrunk(params, apply, x)
    note, *unread = small.notes
    assert [text.split()[0] for text in unread] == ([] if bias else ["b/bias"])
    assert "b/kernel" in note
    assert why in note
    assert note.startswith("1 ")
    np.testing.assert_array_equal(small.params["b"]["bias"], params["b"]["bias"])


def test_channels_that_are_no_constants_fold_nothing():
    params, apply, x = made("VALID")
    small = rx.channels.shrink(apply, params, {"n/scale": {0: [1, 2, 3, 4, 5]}}, x)
    np.testing.assert_array_equal(small.params["b"]["bias"], params["b"]["bias"])
    assert small.notes == ()
    assert small.latency is None


def test_time_before_and_after():
    params, apply, x = made("VALID")
    before, after = shrunk(params, apply, jax.ShapeDtypeStruct(x.shape, x.dtype), repeats=2).latency
    assert 0 < after < 60 > before > 0
