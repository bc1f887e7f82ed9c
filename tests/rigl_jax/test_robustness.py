"""Curves over sparsities and seeds, and corrupted images against SciPy, Pillow and the definitions."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from PIL import Image
from scipy import ndimage

from rigl_jax import diagnostics
from tests.errors import refused

KEY = jax.random.key(0)
POINTS = (0.0, 0.5, 0.8, 0.9, 0.95)
IMAGES = np.random.default_rng(0).uniform(size=(4, 16, 12, 3)).astype(np.float32)


def test_a_curve_has_the_mean_and_the_spread_of_its_runs():
    rng = np.random.default_rng(0)
    table = {(p, s): rng.normal(size=2) for p in POINTS for s in (0, 1, 5, 7)}
    found = diagnostics.curve(lambda p, s: dict(zip("ab", table[p, s], strict=True)), POINTS, [0, 1, 5, 7])
    for i, measure in enumerate("ab"):
        rows = np.array([[table[p, s][i] for s in (0, 1, 5, 7)] for p in POINTS])
        np.testing.assert_allclose(found.mean(measure), rows.mean(1))
        np.testing.assert_allclose(found.std(measure), np.sqrt(((rows - rows.mean(1, keepdims=True)) ** 2).sum(1) / 3))
    lines = str(found).splitlines()
    assert len(lines) == 6
    assert found._repr_html_().count("<tr>") == 6
    assert lines[3].strip().startswith(f"0.8  {found.mean('a')[2]:.4g} +- ")


def test_too_little_is_no_curve():
    run = lambda p, s: {"a": p}  # noqa: E731
    for given, argument in (
        ((run, POINTS[:4], (0, 1, 2)), "at"),
        ((run, (*POINTS[:4], 0.0), (0, 1, 2)), "at"),
        ((run, POINTS, (0, 1)), "seeds"),
        ((run, POINTS, (0, 1, 1)), "seeds"),
        ((lambda p, s: p, POINTS, (0, 1, 2)), "run"),
        ((lambda p, s: {"a": None}, POINTS, (0, 1, 2)), "run"),
        ((lambda p, s: {"a": float("nan")}, POINTS, (0, 1, 2)), "finite"),
        ((lambda p, s: {"a": float("inf")}, POINTS, (0, 1, 2)), "finite"),
        ((lambda p, s: {"ab"[s % 2]: 1.0}, POINTS, (0, 1, 2)), "run"),
    ):
        with refused("curve", argument):
            diagnostics.curve(*given)


def corrupted(name, severity, images=IMAGES):
    return np.asarray(jax.jit(diagnostics.corrupt, static_argnums=(2, 3))(KEY, images, name, severity), np.float64)


def test_blur_and_pixels_are_those_of_scipy_and_pillow():
    blurred = ndimage.gaussian_filter(IMAGES.astype(np.float64), (0, 0.8, 0.8, 0), mode="nearest", truncate=4)
    np.testing.assert_allclose(corrupted("gaussian_blur", 4), blurred, atol=1e-5)
    found = corrupted("pixelate", 5)
    for image, pixels in zip(IMAGES, found, strict=True):
        for c in range(3):
            small = Image.fromarray(image[..., c]).resize((int(12 * 0.65), int(16 * 0.65)), Image.Resampling.BOX)
            np.testing.assert_allclose(pixels[..., c], small.resize((12, 16), Image.Resampling.BOX), atol=1e-5)


def test_brightness_and_contrast_by_their_definitions():
    found = corrupted("brightness", 3)
    np.testing.assert_allclose(found.max(-1), np.minimum(IMAGES.max(-1) + 0.15, 1), atol=1e-6)
    np.testing.assert_allclose(found / found.max(-1, keepdims=True), IMAGES / IMAGES.max(-1, keepdims=True), atol=1e-5)
    assert np.allclose(corrupted("brightness", 1, np.zeros((1, 2, 2, 1), np.float32)), 0.05)
    found = corrupted("contrast", 5)
    np.testing.assert_allclose(found.mean((1, 2)), IMAGES.mean((1, 2)), atol=1e-5)
    np.testing.assert_allclose(found.std((1, 2)), 0.15 * IMAGES.std((1, 2)), atol=1e-5)


def test_noises_have_their_moments():
    x, n = np.full((1, 300, 300, 1), 0.5, np.float32), 90_000
    for name, std in (("gaussian_noise", 0.08), ("speckle_noise", 0.06), ("shot_noise", np.sqrt(0.5 / 100))):
        found = corrupted(name, 3, x)
        assert abs(found.mean() - 0.5) < 5 * std / np.sqrt(n)
        assert found.std() == pytest.approx(std, rel=0.02)
    found = corrupted("impulse_noise", 5, x)
    for value in (0, 1):
        assert (found == value).mean() == pytest.approx(0.035, abs=5 * np.sqrt(0.035 / n))


def test_accuracy_under_corruption():
    """The sharper of two pictures; noise of both kinds finds the wrong one sometimes, contrast never."""
    images = np.concatenate([np.full((50, 4, 4, 1), 0.55), np.full((50, 4, 4, 1), 0.45)]).astype(np.float32)
    labels = np.repeat([0, 1], 50)
    apply = lambda x: jnp.stack([x[:, 0, 0, 0], 1 - x[:, 0, 0, 0]], 1)  # noqa: E731
    found = diagnostics.corrupted_accuracy(apply, images, labels, KEY, names=["gaussian_noise", "contrast"])
    assert found["contrast"].tolist() == [1.0] * 5
    assert found["gaussian_noise"].shape == (5,)
    again = diagnostics.corrupted_accuracy(apply, images, labels, KEY, names=["gaussian_noise"], severities=[5])
    assert again["gaussian_noise"].tolist() == found["gaussian_noise"][4:].tolist()
    assert 0.5 < again["gaussian_noise"][0] < 0.95  # 0.69 in expectation
    for given, argument in (({"names": ["fog"]}, "names"), ({"severities": [6]}, "severities")):
        with refused("corrupted_accuracy", argument):
            diagnostics.corrupted_accuracy(apply, images, labels, KEY, **given)
    with refused("corrupted_accuracy", "labels"):
        diagnostics.corrupted_accuracy(apply, images, labels[:3], KEY)
    with refused("corrupt", "images"):
        diagnostics.corrupt(KEY, np.zeros((1, 2, 2, 1), np.uint8), "contrast")
