"""What every measure refuses: no probabilities, labels that are no class, NaN, nothing. A new one is a row here."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from rigl_jax import channels, diagnostics
from rigl_jax.tracing.intervals import Interval
from tests.errors import refused

DRAW = np.random.default_rng(0)
KEY = jax.random.key(0)
X = DRAW.normal(size=(6, 3)).astype(np.float32)
PROBS = np.exp(X) / np.exp(X).sum(1, keepdims=True)
LABELS = np.arange(6) % 3
IMAGES = DRAW.uniform(size=(6, 2, 2, 3)).astype(np.float32)
W = np.eye(3, dtype=np.float32)
ROW = np.ones(3, np.float32)


def product(params, x):
    return x @ params


OF_PROBS = {name: getattr(diagnostics, name) for name in ("nll", "brier", "ece")}
NO_PROBS = {
    "logits": 10 * X,
    "NaN": np.nan * PROBS,
    "nothing": PROBS[:0],
    "one class": np.ones((6, 1)),
    "another rank": PROBS[0],
    "integers": np.ones((6, 3), int),
}


@pytest.mark.parametrize("kind", NO_PROBS)
@pytest.mark.parametrize("name", OF_PROBS)
def test_what_is_no_probability_is_refused(name, kind):
    with refused(name, "probs"):
        OF_PROBS[name](NO_PROBS[kind], LABELS[: len(NO_PROBS[kind])])


OF_LABELS = {
    **{name: lambda y, f=measure: f(PROBS, y) for name, measure in OF_PROBS.items()},
    "certified_accuracy": lambda y: diagnostics.certified_accuracy(product, W, X, y, 0.1),
    "corrupted_accuracy": lambda y: diagnostics.corrupted_accuracy(
        lambda x: x[:, 0, 0], IMAGES, y, KEY, names=["contrast"], severities=[1]
    ),
}
NO_LABELS = {"too large": LABELS + 1, "negative": LABELS - 1, "floats": 1.0 * LABELS, "too few": LABELS[:2]}


@pytest.mark.parametrize("kind", NO_LABELS)
@pytest.mark.parametrize("name", OF_LABELS)
def test_labels_that_are_no_class_are_refused(name, kind):
    with refused(name, "labels"):
        OF_LABELS[name](NO_LABELS[kind])


def test_a_label_that_is_no_class_is_nan_under_jit():
    assert np.isnan(jax.jit(diagnostics.nll)(PROBS[:2], np.array([0, -1])))
    assert np.isnan(jax.jit(diagnostics.nll)(PROBS[:2], np.array([0, 3])))


OF_NUMBERS = {
    "effective_rank matrix": diagnostics.effective_rank,
    "dead_rate activations": diagnostics.dead_rate,
    "disagreement a": lambda x: diagnostics.disagreement(x, x),
    "agn y": lambda x: diagnostics.agn(KEY, x, 0.1),
    "interval_bounds low": lambda x: diagnostics.interval_bounds(product, W, x, x),
    "certified_accuracy inputs": lambda x: diagnostics.certified_accuracy(product, W, x, LABELS[: len(x)], 0.1),
    "corrupt images": lambda x: diagnostics.corrupt(KEY, x[:, None, None], "contrast"),
    "corrupted_accuracy images": lambda x: diagnostics.corrupted_accuracy(
        lambda x: x[:, 0, 0], x[:, None, None], LABELS[: len(x)], KEY
    ),
    "mutual_information x": lambda x: diagnostics.mutual_information(x[:, 0], x[:, 0]),
    "biased_edges kernel": lambda x: diagnostics.biased_edges(x, x[:, 0], x[:, 0]),
    "copula_normalise x": diagnostics.copula_normalise,
    "error_std error_map": lambda x: diagnostics.error_std(x, ROW, ROW, 3),
    "dead_units relus": lambda x: diagnostics.dead_units([Interval(x, x)]),
    "nrs relus": lambda x: diagnostics.nrs([Interval(x, x)]),
    "nrs_scores relus": lambda x: diagnostics.nrs_scores([Interval(x, x)]),
}


@pytest.mark.parametrize("x", [X * np.where(np.eye(6, 3) > 0, np.nan, 1), X[:0]], ids=["NaN", "nothing"])
@pytest.mark.parametrize("name", OF_NUMBERS)
def test_nan_and_nothing_are_refused(name, x):
    with refused(*name.split()):
        OF_NUMBERS[name](x)


def test_outputs_below_0_and_normalised_images_are_refused():
    with refused("dead_rate", "activations"):
        diagnostics.dead_rate(X)
    with refused("corrupt", "images"):
        diagnostics.corrupt(KEY, 2 * IMAGES, "contrast")


def test_a_rank_is_the_same_at_any_scale():
    for scale in (1e20, 1e-25, 1e200, 1e-200):
        assert int(diagnostics.effective_rank(scale * np.eye(3))) == 3
    batch = np.eye(3, dtype=np.float32)
    found = diagnostics.gradient_ranks(lambda p, x: jnp.mean(1e-24 * (x @ p) ** 2), W + 1, batch, energy=1.0)
    assert list(found.values()) == [pytest.approx(1.0)]


@pytest.mark.parametrize(
    "measure", [diagnostics.gradient_ranks, lambda *a: diagnostics.noise_tolerance(*a, KEY, steps=1)]
)
def test_measures_of_gradients_refuse_what_has_none(measure):
    with refused("loss", "finite"):
        measure(lambda p, x: jnp.mean((x @ p["w"]) ** 2), {"w": W, "steps": np.int32(1)}, np.nan * X)
    with refused("loss"):
        measure(lambda p, x: x @ p, W, X)


def test_certificates_name_what_the_user_gave():
    images = np.ones((2, 3), np.uint8)
    for name, call in (
        ("certified_accuracy inputs", lambda: diagnostics.certified_accuracy(product, W, images, LABELS[:2], 1)),
        ("interval_bounds low", lambda: diagnostics.interval_bounds(product, W, images, images)),
        ("interval_bounds high 0.5 1", lambda: diagnostics.interval_bounds(product, W, X * 0 + 1, X * 0 + [1, 0.5, 1])),
        ("interval_bounds apply", lambda: diagnostics.interval_bounds(product, np.nan * W, X, X)),
        ("certified_accuracy apply", lambda: diagnostics.certified_accuracy(product, np.nan * W, X, LABELS, 0.1)),
        ("certified_accuracy apply", lambda: diagnostics.certified_accuracy(lambda w, x: x[:, 0], W, X, LABELS, 0.1)),
        ("certified_accuracy apply", lambda: diagnostics.certified_accuracy(lambda w, x: x[:, :1], W, X, LABELS, 0.1)),
        ("nrs gammas", lambda: diagnostics.nrs([Interval(X, X)], [np.ones(7)])),
    ):
        with refused(*name.split()):
            call()
    with refused("jnp.maximum"):
        diagnostics.interval_bounds(lambda w, x: jax.nn.leaky_relu(x), W, X, X)


@pytest.mark.parametrize(
    ("given", "same"),
    [
        (lambda x: jnp.maximum(x, 0.01 * x), lambda x: jax.nn.leaky_relu(x, 0.01)),
        (lambda x: -jnp.log(jax.nn.sigmoid(-x)), jax.nn.softplus),
        (jax.nn.relu6, jax.nn.relu6),
    ],
)
def test_activations_that_the_docstring_names_have_exact_bounds(given, same):
    low, high = diagnostics.interval_bounds(lambda w, x: given(x), W, X - 1, X + 1).outputs
    np.testing.assert_allclose([low, high], [same(X - 1), same(X + 1)], rtol=1e-4, atol=1e-6)


def test_what_dead_units_gives_is_what_shrink_takes():
    params = {"a": np.ones((3, 4), np.float32), "b": np.ones((4, 2), np.float32)}
    alive = np.array([True, False, True, False])
    for bad in (~np.ones(4, bool), [0, 0, 1], [0, 4], [-1, 0], alive[:2]):
        with refused("shrink", "keep"):
            channels.shrink(lambda p, x: x @ p["a"] @ p["b"], params, {"a": {1: bad}}, X)
    small = channels.shrink(lambda p, x: x @ p["a"] @ p["b"], params, {"a": {1: alive}}, X)
    assert small.kept["a"][1].tolist() == [0, 2]
