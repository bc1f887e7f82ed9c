"""Preprocessing of images. All randomness is a pure function of (seed, position in the endless stream)."""

from __future__ import annotations

import io
import math

import numpy as np
from PIL import Image

AUGMENTATIONS = ("default", "none", "crop_flip", "inception")
# The mean and deviation of ImageNet's channels that everybody uses, in units of 0 .. 1.
IMAGENET_MEAN = np.array([0.485, 0.456, 0.406])
IMAGENET_STD = np.array([0.229, 0.224, 0.225])
_ATTEMPTS = 10


def uniforms(seed: int, positions: np.ndarray, count: int) -> np.ndarray:
    """Random numbers that can be asked for in any order.

    Args:
      seed: of the run.
      positions: int[n], place of each example in the endless stream of examples.
      count: numbers wanted for each example.

    Returns:
      float64[n, count] in [0, 1). Counter-based (SplitMix64): a position has the same numbers however many others
      are asked for beside it, in whichever process.
    """
    golden = np.uint64(0x9E3779B97F4A7C15)
    stream = _mix(np.array([seed % 2**64], np.uint64) + golden)
    example = _mix(stream + np.asarray(positions).astype(np.uint64) * golden)
    bits = _mix(example[:, None] + np.arange(1, count + 1, dtype=np.uint64) * golden)
    return (bits >> np.uint64(11)) * 2.0**-53


def _mix(z: np.ndarray) -> np.ndarray:
    """The finaliser of SplitMix64, on uint64 arrays (they wrap around, as it wants)."""
    z = (z ^ (z >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    z = (z ^ (z >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return z ^ (z >> np.uint64(31))


def crop_flip(images: np.ndarray, indices: np.ndarray, random: np.ndarray, pad: int = 4) -> np.ndarray:
    """Random crops of images padded by reflection, mirrored half of the time.

    Args:
      images: uint8[N, H, W, C], the whole set, C-contiguous.
      indices: int[n], which of them.
      random: float[n, 3] in [0, 1): row, column, mirror.
      pad: pixels added on every side; less than H and W.

    Returns:
      uint8[n, H, W, C].
    """
    _, height, width, channels = images.shape
    rows = _window(height, pad, random[:, 0])
    columns = _window(width, pad, random[:, 1])
    columns = np.where(random[:, 2:3] < 0.5, columns[:, ::-1], columns)
    # One gather of whole pixels from the set itself: no padded copy, four times quicker than slicing each image.
    pixels = (indices[:, None, None] * height + rows[:, :, None]) * width + columns[:, None, :]
    return np.take(images.reshape(-1, channels), pixels, axis=0)


def _window(size: int, pad: int, random: np.ndarray) -> np.ndarray:
    """int[n, size]: the source coordinate of each coordinate of a crop of the padded axis."""
    reflected = np.pad(np.arange(size), pad, mode="reflect")
    start = (random * (2 * pad + 1)).astype(np.int64)
    return reflected[start[:, None] + np.arange(size)]


def standardise_channels(images: np.ndarray, mean: np.ndarray, std: np.ndarray) -> np.ndarray:
    """`(images - mean) / std`, float32[n, H, W, C]; mean and std are [C], in the units of the uint8 images."""
    scale = (1.0 / std).astype(np.float32)
    shift = (-mean / std).astype(np.float32)
    result = np.multiply(images, scale, dtype=np.float32)
    result += shift
    return result


def standardise_image(images: np.ndarray) -> np.ndarray:
    """Each image to mean 0 and deviation 1: uint8[n, H, W, C] to float32.

    The deviation is at least 1/sqrt(H*W*C) in units of 0 .. 255, so a blank image becomes zeros.
    """
    flat = images.reshape(len(images), -1).astype(np.float32)
    flat -= flat.mean(axis=1, keepdims=True)
    count = flat.shape[1]
    std = np.sqrt(np.einsum("ij,ij->i", flat, flat) / count)
    flat *= (1.0 / np.maximum(std, 1.0 / math.sqrt(count)))[:, None]
    return flat.reshape(images.shape)


def decode(encoded: bytes, channels: int) -> np.ndarray:
    """PNG or JPEG bytes to uint8[H, W, channels], with 1 (grey) or 3 channels."""
    with Image.open(io.BytesIO(encoded)) as image:
        mode = "L" if channels == 1 else "RGB"
        pixels = np.asarray(image if image.mode == mode else image.convert(mode))
    return pixels.reshape(*pixels.shape[:2], channels)


def inception_crop(encoded: bytes, size: int, random: np.ndarray) -> np.ndarray:
    """A random part of the image, resized to uint8[size, size, 3], mirrored half of the time.

    The part covers 8 % to 100 % of the area, with an aspect ratio of 3/4 to 4/3, log-uniform. After 10 attempts that do
    not fit into the image, the largest centred part of a permitted ratio is taken.

    Args:
      encoded: PNG or JPEG bytes.
      size: side of the result, in pixels.
      random: float[41] in [0, 1), see `uniforms`.
    """
    with Image.open(io.BytesIO(encoded)) as image:
        box = _random_box(image.width, image.height, random)
        result = image.convert("RGB").resize((size, size), Image.Resampling.BILINEAR, box=box)
    if random[-1] < 0.5:
        result = result.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
    return np.asarray(result)


INCEPTION_RANDOM = 4 * _ATTEMPTS + 1


def _random_box(width: int, height: int, random: np.ndarray) -> tuple[int, int, int, int]:
    """(left, upper, right, lower) of a random part."""
    for area, ratio, x, y in random[:-1].reshape(_ATTEMPTS, 4):
        target = (0.08 + 0.92 * area) * width * height
        aspect = math.exp(math.log(3 / 4) + ratio * math.log(16 / 9))
        w, h = round(math.sqrt(target * aspect)), round(math.sqrt(target / aspect))
        if 0 < w <= width and 0 < h <= height:
            left, upper = int(x * (width - w + 1)), int(y * (height - h + 1))
            return left, upper, left + w, upper + h
    w = min(width, max(1, round(height * 4 / 3)))
    h = min(height, max(1, round(width * 4 / 3)))
    left, upper = (width - w) // 2, (height - h) // 2
    return left, upper, left + w, upper + h


def centre_crop(encoded: bytes, size: int) -> np.ndarray:
    """The central `size / 256 * 224`-th part: short side resized to `size * 256 / 224`, then uint8[size, size, 3]."""
    with Image.open(io.BytesIO(encoded)) as image:
        # The crop is made while resizing: its box in pixels of the original.
        side = min(image.width, image.height) * 224 / 256
        left, upper = (image.width - side) / 2, (image.height - side) / 2
        box = (left, upper, left + side, upper + side)
        return np.asarray(image.convert("RGB").resize((size, size), Image.Resampling.BILINEAR, box=box))
