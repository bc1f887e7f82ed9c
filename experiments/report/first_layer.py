"""The first sparse layer's mask as a picture: where in the image a method looks."""

from __future__ import annotations

import base64
import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from experiments import measure, texts
from experiments.report import drawing
from experiments.report.drawing import Line
from experiments.report.runs import Run
from experiments.report.tables import group


def unpack_mask(record: Mapping[str, Any]) -> np.ndarray:
    """The mask of a "first_layer" line: bool[*shape].

    Raises:
      ValueError: the packed bits do not fill the shape.
    """
    shape = tuple(record["shape"])
    n_bytes = len(base64.b64decode(record["rows_packed"]))
    if n_bytes != -(-math.prod(shape) // 8):  # too few would be read as inactive weights
        raise ValueError(
            f"report: first_layer mask of {record['leaf']} at step {record['step']}: expected "
            f"{math.prod(shape)} bits for shape {shape}, got {n_bytes} bytes"
        )
    return measure.unpack_mask(record)


def pixel_counts(mask: np.ndarray) -> np.ndarray:
    """Active connections of each input pixel, as an image.

    Args:
      mask: bool[inputs, units] of a dense layer on a flattened square image of 1 or 3 channels (row by row,
        channels last), or bool[height, width, in, out] of a convolution.

    Returns:
      int[height, width]: connections that leave each pixel (summed over channels), or that use each position of the
      convolution's window. A dense layer whose input is no square image gives one row.
    """
    if mask.ndim == 4:
        return mask.sum(axis=(2, 3))
    counts = mask.reshape(mask.shape[0], -1).sum(axis=1)
    for channels in (1, 3):
        side = math.isqrt(len(counts) // channels)
        if side * side * channels == len(counts):
            return counts.reshape(side, side, channels).sum(axis=2)
    return counts[None, :]


class _Pictures(NamedTuple):
    text: str
    start: np.ndarray
    end: np.ndarray


def _pictures(lines: Iterable[Line]) -> list[_Pictures]:
    out = []
    for line in lines:
        pairs = [records for run in line.runs if (records := run.of_kind("first_layer"))]
        if pairs:
            start, end = (
                np.mean([pixel_counts(unpack_mask(pair[which])) for pair in pairs], axis=0) for which in (0, -1)
            )
            out.append(_Pictures(line.text, start, end))
    return out


def first_layer(runs: Iterable[Run]) -> Figure | None:
    """The first sparse layer's mask as pictures: a row a method; its start, its end, and the change between.

    Counts are means over the seeds that recorded it. Within a sparsity all methods share their colour scales, so that
    they compare.
    """
    groups = group(runs)
    found = {panel: _pictures(drawing.lines(groups, panel, dense=False)) for panel in drawing.panels(groups)}
    found = {panel: pictures for panel, pictures in found.items() if pictures}
    if not found:
        return None
    record = next(record for members in groups.values() for run in members for record in run.of_kind("first_layer"))
    height = max(len(pictures) for pictures in found.values())
    with matplotlib.rc_context(drawing.LOOK | {"axes.grid": False}):
        wide = len(found) > 1
        figure, rows = drawing.new_figure(3 * len(found), height, 1.7 if wide else 2.2, 2.0 if wide else 2.4)
        for number, (panel, pictures) in enumerate(found.items()):
            block = [row[3 * number : 3 * number + 3] for row in rows]
            _panel(figure, block, pictures)
            heading = drawing.title(panel) if wide else ""
            for axes, text in zip(block[0], ("start", f"{heading}\nend".lstrip(), "change"), strict=True):
                axes.set_title(text)
        per = "input pixel" if len(record["shape"]) != 4 else "position of the window"
        where = "" if wide else f", {drawing.title(next(iter(found)))}"
        figure.supxlabel(f"Active connections of each {per}, {texts.figure(record['leaf'])}{where}", fontsize=9.5)
    return figure


def _panel(figure: Figure, block: Sequence[Sequence[Axes]], pictures: Sequence[_Pictures]) -> None:
    top = max(1.0, *(float(max(one.start.max(), one.end.max())) for one in pictures))
    reach = max(1.0, *(float(np.abs(one.end - one.start).max()) for one in pictures))
    # 49 levels each: enough to see, few enough for the palette of the file, odd so that no change has its own.
    counts, changes = (matplotlib.colormaps[name].resampled(49) for name in ("viridis", "PuOr_r"))
    images = []
    for row, one in zip(block, pictures, strict=False):
        aspect = "equal" if one.start.shape[0] > 1 else "auto"
        images = [
            row[0].imshow(one.start, cmap=counts, vmin=0, vmax=top, interpolation="nearest", aspect=aspect),
            row[1].imshow(one.end, cmap=counts, vmin=0, vmax=top, interpolation="nearest", aspect=aspect),
            row[2].imshow(one.end - one.start, cmap=changes, vmin=-reach, vmax=reach, aspect=aspect),
        ]
        row[0].set_ylabel(one.text)
    for row in block:
        for axes in row:
            axes.set(xticks=[], yticks=[])
            axes.spines[:].set_visible(False)
    for row in block[len(pictures) :]:
        for axes in row:
            axes.set_visible(False)
    for image, columns in ((images[1], (0, 1)), (images[2], (2,))):
        below = [row[column] for row in block for column in columns]
        ticks = MaxNLocator(4 if len(columns) > 1 else 2, integer=True, symmetric=len(columns) == 1)
        bar = figure.colorbar(image, ax=below, location="bottom", aspect=14 * len(columns), pad=0.02, ticks=ticks)
        bar.outline.set_visible(False)
