"""What the rules of channels share, and the rule of primitives that have none."""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np

from rigl_jax.tracing.channels import Labels
from rigl_jax.tracing.program import Program
from rigl_jax.tracing.walk import Walker


class Sum(NamedTuple):
    """A sum over axes: over how many entries, and the labels of the axes."""

    count: int
    axes: tuple[np.ndarray, ...]


class Notes(NamedTuple):
    """What the rules share.

    Attributes:
      numbers: `{variable: array}` of those whose values are written down in the program.
      sums: `{variable: Sum}` of sums over channels, also seen through changes of shape and type.
      means: `{result: (Sum, which operand is the number)}` of divisions of such a sum by the number of its terms.
      over: `{result: labels}` of the channels that sums, maxima and products run over.
      bodies: `{first result of a loop or branch: the programs that it runs}`.
      products: `(MACs, labels of the axes that they are proportional to)` of every product.
      uneven: labels of channels whose removal may change the function even where they are 0.
      weights: the first position that is not of a weight.
      trips: how often the equations that are being read are run.
    """

    numbers: dict[Any, np.ndarray]
    sums: dict[Any, Sum]
    means: dict[Any, tuple[Sum, int]]
    over: dict[Any, tuple[np.ndarray, ...]]
    bodies: dict[Any, list[Program]]
    products: list[tuple[float, tuple[np.ndarray, ...]]]
    uneven: list[np.ndarray]
    weights: int
    trips: int = 1


def unknown(walker: Walker, eqn: Any, ins: list[Labels]) -> list[Labels]:
    """A primitive without a rule."""
    channels, why = walker.context.channels, f"{eqn.primitive.name}: what it does to channels is not known"
    for axes in ins:
        channels.fix(axes, why, known=False)
    outs = [channels.new(v.aval.shape) for v in eqn.outvars]
    for axes in outs:
        channels.fix(axes, why, known=False)
    return outs
